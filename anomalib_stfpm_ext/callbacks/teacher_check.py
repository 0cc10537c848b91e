# SPDX-License-Identifier: Apache-2.0

"""A warning of a teacher that no weights were loaded for, before anything is computed with it."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn


class TeacherCheck(Callback):
    """Warns of a random teacher at the start of a fit, a validation, a test or a prediction."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the teacher."""
        del trainer
        _check(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the teacher, unless the start of the fit has."""
        if trainer.state.fn != TrainerFn.FITTING:
            _check(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the teacher."""
        del trainer
        _check(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the teacher."""
        del trainer
        _check(pl_module)


def _check(module: Any) -> None:
    if module.model.teacher_model.is_random:
        rank_zero_warn(
            "teacher_weights: wanted True, a file, or a checkpoint that brings them, got False and no checkpoint: "
            "the teacher is random, and so is what it finds."
        )
