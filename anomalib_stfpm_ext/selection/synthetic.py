# SPDX-License-Identifier: Apache-2.0

"""Synthetic anomalies: defects added to good images, to measure how well a student finds what it has never seen."""

import math
from collections.abc import Callable

import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from torch.nn.functional import interpolate

FEWEST_IMAGES = 20  # with fewer held-out images, chance decides which student finds more
MOST_IMAGES = 100  # with an anomaly, to bound time and memory on large data sets
FEWEST_PERLIN_PIXELS = 64  # per side; anomalib's generator fails below
TIE = 0.005  # of the mean AUROC: late epochs differ by as much at random


def add_anomaly(image: torch.Tensor, index: int) -> torch.Tensor:
    """Add a defect to an image, of one of four kinds in turn. The same index gives the same defect.

    The size of the defect depends on the image's size, its strength on the image's range, so it suits any
    normalisation. In an image without contrast a defect may be invisible, to all students alike.

    Args:
        image (torch.Tensor): Normalised image ``(3, H, W)``.
        index (int): Chooses the kind, and seeds shape, place and strength. torch's global random numbers are neither
            used nor changed.

    Returns:
        torch.Tensor: The image ``(3, H, W)`` with the defect, on the same device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(index)
        return KINDS[index % len(KINDS)](image.cpu()).to(image.device)


def mean_auroc(good: torch.Tensor, defective: torch.Tensor, kinds: torch.Tensor) -> float:
    """Compute how well scores separate good images from those with defects, as the mean AUROC over the kinds.

    Args:
        good (torch.Tensor): Scores ``(N,)`` of good images.
        defective (torch.Tensor): Scores ``(M,)`` of images with defects.
        kinds (torch.Tensor): Kind ``(M,)`` of each defect, by index.

    Returns:
        float: Mean image AUROC, from 0 to 1; NaN if a score is NaN.
    """
    if good.isnan().any() or defective.isnan().any():
        return math.nan
    ranks = torch.heaviside(defective[:, None] - good, torch.tensor(0.5, dtype=good.dtype)).mean(1)
    return float(torch.stack([ranks[kinds == kind].mean() for kind in sorted(set(kinds.tolist()))]).mean())


def level_weights(good: torch.Tensor, defective: torch.Tensor, kinds: torch.Tensor) -> tuple[float, ...] | None:
    """Weigh levels by how well each one alone separates good images from those with defects.

    A level's weight is the square of 2 AUROC - 1: 0 for a level that guesses. A small weight grows as the square of the
    distance between good and defective in standard deviations, and so as the inverse of the noise's variance. That is
    the usual weight of independent measurements of one quantity.

    Args:
        good (torch.Tensor): Scores ``(N, levels)`` of good images.
        defective (torch.Tensor): Scores ``(M, levels)`` of images with defects.
        kinds (torch.Tensor): Kind ``(M,)`` of each defect.

    Returns:
        tuple[float, ...] | None: Weights with a mean of 1, rounded to hundredths; ``None`` if all levels guess or a
            score is NaN.
    """
    aurocs = [mean_auroc(level, made, kinds) for level, made in zip(good.T, defective.T, strict=True)]
    raw = [max(2 * auroc - 1, 0) ** 2 for auroc in aurocs]
    return tuple(round(len(raw) * weight / sum(raw), 2) for weight in raw) if sum(raw) > 0 else None


def _perlin(image: torch.Tensor) -> torch.Tensor:
    """Blend noise into patches, as DRAEM does (Zavrtanik et al., ICCV 2021)."""
    size = image.shape[1:]
    canvas = _resize(image, [max(side, FEWEST_PERLIN_PIXELS) for side in size])
    low, contrast = canvas.amin((1, 2), keepdim=True), _contrast(canvas)  # the generator takes images in [0, 1]
    generator = PerlinAnomalyGenerator(probability=1.0, blend_factor=(0.2, 1.0))
    changed: torch.Tensor = generator((canvas - low) / contrast)[0] * contrast + low
    return image + _resize(changed - canvas, list(size))


def _cut_paste(image: torch.Tensor) -> torch.Tensor:
    """Paste a rectangle of the image elsewhere, mirrored at random, as CutPaste does (Li et al., CVPR 2021)."""
    _, height, width = image.shape
    area, aspect = _draw(0.005, 0.05) * height * width, math.exp(_draw(-1.2, 1.2))
    rows = min(max(round(math.sqrt(area * aspect)), 1), height)
    columns = min(max(round(math.sqrt(area / aspect)), 1), width)
    top, left, from_top, from_left = (
        int(_draw(0, room + 1)) for room in (height - rows, width - columns, height - rows, width - columns)
    )
    patch = image[:, from_top : from_top + rows, from_left : from_left + columns]
    mirrored = [dim for dim in (1, 2) if _draw(0, 1) < 0.5]
    result = image.clone()
    result[:, top : top + rows, left : left + columns] = patch.flip(mirrored)
    return result


def _scratch(image: torch.Tensor) -> torch.Tensor:
    """Draw a thin, slightly bent line, lighter or darker."""
    side = min(image.shape[1:])
    along, across = _place(image)
    length, half_width = _draw(0.1, 0.5) * side, _draw(0.004, 0.012) * side
    across = across + _draw(-0.3, 0.3) * along**2 / length
    line = (half_width + 0.5 - across.abs()).clamp(0, 1) * (length / 2 + 0.5 - along.abs()).clamp(0, 1)
    return image + _strength(image) * line


def _blob(image: torch.Tensor) -> torch.Tensor:
    """Add a soft spot, lighter or darker."""
    along, across = _place(image)
    radius, aspect = _draw(0.02, 0.1) * min(image.shape[1:]), math.exp(_draw(-0.5, 0.5))
    return image + _strength(image) * torch.exp(-((along / aspect) ** 2 + (across * aspect) ** 2) / (2 * radius**2))


KINDS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (_perlin, _cut_paste, _scratch, _blob)


def _resize(image: torch.Tensor, size: list[int]) -> torch.Tensor:
    return interpolate(image[None], size, mode="bilinear", align_corners=False)[0]


def _draw(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _contrast(image: torch.Tensor) -> torch.Tensor:
    """Return the range of each channel, ``(3, 1, 1)``."""
    contrast = image.amax((1, 2), keepdim=True) - image.amin((1, 2), keepdim=True)
    return contrast.clamp(min=0.1)  # of an image of one colour


def _strength(image: torch.Tensor) -> torch.Tensor:
    sign = 1 if _draw(0, 1) < 0.5 else -1
    return sign * _draw(0.1, 0.6) * _contrast(image)


def _place(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixel coordinates ``(H, W)`` along and across a random direction, from a random point."""
    _, height, width = image.shape
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    rows, columns = rows - _draw(0.15, 0.85) * height, columns - _draw(0.15, 0.85) * width
    angle = _draw(0, math.pi)
    cosine, sine = math.cos(angle), math.sin(angle)
    return columns * cosine + rows * sine, rows * cosine - columns * sine
