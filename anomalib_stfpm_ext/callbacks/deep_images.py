# SPDX-License-Identifier: Apache-2.0

"""Data sets of anomalib that read images as :mod:`anomalib_stfpm_ext.images` does, as long as a trainer runs."""

import functools
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

from anomalib.data import AnomalibDataset, PredictDataset
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import ConcatDataset, Subset

from .._compat import data_source
from ..errors import fail
from ..images import read_image
from .fit_resource import FitResource


class DeepImages(FitResource):
    """Has the data sets of a run read deep images right, and name the file that is broken.

    anomalib 2.7 clips gray images of more than 8 bits. Its data sets call a function of their module to read, so each
    becomes an instance of a subclass whose method calls ours, until the run ends. Other data sets, and those of other
    models, stay as they are. Where a later anomalib reads them right, this goes.
    """

    def __init__(self) -> None:
        self._changed: list[tuple[Any, type]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change the data sets.

        Raises:
            ValueError: If there are hidden files among the images, which would end the run later.
        """
        del pl_module
        self.release()
        for dataset in _datasets(trainer, stage):
            _check_files(dataset)
            kind: Any = type(dataset)
            if "read_image" in kind.__getitem__.__globals__:
                self._changed.append((dataset, kind))
                dataset.__class__ = reading_deep(kind)

    def release(self) -> None:
        """Change the data sets back."""
        for dataset, kind in reversed(self._changed):  # one that was found twice has its own class first
            dataset.__class__ = kind
        self._changed = []


@functools.cache
def reading_deep(kind: Any) -> Any:
    """Return a subclass of a data set's class that reads images by :func:`read_image`."""
    method = kind.__getitem__
    names = {**method.__globals__, "read_image": read_image}
    reading = FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)
    members = {"__getitem__": reading, "__reduce__": lambda self: (_make, (kind, self.__dict__))}
    return type(kind.__name__, (kind,), members)


def _make(kind: Any, state: dict[str, Any]) -> Any:
    dataset: Any = object.__new__(reading_deep(kind))
    dataset.__dict__.update(state)
    return dataset


def _datasets(trainer: Trainer, stage: str) -> Iterator[Any]:
    loops: dict[str, list[Any]] = {
        TrainerFn.FITTING: [trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop],
        TrainerFn.VALIDATING: [trainer.validate_loop],
        TrainerFn.TESTING: [trainer.test_loop],
        TrainerFn.PREDICTING: [trainer.predict_loop],
    }
    for loop in loops[stage]:
        source = data_source(loop).instance
        parts = source if isinstance(source, list | tuple) else [source]
        for part in parts:
            names = ("dataset", "train_data", "val_data", "test_data", "predict_data")
            for dataset in (getattr(part, name, None) for name in names):
                yield from _anomalibs(dataset)


def _anomalibs(dataset: Any) -> Iterator[Any]:
    """Find anomalib's data sets within subsets and concatenations."""
    if isinstance(dataset, Subset):
        yield from _anomalibs(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _anomalibs(part)
    elif isinstance(dataset, AnomalibDataset | PredictDataset):
        yield dataset


def _check_files(dataset: Any) -> None:
    paths = dataset.image_filenames if isinstance(dataset, PredictDataset) else dataset.samples.image_path
    for path in map(Path, paths):
        if path.name.startswith(".") or path.parent.name.startswith("."):
            fail(ValueError, "data", "images without hidden files or folders among them, as others leave behind", path)
