# SPDX-License-Identifier: Apache-2.0

"""The error of every wrong argument: it names the argument, what is wanted and what came."""

from typing import NoReturn


def fail(error: type[Exception], argument: str, wanted: object, got: object) -> NoReturn:
    """Raise an error that names the argument, what is wanted and what came."""
    msg = f"{argument}: wanted {wanted}, got {got}"
    raise error(msg)
