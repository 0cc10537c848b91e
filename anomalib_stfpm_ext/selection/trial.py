# SPDX-License-Identifier: Apache-2.0

"""Reduced precisions, tried on the held-out images: how much faster scoring is, and how far scores move."""

import math
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch import Trainer

from ..inference.precision import PRECISIONS, Precision, why_not
from .batches import evaluation_batches

if TYPE_CHECKING:
    from ..lightning_model import StfpmExt
    from .judge import Judge

# How far scores may move, as a share of the standard deviation of good images' scores. A tenth adds half a percent to
# that deviation, too little to change verdicts noticeably.
TOLERANCE = 0.1
FEWEST_IMAGES = 5
ENOUGH_IMAGES = 32  # for a choice, which is made for each kept student


class Trial(NamedTuple):
    """The effect of scoring held-out images in a reduced precision.

    Attributes:
        images (int): Number of images.
        shift (float): Root of the mean squared difference of the scores from those in float32, in standard deviations
            of the latter.
        speedup (float): The time of float32 divided by the time of the reduced precision.
    """

    images: int
    shift: float
    speedup: float

    def __str__(self) -> str:
        return (
            f"{self.speedup:.1f} times as fast as float32, and moves the scores of {self.images} held-out images by "
            f"{self.shift:.3f} of their standard deviation ({TOLERANCE} is tolerated)"
        )

    @property
    def is_tolerable(self) -> bool:
        """Whether there are enough images, and scores move by no more than :data:`TOLERANCE`."""
        return self.images >= FEWEST_IMAGES and self.shift <= TOLERANCE


class Choice(NamedTuple):
    """The precision chosen for a student's scores.

    Attributes:
        precision (Precision): The precision.
        reason (str): The reason, in a sentence.
    """

    precision: Precision
    reason: str


def choose_precision(judge: "Judge", trainer: Trainer, model: "StfpmExt") -> Choice:
    """Choose the fastest precision in which the scores of the student in the network move tolerably.

    Args:
        judge (Judge): The judge, with the held-out images.
        trainer (Trainer): Trainer in a fit.
        model (StfpmExt): The model.

    Returns:
        Choice: The choice; float32 where no other precision is faster and tolerable.
    """
    device = model.device.type
    fast = [name for name in PRECISIONS[1:] if why_not(name, device) is None]
    if not fast:
        reasons = "; ".join(f"{name}: {why_not(name, device)}" for name in PRECISIONS[1:])
        return Choice("float32", f"the networks compute in float32 ({reasons}).")
    trials = {name: try_precision(name, judge, trainer, model, ENOUGH_IMAGES) for name in fast}
    tolerable = {name: trial for name, trial in trials.items() if trial.is_tolerable and trial.speedup > 1}
    if not tolerable:
        tried = "; ".join(f"{name} is {trial}" for name, trial in trials.items())
        return Choice("float32", f"the networks compute in float32, since {tried}.")
    best = max(tolerable, key=lambda name: tolerable[name].speedup)
    return Choice(best, f"the networks compute in {best}. It is {tolerable[best]}.")


def try_precision(
    precision: Precision, judge: "Judge", trainer: Trainer, model: "StfpmExt", most: float = math.inf
) -> Trial:
    """Score held-out images in float32 and in another precision. Every process scores its share; all get the result.

    Args:
        precision (Precision): The other precision.
        judge (Judge): The judge, with the held-out images.
        trainer (Trainer): Trainer in a fit.
        model (StfpmExt): The model. Its own precision is the same afterwards.
        most (float): Number of images that are enough; whole batches are scored. Defaults to all.

    Returns:
        Trial: The result.
    """
    network, before = model.model, model.model.precision
    sums = torch.zeros(6, dtype=torch.float64)  # images, scores, their squares, squared differences, two times
    try:
        for batch in evaluation_batches(trainer, model, judge.loader):
            scores, seconds = [], []
            for name in ("float32", precision):
                network.score_by(network.level_weights, name)
                network(batch.image)  # makes the copy
                start = time.perf_counter()
                scores.append(network(batch.image).pred_score.double().cpu().flatten())
                seconds.append(time.perf_counter() - start)
            exact, reduced = scores
            parts = [len(exact), exact.sum(), exact.square().sum(), (reduced - exact).square().sum(), *seconds]
            sums += torch.tensor([float(part) for part in parts], dtype=torch.float64)
            if sums[0] * trainer.world_size >= most:
                break
    finally:
        network.score_by(network.level_weights, before)
    if trainer.world_size > 1:
        sums = trainer.strategy.reduce(sums.to(model.device), reduce_op="sum").cpu()
    count, total, squares, differences, slow, fast = sums.tolist()
    deviation = math.sqrt(max(squares / count - (total / count) ** 2, 0.0))
    shift = math.sqrt(differences / count) / deviation if deviation > 0 else math.inf
    return Trial(int(count), shift, slow / fast)
