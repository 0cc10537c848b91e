# SPDX-License-Identifier: Apache-2.0

"""What a pre-processor does to an image: its parts, and how much of the image they leave."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torchvision.transforms.v2 import Compose, GaussianBlur, Grayscale, Normalize, Resize, ToDtype, ToImage, Transform

PLACE_KEEPING = (Resize, Normalize, ToDtype, ToImage, Grayscale, GaussianBlur)
Pixels = TypeVar("Pixels", bound=torch.Tensor)


def parts(transform: Transform | None) -> Iterator[Transform]:
    """Iterate over a transform's parts, including those of compositions.

    Args:
        transform (Transform | None): The transform.

    Yields:
        Transform: A part that has no parts itself.
    """
    if transform is not None:
        inner = getattr(transform, "transforms", None)
        if inner is None:
            yield transform
        for part in inner or ():
            yield from parts(part)


def steps(transform: Transform | None) -> Iterator[Transform]:
    """Iterate over what a transform does, one after the other; a random choice is one step.

    Args:
        transform (Transform | None): The transform.

    Yields:
        Transform: A step.
    """
    if isinstance(transform, Compose):
        for part in transform.transforms:
            yield from steps(part)
    elif transform is not None:
        yield transform


def shows_all(pre_processor: Any) -> bool:
    """Tell whether maps show the whole image, which is certain where no part of the transform can move places.

    Args:
        pre_processor (Any): The model's pre-processor, or ``None``.

    Returns:
        bool: ``False`` where a map laid over the whole image might show wrong places, as after a crop.
    """
    return all(isinstance(part, PLACE_KEEPING) for part in parts(getattr(pre_processor, "transform", None)))


def seen(pre_processor: Any, pixels: Pixels) -> Pixels:
    """Return what the model sees of an image or its mask: transformed, but not normalised.

    Args:
        pre_processor (Any): The model's pre-processor, or ``None``.
        pixels (torch.Tensor): An image ``(C, H, W)``, or a ``torchvision.tv_tensors.Mask``.

    Returns:
        torch.Tensor: The pixels that the model's maps show.
    """
    kept = [part for part in steps(getattr(pre_processor, "transform", None)) if not isinstance(part, Normalize)]
    result: Pixels = Compose(kept)(pixels) if kept else pixels
    return result
