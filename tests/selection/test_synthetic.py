# SPDX-License-Identifier: Apache-2.0

"""Synthetic anomalies, and the student that they choose."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from anomalib_stfpm_ext.selection.students import Measurement, best_of
from anomalib_stfpm_ext.selection.synthetic import KINDS, add_anomaly, level_weights, mean_auroc


@pytest.mark.parametrize("index", range(2 * len(KINDS)))
@pytest.mark.parametrize("size", [(64, 96), (256, 256), (32, 200), (5, 7), (1, 1)])
def test_anomalies_are_the_same_each_time(index, size):
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    original, state = image.clone(), torch.get_rng_state()
    changed = add_anomaly(image, index)
    assert torch.equal(changed, add_anomaly(image, index))
    assert torch.equal(image, original)
    assert torch.equal(torch.get_rng_state(), state)
    assert changed.shape == image.shape
    assert changed.dtype == image.dtype
    assert changed.isfinite().all()
    if min(size) > 1:
        assert not torch.equal(changed, image)
        assert not torch.equal(changed, add_anomaly(image, index + len(KINDS)))


def test_anomalies_follow_the_normalisation():
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    for index in range(1, len(KINDS)):  # Perlin's noise is posterised and the like, by steps of [0, 1]
        torch.testing.assert_close(add_anomaly(10 * image - 3, index), 10 * add_anomaly(image, index) - 3)


@pytest.mark.parametrize("index", range(len(KINDS)))
def test_images_of_one_colour(index):
    assert add_anomaly(torch.full((3, 64, 64), -2.0), index).isfinite().all()


def test_mean_auroc_is_that_of_the_kinds():
    random = np.random.default_rng(0)
    good, defective = random.integers(0, 9, 30).astype(float), random.integers(3, 12, 20).astype(float)  # with ties
    kinds = random.integers(0, 3, 20)
    expected = [
        roc_auc_score([0] * 30 + [1] * (kinds == kind).sum(), [*good, *defective[kinds == kind]]) for kind in range(3)
    ]
    result = mean_auroc(torch.tensor(good), torch.tensor(defective), torch.tensor(kinds))
    assert result == pytest.approx(np.mean(expected))


def test_nan_among_scores_is_no_score():
    kinds, good = torch.tensor([0, 1]), torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    broken = torch.tensor([[torch.nan], [3.0]], dtype=torch.float64)
    for pair in ((good, broken), (broken, good)):
        assert np.isnan(mean_auroc(*[side[:, 0] for side in pair], kinds))
        assert level_weights(*pair, kinds) is None


def test_levels_weigh_as_much_as_they_find():
    kinds = torch.tensor([0, 1, 0, 1])
    good = torch.tensor([[1, 1, 2, 2], [2, 2, 2, 2], [3, 3, 2, 2], [4, 4, 2, 2]])
    defective = torch.tensor([[5, 3.5, 2, 1], [5, 3.5, 2, 1], [5, 3.5, 2, 1], [5, 3.5, 2, 1]])
    aurocs = torch.tensor([1, 0.75, 0.5, 0])  # of the levels
    expected = (2 * aurocs - 1).clamp(min=0) ** 2
    weights = level_weights(good.double(), defective.double(), kinds)
    assert weights == pytest.approx((4 * expected / expected.sum()).tolist())
    assert level_weights(good[:, 2:].double(), defective[:, 2:].double(), kinds) is None


@pytest.mark.parametrize(
    ("maps", "aurocs", "kept"),
    [
        ((3, 1, 2, 1), (None, None, None, None), 1),  # the paper's rule
        ((3, 2, 1), (0.8, 0.9, 0.7), 1),  # finds most
        ((3, 2, 1), (0.8, 0.9, 0.896), 2),  # is level with it
        ((1, 2, 3), (0.8, 0.804, 0.81), 2),  # of which the second brought nothing
        ((1, 2, 3), (0.8, 0.804, 0.804), 0),
        ((4, 3, 2, 1), (0.9, 0.897, 0.894, 0.891), 1),  # does not slide down from tie to tie
    ],
)
def test_which_student_is_best(maps, aurocs, kept):
    history = [Measurement(epoch, epoch, *pair) for epoch, pair in enumerate(zip(maps, aurocs, strict=True))]
    assert best_of(history) is history[kept]


def test_none_is_best_of_none():
    assert best_of([]) is None
