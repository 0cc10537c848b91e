# SPDX-License-Identifier: Apache-2.0

"""The scorer as the torch operators ``anomalib_stfpm_ext::anomaly_map`` and ``anomaly_map_out``.

The formula of ``reference`` serves gradients, exporters and devices without a kernel of their own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .._compat.torch import current_stream, is_tracing, is_transformed
from ..errors import fail
from . import arguments, native
from .arguments import Options
from .reference import formula, output_dtype

_INPUTS = "Tensor[] teacher, Tensor[] student"
_OPTIONS = "float[] weights=[], str combine='product', SymInt[]? combine_size=None"
_LIBRARY: Any = torch.library.Library("anomalib_stfpm_ext", "DEF")  # type: ignore[no-untyped-call]
# Without weights, each level's is 1. The results: map, scores and, if asked for, level maps.
_LIBRARY.define(
    f"anomaly_map({_INPUTS}, SymInt height, SymInt width, *, {_OPTIONS}, bool level_maps=False) -> Tensor[]"
)
_LIBRARY.define(
    f"anomaly_map_out({_INPUTS}, *, {_OPTIONS}, Tensor(a!) amap, Tensor(b!) score, Tensor(c!)? level_maps=None) -> ()"
)

Tensors = Sequence[torch.Tensor]
TENSORS = native.Access(torch.Tensor.data_ptr, torch.Tensor.stride)


def anomaly_map(
    teacher: Tensors, student: Tensors, image_size: Sequence[int], options: Options, out: Tensors | None
) -> tuple[torch.Tensor, ...]:
    """Score features of any kind, which the operators and this check; see :func:`anomalib_stfpm_ext.anomaly_map`."""
    if not torch.compiler.is_compiling():  # of symbols the operators check the values, when they run
        image_size, options = arguments.check_sizes(image_size, options)
    differentiable = _is_differentiable(teacher, student)
    weights, combine, combine_size, level_maps = options
    if out is not None:
        if differentiable:
            fail(ValueError, "out", "None where gradients are required", "memory that has none")
        shapes = arguments.output_shapes(teacher, image_size, options)
        arguments.check_outputs(out, torch.Tensor, shapes, output_dtype(teacher), teacher[0].device)
        torch.ops.anomalib_stfpm_ext.anomaly_map_out.default(
            teacher,
            student,
            weights=weights,
            combine=combine,
            combine_size=combine_size,
            amap=out[0],
            score=out[1],
            level_maps=out[2] if level_maps else None,
        )
        return tuple(out)
    if differentiable or _is_exported_without_operators():
        arguments.check_features(teacher, student, torch.Tensor)
        return formula(teacher, student, image_size, options)
    return tuple(
        torch.ops.anomalib_stfpm_ext.anomaly_map.default(
            teacher,
            student,
            *image_size,
            weights=weights,
            combine=combine,
            combine_size=combine_size,
            level_maps=level_maps,
        )
    )


def _is_differentiable(teacher: Tensors, student: Tensors) -> bool:
    """Whether gradients may be wanted. An exported program gives none, whatever mode it was exported in."""
    if is_transformed():
        return True
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    return any(level.requires_grad for level in (*teacher, *student))


def has_kernel(device: torch.device) -> bool:
    """Whether this build has kernels of its own for a device; ROCm, which torch calls cuda too, has none."""
    if device.type == "cpu":
        return native.is_built
    return device.type == "cuda" and bool(native.cuda_architectures) and not torch.version.hip


def check_kernel(device: torch.device) -> None:
    """Raise an error where the build has no kernels for the features' device."""
    if not has_kernel(device):
        wanted = "features on the CPU, since this build has no CUDA scorer (docs/install.md)"
        fail(ValueError, "teacher[0]", wanted, device)


def _is_exported_without_operators() -> bool:
    """Whether TorchScript or ONNX, which know no operator of ours, is recording this call."""
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return is_tracing()


def _allocate(teacher: Tensors, image_size: Sequence[int], options: Options) -> list[torch.Tensor]:
    dtype, device = output_dtype(teacher), teacher[0].device
    shapes = arguments.output_shapes(teacher, image_size, options)
    return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]


def _fake(teacher: Tensors, student: Tensors, height: int, width: int, **options: Any) -> list[torch.Tensor]:
    arguments.check_features(teacher, student, torch.Tensor)
    return _allocate(teacher, (height, width), _options(teacher, **options))


def _fused(teacher: Tensors, student: Tensors, height: int, width: int, **options: Any) -> list[torch.Tensor]:
    arguments.check_features(teacher, student, torch.Tensor)
    image_size, checked = arguments.check_sizes((height, width), _options(teacher, **options))
    outputs = _allocate(teacher, image_size, checked)
    _run(teacher, student, outputs, checked)
    return outputs


def _default(teacher: Tensors, student: Tensors, height: int, width: int, **options: Any) -> list[torch.Tensor]:
    arguments.check_features(teacher, student, torch.Tensor)
    return list(formula(teacher, student, *arguments.check_sizes((height, width), _options(teacher, **options))))


def _check_out(
    teacher: Tensors,
    student: Tensors,
    *,
    amap: torch.Tensor,
    score: torch.Tensor,
    level_maps: torch.Tensor | None = None,
    **options: Any,
) -> tuple[list[torch.Tensor], Options]:
    """Check the arguments, and return the memory for the results and the options."""
    arguments.check_features(teacher, student, torch.Tensor)
    if amap.ndim != 4:
        fail(ValueError, "amap", "shape (B, 1, height, width)", tuple(amap.shape))
    checked = _options(teacher, level_maps=level_maps is not None, **options)
    image_size, checked = arguments.check_sizes(amap.shape[2:], checked)
    shapes = arguments.output_shapes(teacher, image_size, checked)
    out = [amap, score] if level_maps is None else [amap, score, level_maps]
    arguments.check_outputs(out, torch.Tensor, shapes, output_dtype(teacher), teacher[0].device)
    return out, checked


def _fused_out(teacher: Tensors, student: Tensors, **arguments: Any) -> None:
    out, options = _check_out(teacher, student, **arguments)
    _run(teacher, student, out, options)


def _default_out(teacher: Tensors, student: Tensors, **arguments: Any) -> None:
    out, options = _check_out(teacher, student, **arguments)
    image_size = (out[0].shape[2], out[0].shape[3])
    for output, result in zip(out, formula(teacher, student, image_size, options), strict=True):
        output.copy_(result)


def _fake_out(teacher: Tensors, student: Tensors, **arguments: Any) -> None:
    _check_out(teacher, student, **arguments)


def _run(teacher: Tensors, student: Tensors, outputs: Tensors, options: Options) -> None:
    device = teacher[0].device
    check_kernel(device)
    call = native.scorer_call(teacher, student, outputs, options, TENSORS)
    if device.type == "cpu":
        native.anomaly_map(call, torch.get_num_threads())
    else:
        positions = sum(level.shape[2] * level.shape[3] for level in teacher) + math.prod(options.combine_size or (0,))
        scratch = torch.empty(teacher[0].shape[0] * positions, dtype=outputs[0].dtype, device=device)
        native.anomaly_map_cuda(call, scratch.data_ptr(), cuda_queue(device))


def cuda_queue(device: torch.device) -> native.CudaQueue:
    """Return where torch enqueues kernels on a CUDA device now."""
    return native.CudaQueue(device.index, current_stream(device))


def _options(
    teacher: Tensors,
    weights: Sequence[float] = (),
    combine: str = "product",
    combine_size: Sequence[int] | None = None,
    level_maps: bool = False,
) -> Options:
    return arguments.check_options(weights or None, combine, combine_size, level_maps, range(len(teacher)))


# Library.impl, since register_kernel wraps the kernel in a guard that costs microseconds at every call.
for _device in ("CPU", "CUDA") if native.is_built else ():
    _LIBRARY.impl("anomaly_map", _fused, _device)
    _LIBRARY.impl("anomaly_map_out", _fused_out, _device)
_LIBRARY.impl("anomaly_map", _default, "CompositeExplicitAutograd")  # devices without a kernel of their own
_LIBRARY.impl("anomaly_map_out", _default_out, "CompositeExplicitAutograd")
torch.library.register_fake("anomalib_stfpm_ext::anomaly_map", _fake)
torch.library.register_fake("anomalib_stfpm_ext::anomaly_map_out", _fake_out)
