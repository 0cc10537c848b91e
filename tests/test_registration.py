# SPDX-License-Identifier: Apache-2.0

"""anomalib knows StfpmExt without an import by the user, and nobody suffers if something goes wrong."""

import shutil
import sys
from pathlib import Path
from textwrap import dedent

import _anomalib_stfpm_ext_autoload
import pytest

import anomalib_stfpm_ext

KNOWN = """
import anomalib.models
from anomalib.models import get_model, list_models
assert "stfpm_ext" in list_models()
from anomalib_stfpm_ext import StfpmExt
assert anomalib.models.StfpmExt is StfpmExt
assert anomalib.models.image.StfpmExt is StfpmExt
assert "StfpmExt" in anomalib.models.__all__
assert sum(cls.__name__ == "StfpmExt" for cls in anomalib.models.AnomalibModule.__subclasses__()) == 1
"""

ORDERS = (
    "import anomalib",
    "import anomalib.models.image.stfpm",
    "import anomalib.data",
    "import anomalib.engine",
    "import anomalib_stfpm_ext",
    "from anomalib_stfpm_ext import anomaly_map",
    "from anomalib_stfpm_ext import StfpmExt",
    "import anomalib_stfpm_ext.lightning_model",
)
AS_ERROR = "import warnings; warnings.simplefilter('error', RuntimeWarning)\n"
BREAK_IT = "import sys; sys.modules['anomalib_stfpm_ext.loss'] = None\n"


@pytest.mark.parametrize("first", ORDERS)
def test_any_import_order(forked, first):
    assert "StfpmExt" not in forked(AS_ERROR + first + KNOWN).stderr


@pytest.mark.parametrize(
    "script",
    [
        BREAK_IT + "import torch, anomalib.models\nassert 'stfpm' in anomalib.models.list_models()",
        AS_ERROR + BREAK_IT + "import anomalib.models",
    ],
    ids=["broken", "broken, with an error for the warning"],
)
def test_failure_is_one_warning(forked, script):
    told = forked(script).stderr
    assert told.count("StfpmExt is not registered with anomalib: ModuleNotFoundError: import of") == 1


def test_get_model(forked):
    """Also that an interpreter which begins with torch knows the model."""
    result = forked(
        AS_ERROR
        + "import torch"
        + KNOWN
        + dedent(
            """
            off = {"backbone": "test_resnet", "layers": ["layer1"], "teacher_weights": False}
            for model in (
                get_model("stfpm_ext", **off),
                get_model("StfpmExt", **off),
                *(get_model({"class_path": path, "init_args": off})
                  for path in ("StfpmExt", "anomalib.models.StfpmExt", "anomalib.models.image.StfpmExt",
                               "anomalib_stfpm_ext.StfpmExt")),
            ):
                assert type(model).__name__ == "StfpmExt"
            """
        )
    )
    assert "StfpmExt" not in result.stderr


def test_spawned_process(python, tmp_path):
    (tmp_path / "child.py").write_text(
        "def names(_):\n    from anomalib.models import list_models\n    return list_models()\n"
    )
    python(
        """
import multiprocessing, sys
sys.path.insert(0, "")
import child
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert "stfpm_ext" in pool.map(child.names, [0])[0]
"""
    )


def test_a_copied_package_is_known_where_no_pth_file_is_read(python, tmp_path):
    package = tmp_path / "copied" / "anomalib_stfpm_ext"
    shutil.copytree(Path(anomalib_stfpm_ext.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(_anomalib_stfpm_ext_autoload.__file__, package)  # as the installation does
    path = [str(package.parent), *(folder for folder in sys.path if folder)]
    python(
        f"import sys; sys.path[:] = {path}; sys.modules['_anomalib_stfpm_ext_autoload'] = None\n"
        "import anomalib_stfpm_ext\n"
        f"assert anomalib_stfpm_ext.__file__.startswith({str(package)!r})" + KNOWN,
        "-S",
    )


IMPORT_ANEW = """
import importlib, sys, warnings
import numpy as np, torch
import anomalib_stfpm_ext
from anomalib_stfpm_ext import StfpmExt, StfpmExtLoss

def check(model):
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        scores = model.eval().model(images).pred_score
        again = anomalib_stfpm_ext.anomaly_map(*model.model.features(images), (64, 64))[1]
    torch.testing.assert_close(scores.flatten(), again, rtol=1e-4, atol=0)
    loss = anomalib_stfpm_ext.StfpmExtLoss()(*model.model.train()(images))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.model.student_model.parameters())

def make():
    return anomalib_stfpm_ext.StfpmExt("test_resnet", ["layer1"], False, image_size=(64, 64), post_processor=False)

old = make()
check(old)
names = [name for name in sys.modules if name.startswith(("anomalib_stfpm_ext", "_anomalib_stfpm_ext"))]
for name in names:
    if type(sys.modules[name]).__name__ == "module":  # not the old names of modules
        importlib.reload(sys.modules[name])
        check(old)
check(make())
for name in names:
    del sys.modules[name]
import anomalib_stfpm_ext
assert anomalib_stfpm_ext.StfpmExt is not StfpmExt
for model in (old, make()):
    check(model)
assert len([finder for finder in sys.meta_path if getattr(finder, "__name__", "") == "StfpmExtFinder"]) == 1
"""


def test_modules_that_are_imported_anew(forked):
    """As notebooks do it (autoreload): each, and all of them."""
    forked(IMPORT_ANEW)


def test_import_torch_leaves_anomalib_alone(python):
    python("import sys, torch; assert not [name for name in sys.modules if name.startswith('anomalib')]")


def test_interpreter_start_loads_one_small_module(python):
    script = "import sys; print(*sorted(sys.modules))"
    ours = set(python(script).stdout.split()) - set(python(script, "-S").stdout.split())
    assert "_anomalib_stfpm_ext_autoload" in ours
    assert not [name for name in ours if name.startswith("anomalib") or name in ("torch", "numpy", "typing")]


def test_installed_package_wins_over_a_source_tree(python, tmp_path):
    (tmp_path / "anomalib_stfpm_ext").mkdir()
    (tmp_path / "anomalib_stfpm_ext" / "__init__.py").write_text("raise SystemExit('the source tree was imported')")
    python("from anomalib_stfpm_ext import anomaly_map")


def test_module_that_windows_lacks_is_not_needed(python):
    python("import sys; sys.modules['fcntl'] = None; import anomalib_stfpm_ext.files")
