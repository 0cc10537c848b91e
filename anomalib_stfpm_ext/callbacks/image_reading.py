# SPDX-License-Identifier: Apache-2.0

"""Images of more than 8 bits: read correctly in all that a trainer does, where anomalib's data sets clip them."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from .._compat.lightning import intercept_loaders, release_loaders
from ..data.loaders import right_loaders
from .fit_resource import FitResource


class ImageReading(FitResource):
    """Makes loaders of anomalib's data sets read images with :func:`.read_image`, and name broken files.

    The trainer gets copies of the loaders. The user's loaders, data module and data sets stay unchanged.
    """

    def __init__(self) -> None:
        self._loops: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Intercept the loaders of this stage, before anything asks for them."""
        del pl_module
        self._loops = list(_loops(trainer, stage))
        for loop in self._loops:
            intercept_loaders(loop, right_loaders)

    def release(self) -> None:
        """Restore the trainer, whose next model may be another."""
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
