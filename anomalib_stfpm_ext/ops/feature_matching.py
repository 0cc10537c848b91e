# SPDX-License-Identifier: Apache-2.0

"""The fused loss as the torch operators ``anomalib_stfpm_ext::feature_matching_loss`` and ``..._backward``."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from .._compat.torch import register_once
from ..errors import fail
from . import arguments, native
from .anomaly_map import TENSORS, check_kernel, cuda_queue
from .arguments import OUTPUT_DTYPES, dtype_name

Tensors = Sequence[torch.Tensor]


def _allocate(teacher: Tensors, student: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the features, and return memory for the loss and the scalars."""
    arguments.check_features(teacher, student, torch.Tensor)
    options: dict[str, Any] = {
        "dtype": getattr(torch, OUTPUT_DTYPES[dtype_name(teacher[0].dtype)]),
        "device": teacher[0].device,
    }
    return torch.empty((), **options), torch.empty(_scalars_shape(teacher), **options)


def _scalars_shape(teacher: Tensors) -> tuple[int, int]:
    return 2, sum(level.shape[0] * level.shape[2] * level.shape[3] for level in teacher)


def _fused(teacher: Tensors, student: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    loss, scalars = _allocate(teacher, student)
    check_kernel(loss.device)
    call, device = native.loss_call(teacher, student, scalars, TENSORS), loss.device
    if len(teacher[0]) == 0:
        loss.fill_(torch.nan)  # the mean of nothing
    elif device.type == "cpu":
        native.feature_matching(call, loss.data_ptr(), torch.get_num_threads())
    else:
        partial_sums = torch.empty(native.most_partial_sums, dtype=torch.float64, device=device)
        native.feature_matching_cuda(call, loss.data_ptr(), partial_sums.data_ptr(), cuda_queue(device))
    return loss, scalars


def _allocate_gradients(
    upstream: torch.Tensor, teacher: Tensors, student: Tensors, scalars: torch.Tensor
) -> list[torch.Tensor]:
    """Check the arguments, and return memory for the gradients, laid out as the student's features are."""
    arguments.check_features(teacher, student, torch.Tensor)
    dtype, device = getattr(torch, OUTPUT_DTYPES[dtype_name(teacher[0].dtype)]), teacher[0].device
    for name, tensor, shape in (("upstream", upstream, ()), ("scalars", scalars, _scalars_shape(teacher))):
        if (tensor.dtype, tensor.device) != (dtype, device):
            fail(ValueError, name, f"{dtype} on {device}", f"{tensor.dtype} on {tensor.device}")
        if tensor.shape != shape or not tensor.is_contiguous():
            fail(ValueError, name, f"shape {shape}, contiguous", f"{tuple(tensor.shape)}, strides {tensor.stride()}")
    return [torch.empty_like(level) for level in student]


def _fused_backward(
    upstream: torch.Tensor, teacher: Tensors, student: Tensors, scalars: torch.Tensor
) -> list[torch.Tensor]:
    gradients = _allocate_gradients(upstream, teacher, student, scalars)
    check_kernel(upstream.device)
    call, device = native.loss_call(teacher, student, scalars, TENSORS), upstream.device
    targets = native.Gradients([level.data_ptr() for level in gradients], [level.stride() for level in gradients])
    if len(teacher[0]) == 0:
        pass
    elif device.type == "cpu":
        native.feature_matching_backward(call, upstream.data_ptr(), targets, torch.get_num_threads())
    else:
        native.feature_matching_backward_cuda(call, upstream.data_ptr(), targets, cuda_queue(device))
    return gradients


def _keep(ctx: Any, inputs: tuple[Tensors, Tensors], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher, student = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # torch would make zeros for the scalars
    ctx.save_for_backward(*teacher, *student, output[1])


def _differentiate(ctx: Any, upstream: torch.Tensor | None, _: Any) -> tuple[list[None], Tensors | list[None]]:
    *features, scalars = ctx.saved_tensors
    levels = len(features) // 2
    if upstream is None:
        return [None] * levels, [None] * levels
    gradients = torch.ops.anomalib_stfpm_ext.feature_matching_loss_backward.default(
        upstream, features[:levels], features[levels:], scalars
    )
    return [None] * levels, gradients


def _refuse(*_: Any) -> NoReturn:
    msg = "the fused loss has no second derivative: differentiate anomalib_stfpm_ext.loss.formula twice instead"
    raise NotImplementedError(msg)


def _register(library: Any) -> None:
    # Besides the features, backward needs the scalars: two for each position of each level, (2, positions).
    library.define("feature_matching_loss(Tensor[] teacher, Tensor[] student) -> (Tensor loss, Tensor scalars)")
    library.define(
        "feature_matching_loss_backward(Tensor upstream, Tensor[] teacher, Tensor[] student, Tensor scalars)"
        " -> Tensor[]"
    )
    for device in ("CPU", "CUDA") if native.is_built else ():
        library.impl("feature_matching_loss", _fused, device)
        library.impl("feature_matching_loss_backward", _fused_backward, device)
    torch.library.register_fake("anomalib_stfpm_ext::feature_matching_loss", _allocate)
    torch.library.register_fake("anomalib_stfpm_ext::feature_matching_loss_backward", _allocate_gradients)
    torch.library.register_autograd("anomalib_stfpm_ext::feature_matching_loss", _differentiate, setup_context=_keep)
    torch.library.register_autograd("anomalib_stfpm_ext::feature_matching_loss_backward", _refuse)


register_once("feature_matching_loss", _register)
