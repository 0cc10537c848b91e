# SPDX-License-Identifier: Apache-2.0

"""The precision of scoring: what model or trainer ask for, tried on held-out images at the end of a fit."""

import math
import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision as FullPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ..errors import fail
from ..inference.precision import PRECISIONS, Precision, dtype_on, why_not
from ..selection.judge import Judge
from .student_selection import StudentSelection

if TYPE_CHECKING:
    from ..torch_model import StfpmExtModel

InferencePrecision = Literal["float32", "bfloat16", "float16", "auto"]
# By the trainer's: that of validation, test and prediction.
OF_TRAINER: dict[str, Precision] = {
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "16-mixed": "float16",
    "16-true": "float16",
}
TRAINING = ("32-true", "bf16-mixed", "16-mixed")
# How far scores may move, as a share of the standard deviation of good images' scores. A tenth adds half a percent to
# that deviation, which no verdict can be told from.
TOLERANCE = 0.1
FEWEST_IMAGES = 5


class Trial(NamedTuple):
    """What scoring in a reduced precision comes to on held-out images.

    Attributes:
        images (int): How many there are.
        shift (float): Root of the mean squared difference of the scores from those of float32, in standard deviations
            of the latter.
        speedup (float): By how much it is faster.
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
        """Whether scores stay within :data:`TOLERANCE`, as far as so many images can tell."""
        return self.images >= FEWEST_IMAGES and self.shift <= TOLERANCE


class ScoringPrecision(Callback):
    """Has the networks score in the precision that is asked for, and says what it does to scores.

    Args:
        selection (StudentSelection): It has the images that are held out and the student that is kept.
    """

    def __init__(self, selection: StudentSelection) -> None:
        self._selection = selection
        self._plugin: FullPrecision | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the precision; what the model was given goes before the trainer's.

        Under ``bf16-true`` Lightning would round thresholds and normalisation, too. So the trainer computes in float32
        meanwhile, and the networks alone in bfloat16.

        Raises:
            ValueError: If the trainer's precision is none that the model can be trained or scored in.
        """
        model: Any = pl_module
        fitting = stage == TrainerFn.FITTING
        allowed = TRAINING if fitting else ("32-true", *OF_TRAINER)
        if trainer.precision not in allowed:
            fail(ValueError, "precision", f"one of {allowed}", repr(trainer.precision))
        asked = OF_TRAINER.get(trainer.precision)
        if model.inference_precision is not None:
            asked = None if model.inference_precision == "auto" else model.inference_precision
        model.asked_precision = asked
        if fitting:  # what thresholds and checkpoints will be of
            device_type = trainer.strategy.root_device.type
            usable = asked is not None and dtype_on(asked, device_type) != torch.float32
            model.model.precision = asked if usable else "float32"
        elif asked is not None:
            if stage != TrainerFn.VALIDATING and trainer.ckpt_path is None:
                tell_other(model.model.precision, asked)
            model.model.precision = asked
        if trainer.precision.endswith("-true") and trainer.precision != "32-true":
            self._plugin, trainer.strategy.precision_plugin = trainer.strategy.precision_plugin, FullPrecision()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the trainer its own precision back."""
        del pl_module, stage
        if self._plugin is not None:
            self._plugin, trainer.strategy.precision_plugin = None, self._plugin

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try precisions on the student that is kept: all that are fast here if the model may choose."""
        model: Any = pl_module
        network: StfpmExtModel = model.model
        if model.inference_precision == "auto":
            candidates = [name for name in PRECISIONS[1:] if why_not(name, model.device.type) is None]
            if not candidates:
                reasons = "; ".join(f"{name}: {why_not(name, model.device.type)}" for name in PRECISIONS[1:])
                rank_zero_info(f"Inference: the networks compute in float32 ({reasons}).")
        else:
            candidates = [network.precision] if network.precision != "float32" else []
        if not candidates:
            return
        judge = self._selection.judge
        if judge is None:
            rank_zero_warn(
                f"inference_precision: no images are held out to try {' and '.join(candidates)} on; the networks "
                f"compute in {network.precision}."
            )
            return
        if self._selection.students is not None:
            self._selection.students.show(best=True)
        trials = {name: self._try(name, judge, trainer, model) for name in candidates}
        if model.inference_precision == "auto":
            self._choose(trials, network)
        else:
            self._tell(trials[network.precision], network.precision)

    def _choose(self, trials: dict[Precision, Trial], network: "StfpmExtModel") -> None:
        tolerable = {name: trial for name, trial in trials.items() if trial.is_tolerable and trial.speedup > 1}
        best = max(tolerable, key=lambda name: tolerable[name].speedup, default=None)
        if best is None:
            tried = "; ".join(f"{name} is {trial}" for name, trial in trials.items())
            rank_zero_info(f"Inference: the networks compute in float32, since {tried}.")
            return
        rank_zero_info(f"Inference: the networks compute in {best}. It is {tolerable[best]}.")
        network.precision = best
        self._selection.validate_again()

    @staticmethod
    def _tell(trial: Trial, precision: Precision) -> None:
        if trial.is_tolerable:
            rank_zero_info(f"Inference: {precision} is {trial}.")
        elif trial.images >= FEWEST_IMAGES:
            rank_zero_warn(
                f"inference_precision: {precision} is {trial}. Verdicts may be other ones; float32 is exact."
            )

    def _try(self, precision: Precision, judge: Judge, trainer: Trainer, model: Any) -> Trial:
        """Score the held-out images in both precisions; every process has a share, and all get the result."""
        network: StfpmExtModel = model.model
        before = network.precision
        sums = torch.zeros(6, dtype=torch.float64)  # images, scores, their squares, squared differences, two times
        for images in judge.images(trainer, model):
            scores, seconds = [], []
            for name in ("float32", precision):
                network.precision = name
                network(images)  # makes the copy
                start = time.perf_counter()
                scores.append(network(images).pred_score.double().cpu().flatten())
                seconds.append(time.perf_counter() - start)
            exact, reduced = scores
            parts = [len(exact), exact.sum(), exact.square().sum(), (reduced - exact).square().sum(), *seconds]
            sums += torch.tensor([float(part) for part in parts], dtype=torch.float64)
        network.precision = before
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums.to(model.device), reduce_op="sum").cpu()
        count, total, squares, differences, slow, fast = sums.tolist()
        deviation = math.sqrt(max(squares / count - (total / count) ** 2, 0.0))
        shift = math.sqrt(differences / count) / deviation if deviation > 0 else math.inf
        return Trial(int(count), shift, slow / fast)


def tell_other(of_threshold: str, asked: str) -> None:
    """Warn of scores of another precision than those that threshold and range were set with."""
    if of_threshold != asked:
        rank_zero_warn(
            f"inference_precision: {asked} is in force, and threshold and range were set in {of_threshold}. Scores "
            "differ slightly; validate the model anew."
        )


def check_precision(precision: str | None) -> None:
    """Raise unless it is one that can be asked for.

    Args:
        precision (str | None): The precision.

    Raises:
        ValueError: If it is none of :data:`InferencePrecision`.
    """
    if precision is not None and precision not in get_args(InferencePrecision):
        fail(ValueError, "inference_precision", f"None or one of {get_args(InferencePrecision)}", repr(precision))
