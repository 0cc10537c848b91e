# SPDX-License-Identifier: Apache-2.0

"""Registers StfpmExt with anomalib, which has no plugin entry point of its own.

anomalib finds the models that happen to be imported: subclasses of ``AnomalibModule`` and attributes of
``anomalib.models``. So this module, which the ``.pth`` file beside it in site-packages imports at every start
of Python, leaves a finder on ``sys.meta_path`` that imports our model right after ``anomalib.models`` was executed.

It imports nothing but ``sys``, to cost no time, and not even our package, whose editable install would. Whatever
fails becomes one warning, and anomalib goes on as if we were not there.
"""

import sys

TYPE_CHECKING = False  # typing's, without the import
if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_PACKAGE = "anomalib_stfpm_ext"
_MODELS = "anomalib.models"


class StfpmExtFinder:
    """Finder for the two packages whose import concerns us."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """Find ``anomalib.models`` and our own package; see the helpers."""
        if name == _PACKAGE:
            return _find_installed_package()
        if name == _MODELS:
            return cls._find_models(path, target)
        return None

    @classmethod
    def _find_models(cls, path: object, target: object) -> "ModuleSpec | None":
        """Let the other finders do it, and have our model imported once the module has been executed."""
        for finder in sys.meta_path:
            if finder is not cls and hasattr(finder, "find_spec"):
                spec: ModuleSpec | None = finder.find_spec(_MODELS, path, target)  # type: ignore[arg-type]
                if spec is not None:
                    if spec.loader is not None:
                        _register_after(spec.loader)
                    return spec
        return None


def publish(model: type) -> None:
    """Put a model into ``anomalib.models`` beside anomalib's own; ``lightning_model`` calls this at its end.

    Args:
        model (type): A direct subclass of ``AnomalibModule``.
    """
    models = sys.modules[_MODELS]
    for module in (models, sys.modules[f"{_MODELS}.image"]):
        setattr(module, model.__name__, model)
        names = getattr(module, "__all__", None)
        if isinstance(names, list) and model.__name__ not in names:
            names.append(model.__name__)
    # get_model() refuses a dotted class_path outside this set; installing us was the user's consent.
    if hasattr(models, "ALLOWED_MODULES"):
        models.ALLOWED_MODULES.add(_PACKAGE)


def register() -> None:
    """Import our model, which publishes itself, or warn."""
    try:
        # Does nothing while this very import is under way; it publishes at its end.
        __import__(f"{_PACKAGE}.lightning_model")
    except Exception as error:
        _warn(error)


def _register_after(loader: "Loader") -> None:
    exec_module = loader.exec_module

    def exec_module_and_register(module: "ModuleType") -> None:
        exec_module(module)
        register()

    try:
        loader.exec_module = exec_module_and_register  # type: ignore[method-assign]
    except AttributeError as error:
        _warn(error)


def _find_installed_package() -> "ModuleSpec | None":
    """Prefer the package installed beside this file to a source tree in the working directory.

    The source tree has no compiled module, and whoever works in a clone after ``pip install .`` would get it instead
    of what they installed. Of an editable install, there is no ``__init__.py`` beside this file, and so no loader.
    """
    import os  # which Python has imported by now
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec(_PACKAGE, [os.path.dirname(__file__)])  # noqa: PTH120  # pathlib takes time
    return spec if spec is not None and spec.loader is not None else None


def _warn(error: Exception) -> None:
    import warnings

    message = f"{_PACKAGE}: StfpmExt is not registered with anomalib: {type(error).__name__}: {error}"
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # python -W error
        sys.stderr.write(f"{message}\n")


# In place of an earlier one, where the module is imported anew.
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") != StfpmExtFinder.__name__]
sys.meta_path.insert(0, StfpmExtFinder)
if _MODELS in sys.modules:
    register()
