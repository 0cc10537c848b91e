# SPDX-License-Identifier: Apache-2.0

"""Good training images that the student never trains on, taken out of any data module or loader."""

import copy
import math
from typing import Any

import numpy as np
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import LabelName, ValSplitMode
from lightning.pytorch import Trainer
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from .._compat import data_source, forget_loader
from ..data.images import read_right
from ..errors import fail


def hold_out(trainer: Trainer, share: float, seed: int) -> tuple[int, DataLoader[Any]]:
    """Make the loader of held-out images; unless the data module holds some out, leave the others to the training.

    Neither the user's data module nor data set is changed.

    Args:
        trainer (Trainer): Trainer at the start of its fit.
        share (float): Share of the good training images that are held out, above 0 and below 1.
        seed (int): Says which ones.

    Returns:
        tuple[int, DataLoader]: The number of held-out images, and the loader of this process's share of them.

    Raises:
        ValueError: If images cannot be held out.
    """
    source = data_source(trainer.fit_loop)
    datamodule: Any = source.instance
    if getattr(datamodule, "val_split_mode", None) == ValSplitMode.FROM_TRAIN:
        loader = datamodule.val_dataloader()
        dataset, held_out = read_right(loader.dataset), good_images(loader.dataset)
        if not len(held_out):
            wanted = "good images in the data module's split, as val_split_mode is from_train"
            fail(ValueError, "held_out_share", wanted, f"none of {len(dataset)}")
    else:
        reload: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if source.is_module() and reload:
            wanted = "a data set that stays the same (or 0 to hold nothing out)"
            fail(ValueError, "held_out_share", wanted, f"reload_dataloaders_every_n_epochs={reload}")
        if not len(getattr(datamodule, "train_data", (True,))):  # of which torch makes no loader
            fail(ValueError, "held_out_share", "a data module with good training images", "one without images")
        loader = check_splittable(source.dataloader())
        good = good_images(loader.dataset)
        held_out = split(len(good), share, seed)
        dataset, held_out = loader.dataset, good[held_out]
        training = np.setdiff1d(np.arange(len(dataset)), held_out)
        source.instance = same_loader(
            loader,
            Subset(dataset, training.tolist()),
            shuffle=isinstance(loader.sampler, RandomSampler),
            drop_last=loader.drop_last,
            generator=loader.generator or getattr(loader.sampler, "generator", None),
        )
        if not len(source.instance):
            wanted = f"a share that leaves a batch of {loader.batch_size} images to train on"
            fail(ValueError, "held_out_share", wanted, f"{len(training)} images, and drop_last=True")
        forget_loader(trainer)
        if isinstance(datamodule, AnomalibDataModule):
            dataset = copy.copy(dataset)
            dataset.augmentations = datamodule.test_data.augmentations
    share_of_process = held_out[trainer.global_rank :: trainer.world_size].tolist()
    # Processes are started anew each time that the images are read, which for a handful takes longer than reading them.
    num_workers = min(loader.num_workers, len(share_of_process) // (loader.batch_size or 1))
    return len(held_out), same_loader(loader, Subset(dataset, share_of_process), num_workers=num_workers)


def check_share(share: float) -> None:
    """Check the share of held-out images.

    Args:
        share (float): The share.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not in [0, 1).
    """
    wanted = "a share of the good training images of at least 0 (holds none out) and less than 1"
    if isinstance(share, bool) or not isinstance(share, int | float):
        fail(TypeError, "held_out_share", wanted, repr(share))
    if not 0 <= share < 1:
        fail(ValueError, "held_out_share", wanted, share)


def split(num_images: int, share: float, seed: int) -> "np.ndarray[Any, Any]":
    """Say which of the good training images are held out.

    It is the authors' split: theirs comes from scikit-learn's ``train_test_split(test_size=share, random_state=seed)``.

    Args:
        num_images (int): Number of good training images.
        share (float): Share of them to hold out, rounded up to whole images.
        seed (int): Seed of the permutation; the global random numbers are neither used nor changed.

    Returns:
        np.ndarray: Indices of the held-out images.

    Raises:
        ValueError: If no image is left on one of the sides.
    """
    num_held_out = math.ceil(share * num_images)
    if not 0 < num_held_out < num_images:
        wanted = "a share that leaves good images both to hold out and to train on (or 0 to hold nothing out)"
        fail(ValueError, "held_out_share", wanted, f"{share} of {num_images} good training images")
    return np.random.RandomState(seed).permutation(num_images)[:num_held_out]


def good_images(dataset: Any) -> "np.ndarray[Any, Any]":
    """Return the indices of the good images; in a data set without anomalib's labels, all are."""
    if isinstance(dataset, Subset):
        return np.flatnonzero(np.isin(dataset.indices, good_images(dataset.dataset)))
    if isinstance(dataset, ConcatDataset):
        starts = zip(dataset.datasets, [0, *dataset.cumulative_sizes], strict=False)
        return np.concatenate([start + good_images(part) for part, start in starts])
    if isinstance(dataset, AnomalibDataset):
        return np.flatnonzero(dataset.samples.label_index == LabelName.NORMAL)
    return np.arange(len(dataset))


def check_splittable(loader: Any) -> Any:
    """Return the loader if its images can be split, and :func:`same_loader` can make another of it; otherwise raise."""
    dataset: Any = getattr(loader, "dataset", None)
    sampler: Any = getattr(loader, "sampler", None)
    got = None
    if type(loader) is not DataLoader:
        got = type(loader).__qualname__
    elif isinstance(dataset, IterableDataset):
        got = f"the iterable {type(dataset).__qualname__}"
    elif loader.batch_size is None:
        got = "a DataLoader with a batch_sampler or without batches"
    elif type(sampler) not in (RandomSampler, SequentialSampler) or getattr(sampler, "replacement", False):
        got = f"a DataLoader with {type(sampler).__qualname__} as sampler"
    elif len(sampler) != len(dataset):
        got = f"a sampler of {len(sampler)} of {len(dataset)} images"
    if got:
        wanted = "training images in one DataLoader, all in each epoch, that can be split (or 0 to hold nothing out)"
        fail(ValueError, "held_out_share", wanted, got)
    return loader


def same_loader(loader: DataLoader[Any], dataset: Dataset[Any], **settings: Any) -> DataLoader[Any]:
    """Make a loader of other images.

    Args:
        loader (DataLoader): A loader with a batch size.
        dataset (Dataset): The images.
        settings (Any): What becomes different, and the sampler's settings; the rest is the given loader's.

    Returns:
        DataLoader: The loader.
    """
    same = ["batch_size", "num_workers", "collate_fn", "pin_memory", "worker_init_fn", "in_order"]
    if settings.get("num_workers", loader.num_workers):  # those of the workers
        same += ["timeout", "multiprocessing_context", "prefetch_factor", "persistent_workers"]
    return DataLoader(dataset, **{**{name: getattr(loader, name) for name in same}, **settings})
