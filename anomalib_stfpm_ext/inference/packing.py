# SPDX-License-Identifier: Apache-2.0

"""Whether convolutions on a CPU keep their weights in oneDNN's layout."""

import platform
from functools import cache

import torch

from .._compat.torch import lacks_packed_convolution


@cache
def why_not_packed() -> str | None:
    """Say why convolutions on a CPU do not keep their weights in oneDNN's layout, which is the fastest way.

    Returns:
        str | None: The reason, or ``None`` if they do.
    """
    if platform.machine() != "x86_64":
        return f"oneDNN has been measured on x86_64 only, not on {platform.machine()}"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch was built without oneDNN"
    missing = lacks_packed_convolution()
    return missing and f"torch {torch.__version__} has no {missing}"
