# SPDX-License-Identifier: Apache-2.0

"""``python -m anomalib_stfpm_ext`` prints a diagnosis."""

import sys

from .console import escape_what_the_terminal_lacks
from .diagnosis import diagnose

if __name__ == "__main__":
    escape_what_the_terminal_lacks()
    sys.exit(0 if diagnose() else 1)
