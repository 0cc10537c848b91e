# SPDX-License-Identifier: Apache-2.0

"""What several processes need beyond Lightning's DDP: batch norm over all of them, and each image tested once."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.plugins import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.trainer.states import TrainerFn
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler

from .._compat.lightning import get_loader, replace_layer_sync, replace_loader, uses_distributed_sampler
from ..data.loaders import same_loader
from ..errors import fail


class StudentSync(LayerSync):
    """Computes the student's batch statistics over the batches of all processes (``Trainer(sync_batchnorm=True)``).

    Lightning's own plugin loses the activations that timm keeps in the batch norms of EfficientNet and others, and
    leaves layers of another class behind. The teacher is never in training mode, and needs no synchronisation.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace the student's batch norms.

        Args:
            model (nn.Module): The ``StfpmExt``.

        Returns:
            nn.Module: The same.
        """
        student: Any = model.model.student_model  # type: ignore[union-attr]
        for parent in list(student.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                    self._replaced.append((parent, name, child))
                    setattr(parent, name, convert_sync_batchnorm(child))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Put the student's own batch norms back, with what they have learnt.

        Args:
            model (nn.Module): The ``StfpmExt``.

        Returns:
            nn.Module: The same.
        """
        while self._replaced:
            parent, name, norm = self._replaced.pop()
            synchronised = getattr(parent, name)
            norm.load_state_dict(synchronised.state_dict())
            setattr(parent, name, norm.train(synchronised.training))
        return model


class DistributedSetup(Callback):
    """Prepares a trainer with several processes; with one it changes nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Synchronise the student's batch norms in a fit, and share out the images of a validation or a test."""
        del pl_module
        if stage == TrainerFn.FITTING:
            replace_layer_sync(trainer, TorchSyncBatchNorm, StudentSync())
        elif stage in (TrainerFn.VALIDATING, TrainerFn.TESTING) and trainer.world_size > 1:
            share_images(trainer)


def share_images(trainer: Trainer) -> None:
    """Give each image of a test or a validation to one process, as Lightning does for predictions.

    Lightning repeats images until all processes have equally many, which distorts the metrics. (Within a fit this is
    necessary, since DDP communicates in every validation step.)

    Loaders with a user's own sampler, or with fewer images than processes, are left to Lightning.

    Args:
        trainer (Trainer): Trainer that is about to validate or test.
    """
    loop = trainer.test_loop if trainer.testing else trainer.validate_loop
    loader = get_loader(loop)
    if (
        type(loader) is DataLoader
        and type(loader.sampler) is SequentialSampler
        and loader.batch_size is not None
        and len(loader.sampler) >= trainer.world_size
        and uses_distributed_sampler(trainer)
    ):
        ranks: dict[str, int] = trainer.distributed_sampler_kwargs  # type: ignore[assignment]
        sampler = UnrepeatedDistributedSampler(loader.dataset, shuffle=False, **ranks)
        replace_loader(loop, same_loader(loader, loader.dataset, sampler=sampler, drop_last=loader.drop_last))


def check_strategy(trainer: Trainer, argument: str, otherwise: str) -> None:
    """Check that each process has the whole student.

    Args:
        trainer (Trainer): Trainer in a fit.
        argument (str): The argument that needs this, for the error.
        otherwise (str): What the argument may be with any strategy, for the error.

    Raises:
        ValueError: If the strategy shards the model.
    """
    if trainer.strategy.restore_checkpoint_after_setup:  # by which sharding strategies are known
        wanted = f"a strategy that has the whole student in each process, such as ddp (or {otherwise})"
        fail(ValueError, argument, wanted, type(trainer.strategy).__qualname__)


def share_statistics(trainer: Trainer, network: nn.Module) -> None:
    """Give all processes the running statistics of the first, as DDP does before each step.

    Args:
        trainer (Trainer): The trainer.
        network (nn.Module): The network.
    """
    if trainer.world_size > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, 0)
