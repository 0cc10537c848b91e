# SPDX-License-Identifier: Apache-2.0

"""The table of scores, which is also the memory of the service: what is in it is not scored again."""

import csv
import io
import os
from pathlib import Path

from typing_extensions import Self

from ..console import tell
from ..errors import fail
from ..files import lock
from .folder import Version

COLUMNS = ("time", "file", "score", "verdict", "threshold", "seconds", "error", "bytes", "modified_ns")


class ScoreTable:
    """A CSV file to which rows are appended, each at once and as one line. One process at a time may write to it.

    If it is moved, removed or emptied meanwhile, a new one is begun in its place.

    Args:
        file (Path): The file. Its folder is made if need be.

    Attributes:
        known (dict[str, Version]): By name, the last version that the table has of each file.

    Raises:
        ValueError: If the file is no such table.
        BlockingIOError: If another process writes to it.
        OSError: If it cannot be read or written.
    """

    def __init__(self, file: Path) -> None:
        self._path = file
        self.known: dict[str, Version] = {}
        self._open()

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab+", buffering=0)
        no_lock = lock(self._file, self._path, "another process writes to it")
        if no_lock:
            tell(no_lock)
        self._file.seek(0)
        content, header = self._file.read(), _line(COLUMNS)
        if content[: len(header)] != header[: len(content)]:
            fail(ValueError, "csv", "a new file, or one that this command has begun", self._path)
        end = content.rfind(b"\n") + 1
        if end < len(content):
            tell(f"{self._path}: its last line was never finished, and is removed")
            self._file.truncate(end)
        if not end:
            self._write(header)
        for row in csv.DictReader(io.StringIO(content[:end].decode(errors="replace"))):
            try:
                self.known[row["file"]] = Version(int(row["bytes"]), int(row["modified_ns"]))
            except (TypeError, ValueError):
                fail(ValueError, "csv", f"rows that this command has written to {self._path}", list(row.values()))

    def append(self, row: dict[str, object]) -> None:
        """Append a row.

        Args:
            row (dict[str, object]): A value for each of ``COLUMNS``.

        Raises:
            OSError: If it cannot be written, as on a full disk.
            ValueError: If there is another file in its place.
        """
        begun = os.fstat(self._file.fileno())
        if not (self._path.exists() and os.path.samestat(self._path.stat(), begun) and begun.st_size):
            self._file.close()
            self._open()
            tell(f"{self._path} was moved, removed or emptied; a new one is begun")
        self._write(_line(tuple(row[column] for column in COLUMNS)))
        self.known[str(row["file"])] = Version(int(str(row["bytes"])), int(str(row["modified_ns"])))

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _line(values: tuple[object, ...]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue().encode()
