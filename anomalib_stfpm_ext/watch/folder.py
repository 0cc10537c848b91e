# SPDX-License-Identifier: Apache-2.0

"""The watched folder: which images there are, and which of them have settled."""

import os
import stat
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from anomalib.data.utils.image import is_image_file

from ..console import tell
from ..data.images import looks_like_picture, passed_over


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
        ignored (Path | None): A subfolder that is left out. Defaults to ``None``.
        pattern (str): What the names of files have to match. Defaults to ``"*"``.
        patience (float): Seconds after which a file that keeps changing is reported. Defaults to ``5.0``.

    Attributes:
        passed_over (set[str]): Suffixes of files that look like pictures, but are not taken for images.
    """

    def __init__(self, folder: Path, ignored: Path | None = None, pattern: str = "*", patience: float = 5.0) -> None:
        self._folder, self._pattern, self._patience = folder, pattern, patience
        self._ignored = ignored and ignored.resolve()
        self._seen: dict[Path, Version] = {}
        self._moving: dict[Path, float] = {}  # since when
        self._told: set[Path] = set()
        self._unreadable: set[str] = set()
        self.passed_over: set[str] = set()

    def look(self) -> tuple[dict[Path, Version], dict[Path, Version]]:
        """Look into the folder.

        Returns:
            tuple[dict[Path, Version], dict[Path, Version]]: The images that have not changed since the last look, the
                oldest first; and the others.

        Raises:
            OSError: If the folder cannot be read.
        """
        found: dict[Path, Version] = {}
        others: list[Path] = []
        for parent, folders, files in os.walk(self._folder, onerror=self._complain):
            folders[:] = [name for name in folders if name[0] != "." and Path(parent, name).resolve() != self._ignored]
            names = (name for name in files if name[0] != "." and fnmatchcase(name, self._pattern))
            for path in (Path(parent, name) for name in names):
                if is_image_file(path) and (version := Version.of(path)):
                    found[path] = version
                elif looks_like_picture(path):
                    others.append(path)
        settled = {path: version for path, version in found.items() if self._seen.get(path) == version}
        changing = {path: version for path, version in found.items() if path not in settled}
        self._tell_others(others)
        self._tell_moving(changing)
        self._seen = found
        return dict(sorted(settled.items(), key=lambda item: (item[1].modified_ns, item[0]))), changing

    def _tell_others(self, paths: list[Path]) -> None:
        new = [path for path in paths if path.suffix.lower() not in self.passed_over]
        if new:
            tell(f"not scored: {passed_over(new)}")
        self.passed_over |= {path.suffix.lower() for path in new}

    def _tell_moving(self, changing: dict[Path, Version]) -> None:
        now = time.monotonic()
        self._moving = {path: self._moving.get(path, now) for path in changing}
        for path in changing.keys() & self._seen.keys() - self._told:
            if now - self._moving[path] >= self._patience:
                self._told.add(path)
                tell(f"{path.relative_to(self._folder)}: it keeps changing; it is scored once it holds still")

    def _complain(self, error: OSError) -> None:
        if Path(error.filename) == self._folder:
            raise error
        if str(error) not in self._unreadable:
            self._unreadable.add(str(error))
            tell(f"{error}; its images are not scored")
