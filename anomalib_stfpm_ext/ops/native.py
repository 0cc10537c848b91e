# SPDX-License-Identifier: Apache-2.0

"""Calls to the compiled module ``_core``: features and results become addresses, shapes and strides."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .arguments import Options, dtype_name

if TYPE_CHECKING:
    from .. import _core


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
