# SPDX-License-Identifier: Apache-2.0

"""Data sets within data sets: torch's ``Subset`` and ``ConcatDataset``, nested to any depth."""

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, IterableDataset, Subset

Indices = NDArray[np.int64]


class Leaf(NamedTuple):
    """A data set that is neither ``Subset`` nor ``ConcatDataset``, and what the whole has of it."""

    dataset: Any
    indices: Indices  # (N,), of its items that the whole has; none of a data set without a length
    positions: Indices  # (N,), of the same items in the whole


def leaves(dataset: Any) -> Iterator[Leaf]:
    """Iterate over the data sets that a nest of them is made of.

    Args:
        dataset (Any): Any data set, or whatever else a loader may have.

    Yields:
        Leaf: A data set, in the order of the nest; one that is in several places comes several times.
    """
    has_length = hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)  # of some, it raises
    everything = np.arange(len(dataset) if has_length else 0)
    yield from _leaves(dataset, everything, everything)


def _leaves(dataset: Any, indices: Indices, positions: Indices) -> Iterator[Leaf]:
    if isinstance(dataset, Subset):
        yield from _leaves(dataset.dataset, np.array(dataset.indices, np.int64)[indices], positions)
    elif isinstance(dataset, ConcatDataset):
        indices = indices % len(dataset)  # negative ones count from the end
        for part, (start, stop) in zip(dataset.datasets, pairwise([0, *dataset.cumulative_sizes]), strict=True):
            here = (start <= indices) & (indices < stop)
            yield from _leaves(part, indices[here] - start, positions[here])
    else:
        yield Leaf(dataset, indices, positions)


def replace_leaves(dataset: Any, replace: Callable[[Any], Any]) -> Any:
    """Make the same nest of other data sets.

    Args:
        dataset (Any): Any data set, which is not changed.
        replace (Callable[[Any], Any]): Takes a leaf, and returns what takes its place, which may be the same.

    Returns:
        Any: The nest; ``dataset`` itself if all leaves are the same.
    """
    if isinstance(dataset, Subset):
        inner = replace_leaves(dataset.dataset, replace)
        if inner is not dataset.dataset:
            dataset = copy.copy(dataset)
            dataset.dataset = inner
    elif isinstance(dataset, ConcatDataset):
        parts = [replace_leaves(part, replace) for part in dataset.datasets]
        if any(new is not old for new, old in zip(parts, dataset.datasets, strict=True)):
            dataset = copy.copy(dataset)
            dataset.datasets = parts
    else:
        dataset = replace(dataset)
    return dataset
