# SPDX-License-Identifier: Apache-2.0

"""The loss against the formula and against anomalib's."""

import pytest
import reference
import torch
from anomalib.models.image.stfpm.loss import STFPMLoss
from conftest import PYRAMIDS, make_features

from anomalib_stfpm_ext import StfpmExtLoss


@pytest.mark.parametrize("batch", [1, 4])
def test_formula_and_relation_to_anomalib(batch):
    teacher, student = make_features(PYRAMIDS["resnet18"], batch, (64, 96))
    expected = sum(2 * reference.distance(t, s).mean() for t, s in zip(teacher, student, strict=True))
    tensors = [dict(enumerate(map(torch.from_numpy, side))) for side in (teacher, student)]
    loss = StfpmExtLoss()(*tensors)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert STFPMLoss()(*tensors).item() == pytest.approx(loss.item() * batch / 2, rel=1e-5)


def test_gradient():
    teacher, student = ({"a": torch.randn(2, 3, 2, 2, dtype=torch.float64)} for _ in range(2))
    student["a"].requires_grad_()
    assert torch.autograd.gradcheck(lambda level: StfpmExtLoss()(teacher, {"a": level}), student["a"])
