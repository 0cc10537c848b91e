# SPDX-License-Identifier: Apache-2.0

"""The teacher's features, computed once and kept: the teacher never changes, nor do images without augmentation."""

import hashlib
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from anomalib.pre_processing.utils.spec import transform_to_spec
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from ..choices import CacheLocation
from ..data.nested import leaves
from ..errors import fail
from .fit_resource import FitResource

Features = dict[str, torch.Tensor]
AUTO_SHARE = 4  # "auto" takes a quarter of the free memory at most
# Containers, and jobs of SLURM and systemd, run in control groups. For versions 2 and 1: the folder, the files of limit
# and usage, and the name of the memory that can be reclaimed.
_GROUPS, _GROUPS_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_GROUP_FILES = {
    "": (".", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
_WANTED = "images that are the same in every epoch"


class _Level(NamedTuple):
    """Memory for one level's features of all images."""

    rows: torch.Tensor  # (N, H, W, C) or (N, C, H, W), as the teacher lays them out
    channels_last: bool


class TeacherCache(FitResource):
    """Keeps the teacher's features of all images of a fit, until the fit ends.

    The key of an image is a hash of its pixels as the network gets them. So an image never gets the features of
    another, wherever it comes from and whatever callbacks do to it. Each of several processes keeps the features of the
    images that it has seen. Checkpoints do not hold them.

    Args:
        location (str): ``"memory"``, or ``"disk"`` for files in the folder for temporary files (``TMPDIR``). The files
            have no names, so they vanish with the process, however it ends. ``"auto"``: memory, on a CPU, if a quarter
            of the free memory suffices; otherwise nothing is kept. Where images turn out not to be the same in every
            epoch, ``"auto"`` gives up, and the other two raise an error.

    Raises:
        ValueError: If ``location`` is something else.
    """

    def __init__(self, location: CacheLocation) -> None:
        if location not in get_args(CacheLocation):
            fail(ValueError, "teacher_cache", f"one of {get_args(CacheLocation)} or None", repr(location))
        self.location = location
        self.release()

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location}  # a copy of the model has no features yet

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["location"])  # type: ignore[misc]  # older versions stored more

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to keep features.

        Args:
            trainer (Trainer): Trainer at the start of its fit.
            pl_module (LightningModule): The model.

        Raises:
            ValueError: If the images are not known to be the same in every epoch, unless the location is ``"auto"``.
        """
        self.release()
        try:
            if self.location == "auto" and trainer.strategy.root_device.type != "cpu":
                return  # a GPU would fetch the features from the host: not measured
            model: Any = pl_module
            judge = model.student_selection.judge
            _check_transform("pre_processor", getattr(model.pre_processor, "transform", None))
            self._num_images = sum(map(_count_images, [trainer.train_dataloader, *([judge.loader] if judge else [])]))
            self._num_images += judge.num_synthetic if judge else 0  # of all processes, which share them
            self._num_processes = trainer.num_devices  # those on this machine
        except ValueError as error:
            self._give_up(error)

    def features(self, images: torch.Tensor, teacher: Callable[[torch.Tensor], Features]) -> Features:
        """Return the teacher's features of a batch; compute them if one of the images is new.

        Args:
            images (torch.Tensor): Images ``(B, 3, H, W)`` as the teacher gets them.
            teacher (Callable[[torch.Tensor], Features]): Computes features of images.

        Returns:
            Features: Features ``(B, C, H_l, W_l)`` by level, in the dtype and layout in which the teacher gives them.

        Raises:
            ValueError: If there are more images than an epoch has, images of several sizes, or not enough memory.
        """
        if not self._num_images:  # before the fit, as in a learning rate finder, or after giving up
            return teacher(images)
        keys = _hashes(images)
        if self._rows.keys() >= set(keys):
            rows = torch.tensor([self._rows[key] for key in keys])
            return {name: _read(level, rows, images.device) for name, level in self._levels.items()}
        features = teacher(images)
        try:
            self._keep(keys, features)
        except ValueError as error:
            self._give_up(error)
        return features

    def release(self) -> None:
        """Release the features."""
        self._num_images, self._num_processes = 0, 1
        self._levels: dict[str, _Level] = {}
        self._rows: dict[bytes, int] = {}  # by the hash of the image

    def _give_up(self, reason: ValueError) -> None:
        """Go on without a cache where the location is ``"auto"``; otherwise raise the reason."""
        if self.location != "auto":
            raise reason
        rank_zero_info(f"The teacher's features are not kept between epochs. {reason}")
        self.release()

    def _keep(self, keys: list[bytes], features: Features) -> None:
        if not self._levels:
            self._allocate(features)
        new = {key: index for index, key in enumerate(keys) if key not in self._rows}
        rows = range(len(self._rows), len(self._rows) + len(new))
        if rows.stop > self._num_images:
            fail(ValueError, "teacher_cache", _WANTED, f"more than the {self._num_images} images of an epoch")
        for name, level in self._levels.items():
            _write(level, rows, features[name], list(new.values()))
        self._rows.update(zip(new, rows, strict=True))

    def _allocate(self, features: Features) -> None:
        """Allocate memory for the features of all images, given those of some."""
        of_image = sum(level[0].numel() * level.dtype.itemsize for level in features.values())
        if self.location == "disk":
            size, free = self._num_images * of_image, shutil.disk_usage(tempfile.gettempdir()).free
            where = f"in {tempfile.gettempdir()}, which TMPDIR names"
        else:
            size, free = self._num_images * of_image * self._num_processes, _free_memory()
            where = "in memory"
        if self.location == "auto":
            free, where = free // AUTO_SHARE, f"in 1/{AUTO_SHARE} of the free memory"
        wanted = f"{size / 1e6:,.1f} MB {where}, for the teacher's features of {self._num_images} images"
        if size > free:
            fail(ValueError, "teacher_cache", wanted, f"{max(free, 0) / 1e6:,.1f} MB")
        allocate = _on_disk if self.location == "disk" else torch.empty
        for name, level in features.items():
            channels_last = level.is_contiguous(memory_format=torch.channels_last)
            shape = level.permute(0, 2, 3, 1).shape if channels_last else level.shape
            try:
                rows = allocate((self._num_images, *shape[1:]), dtype=level.dtype)
            except (OSError, RuntimeError) as error:  # a limit of the process's memory, no folder for temporary files
                fail(ValueError, "teacher_cache", wanted, error)
            self._levels[name] = _Level(rows, channels_last)
        rank_zero_info(
            f"The teacher's features of {self._num_images} images, {size / 1e6:,.1f} MB, are kept in this fit."
        )


def _read(level: _Level, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    shape, on_gpu = (len(rows), *level.rows.shape[1:]), device.type == "cuda"
    features = torch.empty(shape, dtype=level.rows.dtype, pin_memory=on_gpu)  # the last may be in transfer
    torch.index_select(level.rows, 0, rows, out=features)
    features = features.to(device, non_blocking=on_gpu)
    return features.permute(0, 3, 1, 2) if level.channels_last else features


def _write(level: _Level, rows: range, features: torch.Tensor, chosen: list[int]) -> None:
    features = features.permute(0, 2, 3, 1) if level.channels_last else features
    if features.shape[1:] != level.rows.shape[1:]:
        wanted = f"images of one size, with features {tuple(level.rows.shape[1:])}"
        fail(ValueError, "teacher_cache", wanted, tuple(features.shape[1:]))
    level.rows[rows.start : rows.stop] = features if len(chosen) == len(features) else features[chosen]


def _hashes(images: torch.Tensor) -> list[bytes]:
    """Hash each image, on as many threads as torch has."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(_hash, images.cpu().contiguous()))


def _hash(image: torch.Tensor) -> bytes:
    key = hashlib.blake2b(str((image.dtype, image.shape)).encode(), digest_size=16)
    key.update(image.view(torch.uint8).numpy())  # type: ignore[arg-type]
    return key.digest()


def _on_disk(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    size = torch.Size(shape).numel()
    with tempfile.NamedTemporaryFile(prefix="stfpm_ext_") as file:  # loses its name here, its content with the mapping
        if hasattr(os, "posix_fallocate"):  # otherwise a full disk would crash the process later
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        file.truncate(size * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)


def _free_memory() -> int:
    """Return the available memory in bytes, which Linux reports."""
    if not Path("/proc/meminfo").exists():
        fail(ValueError, "teacher_cache", "an operating system that says how much memory is free", sys.platform)
    return int(min(1024 * _numbers("/proc/meminfo")["MemAvailable"], *_free_in_groups()))


def _free_in_groups() -> Iterator[float]:
    """Iterate over the bytes that each limit leaves; file pages that were not used lately count as free.

    A limit may belong to the process's own group or to any above it. Within a container, its own group is at the top.
    """
    yield math.inf
    lines = _GROUPS_OF_PROCESS.read_text().splitlines() if _GROUPS_OF_PROCESS.exists() else []
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if controllers in _GROUP_FILES:
            folder, limit, usage, inactive = _GROUP_FILES[controllers]
            own = Path(group.lstrip("/"))
            for path in (_GROUPS / folder / each for each in (own, *own.parents)):
                with suppress(OSError, ValueError, KeyError):  # no such group here, or one without a limit ("max")
                    used = int((path / usage).read_text()) - _numbers(path / "memory.stat")[inactive]
                    yield int((path / limit).read_text()) - used


def _numbers(file: str | Path) -> dict[str, int]:
    """Read one of the kernel's files with a name and a number on each line."""
    lines = (line.replace(":", "").split() for line in Path(file).read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines}


def _check_transform(argument: str, transform: Any) -> None:
    """Raise unless a transform is one of those that anomalib saves in checkpoints, which are not random."""
    try:
        transform_to_spec(transform)
    except ValueError as error:
        got = str(error).removeprefix("Unsupported transform class: ")
        fail(ValueError, "teacher_cache", f"{_WANTED}, so no random {argument}", got)


def _count_images(loader: Any) -> int:
    """Count the images of a loader; raise if they cannot be counted, or are augmented at random."""
    wanted = f"{_WANTED}, in one DataLoader whose images can be counted"
    dataset = getattr(loader, "dataset", None)
    for leaf in leaves(dataset):
        _check_transform("train_augmentations", getattr(leaf.dataset, "augmentations", None))
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError:
        of = "" if dataset is None else f" of {type(dataset).__qualname__}"
        fail(ValueError, "teacher_cache", wanted, f"{type(loader).__qualname__}{of}")
