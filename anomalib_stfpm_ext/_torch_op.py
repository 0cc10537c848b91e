# SPDX-License-Identifier: Apache-2.0

"""The scorer as the torch operator ``anomalib_stfpm_ext::anomaly_map``, and its formula in plain torch operations."""

import torch
from torch.nn import functional as F

from .scorer import OUTPUT_DTYPES, check_features, check_image_size, dtype_name, run_core

_OPERATOR = "anomalib_stfpm_ext::anomaly_map"

torch.library.define(
    _OPERATOR, "(Tensor[] teacher, Tensor[] student, SymInt height, SymInt width) -> (Tensor amap, Tensor score)"
)


def anomaly_map(
    teacher: list[torch.Tensor], student: list[torch.Tensor], height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score checked features; see :func:`anomalib_stfpm_ext.anomaly_map`."""
    needs_grad = torch.is_grad_enabled() and any(level.requires_grad for level in (*teacher, *student))
    # ONNX and TorchScript know no operator of ours, and it has no gradient.
    if needs_grad or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return anomaly_map_formula(teacher, student, height, width)
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.anomalib_stfpm_ext.anomaly_map(
        teacher, student, height, width
    )
    return result


def anomaly_map_formula(
    teacher: list[torch.Tensor], student: list[torch.Tensor], height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """State ``csrc/anomaly_map_math.h`` in torch operations: differentiable, exportable, on any device."""
    dtype = _output_dtype(teacher)
    amap = None
    for t, s in zip(teacher, student, strict=True):
        difference = F.normalize(t.to(dtype)) - F.normalize(s.to(dtype))
        distance = 0.5 * difference.square().sum(dim=1, keepdim=True)
        level_map = F.interpolate(distance, size=(height, width), mode="bilinear", align_corners=False)
        amap = level_map if amap is None else amap * level_map
    assert amap is not None
    return amap, amap.amax(dim=(1, 2, 3))


def _cpu(
    teacher: list[torch.Tensor], student: list[torch.Tensor], height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    amap, score = _outputs(teacher, student, height, width)
    run_core(
        teacher,
        student,
        amap,
        score,
        address=torch.Tensor.data_ptr,
        strides=torch.Tensor.stride,
        num_threads=torch.get_num_threads(),
    )
    return amap, score


def _outputs(
    teacher: list[torch.Tensor], student: list[torch.Tensor], height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    check_features(teacher, student, torch.Tensor)
    check_image_size((height, width))
    batch, dtype = teacher[0].shape[0], _output_dtype(teacher)
    return teacher[0].new_empty((batch, 1, height, width), dtype=dtype), teacher[0].new_empty((batch,), dtype=dtype)


def _output_dtype(features: list[torch.Tensor]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, OUTPUT_DTYPES[dtype_name(features[0])])
    return dtype


torch.library.register_kernel(_OPERATOR, "cpu", _cpu)
torch.library.register_kernel(_OPERATOR, "default", anomaly_map_formula)  # devices without a kernel of their own
torch.library.register_fake(_OPERATOR, _outputs)  # what torch.compile and torch.export learn without running it
