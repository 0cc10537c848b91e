# SPDX-License-Identifier: Apache-2.0

"""STFPM for anomalib, with a fused scorer.

Importing the package makes anomalib aware of ``StfpmExt`` and loads nothing else: the public names are imported on
first use, so that ``anomaly_map`` on NumPy arrays needs no torch, and an interpreter start costs next to nothing.
"""

try:
    import _anomalib_stfpm_ext_autoload  # noqa: F401  # where no .pth file was read, as under PYTHONPATH
except ModuleNotFoundError:  # the package's folder was copied alone
    import sys
    from importlib import import_module

    sys.modules["_anomalib_stfpm_ext_autoload"] = import_module("._anomalib_stfpm_ext_autoload", __name__)

from . import old_names  # noqa: F401

TYPE_CHECKING = False  # typing's, without the import
if TYPE_CHECKING:
    from .lightning_model import StfpmExt
    from .loss import StfpmExtLoss
    from .prediction import Predictor, load_model
    from .scorer import anomaly_map
    from .torch_model import StfpmExtModel

__all__ = ["Predictor", "StfpmExt", "StfpmExtLoss", "StfpmExtModel", "anomaly_map", "load_model"]

_MODULE_OF = {
    "Predictor": "prediction",
    "StfpmExt": "lightning_model",
    "StfpmExtLoss": "loss",
    "StfpmExtModel": "torch_model",
    "anomaly_map": "scorer",
    "load_model": "prediction",
}


def __getattr__(name: str) -> object:
    from importlib import import_module, metadata

    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    if name == "__version__":
        return metadata.version("anomalib-stfpm-ext")
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
