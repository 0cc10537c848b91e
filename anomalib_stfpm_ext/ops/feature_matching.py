# SPDX-License-Identifier: Apache-2.0

"""The fused loss as the torch operators ``anomalib_stfpm_ext::feature_matching_loss`` and ``..._backward``."""

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from .._compat.torch import register_once
from ..errors import fail
from . import arguments, native
from .anomaly_map import TENSORS, check_kernel, cuda_queue
from .arguments import OUTPUT_DTYPES, dtype_name
from .reference import rank_of_threshold

Tensors = Sequence[torch.Tensor]


def _allocate(teacher: Tensors, student: Tensors, hard_share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the arguments, and return memory for the loss and the scalars."""
    if not 0 < hard_share <= 1:
        fail(ValueError, "hard_share", "a number above 0 and of at most 1", hard_share)
    arguments.check_features(teacher, student, torch.Tensor)
    options: dict[str, Any] = {
        "dtype": getattr(torch, OUTPUT_DTYPES[dtype_name(teacher[0].dtype)]),
        "device": teacher[0].device,
    }
    return torch.empty((), **options), torch.empty(_scalars_shape(teacher), **options)


def _scalars_shape(teacher: Tensors) -> tuple[int, int]:
    return 3, sum(_positions(teacher))


def _positions(teacher: Tensors) -> list[int]:
    return [level.shape[0] * level.shape[2] * level.shape[3] for level in teacher]


def _fused(teacher: Tensors, student: Tensors, hard_share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    loss, scalars = _allocate(teacher, student, hard_share)
    check_kernel(loss.device)
    call, device = native.loss_call(teacher, student, scalars, TENSORS), loss.device
    if len(teacher[0]) == 0:
        loss.fill_(torch.nan)  # the mean of nothing
    elif device.type == "cpu":
        native.feature_matching(call, loss.data_ptr(), torch.get_num_threads())
    else:
        partial_sums = torch.empty(native.most_partial_sums, dtype=torch.float64, device=device)
        native.feature_matching_cuda(call, loss.data_ptr(), partial_sums.data_ptr(), cuda_queue(device))
    if hard_share < 1 and len(teacher[0]) > 0:
        _count_hardest(loss, scalars, _positions(teacher), hard_share)
    return loss, scalars


def _count_hardest(loss: torch.Tensor, scalars: torch.Tensor, positions: list[int], share: float) -> None:
    """Make the loss that of the hardest positions, as ``reference.mean_of_hardest`` has it.

    Backward divides by the number of all positions, which the factors make good.
    """
    loss.zero_()
    for count, (factors, _, values) in zip(positions, torch.split(scalars, positions, dim=1), strict=True):
        is_easy = values < _threshold(values, share)
        hard_count = (count - is_easy.count_nonzero()).to(values.dtype)
        loss += values.masked_fill_(is_easy, 0).sum() / hard_count
        factors.masked_fill_(is_easy, 0).mul_(count / hard_count)


def _threshold(values: torch.Tensor, share: float) -> torch.Tensor:
    rank = rank_of_threshold(len(values), share)
    if values.device.type == "cpu":  # five times as fast as torch's
        return torch.from_numpy(np.partition(values.numpy(), rank - 1))[rank - 1]
    return values.kthvalue(rank).values


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


def _keep(ctx: Any, inputs: tuple[Tensors, Tensors, float], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher, student, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # torch would make zeros for the scalars
    ctx.save_for_backward(*teacher, *student, output[1])


def _differentiate(ctx: Any, upstream: torch.Tensor | None, _: Any) -> tuple[list[None], Tensors | list[None], None]:
    *features, scalars = ctx.saved_tensors
    levels = len(features) // 2
    if upstream is None:
        return [None] * levels, [None] * levels, None
    gradients = torch.ops.anomalib_stfpm_ext.feature_matching_loss_backward.default(
        upstream, features[:levels], features[levels:], scalars
    )
    return [None] * levels, gradients, None


def _refuse(*_: Any) -> NoReturn:
    msg = "the fused loss has no second derivative: differentiate anomalib_stfpm_ext.loss.formula twice instead"
    raise NotImplementedError(msg)


def _register(library: Any) -> None:
    # Besides the features, backward needs the scalars: factor, projection and value of each position of each level.
    library.define(
        "feature_matching_loss(Tensor[] teacher, Tensor[] student, float hard_share=1.0)"
        " -> (Tensor loss, Tensor scalars)"
    )
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
