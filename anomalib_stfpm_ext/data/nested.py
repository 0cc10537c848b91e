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
    """A data set that is neither ``Subset`` nor ``ConcatDataset``, and those of its items that are in the nest."""

    dataset: Any
    indices: Indices  # (N,), of these items in the data set; empty for a data set without a length
    positions: Indices  # (N,), of the same items in the nest


def leaves(dataset: Any) -> Iterator[Leaf]:
    """Iterate over the innermost data sets of a nest.

    Args:
        dataset (Any): Any data set, or whatever else a loader may have.

    Yields:
        Leaf: A data set, in the order of the nest; one that is in several places comes several times.
    """
    has_length = hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)  # where len() may raise
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
    """Copy a nest, with other data sets in it.

    Args:
        dataset (Any): Any data set, which is not changed.
        replace (Callable[[Any], Any]): Takes a leaf, and returns its replacement, which may be the leaf itself.

    Returns:
        Any: The copy; ``dataset`` itself if no leaf is replaced.
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
