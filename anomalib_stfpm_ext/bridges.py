# SPDX-License-Identifier: Apache-2.0

"""The former name of :mod:`anomalib_stfpm_ext.convert`, which goes with the next version."""

import warnings

from . import convert
from .convert import *  # noqa: F403

warnings.warn(
    "anomalib_stfpm_ext.bridges is now anomalib_stfpm_ext.convert; the old name goes with the next version",
    FutureWarning,
    stacklevel=2,
)

if __name__ == "__main__":
    convert.main()
