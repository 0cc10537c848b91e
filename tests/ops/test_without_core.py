# SPDX-License-Identifier: Apache-2.0

"""The package where its compiled module is missing: torch operations do the work, and one warning says so."""

import shutil
from pathlib import Path

import _anomalib_stfpm_ext_autoload
import pytest

import anomalib_stfpm_ext

SCORES = """
import warnings
warnings.simplefilter("error", RuntimeWarning)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from anomalib_stfpm_ext import anomaly_map
    from anomalib_stfpm_ext.ops import feature_matching, native
assert not native.is_built
assert sum("without its compiled scorer" in str(warning.message) for warning in caught) == 1

import numpy as np, reference, torch
from helpers import make_features
teacher, student = make_features([(24, 4), (40, 8)], 2, (48, 64))
options = {"weights": [0.5, 1.5], "combine_size": (16, 20)}
expected = reference.anomaly_map(teacher, student, (48, 64), **options)
reversed_teacher = [level[:, :, ::-1] for level in [np.ascontiguousarray(level[:, :, ::-1]) for level in teacher]]
for level in student:
    level.flags.writeable = False
out = [np.empty(array.shape, np.float32) for array in expected]
assert anomaly_map(reversed_teacher, student, (48, 64), level_maps=True, out=out, **options)[0] is out[0]
tensors = [[torch.from_numpy(level.copy()) for level in side] for side in (teacher, student)]
for results in (out, anomaly_map(*tensors, (48, 64), level_maps=True, **options)):
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(np.asarray(result), wanted, rtol=1e-4)
halves = [[level.astype("f2") for level in side] for side in (teacher, student)]
np.testing.assert_allclose(anomaly_map(*halves, (48, 64))[1], reference.anomaly_map(*halves, (48, 64))[1], rtol=1e-4)
brain = anomaly_map(*[[level.to(torch.bfloat16) for level in side] for side in tensors], (48, 64))
assert brain[0].dtype == torch.float32
"""

TRAINS = """
import torch
from anomalib_stfpm_ext import StfpmExtModel
torch.manual_seed(0)
model = StfpmExtModel("test_resnet", ["layer1", "layer3"], teacher_weights=False)
images = torch.rand(2, 3, 64, 64)
from anomalib_stfpm_ext import StfpmExtLoss
teacher, student = model.train()(images)
loss = StfpmExtLoss()(teacher, student)
loss.backward()
assert next(model.student_model.parameters()).grad is not None
prediction = model.eval()(images)
assert prediction.anomaly_map.shape == (2, 1, 64, 64) and prediction.pred_score.isfinite().all()
"""


@pytest.fixture
def without_core(python, tmp_path):
    """Run a script with a copy of the package that lacks the compiled module."""
    site = tmp_path / "site"
    source = Path(anomalib_stfpm_ext.__file__).parent
    shutil.copytree(source, site / source.name, ignore=shutil.ignore_patterns("_core.*.so", "__pycache__"))
    shutil.copy(_anomalib_stfpm_ext_autoload.__file__, site)  # which finds the package beside it
    paths = f"{site}:{Path(__file__).parents[1]}"
    return lambda script, *options: python(script, *options, PYTHONPATH=paths)


def test_scores_equal_the_reference(without_core):
    without_core(SCORES)


def test_the_model_trains_and_predicts_and_the_diagnosis_says_so(without_core):
    diagnosis = "import runpy; runpy.run_module('anomalib_stfpm_ext', run_name='__main__', alter_sys=True)"
    printed = without_core(TRAINS + diagnosis).stdout
    assert "none, torch operations do its work" in printed
    assert "NO" not in printed
