# SPDX-License-Identifier: Apache-2.0

"""What lasts as long as a fit."""

from abc import ABC, abstractmethod

from lightning.pytorch import Callback, LightningModule, Trainer


class HeldForFit(Callback, ABC):
    """What is held for a fit and released at its end, however it ends."""

    @abstractmethod
    def release(self) -> None:
        """Let go of it."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release it at the end of the fit."""
        del trainer, pl_module, stage
        self.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release it where an exception ends the fit."""
        del trainer, pl_module, exception
        self.release()
