# SPDX-License-Identifier: Apache-2.0

"""The scorer: features of all levels in, anomaly map and image score out.

This module checks the arguments and serves NumPy; ``_torch_op`` serves torch; both call ``csrc/`` with addresses and
strides. torch is not imported unless the caller has.
"""

import functools
import math
import operator
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, get_args, overload

import numpy as np

from . import _core

if TYPE_CHECKING:
    import torch

    NumpyArray = np.ndarray[Any, Any]
    Arrays = Sequence[NumpyArray] | Mapping[str, NumpyArray]
    Tensors = Sequence[torch.Tensor] | Mapping[str, torch.Tensor]

MAX_LEVELS = 8
MAX_PIXELS = 2**40  # of a map: 4 terabytes, and sizes in bytes stay far from overflowing
# By dtype of the features: that of map and score.
OUTPUT_DTYPES = {"float32": "float32", "float64": "float64", "float16": "float32", "bfloat16": "float32"}
Combination = Literal["product", "sum", "maximum"]
COMBINATIONS = get_args(Combination)


class Options(NamedTuple):
    """How the upsampled distances of the levels become one map; see :func:`anomaly_map`."""

    weights: Sequence[float]
    combine: str
    combine_size: tuple[int, int] | None  # that of the image where there is none
    level_maps: bool


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
            the build has no CUDA scorer, or the map or a level has more than 2**30 positions.
        RuntimeError: If CUDA fails, or the build holds no code for the device's architecture.

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
    options = check_options(weights, combine, combine_size, level_maps, names)
    torch = sys.modules.get("torch")
    if torch is not None and any(isinstance(level, torch.Tensor) for level in teacher_levels[:1] + student_levels[:1]):
        try:
            from . import _torch_op

            return _torch_op.anomaly_map(teacher_levels, student_levels, image_size, options, out)
        except Exception:
            check_features(teacher_levels, student_levels, torch.Tensor, names)  # names what it complains of
            raise

    teacher_levels = [_as_numpy(level) for level in teacher_levels]
    student_levels = [_as_numpy(level) for level in student_levels]
    check_features(teacher_levels, student_levels, np.ndarray, names)
    image_size, options = check_sizes(image_size, options)
    shapes = output_shapes(teacher_levels, image_size, options)
    dtype = OUTPUT_DTYPES[dtype_name(teacher_levels[0].dtype)]
    if out is None:
        out = [np.empty(shape, dtype) for shape in shapes]
    else:
        check_outputs(out, np.ndarray, shapes, np.dtype(dtype))
    num_threads = torch.get_num_threads() if torch is not None else _cpu_count()
    _core.anomaly_map(core_call(teacher_levels, student_levels, out, options, _address, _strides), num_threads)
    return tuple(out)


def core_call(
    teacher: Sequence[Any], student: Sequence[Any], outputs: Sequence[Any], options: Options, address: Any, strides: Any
) -> "_core.Call":
    """Describe a call to the compiled scorer, which raises a ValueError where outputs overlap with anything.

    Args:
        teacher (Sequence): Features ``(B, C, H, W)`` of every level, as ``check_features`` wants them.
        student (Sequence): Likewise.
        outputs (Sequence): Receive map, scores and, if wanted, level maps, as ``output_shapes`` has them; contiguous.
        options (Options): As ``check_options`` returns them.
        address (Callable): Gives the address of an array's first element.
        strides (Callable): Gives an array's strides in elements.

    Returns:
        tuple: The call, for the functions of ``_core``.
    """
    amap, score, *level_maps = outputs
    batch, _, *image_size = amap.shape
    return (
        dtype_name(teacher[0].dtype),
        core_levels(teacher, student, address, strides),
        batch,
        image_size,
        options.combine_size or image_size,
        options.weights,
        options.combine,
        address(amap),
        address(score),
        address(level_maps[0]) if level_maps else 0,
    )


def core_levels(teacher: Sequence[Any], student: Sequence[Any], address: Any, strides: Any) -> "list[_core.Level]":
    """Describe the features of every level for the functions of ``_core``; see :func:`core_call`."""
    return [
        (address(t), address(s), *t.shape[1:], *strides(t), *strides(s)) for t, s in zip(teacher, student, strict=True)
    ]


def output_shapes(teacher: Sequence[Any], image_size: Sequence[int], options: Options) -> list[tuple[int, ...]]:
    """Return the shapes of map, scores and, if wanted, level maps."""
    batch = teacher[0].shape[0]
    shapes: list[tuple[int, ...]] = [(batch, 1, *image_size), (batch,)]
    if options.level_maps:
        shapes.append((batch, len(teacher), *(options.combine_size or image_size)))
    return shapes


@functools.cache
def dtype_name(dtype: object) -> str:
    """Name a dtype of NumPy or torch as NumPy does: ``float32``, not ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def check_features(
    teacher: Sequence[Any], student: Sequence[Any], kind: Any, names: Sequence[Any] = range(MAX_LEVELS)
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
        fail(ValueError, "student", f"as many levels as the teacher, {len(teacher)}", len(student))
    if not 1 <= len(teacher) <= MAX_LEVELS:
        fail(ValueError, "teacher", f"1 to {MAX_LEVELS} levels", len(teacher))
    first, tensors = teacher[0], kind is not np.ndarray
    if not isinstance(first, kind):
        fail(TypeError, f"teacher[{names[0]!r}]", _qualified(kind), _qualified(type(first)))
    dtype, batch = first.dtype, first.shape[:1]
    device = first.device if tensors else None
    if dtype_name(dtype) not in OUTPUT_DTYPES:
        fail(TypeError, f"teacher[{names[0]!r}]", f"dtype {' or '.join(OUTPUT_DTYPES)}", dtype_name(dtype))
    for name, t, s in zip(names, teacher, student, strict=False):
        for side, level in (("teacher", t), ("student", s)):
            if not isinstance(level, kind):
                fail(TypeError, f"{side}[{name!r}]", _qualified(kind), _qualified(type(level)))
            if level.dtype != dtype:
                fail(TypeError, f"{side}[{name!r}]", f"dtype {dtype} like the first level", level.dtype)
            if tensors and str(level.layout) != "torch.strided":
                fail(TypeError, f"{side}[{name!r}]", "a strided tensor", level.layout)
            if tensors and level.device != device:
                fail(ValueError, f"{side}[{name!r}]", f"device {device} like the first level", level.device)
        shape = t.shape
        if len(shape) != 4:
            fail(ValueError, f"teacher[{name!r}]", "shape (B, C, H, W)", tuple(shape))
        if s.shape != shape:
            fail(ValueError, f"student[{name!r}]", f"the teacher's shape {tuple(shape)}", tuple(s.shape))
        if shape[:1] != batch:
            fail(ValueError, f"teacher[{name!r}]", f"the first level's batch of {batch[0]}", tuple(shape))
        if not all(1 <= size < 2**31 for size in shape[1:] if isinstance(size, int)):  # others are torch's symbols
            fail(ValueError, f"teacher[{name!r}]", "1 to 2**31 - 1 channels, rows and columns", tuple(shape))


def check_sizes(image_size: Any, options: Options) -> tuple[tuple[int, int], Options]:
    """Return the image's size and the options with sizes of integers, or raise an error that names the argument."""
    if options.combine_size is not None:
        options = options._replace(combine_size=_check_size("combine_size", options.combine_size))
    return _check_size("image_size", image_size), options


def _check_size(argument: str, size: Any) -> tuple[int, int]:
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        fail(TypeError, argument, "two whole numbers (height, width)", repr(size))
    if not (1 <= height < 2**31 and 1 <= width < 2**31):
        fail(ValueError, argument, "a height and a width of 1 to 2**31 - 1", (height, width))
    if height * width > MAX_PIXELS:
        fail(ValueError, argument, "at most 2**40 pixels", (height, width))
    return height, width


def check_options(weights: Any, combine: Any, combine_size: Any, level_maps: Any, names: Sequence[Any]) -> Options:
    """Return the options with a weight for each level, or raise an error that names the argument.

    The size is for :func:`check_sizes`.
    """
    if combine not in COMBINATIONS:
        fail(ValueError, "combine", " or ".join(map(repr, COMBINATIONS)), repr(combine))
    return Options(_check_weights(weights, names), combine, combine_size, bool(level_maps))


def _check_weights(weights: Any, names: Sequence[Any]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if isinstance(weights, Mapping):
        if list(weights) != list(names):
            fail(ValueError, "weights", f"the levels {list(names)} in this order", list(weights))
        weights = weights.values()
    try:
        weights = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        fail(TypeError, "weights", "a number for each level", repr(weights))
    if len(weights) != len(names) or not all(0 <= weight < math.inf for weight in weights):
        fail(ValueError, "weights", f"{len(names)} finite numbers of at least 0", weights)
    checked: list[float] = weights
    return checked


def check_outputs(out: Any, kind: Any, shapes: Sequence[tuple[int, ...]], dtype: object, device: object = None) -> None:
    """Check memory that the caller supplied; whether it overlaps is for the compiled scorer to see.

    Args:
        out (Sequence): The caller's arrays or tensors.
        kind (type): What each must be an instance of.
        shapes (Sequence[tuple[int, ...]]): What :func:`output_shapes` returned.
        dtype (object): The dtype of all of them.
        device (object): The device of all of them, where there are devices.

    Raises:
        TypeError: If one is of the wrong kind or dtype.
        ValueError: If number, shape, device or layout do not fit, or one cannot be written to.
    """
    if not isinstance(out, Sequence) or len(out) != len(shapes):
        got = len(out) if isinstance(out, Sequence) else _qualified(type(out))
        fail(ValueError, "out", f"a sequence of {len(shapes)}", got)
    for index, (output, shape) in enumerate(zip(out, shapes, strict=True)):
        name = f"out[{index}]"
        if not isinstance(output, kind):
            fail(TypeError, name, _qualified(kind), _qualified(type(output)))
        if output.dtype != dtype:
            fail(TypeError, name, f"dtype {dtype}", output.dtype)
        if tuple(output.shape) != tuple(shape):
            fail(ValueError, name, f"shape {tuple(shape)}", tuple(output.shape))
        if device is not None and output.device != device:
            fail(ValueError, name, f"device {device}", output.device)
        contiguous = (
            output.flags.c_contiguous and output.flags.aligned if kind is np.ndarray else output.is_contiguous()
        )
        if not contiguous:
            fail(
                ValueError,
                name,
                "contiguous memory",
                f"strides {output.strides if kind is np.ndarray else output.stride()}",
            )
        if kind is np.ndarray and not output.flags.writeable:
            fail(ValueError, name, "memory that can be written to", "a read-only array")


def fail(error: type[Exception], argument: str, wanted: object, got: object) -> NoReturn:
    """Raise an error that names the argument, what is wanted and what came."""
    msg = f"{argument}: wanted {wanted}, got {got}"
    raise error(msg)


def pair_levels(teacher: Any, student: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Return names or indices of the levels, and both sides' features as lists; raise an error if they do not pair."""
    if isinstance(teacher, Mapping) and isinstance(student, Mapping):
        if list(teacher) != list(student):
            fail(ValueError, "student", f"the teacher's levels {list(teacher)} in this order", list(student))
        return list(teacher), list(teacher.values()), list(student.values())
    for side, levels in (("teacher", teacher), ("student", student)):
        if not isinstance(levels, Sequence) or isinstance(levels, str):
            fail(TypeError, side, "a sequence of features, or both sides as mappings", _qualified(type(levels)))
    return list(range(len(teacher))), list(teacher), list(student)


def _as_numpy(level: Any) -> Any:
    """View the level as an array that the scorer can address; copies only what lies askew in memory."""
    if not isinstance(level, np.ndarray):
        if hasattr(level, "__dlpack__"):
            level = np.from_dlpack(level)
        else:
            try:
                level = np.asarray(memoryview(level))
            except TypeError:
                return level  # for check_features to refuse
    if not level.flags.aligned or any(stride % level.itemsize for stride in level.strides):
        return level.copy()
    return level


def _address(array: "NumpyArray") -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _strides(array: "NumpyArray") -> tuple[int, ...]:
    return tuple(stride // array.itemsize for stride in array.strides)


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
