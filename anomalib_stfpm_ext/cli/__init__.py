# SPDX-License-Identifier: Apache-2.0

"""The command ``stfpm-ext``: one parser and one error handler over all that the package does from a shell."""

import warnings

from ..console import run_command
from .parser import make_parser, run


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments (list[str] | None): Its arguments. Defaults to ``None``, those of the process.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(anomalib|timm)\.")  # of anomalib's import
    run_command(make_parser(), run, arguments)
