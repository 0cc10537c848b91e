# SPDX-License-Identifier: Apache-2.0

"""The former name of :mod:`anomalib_stfpm_ext.visualization`, which goes with the next version."""

import warnings

from . import visualization
from .visualization import *  # noqa: F403

warnings.warn(
    "anomalib_stfpm_ext.pictures is now anomalib_stfpm_ext.visualization; the old name goes with the next version",
    FutureWarning,
    stacklevel=2,
)

if __name__ == "__main__":
    visualization.main()
