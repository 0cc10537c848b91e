# SPDX-License-Identifier: Apache-2.0

"""The former name of ``convert`` and of ``stfpm-ext convert``, which goes with the next version."""

import warnings
from typing import Any

import jsonargparse

from .cli.convert import from_anomalib, from_authors, to_authors
from .cli.handler import ending_in_one_line
from .convert import *  # noqa: F403

warnings.warn(
    "anomalib_stfpm_ext.bridges is now anomalib_stfpm_ext.convert, and its command is stfpm-ext convert; "
    "the old name goes with the next version",
    FutureWarning,
    stacklevel=2,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the former command line, whose arguments are positional."""
    commands: dict[str, Any] = {
        "read-authors": from_authors,
        "read-anomalib": from_anomalib,
        "write-authors": to_authors,
    }
    with ending_in_one_line():
        jsonargparse.CLI(commands, arguments)  # type: ignore[no-untyped-call]  # auto_cli in newer versions


if __name__ == "__main__":
    main()
