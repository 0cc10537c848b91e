# SPDX-License-Identifier: Apache-2.0

"""The parser of ``stfpm-ext``, with a subcommand for each task."""

import sys
from collections.abc import Callable
from typing import Any

import jsonargparse

from .. import diagnosis, reproduce, watch
from .convert import from_anomalib, from_authors, to_authors
from .draw import histogram, levels

GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "draw": ("Draw the maps of the levels, or a histogram of scores.", {"levels": levels, "histogram": histogram}),
    "convert": (
        "Convert students of the authors' code and checkpoints of anomalib's Stfpm.",
        {"from-authors": from_authors, "from-anomalib": from_anomalib, "to-authors": to_authors},
    ),
}


def make_parser() -> Any:
    """Make the parser of the command line.

    Returns:
        jsonargparse.ArgumentParser: The parser, with a subcommand for each task.
    """
    parser: Any = jsonargparse.ArgumentParser(prog="stfpm-ext", description="STFPM for anomalib, true to the paper.")
    commands = parser.add_subcommands(required=True)
    info = jsonargparse.ArgumentParser()
    commands.add_subcommand("info", info, help="Print a diagnosis to paste into a bug report.")
    watching = watch.make_parser(positional=False)
    commands.add_subcommand("watch", watching, help="Score images as they arrive in a folder.")
    for group, (text, functions) in GROUPS.items():
        of_group: Any = jsonargparse.ArgumentParser()
        commands.add_subcommand(group, of_group, help=text)
        tasks = of_group.add_subcommands(required=True)  # only now: jsonargparse wants the levels in this order
        for task, function in functions.items():
            of_task = jsonargparse.ArgumentParser()
            of_task.add_function_arguments(function, as_positional=False)
            tasks.add_subcommand(task, of_task, help=(function.__doc__ or "").partition("\n")[0])
    reproducing = reproduce.make_parser()
    commands.add_subcommand("reproduce", reproducing, help="Train and evaluate on MVTec AD or VisA, and tabulate it.")
    return parser


def run(given: dict[str, Any]) -> None:
    """Run the subcommand that was given.

    Args:
        given (dict[str, Any]): The parsed arguments.
    """
    command = given["subcommand"]
    options = given[command]
    if command == "info":
        if not diagnosis.diagnose():
            sys.exit(1)
    elif command in GROUPS:
        task = options["subcommand"]
        GROUPS[command][1][task](**options[task])
    else:
        {"watch": watch.run, "reproduce": reproduce.run}[command](options)
