# SPDX-License-Identifier: Apache-2.0

"""A guard against losses that are not finite: it stops a training that has diverged, and names the student left."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT

from ..errors import fail


class PendingLoss(NamedTuple):
    """A loss that is being copied from the device. Nothing waits for the device until the loss is read."""

    value: torch.Tensor
    arrived: torch.cuda.Event | None
    where: str

    @classmethod
    def send(cls, loss: torch.Tensor, where: str) -> "PendingLoss":
        """Start to copy the loss of a step, which ``where`` describes."""
        if not loss.is_cuda:
            return cls(loss, None, where)
        value = loss.to("cpu", non_blocking=True)  # pinned
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(loss.device))
        return cls(value, arrived, where)

    def read(self) -> float:
        """Wait for the loss, and return it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return float(self.value)


def unread_losses(device: torch.device) -> int:
    """Return how many losses may stay unread: one on CUDA, since reading the last loss would wait for its step."""
    return 1 if device.type == "cuda" else 0


class FiniteLoss(Callback):
    """Stops a training whose loss is not finite; on CUDA one step later, since nothing waits for the running step.

    All losses are read before a student is measured and before checkpoints are saved.

    Args:
        describe_kept (Callable[[], str]): Says which student is kept, for the error.

    Raises:
        FloatingPointError: If a loss is not finite in one of the processes.
    """

    def __init__(self, describe_kept: Callable[[], str]) -> None:
        self._describe_kept = describe_kept
        self._losses: deque[PendingLoss] = deque()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the losses of an earlier fit."""
        del trainer, pl_module
        self._losses.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Start to copy this step's loss, and read those that have arrived."""
        del pl_module, batch, batch_idx
        if not outputs:  # the model skipped the batch
            return
        loss: torch.Tensor = outputs["loss"].detach()  # type: ignore[index]
        if trainer.world_size > 1:  # all processes stop at the same step
            loss = loss.clone()
            torch.distributed.all_reduce(loss)
        self._losses.append(PendingLoss.send(loss, where(trainer)))
        self._read(unread_losses(loss.device))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the losses that are left."""
        del trainer, pl_module
        self._read()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the losses that are left."""
        del trainer, pl_module
        self._read()

    def _read(self, unread: int = 0) -> None:
        while len(self._losses) > unread:
            loss = self._losses.popleft()
            value = loss.read()
            if not math.isfinite(value):
                fail_as_diverged(f"a loss of {value}", loss.where, self._describe_kept())


def where(trainer: Trainer) -> str:
    """Say where a training is.

    Args:
        trainer (Trainer): Trainer in its fit.

    Returns:
        str: Step, epoch and learning rate.
    """
    lr = trainer.optimizers[0].param_groups[0]["lr"]
    return f"at step {trainer.global_step}, epoch {trainer.current_epoch}, learning rate {lr}"


def fail_as_diverged(got: str, where: str, kept: str) -> NoReturn:
    """Raise the error of a training that has diverged.

    Args:
        got (str): What is not finite.
        where (str): What :func:`where` said.
        kept (str): The student that is kept.

    Raises:
        FloatingPointError: Always.
    """
    wanted = "a learning rate with which training stays finite"
    fail(FloatingPointError, "lr", wanted, f"{got} {where}. Last good student: {kept}")
