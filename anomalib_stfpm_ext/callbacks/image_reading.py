# SPDX-License-Identifier: Apache-2.0

"""Images of more than 8 bits, which anomalib's data sets would clip, read right in whatever the trainer does."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from .._compat import data_source
from ..data.images import read_right, refuse_deep
from ..selection.hold_out import same_loader
from .fit_resource import FitResource


class ImageReading(FitResource):
    """Has loaders of anomalib's data sets read images by :func:`.read_image`, and name a file that is broken.

    The loaders are other ones: neither the user's nor his data module and data sets are changed, nor is anomalib.
    """

    def __init__(self) -> None:
        self._sources: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Follow the loaders of this stage, before anything asks for them."""
        del pl_module
        self._sources = [data_source(loop) for loop in _loops(trainer, stage)]
        for source in self._sources:
            source.dataloader = partial(_load_right, source)

    def release(self) -> None:
        """Leave the trainer as it was, since its next model may be another."""
        for source in self._sources:
            vars(source).pop("dataloader", None)
        self._sources = []


def _loops(trainer: Trainer, stage: str) -> Iterator[Any]:
    if stage == TrainerFn.FITTING:
        yield from (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop)
    elif stage == TrainerFn.VALIDATING:
        yield trainer.validate_loop
    elif stage == TrainerFn.TESTING:
        yield trainer.test_loop
    elif stage == TrainerFn.PREDICTING:
        yield trainer.predict_loop


def _load_right(source: Any) -> Any:
    return _right_loaders(type(source).dataloader(source))


def _right_loaders(loaders: Any) -> Any:
    if isinstance(loaders, list | tuple):
        return [_right_loaders(loader) for loader in loaders]
    if isinstance(loaders, dict):
        return {name: _right_loaders(loader) for name, loader in loaders.items()}
    if type(loaders) is DataLoader and loaders.batch_size is not None:
        dataset = read_right(loaders.dataset)
        if dataset is loaders.dataset:
            return loaders
        keep = {name: getattr(loaders, name) for name in ("sampler", "drop_last", "generator")}
        return same_loader(loaders, dataset, **keep)
    for loader in getattr(loaders, "flattened", [loaders]):  # several, of Lightning's CombinedLoader
        refuse_deep(getattr(loader, "dataset", None), "where the loader is no plain DataLoader with a batch_size")
    return loaders
