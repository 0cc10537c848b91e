# SPDX-License-Identifier: Apache-2.0

"""The scorer as the torch operators ``anomalib_stfpm_ext::anomaly_map`` and ``anomaly_map_out``.

The formula of ``reference`` serves gradients, exporters and devices without a kernel of their own.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from .._compat.torch import current_stream, is_tracing, is_transformed, register_once
from ..errors import fail
from . import native
from .arguments import Options, check_call, output_shapes
from .reference import formula, output_dtype

_INPUTS = "Tensor[] teacher, Tensor[] student"
_OPTIONS = "float[]? weights=None, str combine='product', SymInt[]? combine_size=None"
_OPERATORS = torch.ops.anomalib_stfpm_ext
Tensors = Sequence[torch.Tensor]
TENSORS = native.Access(torch.Tensor.data_ptr, torch.Tensor.stride)


def anomaly_map(
    teacher: Tensors,
    student: Tensors,
    image_size: Sequence[int],
    options: tuple[Any, Any, Any, Any],
    out: Sequence[torch.Tensor] | None,
) -> tuple[torch.Tensor, ...]:
    """Score features of any kind, which the operators check; see :func:`anomalib_stfpm_ext.anomaly_map`."""
    differentiable = _is_differentiable(teacher, student)
    if out is not None and differentiable:
        fail(ValueError, "out", "None where gradients are required", "memory that has none")
    if out is None and (differentiable or _is_exported_without_operators()):
        symbols = torch.compiler.is_compiling()
        return formula(
            teacher, student, *check_call(teacher, student, torch.Tensor, image_size, options, symbols=symbols)
        )
    weights, combine, combine_size, keeps_levels = options
    weights = None if weights is None else [float(weight) for weight in weights]
    keywords = {"weights": weights, "combine": combine, "combine_size": combine_size}
    if out is None:
        return tuple(
            _OPERATORS.anomaly_map.default(teacher, student, *image_size, level_maps=bool(keeps_levels), **keywords)
        )
    memory: tuple[Any, ...] = tuple(out) if keeps_levels else (*out, None)
    amap, score, level_maps = memory
    if amap.shape[2:] != torch.Size(image_size):  # the operator takes the size from the map
        fail(ValueError, "out[0]", f"a map of {tuple(image_size)} pixels", tuple(amap.shape))
    _OPERATORS.anomaly_map_out.default(teacher, student, amap=amap, score=score, level_maps=level_maps, **keywords)
    return tuple(out)


def _is_differentiable(teacher: Tensors, student: Tensors) -> bool:
    """Whether gradients may be needed. An exported program gives none, whatever mode it was exported in."""
    if is_transformed():
        return True
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    return any(level.requires_grad for level in (*teacher, *student))


def has_kernel(device: torch.device) -> bool:
    """Whether this build has kernels of its own that run on a device."""
    return why_no_kernel(device) is None


def why_no_kernel(device: torch.device) -> str | None:
    """Say why this build has no kernels that run on a device.

    A CUDA device is tried once. ``torch.compile`` cannot follow the trial: until it was made, kernels are assumed to
    run, and an error says if they do not.

    Args:
        device (torch.device): The device.

    Returns:
        str | None: The reason, or ``None`` where they run.
    """
    if device.type == "cpu":
        return None if native.is_built else "this installation has no compiled scorer"
    if device.type != "cuda" or torch.version.hip:  # which torch calls cuda too
        return f"there is no scorer for {'ROCm' if torch.version.hip else device.type}"
    if not native.cuda_architectures:
        return "this build has no CUDA scorer"
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _why_not_on_cuda and not torch.compiler.is_compiling():
        _why_not_on_cuda[index] = _try_cuda(index)
    return _why_not_on_cuda.get(index)


_why_not_on_cuda: dict[int, str | None] = {}  # by index of the device


def _try_cuda(index: int) -> str | None:
    try:
        capability = torch.cuda.get_device_capability(index)
        if not any(_runs_on(capability, architecture) for architecture in native.cuda_architectures.split(", ")):
            held = f"this build holds CUDA code for {native.cuda_architectures} only"
            return f"device {index} has compute capability {capability[0]}.{capability[1]}, and {held}"
        native.try_cuda(index)
    except Exception as error:  # the scorer would raise the same
        return str(error)
    return None


def _runs_on(capability: tuple[int, int], architecture: str) -> bool:
    """Whether a device runs code for an architecture, such as ``"90"``, ``"90a"`` or ``"90 (PTX)"``."""
    parts = re.fullmatch(r"(\d+)(\d)([af]?)( \(PTX\))?", architecture)
    if parts is None:
        return True  # "native" and the like: the device is asked next
    built = int(parts[1]), int(parts[2])
    if parts[3] == "a":
        return capability == built
    goes_beyond = parts[4] is not None and not parts[3]  # the major version: machine code and code of a family do not
    return capability >= built and (goes_beyond or capability[0] == built[0])


def check_kernel(device: torch.device) -> None:
    """Raise an error where the build has no kernels for the features' device."""
    reason = why_no_kernel(device)
    if reason is not None:
        fail(ValueError, "teacher[0]", f"features on the CPU, since {reason} (docs/install.md)", device)


def _is_exported_without_operators() -> bool:
    """Whether TorchScript or ONNX is recording this call; they do not know our operators."""
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return is_tracing()


def _allocate(teacher: Tensors, image_size: Sequence[int], options: Options) -> list[torch.Tensor]:
    dtype, device = output_dtype(teacher), teacher[0].device
    shapes = output_shapes(teacher, image_size, options)
    return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]


def _check(
    teacher: Tensors,
    student: Tensors,
    image_size: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    combine: str = "product",
    combine_size: Sequence[int] | None = None,
    level_maps: bool = False,
    **more: Any,
) -> tuple[tuple[int, int], Options]:
    """Check a call of an operator. The defaults are the schema's, which torch does not pass on."""
    options = weights, combine, combine_size, level_maps
    return check_call(teacher, student, torch.Tensor, image_size, options, **more)


def _fake(teacher: Tensors, student: Tensors, height: int, width: int, **options: Any) -> list[torch.Tensor]:
    return _allocate(teacher, *_check(teacher, student, (height, width), symbols=True, **options))


def _fused(teacher: Tensors, student: Tensors, height: int, width: int, **options: Any) -> list[torch.Tensor]:
    image_size, checked = _check(teacher, student, (height, width), **options)
    outputs = _allocate(teacher, image_size, checked)
    _run(teacher, student, outputs, checked)
    return outputs


def _default(teacher: Tensors, student: Tensors, height: int, width: int, **options: Any) -> list[torch.Tensor]:
    return list(formula(teacher, student, *_check(teacher, student, (height, width), **options)))


def _check_out(
    teacher: Tensors,
    student: Tensors,
    *,
    amap: torch.Tensor,
    score: torch.Tensor,
    level_maps: torch.Tensor | None = None,
    **more: Any,
) -> tuple[list[torch.Tensor], tuple[int, int], Options]:
    """Check a call with the caller's memory, and return this memory, the image's size and the options."""
    if amap.ndim != 4:
        fail(ValueError, "amap", "shape (B, 1, height, width)", tuple(amap.shape))
    out = [amap, score] if level_maps is None else [amap, score, level_maps]
    return out, *_check(teacher, student, amap.shape[2:], level_maps=level_maps is not None, out=out, **more)


def _fused_out(teacher: Tensors, student: Tensors, **arguments: Any) -> None:
    out, _, options = _check_out(teacher, student, **arguments)
    _run(teacher, student, out, options)


def _default_out(teacher: Tensors, student: Tensors, **arguments: Any) -> None:
    out, image_size, options = _check_out(teacher, student, **arguments)
    for output, result in zip(out, formula(teacher, student, image_size, options), strict=True):
        output.copy_(result)


def _fake_out(teacher: Tensors, student: Tensors, **arguments: Any) -> None:
    _check_out(teacher, student, symbols=True, **arguments)


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


def _register(library: Any) -> None:
    # Without weights, each level's is 1. The results: map, scores and, if asked for, level maps.
    library.define(
        f"anomaly_map({_INPUTS}, SymInt height, SymInt width, *, {_OPTIONS}, bool level_maps=False) -> Tensor[]"
    )
    library.define(
        f"anomaly_map_out({_INPUTS}, *, {_OPTIONS}, "
        "Tensor(a!) amap, Tensor(b!) score, Tensor(c!)? level_maps=None) -> ()"
    )
    # Library.impl, since register_kernel wraps the kernel in a guard that costs microseconds at every call.
    for device in ("CPU", "CUDA") if native.is_built else ():
        library.impl("anomaly_map", _fused, device)
        library.impl("anomaly_map_out", _fused_out, device)
    library.impl("anomaly_map", _default, "CompositeExplicitAutograd")  # devices without a kernel of their own
    library.impl("anomaly_map_out", _default_out, "CompositeExplicitAutograd")
    torch.library.register_fake("anomalib_stfpm_ext::anomaly_map", _fake)
    torch.library.register_fake("anomalib_stfpm_ext::anomaly_map_out", _fake_out)


register_once("anomaly_map", _register)
