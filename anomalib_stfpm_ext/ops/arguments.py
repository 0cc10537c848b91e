# SPDX-License-Identifier: Apache-2.0

"""The arguments of the operators: features, sizes, options and memory for results, checked before csrc/ sees them.

NumPy arrays and torch tensors are told apart by their class alone, so that arrays need no torch.
"""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ..errors import fail

MAX_LEVELS = 8
MAX_PIXELS = 2**40  # of a map: 4 terabytes, and sizes in bytes stay far from overflowing
# The dtype of map and score, by that of the features.
OUTPUT_DTYPES = {"float32": "float32", "float64": "float64", "float16": "float32", "bfloat16": "float32"}
Combination = Literal["product", "sum", "maximum"]
COMBINATIONS = get_args(Combination)


class Options(NamedTuple):
    """How the upsampled distances of the levels become one map; see :func:`anomaly_map`."""

    weights: Sequence[float]
    combine: str
    combine_size: tuple[int, int] | None  # None for the image's size
    level_maps: bool


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


def check_call(
    teacher: Sequence[Any],
    student: Sequence[Any],
    kind: Any,
    image_size: Any,
    options: tuple[Any, Any, Any, Any],
    out: Any = None,
    names: Sequence[Any] = range(MAX_LEVELS),
    symbols: bool = False,
) -> tuple[tuple[int, int], Options]:
    """Check all arguments of the scorer, once for every call. The compiled module finds overlaps of memory.

    Args:
        teacher (Sequence): Features of the teacher.
        student (Sequence): Features of the student.
        kind (type): What features and memory must be instances of.
        image_size (Sequence[int]): Height and width of the map.
        options (tuple): What :class:`Options` holds, as the caller gave it.
        out (Sequence | None): The caller's memory for the results.
        names (Sequence): What to call each level in messages: its name or, by default, its index.
        symbols (bool): Whether torch's symbols may stand for sizes, which then are not checked.

    Returns:
        tuple[tuple[int, int], Options]: The image's size, and the options with a weight for each level.

    Raises:
        TypeError: If something is of the wrong kind or dtype.
        ValueError: If something else does not fit.
    """
    check_features(teacher, student, kind, names)
    weights, combine, combine_size, level_maps = options
    if not symbols:
        image_size = _check_size("image_size", image_size)
        combine_size = None if combine_size is None else _check_size("combine_size", combine_size)
    checked = check_options(weights, combine, combine_size, level_maps, teacher)
    if out is not None:
        _check_outputs(out, kind, teacher, output_shapes(teacher, image_size, checked))
    return image_size, checked


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
        TypeError: If one is not of this kind, or its dtype is unsupported or not the first one's.
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
        for size in shape[1:]:
            if isinstance(size, int) and not 1 <= size < 2**31:  # others are torch's symbols
                fail(ValueError, f"teacher[{name!r}]", "1 to 2**31 - 1 channels, rows and columns", tuple(shape))


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


def check_options(weights: Any, combine: Any, combine_size: Any, level_maps: Any, levels: Sequence[Any]) -> Options:
    """Return the options with a weight for each level, or raise an error that names the argument.

    The size, which may be a symbol, is left to :func:`check_call`.
    """
    if combine not in COMBINATIONS:
        fail(ValueError, "combine", " or ".join(map(repr, COMBINATIONS)), repr(combine))
    if weights is None:
        return Options([1.0] * len(levels), combine, combine_size, bool(level_maps))
    try:
        weights = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        fail(TypeError, "weights", "a number for each level", repr(weights))
    if len(weights) != len(levels) or not all(0 <= weight < math.inf for weight in weights):
        fail(ValueError, "weights", f"{len(levels)} finite numbers of at least 0", weights)
    return Options(weights, combine, combine_size, bool(level_maps))


def _check_outputs(out: Any, kind: Any, teacher: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> None:
    arrays = kind is np.ndarray
    dtype, device = OUTPUT_DTYPES[dtype_name(teacher[0].dtype)], None if arrays else teacher[0].device
    if not isinstance(out, Sequence) or len(out) != len(shapes):
        got = len(out) if isinstance(out, Sequence) else _qualified(type(out))
        fail(ValueError, "out", f"a sequence of {len(shapes)}", got)
    for index, (output, shape) in enumerate(zip(out, shapes, strict=True)):
        name = f"out[{index}]"
        if not isinstance(output, kind):
            fail(TypeError, name, _qualified(kind), _qualified(type(output)))
        if dtype_name(output.dtype) != dtype:
            fail(TypeError, name, f"dtype {dtype}", dtype_name(output.dtype))
        if tuple(output.shape) != tuple(shape):
            fail(ValueError, name, f"shape {tuple(shape)}", tuple(output.shape))
        if not arrays and output.device != device:
            fail(ValueError, name, f"device {device}", output.device)
        if not (output.flags.c_contiguous and output.flags.aligned if arrays else output.is_contiguous()):
            fail(ValueError, name, "contiguous memory", f"strides {output.strides if arrays else output.stride()}")
        if arrays and not output.flags.writeable:
            fail(ValueError, name, "memory that can be written to", "a read-only array")


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


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
