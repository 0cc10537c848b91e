# SPDX-License-Identifier: Apache-2.0

"""What arguments of StfpmExt can be, and the paper's choice. Commands read it without torch and anomalib."""

from typing import Literal

CacheLocation = Literal["auto", "memory", "disk"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
InferencePrecision = Literal["float32", "bfloat16", "float16", "auto"]
Selection = Literal["held_out_map", "synthetic"]

PAPERS_RATE = 0.4
# The paper's settings where StfpmExt has other defaults.
PAPERS_RULES = {"selection": "held_out_map", "precise_bn": False, "lr": PAPERS_RATE}
