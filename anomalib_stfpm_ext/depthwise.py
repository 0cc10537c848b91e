# SPDX-License-Identifier: Apache-2.0

"""Training in bfloat16 on a CPU: depthwise convolutions, whose gradients oneDNN computes slowly there."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class DepthwiseGradients(TorchFunctionMode):
    """Computes gradients of grouped convolutions in float32 while autocast computes in bfloat16 on a CPU.

    oneDNN 3.12 takes up to 14 times as long for gradients of depthwise convolutions in bfloat16 as in float32, where
    they have a stride or a window of 5x5. With them, EfficientNet-Lite0 would train slower than in float32.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace the call of a grouped convolution that gradients are wanted of."""
        del types
        kwargs = kwargs or {}
        if func is torch.conv2d and not kwargs and len(args) == 7 and _is_slow(*args):
            return _GroupedConvolution.apply(*args)
        return func(*args, **kwargs)


def _is_slow(images: torch.Tensor, weight: torch.Tensor, _bias: Any, _stride: Any, padding: Any, *others: Any) -> bool:
    groups = others[-1]
    return (
        groups > 1
        and images.device.type == "cpu"
        and isinstance(padding, tuple)
        and torch.is_grad_enabled()
        and weight.requires_grad
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


class _GroupedConvolution(torch.autograd.Function):
    """A convolution whose result is bfloat16 and whose gradients are computed in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> torch.Tensor:
        ctx.dtype, ctx.has_bias, ctx.geometry = images.dtype, bias is not None, (stride, padding, dilation, groups)
        images = images.bfloat16()
        ctx.save_for_backward(images, weight)
        return torch.conv2d(images, weight, bias, stride, padding, dilation, groups)  # under autocast still

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
        bias_sizes = [weight.shape[0]] if ctx.has_bias else None
        of_images, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient.float(),
            images.float(),
            weight,
            bias_sizes,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            wanted,
        )
        return None if of_images is None else of_images.to(ctx.dtype), of_weight, of_bias, None, None, None, None
