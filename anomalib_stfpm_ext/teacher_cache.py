# SPDX-License-Identifier: Apache-2.0

"""The teacher's features, computed once and kept: the teacher never changes, nor do images without augmentation."""

import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.spec import transform_to_spec
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from .held_out import check_loader, same_loader
from .kept_memory import HeldForFit
from .scorer import fail

Features = dict[str, torch.Tensor]
# Limit and usage of a container's memory, and the name of what can be had back: control groups of version 2 and of 1.
_CONTAINER = Path("/sys/fs/cgroup")
_CONTAINER_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
_WANTED = "images that are the same in every epoch"


class _Level(NamedTuple):
    """Memory for one level's features of all images."""

    rows: torch.Tensor  # (N, H, W, C) or (N, C, H, W), as the teacher lays them out
    channels_last: bool
    dtype: torch.dtype  # the teacher's


class TeacherCache(HeldForFit):
    """Keeps the teacher's features of all images of a fit, until the fit ends.

    An image is known by its number in the data set, which travels with it through samplers, workers and processes. A
    checksum goes with it: an image that the data set changes is an error, and never a wrong loss. (What a callback does
    to a batch later is not noticed.) Of several processes, each keeps the features of those images that it has come
    across. Nothing of it is in a checkpoint.

    Args:
        location (str | None): ``"memory"``, or ``"disk"`` for files in the folder for temporary files (``TMPDIR``). The
            files have no names, so they go with the process, whatever becomes of it.
        half (bool): Keep float16 instead of the teacher's dtype.

    Raises:
        ValueError: If ``location`` is something else.
        TypeError: If ``half`` is not a bool.
    """

    def __init__(self, location: str | None, half: bool = False) -> None:
        if not isinstance(half, bool):
            fail(TypeError, "teacher_cache_half", "True or False", repr(half))
        if location not in ("memory", "disk"):
            fail(
                ValueError, "teacher_cache", "'memory' or 'disk', or neither it nor teacher_cache_half", repr(location)
            )
        self.location, self.half = location, half
        self.release()

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "half": self.half}  # a copy of the model has no features yet

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def start(self, trainer: Trainer, pre_processor: nn.Module | None) -> None:
        """Number the training images, before Lightning asks for them.

        Args:
            trainer (Trainer): Trainer at the start of its fit.
            pre_processor (nn.Module | None): The model's, which transforms every batch.

        Raises:
            ValueError: If the images cannot be numbered, or may differ from epoch to epoch.
        """
        if pre_processor is not None and type(pre_processor) is not PreProcessor:
            wanted = f"{_WANTED}: anomalib's own PreProcessor as pre_processor, or none"
            fail(ValueError, "teacher_cache", wanted, type(pre_processor).__qualname__)
        _check_transform("pre_processor", getattr(pre_processor, "transform", None))
        source = trainer.fit_loop._data_source  # Lightning has no public way to a loader that was given to fit()
        reload: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if source.is_module() and reload:
            fail(ValueError, "teacher_cache", _WANTED, f"reload_dataloaders_every_n_epochs={reload}")
        self.release()
        self._num_processes = trainer.num_devices  # those on this machine
        source.instance = self.number(source.dataloader())
        trainer.fit_loop._combined_loader = None  # without numbers, which a learning rate finder may have left

    def number(self, loader: Any) -> DataLoader[Any]:
        """Number the images of a loader, on from those before.

        Args:
            loader (Any): The loader.

        Returns:
            DataLoader[Any]: The same batches, which :meth:`features` knows.

        Raises:
            ValueError: If the images cannot be numbered, or may differ from epoch to epoch.
        """
        check_loader("teacher_cache", f"{_WANTED}, in one DataLoader", loader)
        dataset = loader.dataset
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        _check_transform("train_augmentations", getattr(dataset, "augmentations", None))
        numbered = same_loader(
            loader,
            _Numbered(loader.dataset, self._num_images),
            sampler=loader.sampler,
            drop_last=loader.drop_last,
            generator=loader.generator,
        )
        numbered.collate_fn = _Collate(loader.collate_fn)
        self._num_images += len(loader.dataset)
        return numbered

    def features(self, batch: Any, teacher: Callable[[torch.Tensor], Features]) -> Features:
        """Return the teacher's features of a batch; they are computed where one of the images is new.

        Args:
            batch (Any): A batch of a numbered loader, on the model's device.
            teacher (Callable[[torch.Tensor], Features]): Computes features of images.

        Returns:
            Features: Features ``(B, C, H_l, W_l)`` by level, in the dtype and layout in which the teacher gives them.

        Raises:
            ValueError: If an image has changed, or features do not fit.
        """
        if not self._num_images:  # a learning rate finder, which goes before the start
            return teacher(batch.image)
        numbers, checksums = batch.numbers_and_checksums
        for number, checksum in zip(numbers, checksums, strict=True):
            if self._checksums.get(number, checksum) != checksum:
                fail(ValueError, "teacher_cache", f"{_WANTED}, not augmented", f"another image {number} than before")
        rows = torch.tensor(numbers)
        if self._checksums.keys() >= set(numbers):
            return {name: _read(level, rows, batch.image.device) for name, level in self._levels.items()}
        features = teacher(batch.image)
        if not self._levels:
            self._allocate(features)
        for name, level in self._levels.items():
            _write(level, rows, features[name])
        self._checksums.update(zip(numbers, checksums, strict=True))
        return features

    def release(self) -> None:
        """Let go of the features."""
        self._num_images, self._num_processes = 0, 1
        self._levels: dict[str, _Level] = {}
        self._checksums: dict[int, int] = {}

    def _allocate(self, features: Features) -> None:
        """Find room for the features of all images, given those of some."""
        dtypes = {name: torch.float16 if self.half else level.dtype for name, level in features.items()}
        of_image = sum(level[0].numel() * dtypes[name].itemsize for name, level in features.items())
        if self.location == "memory":
            size, free = self._num_images * of_image * self._num_processes, _free_memory()
            where = "in memory"
        else:
            size, free = self._num_images * of_image, shutil.disk_usage(tempfile.gettempdir()).free
            where = f"in {tempfile.gettempdir()}, which TMPDIR names"
        if size > free:
            wanted = f"{size / 1e6:,.1f} MB {where}, for the teacher's features of {self._num_images} images"
            fail(ValueError, "teacher_cache", wanted, f"{free / 1e6:,.1f} MB")
        allocate = torch.empty if self.location == "memory" else _on_disk
        for name, level in features.items():
            channels_last = level.is_contiguous(memory_format=torch.channels_last)
            shape = level.permute(0, 2, 3, 1).shape if channels_last else level.shape
            rows = allocate((self._num_images, *shape[1:]), dtype=dtypes[name])
            self._levels[name] = _Level(rows, channels_last, level.dtype)


def _read(level: _Level, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    shape, on_gpu = (len(rows), *level.rows.shape[1:]), device.type == "cuda"
    features = torch.empty(shape, dtype=level.rows.dtype, pin_memory=on_gpu)  # a new one: the last may be on its way
    torch.index_select(level.rows, 0, rows, out=features)
    features = features.to(device, non_blocking=on_gpu).to(level.dtype)
    return features.permute(0, 3, 1, 2) if level.channels_last else features


def _write(level: _Level, rows: torch.Tensor, features: torch.Tensor) -> None:
    features = features.permute(0, 2, 3, 1) if level.channels_last else features
    if features.shape[1:] != level.rows.shape[1:]:
        wanted = f"images of one size, with features {tuple(level.rows.shape[1:])}"
        fail(ValueError, "teacher_cache", wanted, tuple(features.shape[1:]))
    most = torch.finfo(level.rows.dtype).max
    if level.rows.dtype != level.dtype and features.abs().max() > most:
        fail(ValueError, "teacher_cache_half", f"features of at most {most:.0f}", f"{features.abs().max():.4g}")
    level.rows.index_copy_(0, rows, features.to("cpu", level.rows.dtype))


def _on_disk(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    size = torch.Size(shape).numel()
    with tempfile.NamedTemporaryFile(prefix="stfpm_ext_") as file:  # goes by name at once, in full with its mapping
        os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)  # or else a full disk is a crash, later
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)


def _free_memory() -> int:
    """Return the memory that is available, in bytes; as on every Linux, which this package is for."""
    available = 1024 * _numbers("/proc/meminfo")["MemAvailable"]
    return int(min(available, *map(_free_in_container, _CONTAINER_LIMITS)))


def _free_in_container(files: tuple[str, str, str]) -> float:
    """Return what a container's limit leaves: not taken, or by pages of files that nobody has used of late."""
    limit, usage, inactive = files
    try:
        used = int((_CONTAINER / usage).read_text()) - _numbers((_CONTAINER / limit).with_name("memory.stat"))[inactive]
        return int((_CONTAINER / limit).read_text()) - used
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        return math.inf


def _numbers(file: str | Path) -> dict[str, int]:
    """Read a file of the kernel with a name and a number on each line."""
    lines = (line.replace(":", "").split() for line in Path(file).read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines}


def _check_transform(argument: str, transform: Any) -> None:
    """Raise unless a transform is one of those that anomalib saves in checkpoints, which are not random."""
    try:
        transform_to_spec(transform)
    except ValueError as error:
        fail(ValueError, "teacher_cache", f"{_WANTED}, so no random {argument}", error)


class _Numbered(Dataset[Any]):
    """The images of a data set, each with its number."""

    def __init__(self, dataset: Any, first: int) -> None:
        self.dataset, self.first = dataset, first

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return self.first + index, self.dataset[index]


class _Collate:
    """Makes a batch, to which numbers and checksums of the images are attached."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Iterable[tuple[int, Any]]) -> Any:
        numbers, images = zip(*items, strict=True)
        batch = self.collate(list(images))
        checksums = [zlib.crc32(image.contiguous().view(torch.uint8).numpy()) for image in batch.image]
        batch.numbers_and_checksums = (numbers, checksums)
        return batch
