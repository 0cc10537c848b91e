# SPDX-License-Identifier: Apache-2.0

"""The precision in which the networks score: the one that the model, or else the trainer, asks for."""

from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision as FullPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ..choices import InferencePrecision
from ..errors import fail
from ..inference.precision import Precision, dtype_on
from ..selection.trial import FEWEST_IMAGES, Trial, try_precision

# The precision of validation, test and prediction, by the trainer's.
OF_TRAINER: dict[str, Precision] = {
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "16-mixed": "float16",
    "16-true": "float16",
}
TRAINING = ("32-true", "bf16-mixed", "16-mixed")


class ScoringDtype(Callback):
    """Makes the networks score in the precision that is asked for, and says how it changes scores."""

    def __init__(self) -> None:
        self._plugin: FullPrecision | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the precision; the model's argument takes precedence over the trainer's.

        Under ``bf16-true``, Lightning would round thresholds and normalisation, too. So the trainer computes in float32
        meanwhile, and only the networks in bfloat16.

        Raises:
            ValueError: If the model cannot be trained or scored in the trainer's precision.
        """
        model: Any = pl_module
        network = model.model
        fitting = stage == TrainerFn.FITTING
        allowed = TRAINING if fitting else ("32-true", *OF_TRAINER)
        if trainer.precision not in allowed:
            fail(ValueError, "precision", f"one of {allowed}", repr(trainer.precision))
        asked = model.asked_precision = asked_precision(model.inference_precision, trainer)
        if fitting:  # thresholds and checkpoints will be made in this precision
            device_type = trainer.strategy.root_device.type
            usable = asked is not None and dtype_on(asked, device_type) != torch.float32
            network.score_by(network.level_weights, asked if usable else "float32")
        elif asked is not None:
            if stage != TrainerFn.VALIDATING and trainer.ckpt_path is None:
                tell_other(network.precision, asked)
            network.score_by(network.level_weights, asked)
        if trainer.precision.endswith("-true") and trainer.precision != "32-true":
            self._plugin, trainer.strategy.precision_plugin = trainer.strategy.precision_plugin, FullPrecision()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the trainer its own precision back."""
        del pl_module, stage
        if self._plugin is not None:
            self._plugin, trainer.strategy.precision_plugin = None, self._plugin

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how the precision that was asked for changes the kept student's scores."""
        model: Any = pl_module
        selection, precision = model.student_selection, model.model.precision
        is_open = model.inference_precision == "auto"
        if (is_open or precision != "float32") and not selection.share:
            tried = "other precisions" if is_open else precision
            rank_zero_warn(
                f"inference_precision: no images are held out to try {tried} on; the networks compute in {precision}."
            )
        elif not is_open and precision != "float32" and selection.judge:
            tell(try_precision(precision, selection.judge, trainer, model), precision)


def asked_precision(of_model: InferencePrecision | None, trainer: Trainer | None = None) -> Precision | None:
    """Return the precision that a model, or else its trainer, asks for.

    Args:
        of_model (InferencePrecision | None): The model's argument ``inference_precision``.
        trainer (Trainer | None): The trainer. Defaults to ``None``.

    Returns:
        Precision | None: The precision; ``None`` where neither asks for one.
    """
    if of_model is not None:
        return None if of_model == "auto" else of_model
    return OF_TRAINER.get(trainer.precision) if trainer else None


def tell(trial: Trial, precision: Precision) -> None:
    """Say how a precision changes scores, and warn where it may change verdicts."""
    if trial.is_tolerable:
        rank_zero_info(f"Inference: {precision} is {trial}.")
    elif trial.images >= FEWEST_IMAGES:
        rank_zero_warn(f"inference_precision: {precision} is {trial}. Verdicts may differ; float32 is exact.")


def tell_other(of_threshold: str, asked: str) -> None:
    """Warn where scores have another precision than threshold and range."""
    if of_threshold != asked:
        rank_zero_warn(
            f"inference_precision: {asked} is in force, and threshold and range were set in {of_threshold}. Scores "
            "differ slightly; validate the model anew."
        )


def check_precision(precision: str | None) -> None:
    """Check the argument ``inference_precision``.

    Args:
        precision (str | None): Its value.

    Raises:
        ValueError: If it is none of :data:`.InferencePrecision`.
    """
    if precision is not None and precision not in get_args(InferencePrecision):
        fail(ValueError, "inference_precision", f"None or one of {get_args(InferencePrecision)}", repr(precision))
