# SPDX-License-Identifier: Apache-2.0

"""Max pooling in the inference copy: torch's also finds the place of each maximum, and takes twice as long.

With convolutions in bfloat16, torch's would take a fifth of a ResNet's time.
"""

from typing import TypeGuard

import torch
from torch import nn

from ..ops import native
from ..ops.anomaly_map import TENSORS
from ..ops.arguments import dtype_name


class InferenceMaxPool2d(nn.Module):
    """Max pooling without gradients on a CPU; torch pools features whose memory layout is not channels_last.

    Args:
        pooling (nn.MaxPool2d): torch's module, for which :func:`is_plain` holds.
    """

    def __init__(self, pooling: nn.MaxPool2d) -> None:
        super().__init__()
        self.pooling = pooling.forward  # no child, so that a trace takes this module for one step
        self.window, self.stride, self.padding = int(pooling.kernel_size), int(pooling.stride), int(pooling.padding)  # type: ignore[arg-type]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Compute the maxima.

        Args:
            features (torch.Tensor): Features ``(B, C, H, W)``.

        Returns:
            torch.Tensor: Their maxima ``(B, C, H', W')``; NaN where a window has one.
        """
        if features.device.type != "cpu" or not features.is_contiguous(memory_format=torch.channels_last):
            pooled: torch.Tensor = self.pooling(features)
            return pooled
        batch, channels, *size = features.shape
        pooled_size = [(side + 2 * self.padding - self.window) // self.stride + 1 for side in size]
        shape = (batch, channels, *pooled_size)
        maxima = torch.empty(shape, dtype=features.dtype, device="cpu", memory_format=torch.channels_last)
        address = TENSORS.address
        call = native.PoolingCall(
            dtype_name(features.dtype),
            features.shape,
            pooled_size,
            address(features),
            address(maxima),
            self.window,
            self.stride,
            self.padding,
        )
        native.max_pooling(call, torch.get_num_threads())
        return maxima


def is_plain(module: nn.Module) -> TypeGuard[nn.MaxPool2d]:
    """Tell whether a module pools square windows, without dilation, and gives the maxima alone.

    Args:
        module (nn.Module): The module.

    Returns:
        bool: Whether :class:`InferenceMaxPool2d` can replace it.
    """
    return (
        native.is_built
        and type(module) is nn.MaxPool2d
        and all(isinstance(number, int) for number in (module.kernel_size, module.stride, module.padding))
        and module.dilation == 1
        and not module.return_indices
        and not module.ceil_mode
    )
