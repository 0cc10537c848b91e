# SPDX-License-Identifier: Apache-2.0

"""Messages in one line each, whatever the names of files are made of."""

import sys


def printable(text: object) -> str:
    """Escape what does not belong in a line of UTF-8, line breaks and bytes that are no UTF-8, and the backslash."""
    return "".join(
        character if character.isprintable() and character != "\\" else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def tell(message: str) -> None:
    """Print a message for whoever looks after the service."""
    print(printable(message), file=sys.stderr, flush=True)
