# SPDX-License-Identifier: Apache-2.0

"""Precise batch norm: a student is judged with the statistics of its own features, not with earlier students'."""

from collections import deque
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.swa_utils import update_bn

from .distributed import check_strategy
from .fit_resource import FitResource

NUM_IMAGES = 64  # at least, in whole batches; five times as many move the AUROC by no more than 0.004


class PreciseBatchNorm(FitResource):
    """Estimates the student's running statistics anew before it is measured, validated, saved and kept.

    Running statistics average over the students of the last 10 to 20 steps. At a constant learning rate these students
    differ, and in the first steps the average has not yet converged. So the present student processes the latest
    training batches again, and gets the mean of their statistics: "PreciseBN" of Wu and Johnson, "Rethinking 'Batch' in
    BatchNorm", arXiv 2105.07576, section 3. Training steps do not use running statistics, so losses do not change.
    """

    def __init__(self) -> None:
        self._batches: deque[torch.Tensor] = deque()
        self._is_precise = False  # whether the student's statistics were estimated since the last batch

    def release(self) -> None:
        """Release the images."""
        self._batches.clear()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh, since a search for a learning rate may have made steps before.

        Raises:
            ValueError: If the strategy shards the model.
        """
        del pl_module
        self.release()
        self._is_precise = False
        check_strategy(trainer, "precise_bn", "False")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the latest batches; no more than an epoch has, so that a resumed fit has the same ones."""
        del pl_module, batch_idx
        self._is_precise = False  # also after a batch without a step: gradients may be accumulated over several
        if not outputs:  # the model skipped the batch
            return
        self._batches.append(batch.image)
        while (
            len(self._batches) > trainer.num_training_batches
            or sum(map(len, self._batches)) - len(self._batches[0]) >= NUM_IMAGES
        ):
            self._batches.popleft()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate the statistics of the student that is validated within a fit."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._estimate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate the statistics of the student that is measured and saved."""
        self._estimate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Release the images: the kept student has its statistics."""
        del trainer, pl_module
        self.release()

    def _estimate(self, trainer: Trainer, module: Any) -> None:
        """Estimate the statistics over the images of all processes, unless no batch has come since the last time."""
        if not self._batches or self._is_precise:
            return
        tiler = module.model.tiler
        images = [tiler.tile(batch) if tiler else batch for batch in self._batches]
        student = module.model.student_model
        # Dropout must not change the random numbers of the training.
        with trainer.precision_plugin.forward_context(), torch.random.fork_rng(devices=[]):
            update_bn(images, student)
            for statistic in filter(torch.is_floating_point, student.buffers()):
                statistic.copy_(trainer.strategy.reduce(statistic, reduce_op="mean"))
        self._is_precise = True
