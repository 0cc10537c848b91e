# SPDX-License-Identifier: Apache-2.0

"""Copies of loaders: with other images, or with the same images read correctly."""

from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from ..errors import fail
from .images import read_right, refuse_deep


def same_loader(loader: DataLoader[Any], dataset: Dataset[Any], **settings: Any) -> DataLoader[Any]:
    """Copy a loader, with other images.

    Args:
        loader (DataLoader): A loader with a batch size.
        dataset (Dataset): The images.
        settings (Any): Settings that differ, and those of the sampler; all others are the given loader's.

    Returns:
        DataLoader: The copy.
    """
    same = ["batch_size", "num_workers", "collate_fn", "pin_memory", "worker_init_fn", "in_order"]
    if settings.get("num_workers", loader.num_workers):  # settings of the workers
        same += ["timeout", "multiprocessing_context", "prefetch_factor", "persistent_workers"]
    return DataLoader(dataset, **{**{name: getattr(loader, name) for name in same}, **settings})


def right_loaders(loaders: Any) -> Any:
    """Copy loaders so that they read images with :func:`.read_image`, where the data sets are anomalib's.

    Args:
        loaders (Any): A loader, or several in a list, a dict or a ``CombinedLoader``. None is changed.

    Returns:
        Any: The copies in the same structure; loaders of other data sets are returned as they are.

    Raises:
        ValueError: If there are images of more than 8 bits in a loader that cannot be copied.
    """
    if isinstance(loaders, list | tuple):
        return [right_loaders(loader) for loader in loaders]
    if isinstance(loaders, dict):
        return {name: right_loaders(loader) for name, loader in loaders.items()}
    if type(loaders) is DataLoader and loaders.batch_size is not None:
        dataset = read_right(loaders.dataset)
        if dataset is loaders.dataset:
            return loaders
        keep = {name: getattr(loaders, name) for name in ("sampler", "drop_last", "generator")}
        return same_loader(loaders, dataset, **keep)
    for loader in getattr(loaders, "flattened", [loaders]):  # several, of Lightning's CombinedLoader
        refuse_deep(getattr(loader, "dataset", None), "where the loader is no plain DataLoader with a batch_size")
    return loaders


def check_splittable(loader: Any) -> Any:
    """Check that the images of a loader can be split, and that :func:`same_loader` can copy it.

    Args:
        loader (Any): Should be a plain ``DataLoader`` with a batch size, whose sampler takes each image once.

    Returns:
        Any: The loader.

    Raises:
        ValueError: If it is something else.
    """
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
