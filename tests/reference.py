# SPDX-License-Identifier: Apache-2.0

"""What the scorer has to compute, in float64 NumPy, written from the formulas (arXiv 2103.04257, section 3.3).

Slow and plain on purpose, and independent of torch and of csrc/.
"""

from collections.abc import Sequence

import numpy as np


def normalize(features: np.ndarray) -> np.ndarray:
    """Divide features ``(B, C, H, W)`` by their L2 norm over the channels, or by 1e-12 where that is larger."""
    largest = np.abs(features).max(axis=1, keepdims=True, initial=0)
    scale = np.where((largest > 0) & np.isfinite(largest), largest, 1)  # the squares neither over- nor underflow
    norm = scale * np.sqrt(np.square(features / scale).sum(axis=1, keepdims=True))
    return features / np.maximum(norm, 1e-12)


def distance(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """Half squared distance of the normalised features, ``(B, H, W)``."""
    difference = normalize(teacher.astype(np.float64)) - normalize(student.astype(np.float64))
    return 0.5 * np.square(difference).sum(axis=1)


def interpolation_matrix(input_size: int, output_size: int) -> np.ndarray:
    """Linear interpolation along one axis with half-pixel centres, ``(output_size, input_size)``."""
    matrix = np.zeros((output_size, input_size))
    for index in range(output_size):
        source = min(max((index + 0.5) * input_size / output_size - 0.5, 0), input_size - 1)
        low = int(source)
        matrix[index, low] += 1 - (source - low)
        if source > low:
            matrix[index, low + 1] += source - low
    return matrix


def upsample(image: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Stretch ``(B, H, W)`` bilinearly to the image size."""
    rows = interpolation_matrix(image.shape[1], image_size[0])
    columns = interpolation_matrix(image.shape[2], image_size[1])
    return rows @ image @ columns.T


def anomaly_map(
    teacher: Sequence[np.ndarray],
    student: Sequence[np.ndarray],
    image_size: tuple[int, int],
    weights: Sequence[float] | None = None,
    combine: str = "product",
    combine_size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Combine the upsampled distances: map ``(B, 1, H, W)``, its maxima ``(B,)``, level maps ``(B, levels, h, w)``."""
    size = combine_size or image_size
    level_maps = np.stack([upsample(distance(t, s), size) for t, s in zip(teacher, student, strict=True)], axis=1)
    weight = np.reshape([1] * len(teacher) if weights is None else weights, (-1, 1, 1))
    if combine == "product":
        amap = np.prod(level_maps**weight, axis=1, keepdims=True)
    else:
        amap = {"sum": np.sum, "maximum": np.max}[combine](weight * level_maps, axis=1, keepdims=True)
    if combine_size:
        amap = upsample(amap[:, 0], image_size)[:, None]
    return amap, amap.max(axis=(1, 2, 3)), level_maps
