# SPDX-License-Identifier: Apache-2.0

"""``python -m anomalib_stfpm_ext.reproduce``, which is ``stfpm-ext reproduce``."""

from ..console import run_command
from .command import make_parser, run

if __name__ == "__main__":
    run_command(make_parser(), run)
