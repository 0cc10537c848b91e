# SPDX-License-Identifier: Apache-2.0

"""What commands write to a terminal: printable text, and for an error one line without a traceback."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jsonargparse
import yaml


def printable(text: object) -> str:
    """Escape line breaks and other characters that cannot be printed, bytes that are no UTF-8, and the backslash."""
    return "".join(
        character if character.isprintable() and character != "\\" else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def escape_what_the_terminal_lacks() -> None:
    """Make standard output and error escape characters that their encoding lacks, where Python would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # notebooks and windows have others in its place
            stream.reconfigure(errors="backslashreplace")


def tell(message: str) -> None:
    """Print a message on standard error."""
    print(printable(message), file=sys.stderr, flush=True)


@contextmanager
def ending_in_one_line() -> Iterator[None]:
    """End the process with one line where an argument, a file or the machine is to blame."""
    try:
        yield
    except (OSError, RuntimeError, TypeError, ValueError, FloatingPointError) as error:
        sys.exit(printable(f"{type(error).__name__}: {error}"))


def run_command(
    parser: jsonargparse.ArgumentParser, run: Callable[[dict[str, Any]], None], arguments: list[str] | None = None
) -> None:
    """Run a command that has a parser of its own.

    Args:
        parser (jsonargparse.ArgumentParser): The parser.
        run (Callable[[dict[str, Any]], None]): Takes the parsed arguments, by name.
        arguments (list[str] | None): The arguments. Defaults to ``None``, those of the process.
    """
    escape_what_the_terminal_lacks()
    # YAML, by which arguments are read, cannot hold names that are no text in the file system's encoding.
    errors = (yaml.YAMLError, UnicodeEncodeError)
    jsonargparse.set_loader("yaml", jsonargparse.get_loader("yaml"), errors)
    given = parser.parse_args(arguments).as_dict()
    with ending_in_one_line():
        run(given)
