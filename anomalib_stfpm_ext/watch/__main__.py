# SPDX-License-Identifier: Apache-2.0

"""``python -m anomalib_stfpm_ext.watch``, which is ``stfpm-ext watch``, with positional checkpoint and folder."""

from ..console import run_command
from .command import make_parser, run

if __name__ == "__main__":
    run_command(make_parser(positional=True), run)
