# SPDX-License-Identifier: Apache-2.0

"""Files that several processes may want: written in full or not at all, and locked where the file system can."""

import errno
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What network drives answer that know no locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Write all of a file or none, also where threads or processes write it at the same time: the last one's is kept.

    Args:
        file (Path): The file. Its folder is made if need be.

    Yields:
        Path: A hidden file beside it, with the same suffix, to be written in its place. Where that raises, it goes, and
            the file stays as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{secrets.token_hex(8)}{file.suffix}")  # a file's own name may be as long as names go
    try:
        yield unfinished
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_file(file: Path, text: str) -> None:
    """Write a text with :func:`whole_file`.

    Args:
        file (Path): The file. Its folder is made if need be.
        text (str): What it is to hold.
    """
    with whole_file(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def lock(file: IO[Any], path: Path, holder: str) -> str | None:
    """Lock an open file until it is closed.

    Args:
        file (IO): The file.
        path (Path): Its path, for the error.
        holder (str): Who has the lock otherwise, for the error.

    Returns:
        str | None: Why there is no lock, where the file system or the operating system knows none.

    Raises:
        BlockingIOError: If another process has locked it.
    """
    if fcntl is None:
        return f"{path}: this operating system knows no such locks, so nothing keeps a second process away"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, holder, str(path)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return f"{path}: the file system knows no locks ({error.strerror}), so nothing keeps a second process away"
    return None
