# SPDX-License-Identifier: Apache-2.0

"""``python -m anomalib_stfpm_ext`` prints a diagnosis."""

import sys

from .diagnosis import diagnose

if __name__ == "__main__":
    sys.exit(0 if diagnose() else 1)
