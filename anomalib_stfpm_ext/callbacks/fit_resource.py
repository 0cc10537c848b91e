# SPDX-License-Identifier: Apache-2.0

"""Resources that last as long as a fit."""

from abc import ABC, abstractmethod

from lightning.pytorch import Callback, LightningModule, Trainer


class FitResource(Callback, ABC):
    """A resource that a fit holds, and that is released at its end, however the fit ends."""

    @abstractmethod
    def release(self) -> None:
        """Release the resource."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release it at the end of the fit."""
        del trainer, pl_module, stage
        self.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release it where an exception ends the fit."""
        del trainer, pl_module, exception
        self.release()
