# SPDX-License-Identifier: Apache-2.0

"""A guard against callbacks that change the student between its measurement, its validation and its checkpoint."""

from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from ..errors import fail
from .distributed import share_statistics

_KNOWN = ("anomalib", "anomalib_stfpm_ext", "lightning")


class UnchangedStudent(Callback):
    """Stops a fit in which the student that is validated or saved is not the one that was measured.

    Some callbacks put averaged weights into the network for the validation, and take them out before the checkpoint.
    Threshold and range would then belong to a student that nobody keeps.

    It runs after :class:`.PreciseBatchNorm`, the last to change a student's statistics, and before
    :class:`.StudentSelection`, which would keep whatever is in the network.
    """

    def __init__(self) -> None:
        self._seen: dict[str, torch.Tensor] | None = None  # the student, since its last step

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        del trainer, pl_module
        self._seen = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forget the student, which the batch has changed."""
        del trainer, pl_module, outputs, batch, batch_idx
        self._seen = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the student that is about to be measured and validated."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._look(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Check the student that is being validated."""
        del outputs, batch, args
        if batch_idx == 0 and self._seen:
            self._look(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the student that gets threshold and range, and that checkpoints will hold."""
        if self._seen:
            self._look(trainer, pl_module)

    on_validation_end = on_validation_epoch_end

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the student that checkpoints will hold."""
        self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the last student, and release it."""
        if self._seen:
            self._look(trainer, pl_module)
        self._seen = None

    def _look(self, trainer: Trainer, module: Any) -> None:
        """Remember the student, or raise if it differs from the one that was remembered."""
        student: nn.Module = module.model.student_model
        tensors = dict(chain(student.named_parameters(), student.named_buffers()))
        if self._seen is None:
            share_statistics(trainer, student)  # as the selection does
            self._seen = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        elif not all(torch.equal(tensor, self._seen[name]) for name, tensor in tensors.items()):
            own = [type(each) for each in trainer.callbacks]  # type: ignore[attr-defined]
            names = [each.__qualname__ for each in own if each.__module__.partition(".")[0] not in _KNOWN]
            wanted = "none that changes the student between its last step, its validation and its checkpoint"
            fail(ValueError, "callbacks", wanted, f"another student, with {names or 'hooks of the model'}")
