# SPDX-License-Identifier: Apache-2.0

"""Exports shrink photographs as ``anomalib predict`` does: with antialiasing."""

from collections.abc import Sequence

import torch
from anomalib.data.transforms import ExportableCenterCrop
from anomalib.pre_processing import PreProcessor
from torch import nn
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize, Transform, functional

from ..data.transforms import steps
from ..errors import fail

# Whatever torchvision takes: mode, its name or PIL's number. The nearest modes are never antialiased.
BILINEAR = (InterpolationMode.BILINEAR, "bilinear", 2)
NEAREST = (InterpolationMode.NEAREST, "nearest", 0, InterpolationMode.NEAREST_EXACT, "nearest-exact")


def pre_process(pre_processor: PreProcessor | None, images: torch.Tensor) -> torch.Tensor:
    """Transform images as ``anomalib predict`` does.

    anomalib 2.7.0's ``PreProcessor.forward``, which serves exports alone, switches the antialiasing off, so that the
    checkpoint's threshold does not fit. Once a later version leaves it on, this function can go, and
    ``ExactExports.forward`` needs :func:`exportable` alone.

    Args:
        pre_processor (PreProcessor | None): The model's. One with a ``forward`` of its own is called as it is.
        images (torch.Tensor): Images ``(B, 3, H, W)`` of any size.

    Returns:
        torch.Tensor: Images of the size of the model's input.

    Raises:
        ValueError: If ONNX cannot resize like this.
    """
    if pre_processor is None:
        return images
    transformed: torch.Tensor
    if type(pre_processor).forward is not PreProcessor.forward:
        transformed = pre_processor(images)
        return transformed
    transform: Transform | None = pre_processor.transform
    if transform is None:
        return images
    return exportable(transform)(images) if torch.onnx.is_in_onnx_export() else apply_quickly(transform, images)


def apply_quickly(transform: Transform, images: torch.Tensor) -> torch.Tensor:
    """Apply a transform without what torchvision does for images, boxes and masks in nested data.

    Args:
        transform (Transform): The transform.
        images (torch.Tensor): Images ``(B, C, H, W)``.

    Returns:
        torch.Tensor: The same images as ``transform(images)`` gives.
    """
    for part in steps(transform):
        if type(part) is Resize:
            images = functional.resize(images, part.size, part.interpolation, part.max_size, part.antialias)
        elif type(part) is Normalize:
            images = functional.normalize(images, part.mean, part.std, part.inplace)
        else:
            images = part(images)
    return images


def exportable(transform: Transform) -> nn.Module:
    """Return a transform in operations that every runtime of ONNX has.

    Args:
        transform (Transform): The transform, which stays as it is.

    Returns:
        nn.Module: A module with the same results.

    Raises:
        ValueError: If it antialiases, but not bilinearly.
    """
    if isinstance(transform, Compose):
        return nn.Sequential(*map(exportable, transform.transforms))
    module: nn.Module = transform
    if isinstance(transform, CenterCrop):
        module = ExportableCenterCrop(transform.size)
    elif isinstance(transform, Resize) and transform.antialias and transform.interpolation not in NEAREST:
        if transform.interpolation not in BILINEAR:
            wanted = "Resize with bilinear interpolation, or without antialias, in exports to ONNX and OpenVINO"
            fail(ValueError, "pre_processor", wanted, f"antialias with {transform.interpolation}")
        module = MatrixResize(transform)
    return module


class MatrixResize(nn.Module):
    """``Resize`` as two matrix multiplications.

    OpenVINO 2026.4 silently ignores the ``antialias`` of ONNX's ``Resize``, and opset 14, which anomalib asks for, has
    none.

    Args:
        resize (Resize): A bilinear one, with antialias.
    """

    def __init__(self, resize: Resize) -> None:
        super().__init__()
        self.without_antialias = Resize(resize.size, resize.interpolation, resize.max_size, antialias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize.

        Args:
            images (torch.Tensor): Images ``(B, C, H, W)``.

        Returns:
            torch.Tensor: The resized images.
        """
        size = self.without_antialias(images).shape[-2:]  # torchvision's choice; exporters drop the images themselves
        return resize_by_matrices(images, size)


def resize_by_matrices(images: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize as ``interpolate(mode="bilinear", antialias=True)`` does.

    Args:
        images (torch.Tensor): Images ``(B, C, H, W)``, of sizes that may be symbols.
        size (Sequence[int]): Height and width of the result.

    Returns:
        torch.Tensor: Images ``(B, C, *size)``.
    """
    rows, row_sums = _triangles(images, images.shape[2], size[0])
    columns, column_sums = _triangles(images, images.shape[3], size[1])
    # Weights and each result are from 0 to 1 for every size, so that runtimes of 8 or 16 bits hold them.
    images = rows @ images / row_sums
    return images @ columns.T / column_sums.T


def _triangles(images: torch.Tensor, before: int, after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how much each of the pixels adds to each new one ``(after, before)``, and the sums ``(after, 1)``."""
    # Positions are whole numbers, so that a runtime that computes in bfloat16 loses none of them.
    new, old = (2 * torch.arange(size, device=images.device) + 1 for size in (after, before))
    distance = (old * after - new[:, None] * before).abs()
    width = 1 + torch.maximum(old[-1], new[-1])  # twice the larger size, which tracing may know as a tensor only
    # In floats, since OpenVINO 2025.4 turns all 64-bit integers that it clamps into 0.
    weights = (width - distance).to(images.dtype).relu() / width
    return weights, weights.sum(dim=1, keepdim=True)
