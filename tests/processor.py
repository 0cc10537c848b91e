# SPDX-License-Identifier: Apache-2.0

"""What the scorer has to pick on this machine, by what Linux says of the processor."""

import platform
import re
from pathlib import Path

FLAGS = {
    "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma"},
    "baseline": set[str](),
}


def best_isa() -> str:
    """Name the best instruction set of the processor."""
    if platform.machine() == "aarch64":
        return "neon"
    flags = re.findall(r"^flags\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split()
    return next(isa for isa, wanted in FLAGS.items() if wanted <= set(flags))
