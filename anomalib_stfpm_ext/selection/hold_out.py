# SPDX-License-Identifier: Apache-2.0

"""Good training images that the student never trains on, taken out of any data module or loader."""

import copy
import math
from functools import partial
from typing import Any

import numpy as np
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import LabelName, ValSplitMode
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, RandomSampler, Subset

from .._compat.lightning import get_data, get_loader, replace_loader
from ..data.images import read_right
from ..data.loaders import check_splittable, same_loader
from ..data.nested import Indices, leaves, replace_leaves
from ..errors import fail


def hold_out(trainer: Trainer, share: float, seed: int) -> tuple[int, DataLoader[Any]]:
    """Make the loader of held-out images; unless the data module holds some out, leave the others to the training.

    The user's data module and data set do not change.

    Args:
        trainer (Trainer): Trainer at the start of its fit.
        share (float): Share of the good training images that are held out, above 0 and below 1.
        seed (int): Seed of the choice.

    Returns:
        tuple[int, DataLoader]: The number of held-out images, and the loader of this process's share of them.

    Raises:
        ValueError: If images cannot be held out.
    """
    datamodule = get_data(trainer.fit_loop)
    if getattr(datamodule, "val_split_mode", None) == ValSplitMode.FROM_TRAIN:
        loader = datamodule.val_dataloader()
        dataset, held_out = read_right(loader.dataset), good_images(loader.dataset)
        if not len(held_out):
            wanted = "good images in the data module's split, as val_split_mode is from_train"
            fail(ValueError, "held_out_share", wanted, f"none of {len(dataset)}")
    else:
        reload: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if isinstance(datamodule, LightningDataModule | LightningModule) and reload:
            wanted = "a data set that stays the same (or 0 to hold nothing out)"
            fail(ValueError, "held_out_share", wanted, f"reload_dataloaders_every_n_epochs={reload}")
        if not len(getattr(datamodule, "train_data", (True,))):  # torch makes no loader of none
            fail(ValueError, "held_out_share", "a data module with good training images", "one without images")
        loader = check_splittable(get_loader(trainer.fit_loop))
        good = good_images(loader.dataset)
        held_out = split(len(good), share, seed)
        dataset, held_out = loader.dataset, good[held_out]
        training = np.setdiff1d(np.arange(len(dataset)), held_out)
        remaining = same_loader(
            loader,
            Subset(dataset, training.tolist()),
            shuffle=isinstance(loader.sampler, RandomSampler),
            drop_last=loader.drop_last,
            generator=loader.generator or getattr(loader.sampler, "generator", None),
        )
        if not len(remaining):
            wanted = f"a share that leaves a batch of {loader.batch_size} images to train on"
            fail(ValueError, "held_out_share", wanted, f"{len(training)} images, and drop_last=True")
        replace_loader(trainer.fit_loop, remaining)
        if isinstance(datamodule, AnomalibDataModule):
            dataset = replace_leaves(dataset, partial(_augmented, datamodule.test_data.augmentations))
    share_of_process = held_out[trainer.global_rank :: trainer.world_size].tolist()
    # Worker processes start anew for each pass over the images. For a few images, that takes longer than reading them.
    num_workers = min(loader.num_workers, len(share_of_process) // (loader.batch_size or 1))
    return len(held_out), same_loader(loader, Subset(dataset, share_of_process), num_workers=num_workers)


def _augmented(augmentations: Any, dataset: Any) -> Any:
    dataset = copy.copy(dataset)
    dataset.augmentations = augmentations
    return dataset


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


def split(num_images: int, share: float, seed: int) -> Indices:
    """Choose the good training images that are held out.

    It is the authors' split, of scikit-learn's ``train_test_split(test_size=share, random_state=seed)``.

    Args:
        num_images (int): Number of good training images.
        share (float): Share of them to hold out, rounded up to whole images.
        seed (int): Seed of the permutation; the global random numbers are neither used nor changed.

    Returns:
        Indices: The indices of the held-out images.

    Raises:
        ValueError: If no image would be held out, or none left to train on.
    """
    num_held_out = math.ceil(share * num_images)
    if not 0 < num_held_out < num_images:
        wanted = "a share that leaves good images both to hold out and to train on (or 0 to hold nothing out)"
        fail(ValueError, "held_out_share", wanted, f"{share} of {num_images} good training images")
    return np.random.RandomState(seed).permutation(num_images)[:num_held_out]


def good_images(dataset: Any) -> Indices:
    """Return the indices of the good images, ascending; without anomalib's labels, all images count as good.

    Args:
        dataset (Any): A data set with a length, or a nest of them.

    Returns:
        Indices: The indices in the whole.
    """
    good = np.ones(len(dataset), bool)
    for leaf in leaves(dataset):
        if isinstance(leaf.dataset, AnomalibDataset):
            good[leaf.positions] = leaf.dataset.samples.label_index.iloc[leaf.indices] == LabelName.NORMAL
    return np.flatnonzero(good)
