# SPDX-License-Identifier: Apache-2.0

"""Scores images as they arrive in a folder; ``python -m anomalib_stfpm_ext.watch --help`` is the command.

The folder is looked at again and again. An image is scored once it has stayed as it is from one look to the next, and a
file that cannot be read is tried again for a while before it counts as broken. The table of scores is also the memory:
what stands there is not scored again after a restart.
"""

import csv
import fcntl
import io
import math
import os
import signal
import stat
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jsonargparse
import torch
from anomalib.data import ImageBatch
from anomalib.data.utils import read_image
from anomalib.data.utils.image import is_image_file
from anomalib.visualization import ImageVisualizer
from PIL import Image
from typing_extensions import Self

from .errors import fail
from .prediction import Predictor

COLUMNS = ("time", "file", "score", "verdict", "threshold", "seconds", "error", "bytes", "modified_ns")


class Version(NamedTuple):
    """What changes when a file does.

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
            _tell(f"{error}; its images are not scored")


class ScoreTable:
    """A CSV file to which rows are appended, each at once and as one line. One process at a time may write to it.

    If it is moved, removed or emptied meanwhile, a new one is begun in its place.

    Args:
        file (Path): The file. Its folder is made if need be.

    Attributes:
        known (dict[str, Version]): By name, the last version that the table has of each file.

    Raises:
        ValueError: If the file is something else.
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
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another process writes to it", str(self._path)) from error
        self._file.seek(0)
        content, header = self._file.read(), _line(COLUMNS)
        if content[: len(header)] != header[: len(content)]:
            fail(ValueError, "csv", "a new file, or one that this command has begun", self._path)
        end = content.rfind(b"\n") + 1
        if end < len(content):
            _tell(f"{self._path}: its last line was never finished, and is removed")
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
            _tell(f"{self._path} was moved, removed or emptied; a new one is begun")
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


def _printable(text: object) -> str:
    """Escape what does not belong in a line of UTF-8, line breaks and bytes that are no UTF-8, and the backslash."""
    return "".join(
        character if character.isprintable() and character != "\\" else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def _tell(message: str) -> None:
    print(_printable(message), file=sys.stderr, flush=True)


def watch(
    checkpoint: Path,
    folder: Path,
    csv: Path = Path("scores.csv"),
    overlays: Path | None = None,
    once: bool = False,
    interval: float = 0.5,
    patience: float = 5.0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    teacher_weights: Path | None = None,
) -> None:
    """Score images as they arrive in a folder, until Ctrl-C or SIGTERM.

    Args:
        checkpoint: The trained model: a checkpoint (.ckpt) or an export for torch (.pt).
        folder: The folder, with its subfolders. Images that are already there are scored, too.
        csv: Where a row is appended for each image, or version of an image. What is in there is not scored again.
        overlays: Folder for overlays as anomalib makes them, called as the images are.
        once: End when all that is in the folder is scored.
        interval: Seconds between two looks. A file that has changed in between is still being written.
        patience: Seconds for which a file that cannot be read is tried again before it counts as broken.
        device: Where the model runs. Defaults to a GPU if there is one.
        teacher_weights: The teacher's weights, for a checkpoint that leaves them out.

    Raises:
        FileNotFoundError: If the folder or the model does not exist.
        ValueError: If an argument is out of range, or a file is not what it should be.
        OSError: If a row or an overlay cannot be written, as on a full disk.
    """
    if not folder.is_dir():
        fail(FileNotFoundError, "folder", "a folder of images", folder)
    if overlays and overlays.resolve() in (folder.resolve(), *folder.resolve().parents):
        fail(ValueError, "overlays", "a folder that does not hold the images, which they might overwrite", overlays)
    if not 0 < interval < math.inf:
        fail(ValueError, "interval", "more than 0 seconds", interval)
    if not 0 <= patience < math.inf:
        fail(ValueError, "patience", "at least 0 seconds", patience)
    predictor = Predictor(checkpoint, device, teacher_weights)
    visualizer, arrivals = ImageVisualizer(), Arrivals(folder, overlays)
    failures: dict[tuple[Path, Version], float] = {}  # when each was found unreadable first
    lost = False
    with ScoreTable(csv) as table:
        print(_printable(f"Watching {folder}; scores go to {csv}"), flush=True)
        while True:
            began = time.monotonic()
            try:
                settled, changing = arrivals.look()
            except OSError as error:
                if once:
                    raise
                if not lost:
                    _tell(f"{error}; waiting for it to come back")
                lost = True
                time.sleep(interval)
                continue
            pause = max(interval, 4 * (time.monotonic() - began))  # a core's fifth at most, however many files
            if lost:
                _tell(f"{folder} is back")
            lost, waiting = False, bool(changing)
            failures = {key: since for key, since in failures.items() if key in settled.items()}
            for path, version in settled.items():
                name = _printable(path.relative_to(folder))
                if table.known.get(name) == version:
                    continue
                start = time.perf_counter()
                image, problem = _read(path)
                if Version.of(path) != version:  # it is being written after all, or gone
                    waiting = True
                    continue
                if image is None:
                    since = failures.setdefault((path, version), time.monotonic())
                    if time.monotonic() - since < patience:
                        waiting = True
                        continue
                    _tell(f"{name}: {problem}")
                row: dict[str, object] = dict.fromkeys(COLUMNS, "")
                row |= {"file": name, "bytes": version.num_bytes, "modified_ns": version.modified_ns}
                row |= {"error": _printable(problem)}
                if image is not None:
                    try:
                        batch = predictor(image)
                    except Exception:
                        _tell(f"{name}: cannot be scored")
                        raise
                    row |= _verdict(batch, predictor.threshold)
                    row["seconds"] = f"{time.perf_counter() - start:.4f}"
                    if overlays:
                        _save_overlay(visualizer, batch, overlays / path.relative_to(folder), name)
                table.append(row | {"time": datetime.now().astimezone().isoformat(timespec="milliseconds")})
            if once and not waiting:
                print(f"All {len(settled)} images have a row in {csv}", flush=True)
                return
            time.sleep(pause)


def _read(path: Path) -> tuple[torch.Tensor | None, str]:
    """Read an image, or say why not."""
    try:
        return read_image(path, as_tensor=True), ""
    except Exception as error:  # decoders raise all sorts of them
        return None, f"{type(error).__name__}: {error}"


def _verdict(batch: ImageBatch, threshold: float | None) -> dict[str, object]:
    score = f"{batch.pred_score.item():.9g}"  # all that float32 holds
    if threshold is None:
        return {"score": score}
    return {
        "score": score,
        "threshold": f"{threshold:.9g}",
        "verdict": "defective" if batch.pred_label.item() else "good",
    }


def _save_overlay(visualizer: ImageVisualizer, batch: ImageBatch, file: Path, name: str) -> None:
    """Save the overlay of an image, or tell why there is none: the score is there all the same."""
    try:
        picture = visualizer.visualize(batch)
    except Exception as error:  # of pictures of one pixel, for one
        _tell(f"{name}: no overlay, {type(error).__name__}: {error}")
    else:
        _save(picture, file)


def _save(picture: Image.Image, file: Path) -> None:
    """Save all of a picture or nothing."""
    unfinished = file.with_name(f".unfinished{file.suffix}")  # the name's own may be as long as names can be
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(unfinished)
        unfinished.replace(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error


def make_parser(positional: bool) -> jsonargparse.ArgumentParser:
    """Make the parser of this command.

    Args:
        positional (bool): Whether checkpoint and folder are told by their places, not by options.

    Returns:
        jsonargparse.ArgumentParser: The parser.
    """
    parser = jsonargparse.ArgumentParser(prog="python -m anomalib_stfpm_ext.watch")
    parser.add_function_arguments(watch, as_positional=positional, skip={"once"})
    parser.add_argument("--once", action="store_true", help="End when all that is in the folder is scored.")
    return parser


def run(given: dict[str, Any]) -> None:
    """Watch, and end as a command does.

    Args:
        given (dict[str, Any]): The arguments of :func:`watch`.
    """
    try:
        watch(**given)
    except KeyboardInterrupt:  # how it is meant to end; whatever was not finished is done again after a restart
        _tell("stopped")
        if given["once"]:
            sys.exit(128 + signal.SIGINT)
    except (OSError, RuntimeError, TypeError, ValueError, FloatingPointError) as error:
        sys.exit(_printable(f"{type(error).__name__}: {error}"))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments (list[str] | None): Its arguments. Defaults to ``None``, those of the process.
    """
    run(make_parser(positional=True).parse_args(arguments).as_dict())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    main()
