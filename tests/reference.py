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
    teacher: Sequence[np.ndarray], student: Sequence[np.ndarray], image_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Product over the levels of the upsampled distances ``(B, 1, H, W)``, and its maxima ``(B,)``."""
    level_maps = [upsample(distance(t, s), image_size) for t, s in zip(teacher, student, strict=True)]
    amap = np.prod(level_maps, axis=0)[:, None]
    return amap, amap.max(axis=(1, 2, 3))
