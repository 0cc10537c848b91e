# SPDX-License-Identifier: Apache-2.0

"""Messages of one line each, whatever characters the names of files hold."""

import sys


def printable(text: object) -> str:
    """Escape what does not belong in a line of UTF-8, line breaks and bytes that are no UTF-8, and the backslash."""
    return "".join(
        character if character.isprintable() and character != "\\" else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def tell(message: str) -> None:
    """Print a message on standard error."""
    print(printable(message), file=sys.stderr, flush=True)
