# SPDX-License-Identifier: Apache-2.0

"""The command ``stfpm-ext``: one parser and one error handler over all that the package does from a shell."""

import warnings


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments (list[str] | None): Its arguments. Defaults to ``None``, those of the process.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what anomalib's use of timm raises
        from ..console import run_command
        from .parser import make_parser, run
    run_command(make_parser(), run, arguments)
