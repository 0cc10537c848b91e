# SPDX-License-Identifier: Apache-2.0

"""The command line of the service."""

import signal
import sys
from typing import Any

import jsonargparse

from ..console import tell
from .service import watch


def make_parser(positional: bool) -> jsonargparse.ArgumentParser:
    """Make the parser of this command.

    Args:
        positional (bool): Whether checkpoint and folder are positional arguments, not options.

    Returns:
        jsonargparse.ArgumentParser: The parser.
    """
    parser = jsonargparse.ArgumentParser(prog="python -m anomalib_stfpm_ext.watch")
    parser.add_function_arguments(watch, as_positional=positional, skip={"once"})
    parser.add_argument("--once", action="store_true", help="End when all images in the folder are scored.")
    return parser


def run(given: dict[str, Any]) -> None:
    """Watch until the process is asked to end.

    Args:
        given (dict[str, Any]): The arguments of :func:`watch`.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        watch(**given)
    except KeyboardInterrupt:  # the intended end; unfinished work is done again after a restart
        tell("stopped")
        if given["once"]:
            sys.exit(128 + signal.SIGINT)
