# SPDX-License-Identifier: Apache-2.0

"""The watched folder: which images there are, and which of them have settled."""

import os
import stat
from pathlib import Path
from typing import NamedTuple

from anomalib.data.utils.image import is_image_file

from ..console import tell


class Version(NamedTuple):
    """Size and time of modification of a file, which tell its versions apart.

    Args:
        num_bytes (int): Its size.
        modified_ns (int): When it was modified, in nanoseconds since 1970.
    """

    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "Version | None":
        """Look at a file.

        Args:
            path (Path): The file.

        Returns:
            Version | None: Its version, or ``None`` if there is no such file or it is something else, like a pipe.
        """
        try:
            status = path.stat()
        except OSError:
            return None
        return cls(status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


class Arrivals:
    """The images in a folder and its subfolders, but not in those that are links, or whose names begin with a dot.

    Args:
        folder (Path): The folder.
        ignored (Path | None): A folder within that is left alone. Defaults to ``None``.
    """

    def __init__(self, folder: Path, ignored: Path | None = None) -> None:
        self._folder = folder
        self._ignored = ignored and ignored.resolve()
        self._seen: dict[Path, Version] = {}
        self._unreadable: set[str] = set()

    def look(self) -> tuple[dict[Path, Version], dict[Path, Version]]:
        """Look into the folder.

        Returns:
            tuple[dict[Path, Version], dict[Path, Version]]: Those that are as at the last look, the oldest first; and
                the others.

        Raises:
            OSError: If the folder cannot be read.
        """
        found: dict[Path, Version] = {}
        for parent, folders, files in os.walk(self._folder, onerror=self._complain):
            folders[:] = [name for name in folders if name[0] != "." and Path(parent, name).resolve() != self._ignored]
            for path in (Path(parent, name) for name in files if name[0] != "."):
                if is_image_file(path) and (version := Version.of(path)):
                    found[path] = version
        settled = {path: version for path, version in found.items() if self._seen.get(path) == version}
        changing = {path: version for path, version in found.items() if path not in settled}
        self._seen = found
        return dict(sorted(settled.items(), key=lambda item: (item[1].modified_ns, item[0]))), changing

    def _complain(self, error: OSError) -> None:
        if Path(error.filename) == self._folder:
            raise error
        if str(error) not in self._unreadable:
            self._unreadable.add(str(error))
            tell(f"{error}; its images are not scored")
