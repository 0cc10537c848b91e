# SPDX-License-Identifier: Apache-2.0

"""The precision that both networks compute in when they score images, and where it is faster than float32."""

import os
import platform
from functools import cache
from typing import Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from .._compat.torch import has_tiles
from .packing import why_not_packed

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@cache
def why_not(precision: Precision, device_type: str) -> str | None:
    """Say why a precision gains nothing on a device.

    Of CPUs, only those with tiles (AMX) gain anything. On an Intel Xeon, the AVX-512 instructions for bfloat16 and
    float16 took 1.4 times as long as those for float32.

    Args:
        precision (Precision): The precision.
        device_type (str): Kind of the device, such as ``"cpu"``.

    Returns:
        str | None: The reason, or ``None`` if it is fast there.
    """
    if precision == "float32":
        return None
    if device_type == "cuda":
        emulated = precision == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False)
        return "this GPU only emulates it" if emulated else None
    if device_type != "cpu":
        return f"it has not been measured on {device_type!r} devices"
    if platform.machine() != "x86_64":
        return f"it has been measured on x86_64 only, not on {platform.machine()}"
    if (reason := why_not_packed()) is not None:
        return reason
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if not has_tiles(precision) or (limit not in ("", "ALL", "DEFAULT") and "AMX" not in limit):
        return f"this CPU has no tiles (AMX) for {precision}"
    return None


@cache
def dtype_on(precision: Precision, device_type: str) -> torch.dtype:
    """Return the dtype to compute in on a device: the precision's, or float32 where it gains nothing. Say once which.

    Args:
        precision (Precision): The precision that is asked for.
        device_type (str): Kind of the device, such as ``"cpu"``.

    Returns:
        torch.dtype: The dtype.
    """
    reason = why_not(precision, device_type)
    if reason is not None:
        rank_zero_warn(
            f"inference_precision: the networks compute in float32, not in {precision}, since {reason}. Scores differ "
            f"slightly; where a threshold was set in {precision}, validate the model anew."
        )
        return torch.float32
    if precision != "float32":
        rank_zero_info(f"Inference: the networks compute in {precision}.")
    dtype: torch.dtype = getattr(torch, precision)
    return dtype
