# SPDX-License-Identifier: Apache-2.0

"""The scorer: features of all levels in, anomaly map and image score out.

This module checks the arguments and serves NumPy; ``_torch_op`` serves torch; both call ``csrc/`` with addresses and
strides. torch is not imported unless the caller has.
"""

import operator
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from . import _core

if TYPE_CHECKING:
    import torch

    Arrays = Sequence[np.ndarray[Any, Any]] | Mapping[str, np.ndarray[Any, Any]]
    Tensors = Sequence[torch.Tensor] | Mapping[str, torch.Tensor]

MAX_LEVELS = 8
# By dtype of the features: that of map and score.
OUTPUT_DTYPES = {"float32": "float32", "float64": "float64", "float16": "float32", "bfloat16": "float32"}


@overload
def anomaly_map(
    teacher: "Arrays", student: "Arrays", image_size: Sequence[int]
) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]": ...
@overload
def anomaly_map(
    teacher: "Tensors", student: "Tensors", image_size: Sequence[int]
) -> "tuple[torch.Tensor, torch.Tensor]": ...
def anomaly_map(teacher: Any, student: Any, image_size: Sequence[int]) -> tuple[Any, Any]:
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
            the level's name. Torch tensors or NumPy arrays of one dtype (float32, float64, float16 or bfloat16) and
            on one device, in any memory layout. ``C``, ``H`` and ``W`` may differ from level to level.
        student (Sequence | Mapping): Features of the same levels in the same order, of the same shapes.
        image_size (Sequence[int]): Height and width of the map in pixels.

    Returns:
        tuple: The anomaly map ``(B, 1, height, width)``, not negative, and the image scores ``(B,)``, its maxima.
            Tensors for tensors, arrays for arrays; float64 for float64 features, otherwise float32. NaN where a
            feature that a pixel depends on is NaN, and in the score of that image.

    Raises:
        TypeError: If an argument is of the wrong kind, or the dtypes are mixed or not supported.
        ValueError: If shapes, devices, level names or sizes do not fit.

    Note:
        Tensors outside the CPU, and tensors that require gradients while gradients are enabled, are scored by the
        formula above in torch operations: same map, differentiable, but not fused.

    Example:
        >>> import numpy as np
        >>> from anomalib_stfpm_ext import anomaly_map
        >>> teacher = [np.ones((1, 2, 4, 4), np.float32)]
        >>> amap, score = anomaly_map(teacher, [-teacher[0]], image_size=(8, 8))
        >>> amap.shape, score
        ((1, 1, 8, 8), array([2.], dtype=float32))
    """
    names, teacher_levels, student_levels = _pair_levels(teacher, student)
    height, width = check_image_size(image_size)
    torch = sys.modules.get("torch")
    if torch is not None and any(isinstance(level, torch.Tensor) for level in (*teacher_levels, *student_levels)):
        from ._torch_op import anomaly_map as torch_anomaly_map

        check_features(teacher_levels, student_levels, torch.Tensor, names)
        return torch_anomaly_map(teacher_levels, student_levels, height, width)

    teacher_levels = [_as_numpy(level) for level in teacher_levels]
    student_levels = [_as_numpy(level) for level in student_levels]
    check_features(teacher_levels, student_levels, np.ndarray, names)
    batch = teacher_levels[0].shape[0]
    dtype = OUTPUT_DTYPES[dtype_name(teacher_levels[0])]
    amap = np.empty((batch, 1, height, width), dtype)
    score = np.empty((batch,), dtype)
    run_core(
        teacher_levels,
        student_levels,
        amap,
        score,
        address=lambda array: array.__array_interface__["data"][0],
        strides=lambda array: tuple(stride // array.itemsize for stride in array.strides),
        num_threads=torch.get_num_threads() if torch is not None else _cpu_count(),
    )
    return amap, score


def run_core(
    teacher: Sequence[Any],
    student: Sequence[Any],
    amap: Any,
    score: Any,
    *,
    address: Any,
    strides: Any,
    num_threads: int,
) -> None:
    """Hand checked features and allocated outputs to the compiled scorer.

    Args:
        teacher (Sequence): Features ``(B, C, H, W)`` of every level, as ``check_features`` wants them.
        student (Sequence): Likewise.
        amap (Array): Receives the map ``(B, 1, height, width)``, contiguous.
        score (Array): Receives the scores ``(B,)``, contiguous.
        address (Callable): Gives the address of an array's first element.
        strides (Callable): Gives an array's strides in elements.
        num_threads (int): How many threads may work.
    """
    levels = [
        (address(t), address(s), *t.shape[1:], *strides(t), *strides(s)) for t, s in zip(teacher, student, strict=True)
    ]
    batch, _, height, width = amap.shape
    _core.anomaly_map(dtype_name(teacher[0]), levels, batch, height, width, address(amap), address(score), num_threads)


def dtype_name(array: Any) -> str:
    """Name an array's or tensor's dtype as NumPy does: ``float32``, not ``torch.float32``."""
    return str(array.dtype).removeprefix("torch.")


def check_features(
    teacher: Sequence[Any], student: Sequence[Any], kind: type, names: Sequence[Any] = range(MAX_LEVELS)
) -> None:
    """Check that the scorer may read these features.

    Args:
        teacher (Sequence): Features of the teacher.
        student (Sequence): Features of the student.
        kind (type): What every one of them must be an instance of.
        names (Sequence): What to call each level in messages: its name or, by default, its index.

    Raises:
        TypeError: If one is not of this kind, or of an unsupported or other dtype than the first.
        ValueError: If shapes or devices do not fit.
    """
    if len(teacher) != len(student):
        _fail(ValueError, "student", f"as many levels as the teacher, {len(teacher)}", len(student))
    if not 1 <= len(teacher) <= MAX_LEVELS:
        _fail(ValueError, "teacher", f"1 to {MAX_LEVELS} levels", len(teacher))
    first = teacher[0]
    for name, t, s in zip(names, teacher, student, strict=False):
        for side, level in (("teacher", t), ("student", s)):
            if not isinstance(level, kind):
                _fail(TypeError, f"{side}[{name!r}]", _qualified(kind), _qualified(type(level)))
            if str(getattr(level, "layout", "torch.strided")) != "torch.strided":
                _fail(TypeError, f"{side}[{name!r}]", "a strided tensor", level.layout)
            if level.dtype != first.dtype or dtype_name(level) not in OUTPUT_DTYPES:
                wanted = dtype_name(first) if dtype_name(first) in OUTPUT_DTYPES else " or ".join(OUTPUT_DTYPES)
                _fail(TypeError, f"{side}[{name!r}]", f"dtype {wanted}, as the first level has", dtype_name(level))
            if level.ndim != 4:
                _fail(ValueError, f"{side}[{name!r}]", "shape (B, C, H, W)", tuple(level.shape))
            device = getattr(level, "device", None)
            if device != getattr(first, "device", None):
                _fail(ValueError, f"{side}[{name!r}]", f"device {first.device}, as the first level has", device)
        if t.shape != s.shape:
            _fail(ValueError, f"student[{name!r}]", f"the teacher's shape {tuple(t.shape)}", tuple(s.shape))
        if t.shape[0] != first.shape[0]:
            _fail(ValueError, f"teacher[{name!r}]", f"the first level's batch of {first.shape[0]}", tuple(t.shape))
        if 0 in t.shape[1:]:
            _fail(ValueError, f"teacher[{name!r}]", "at least one channel, row and column", tuple(t.shape))


def _pair_levels(teacher: Any, student: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Return names or indices of the levels, and both sides' features as lists."""
    if isinstance(teacher, Mapping) and isinstance(student, Mapping):
        if list(teacher) != list(student):
            _fail(ValueError, "student", f"the teacher's levels {list(teacher)} in this order", list(student))
        return list(teacher), list(teacher.values()), list(student.values())
    for side, levels in (("teacher", teacher), ("student", student)):
        if not isinstance(levels, Sequence) or isinstance(levels, str):
            _fail(TypeError, side, "a sequence of features, or both sides as mappings", _qualified(type(levels)))
    return list(range(len(teacher))), list(teacher), list(student)


def check_image_size(image_size: Any) -> tuple[int, int]:
    """Return height and width as integers, or raise an error that names ``image_size``."""
    try:
        height, width = (operator.index(size) for size in image_size)
    except (TypeError, ValueError):
        _fail(TypeError, "image_size", "two whole numbers (height, width)", repr(image_size))
    if height < 1 or width < 1:
        _fail(ValueError, "image_size", "a height and a width of at least 1", (height, width))
    return height, width


def _as_numpy(level: Any) -> Any:
    """Return the level as an array that the scorer can address; copies only what lies askew in memory."""
    if not isinstance(level, np.ndarray):
        return level
    if not level.flags.aligned or any(stride % level.itemsize for stride in level.strides):
        return level.copy()
    return level


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _fail(error: type[Exception], argument: str, wanted: object, got: object) -> None:
    msg = f"{argument}: wanted {wanted}, got {got}"
    raise error(msg)
