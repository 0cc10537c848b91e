# SPDX-License-Identifier: Apache-2.0

"""The former name of ``visualization`` and of ``stfpm-ext draw``, which goes with the next version."""

import warnings
from typing import Any

import jsonargparse

from .cli.draw import histogram, levels
from .cli.handler import ending_in_one_line
from .visualization import *  # noqa: F403

warnings.warn(
    "anomalib_stfpm_ext.pictures is now anomalib_stfpm_ext.visualization, and its command is stfpm-ext draw; "
    "the old name goes with the next version",
    FutureWarning,
    stacklevel=2,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the former command line, whose arguments are positional."""
    commands: dict[str, Any] = {"levels": levels, "histogram": histogram}
    with ending_in_one_line():
        jsonargparse.CLI(commands, arguments)  # type: ignore[no-untyped-call]  # auto_cli in newer versions


if __name__ == "__main__":
    main()
