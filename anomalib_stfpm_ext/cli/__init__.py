# SPDX-License-Identifier: Apache-2.0

"""The command ``stfpm-ext``: one parser and one error handler over all that the package does from a shell."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse

from .. import __main__ as diagnosis
from .. import convert, reproduce, visualization, watch

Commands = dict[str, Callable[..., None]]


def info() -> None:
    """Print a diagnosis to paste into a bug report."""
    if not diagnosis.diagnose():
        sys.exit(1)


def from_authors(student: Path, output: Path, teacher_weights: bool | Path = True) -> None:
    """Turn a student of the authors' code into a checkpoint of StfpmExt.

    Args:
        student: The file that the authors' code saved, best.pth.tar.
        output: The checkpoint to write.
        teacher_weights: File with torchvision's weights of ResNet18, or true for those from cache or internet.
    """
    convert.convert_from_authors(student, output, teacher_weights)


def from_anomalib(checkpoint: Path, output: Path, backbone: str | None = None, layers: list[str] | None = None) -> None:
    """Turn a checkpoint of anomalib's Stfpm into one of StfpmExt.

    Args:
        checkpoint: The checkpoint of Stfpm.
        output: The checkpoint to write.
        backbone: The backbone, for a checkpoint that does not name it.
        layers: The layers, likewise, as in [layer1,layer2].
    """
    convert.convert_from_anomalib(checkpoint, output, backbone, layers)


def to_authors(checkpoint: Path, output: Path, category: str = "") -> None:
    """Write the student of a checkpoint of StfpmExt, or of anomalib's Stfpm, for the authors' code.

    Args:
        checkpoint: The checkpoint.
        output: The file to write, snapshots/CATEGORY/best.pth.tar for them.
        category: The category that the file names.
    """
    convert.convert_to_authors(checkpoint, output, category)


def histogram(checkpoint: Path, good: Path, defective: Path, output: Path, teacher_weights: Path | None = None) -> None:
    """Draw a histogram of the raw scores of good and defective images, with the threshold.

    Args:
        checkpoint: The trained model.
        good: Folder of good images, with those in its subfolders.
        defective: Folder of defective images, likewise.
        output: The picture to be written.
        teacher_weights: The teacher's weights, for a checkpoint that leaves them out.
    """
    visualization.command_histogram(checkpoint, good, defective, output, teacher_weights)


def _parser_of(function: Callable[..., None]) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser()
    parser.add_function_arguments(function, as_positional=False)
    return parser


def _group(parser: Any, commands: Commands) -> None:
    subcommands = parser.add_subcommands(required=True)
    for name, function in commands.items():
        subcommands.add_subcommand(name, _parser_of(function), help=(function.__doc__ or "").partition("\n")[0])


_DRAW: Commands = {"levels": visualization.command_levels, "histogram": histogram}
_CONVERT: Commands = {"from-authors": from_authors, "from-anomalib": from_anomalib, "to-authors": to_authors}


def make_parser() -> Any:
    """Make the parser of the command line.

    Returns:
        jsonargparse.ArgumentParser: The parser, with a subcommand for each task.
    """
    parser: Any = jsonargparse.ArgumentParser(prog="stfpm-ext", description="STFPM for anomalib, true to the paper.")
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand("info", _parser_of(info), help="Print a diagnosis to paste into a bug report.")
    commands.add_subcommand(
        "watch", watch.make_parser(positional=False), help="Score images as they arrive in a folder."
    )
    for name, group, text in (
        ("draw", _DRAW, "Draw the maps of the levels, or a histogram of scores."),
        ("convert", _CONVERT, "Convert students of the authors' code and checkpoints of anomalib's Stfpm."),
    ):
        of_group: Any = jsonargparse.ArgumentParser()
        commands.add_subcommand(name, of_group, help=text)
        _group(of_group, group)  # jsonargparse wants the levels in this order
    commands.add_subcommand(
        "reproduce", reproduce.make_parser(), help="Train and evaluate on MVTec AD or VisA, and tabulate it."
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments (list[str] | None): Its arguments. Defaults to ``None``, those of the process.
    """
    given = make_parser().parse_args(arguments)
    name = given["subcommand"]
    options = given[name].as_dict()
    if name == "watch":
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        watch.run(options)
        return
    if name == "reproduce":
        reproduce.run(options)
        return
    function: Callable[..., None] = info
    if name in ("draw", "convert"):
        task = options["subcommand"]
        function, options = {**_DRAW, **_CONVERT}[task], options[task]
    try:
        function(**options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
