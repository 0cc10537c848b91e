# SPDX-License-Identifier: Apache-2.0

"""Images of more than 8 bits, which anomalib's data sets would clip, read right in whatever the trainer does."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from .._compat.lightning import intercept_loaders, release_loaders
from ..data.loaders import right_loaders
from .fit_resource import FitResource


class ImageReading(FitResource):
    """Has loaders of anomalib's data sets read images by :func:`.read_image`, and name a file that is broken.

    The loaders are other ones: neither the user's nor his data module and data sets are changed, nor is anomalib.
    """

    def __init__(self) -> None:
        self._loops: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Follow the loaders of this stage, before anything asks for them."""
        del pl_module
        self._loops = list(_loops(trainer, stage))
        for loop in self._loops:
            intercept_loaders(loop, right_loaders)

    def release(self) -> None:
        """Leave the trainer as it was, since its next model may be another."""
        for loop in self._loops:
            release_loaders(loop)
        self._loops = []


def _loops(trainer: Trainer, stage: str) -> Iterator[Any]:
    if stage == TrainerFn.FITTING:
        yield from (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop)
    elif stage == TrainerFn.VALIDATING:
        yield trainer.validate_loop
    elif stage == TrainerFn.TESTING:
        yield trainer.test_loop
    elif stage == TrainerFn.PREDICTING:
        yield trainer.predict_loop
