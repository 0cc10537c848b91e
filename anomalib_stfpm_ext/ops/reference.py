# SPDX-License-Identifier: Apache-2.0

"""The formulas of ``csrc/distance_math.h`` in torch operations: differentiable, exportable, on any device."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from .arguments import OUTPUT_DTYPES, Options, dtype_name

Tensors = Sequence[torch.Tensor]


def formula(
    teacher: Tensors, student: Tensors, image_size: Sequence[int], options: Options, gain: float = 1.0
) -> tuple[torch.Tensor, ...]:
    """State ``csrc/distance_math.h`` in torch operations: differentiable, exportable, on any device.

    ``gain`` multiplies all distances.
    """
    distances = [0.5 * squared_distance(t, s, gain) for t, s in zip(teacher, student, strict=True)]
    return combine_levels(distances, image_size, options)


def combine_levels(distances: Tensors, image_size: Sequence[int], options: Options) -> tuple[torch.Tensor, ...]:
    """State the rest of the formula, which follows from the levels' distances, each ``(B, 1, H_l, W_l)``."""
    level_maps, weighted = [], []
    for distance, weight in zip(distances, options.weights, strict=True):
        level_map = F.interpolate(distance, options.combine_size or image_size, mode="bilinear", align_corners=False)
        level_maps.append(level_map)
        if weight != 1:
            level_map = level_map**weight if options.combine == "product" else level_map * weight
        weighted.append(level_map)
    combine: Any = {"product": torch.mul, "sum": torch.add, "maximum": torch.maximum}[options.combine]
    amap: torch.Tensor = functools.reduce(combine, weighted)
    if options.combine_size is not None:
        amap = F.interpolate(amap, image_size, mode="bilinear", align_corners=False)
    result = (amap, amap.amax(dim=(1, 2, 3)))
    return (*result, torch.cat(level_maps, dim=1)) if options.level_maps else result


def squared_distance(teacher: torch.Tensor, student: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """Return the squared distance of normalised features ``(B, C, H, W)`` at each position: ``(B, 1, H, W)``."""
    dtype = output_dtype([teacher])
    difference = F.normalize(teacher.to(dtype)) - F.normalize(student.to(dtype))
    if gain != 1:  # before the squares, which float16 may not hold
        difference = difference * gain**0.5
    return difference.square().sum(dim=1, keepdim=True)


def mean_of_hardest(values: torch.Tensor, share: float) -> torch.Tensor:
    """Return the mean of the largest values, and of those that equal the last of them; NaN if there is one.

    Args:
        values (torch.Tensor): Squared distances of a level, of any shape; at least one.
        share (float): The share of values that count, above 0.

    Returns:
        torch.Tensor: The mean, a scalar.
    """
    count = values.numel()
    threshold = values.detach().flatten().kthvalue(rank_of_threshold(count, share)).values
    is_easy = values < threshold  # which NaN is not
    return values.masked_fill(is_easy, 0).sum() / (count - is_easy.count_nonzero())


def rank_of_threshold(count: int, share: float) -> int:
    """Return the rank, from 1 for the smallest, of the last value that is in a share of the largest."""
    return count + 1 - math.ceil(share * count)


def output_dtype(features: Tensors) -> torch.dtype:
    """Return the dtype of the map and the scores."""
    dtype: torch.dtype = getattr(torch, OUTPUT_DTYPES[dtype_name(features[0].dtype)])
    return dtype
