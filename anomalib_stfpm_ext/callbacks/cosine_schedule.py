# SPDX-License-Identifier: Apache-2.0

"""The length of a cosine schedule, which is known only once images are held out."""

import math

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..errors import fail


class CosineSchedule(Callback):
    """Stretches the cosine of the learning rate over the steps of a training; other schedules stay as they are."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the scheduler how many steps there are.

        Raises:
            ValueError: If the number of steps is not known, or not that of the checkpoint that is resumed.
        """
        del pl_module
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, CosineAnnealingLR):
                steps, before = trainer.estimated_stepping_batches, config.scheduler.T_max
                if not 0 < steps < math.inf:
                    wanted = "constant, or a trainer that knows its number of steps (max_epochs, max_steps)"
                    fail(ValueError, "lr_schedule", wanted, "cosine")
                if before not in (0, steps):
                    fail(ValueError, "lr_schedule", f"a training of {before} steps as in the checkpoint", steps)
                config.scheduler.T_max = int(steps)
