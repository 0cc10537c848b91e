# SPDX-License-Identifier: Apache-2.0

"""The scorer: features of all levels in, anomaly map and image score out.

This module serves NumPy and hands torch's tensors to ``ops.anomaly_map``; both call ``csrc/`` with addresses and
strides. torch is not imported unless the caller has.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from .errors import fail
from .ops import native
from .ops.arguments import OUTPUT_DTYPES, Combination, check_call, dtype_name, output_shapes, pair_levels

if TYPE_CHECKING:
    import torch

    NumpyArray = np.ndarray[Any, Any]
    Arrays = Sequence[NumpyArray] | Mapping[str, NumpyArray]
    Tensors = Sequence[torch.Tensor] | Mapping[str, torch.Tensor]


@overload
def anomaly_map(
    teacher: "Arrays",
    student: "Arrays",
    image_size: Sequence[int],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    combine: Combination = "product",
    combine_size: Sequence[int] | None = None,
    level_maps: bool = False,
    out: "Sequence[NumpyArray] | None" = None,
) -> "tuple[NumpyArray, ...]": ...
@overload
def anomaly_map(
    teacher: "Tensors",
    student: "Tensors",
    image_size: Sequence[int],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    combine: Combination = "product",
    combine_size: Sequence[int] | None = None,
    level_maps: bool = False,
    out: "Sequence[torch.Tensor] | None" = None,
) -> "tuple[torch.Tensor, ...]": ...
def anomaly_map(
    teacher: Any,
    student: Any,
    image_size: Sequence[int],
    *,
    weights: Any = None,
    combine: Combination = "product",
    combine_size: Sequence[int] | None = None,
    level_maps: bool = False,
    out: Any = None,
) -> tuple[Any, ...]:
    r"""Score images by the features of teacher and student (arXiv 2103.04257, section 3.3).

    Equivalent to, but in two passes over memory instead of some 35 kernels::

        maps = [
            interpolate(0.5 * (normalize(t) - normalize(s)).square().sum(1, keepdim=True), image_size, mode="bilinear")
            for t, s in zip(teacher, student)
        ]
        anomaly_map = prod(maps)
        score = anomaly_map.amax((1, 2, 3))

    Args:
        teacher (Sequence | Mapping): Features of 1 to 8 levels, each ``(B, C, H, W)``: a sequence, or a mapping from
            the level's name. Torch tensors; or NumPy arrays, or what NumPy can view by DLPack or the buffer protocol.
            All of one dtype (float32, float64, float16 or bfloat16) and on one device, in any memory layout. ``C``,
            ``H`` and ``W`` may differ from level to level.
        student (Sequence | Mapping): Features of the same levels in the same order, of the same shapes.
        image_size (Sequence[int]): Height and width of the map in pixels.
        weights (Sequence[float] | Mapping[str, float] | None): A weight for each level, not negative: the exponent of
            its map in the product, its factor in the sum and the maximum. Defaults to 1 for each.
        combine (str): ``"product"`` of the levels' maps as in the paper, or their ``"sum"`` or ``"maximum"``.
        combine_size (Sequence[int] | None): Height and width to which the levels' maps are stretched before they are
            combined; the result is then stretched to ``image_size``. Defaults to ``image_size``, as in the paper; its
            authors' code combines at the finest level's size, ``(64, 64)`` for images of 256x256.
        level_maps (bool): Whether to return each level's own map too.
        out (Sequence | None): Contiguous memory for all that is returned, of the right shapes and dtype. It may
            overlap neither the features nor itself.

    Returns:
        tuple: The anomaly map ``(B, 1, height, width)``, not negative, and the image scores ``(B,)``, its maxima; with
            ``level_maps`` also the upsampled distances of each level ``(B, levels, *combine_size)``, without weights.
            Tensors for tensors, otherwise arrays; float64 for float64 features, otherwise float32. NaN where a
            feature that a pixel depends on is NaN, and in the score of that image.

    Raises:
        TypeError: If an argument is of the wrong kind, or the dtypes are mixed or not supported.
        ValueError: If shapes, devices, level names, sizes, options or the memory of ``out`` do not fit; on CUDA also if
            the build has no scorer that runs on the device, or the map or a level has more than 2**30 positions.
        RuntimeError: If CUDA fails.

    Note:
        Tensors that require gradients while gradients are enabled, and tensors on devices other than the CPU and CUDA,
        are scored by the formula above in torch operations: same map, differentiable, but not fused.

    Example:
        >>> import numpy as np
        >>> from anomalib_stfpm_ext import anomaly_map
        >>> teacher = [np.ones((1, 2, 4, 4), np.float32)]
        >>> amap, score = anomaly_map(teacher, [-teacher[0]], image_size=(8, 8))
        >>> amap.shape, score
        ((1, 1, 8, 8), array([2.], dtype=float32))
    """
    names, teacher_levels, student_levels = pair_levels(teacher, student)
    if isinstance(weights, Mapping):
        if list(weights) != names:
            fail(ValueError, "weights", f"the levels {names} in this order", list(weights))
        weights = list(weights.values())
    options = weights, combine, combine_size, level_maps
    torch = sys.modules.get("torch")
    if torch is not None and any(isinstance(level, torch.Tensor) for level in teacher_levels[:1] + student_levels[:1]):
        try:
            from .ops import anomaly_map as operators

            return operators.anomaly_map(teacher_levels, student_levels, image_size, options, out)
        except Exception:
            # The operators have checked it, without the levels' names; what torch refused itself is said better here.
            check_call(teacher_levels, student_levels, torch.Tensor, image_size, options, out, names)
            raise

    teacher_levels = [_as_numpy(level) for level in teacher_levels]
    student_levels = [_as_numpy(level) for level in student_levels]
    image_size, checked = check_call(teacher_levels, student_levels, np.ndarray, image_size, options, out, names)
    for argument, arrays in (("teacher", teacher_levels), ("student", student_levels), ("out", out or ())):
        if any(isinstance(array, np.ma.MaskedArray) for array in arrays):
            fail(TypeError, argument, "arrays without a mask, which nothing here heeds", "a masked array")
    if out is None:
        dtype = OUTPUT_DTYPES[dtype_name(teacher_levels[0].dtype)]
        out = [np.empty(shape, dtype) for shape in output_shapes(teacher_levels, image_size, checked)]
    if native.is_built:
        call = native.scorer_call(teacher_levels, student_levels, out, checked, _ARRAYS)
        native.anomaly_map(call, torch.get_num_threads() if torch is not None else cpu_count())
    else:
        _score_by_torch(teacher_levels, student_levels, image_size, checked, out)
    return tuple(out)


def _score_by_torch(
    teacher: "Sequence[NumpyArray]", student: "Sequence[NumpyArray]", image_size: Sequence[int], options: Any, out: Any
) -> None:
    import torch

    from .ops.reference import formula

    def tensors(levels: "Sequence[NumpyArray]") -> "list[torch.Tensor]":
        # Copies, since tensors know neither arrays that are read-only nor negative strides.
        dtype = getattr(torch, dtype_name(levels[0].dtype))
        return [torch.from_numpy(level.copy().view(f"i{level.itemsize}")).view(dtype) for level in levels]

    for memory, result in zip(out, formula(tensors(teacher), tensors(student), image_size, options), strict=True):
        np.copyto(memory, result.numpy())


def _as_numpy(level: Any) -> Any:
    """View the level as an array that the scorer can address; copies only arrays that are not aligned."""
    if not isinstance(level, np.ndarray):
        if hasattr(level, "__dlpack__"):
            level = np.from_dlpack(level)
        else:
            try:
                level = np.asarray(memoryview(level))
            except TypeError:
                return level  # for check_call to refuse
    if not level.flags.aligned or any(stride % level.itemsize for stride in level.strides):
        return level.copy()
    return level


def _address(array: "NumpyArray") -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _strides(array: "NumpyArray") -> tuple[int, ...]:
    size, (batch, channels, rows, columns) = array.itemsize, array.strides
    return batch // size, channels // size, rows // size, columns // size  # a generator takes twice as long


_ARRAYS = native.Access(_address, _strides)


def cpu_count() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
