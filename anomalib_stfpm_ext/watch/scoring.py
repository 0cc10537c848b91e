# SPDX-License-Identifier: Apache-2.0

"""Scores images into the table, and saves overlays."""

import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import torch
from anomalib.data import ImageBatch
from anomalib.visualization import ImageVisualizer
from PIL import Image

from ..console import printable, tell
from ..data.images import read_image
from ..data.transforms import seen, shows_all
from ..files import whole_file
from ..prediction import Predictor
from .folder import Version
from .table import COLUMNS, ScoreTable


class Scoring:
    """Scores images into the table.

    Args:
        predictor (Predictor): The trained model.
        folder (Path): The folder, to which names of images are relative.
        table (ScoreTable): The table.
        overlays (Path | None): Folder for overlays, or ``None``.
        patience (float): Seconds for which an image that cannot be read is tried again.
    """

    def __init__(
        self, predictor: Predictor, folder: Path, table: ScoreTable, overlays: Path | None, patience: float
    ) -> None:
        self._predictor, self._folder, self._table = predictor, folder, table
        self._overlays, self._patience = overlays, patience
        self._visualizer = ImageVisualizer()
        self._failures: dict[tuple[Path, Version], float] = {}  # when each was first found unreadable

    def score(self, settled: Mapping[Path, Version]) -> bool:
        """Give each image a row, unless it has one.

        Args:
            settled (Mapping[Path, Version]): The images of one look.

        Returns:
            bool: Whether all have a row now; others have to be tried again.

        Raises:
            OSError: If a row or an overlay cannot be written.
        """
        self._failures = {key: since for key, since in self._failures.items() if key in settled.items()}
        have_rows = [self._score(path, version) for path, version in settled.items()]
        return all(have_rows)

    def _score(self, path: Path, version: Version) -> bool:
        name = printable(path.relative_to(self._folder))
        if self._table.known.get(name) == version:
            return True
        start = time.perf_counter()
        image, problem = _read(path)
        if Version.of(path) != version:  # it is being written after all, or gone
            return False
        row: dict[str, object] = dict.fromkeys(COLUMNS, "")
        row |= {"file": name, "bytes": version.num_bytes, "modified_ns": version.modified_ns}
        if image is None:
            since = self._failures.setdefault((path, version), time.monotonic())
            if time.monotonic() - since < self._patience:
                return False
            tell(f"{name}: {problem}")
            row["error"] = printable(problem)
        else:
            batch = self._predict(image, name)
            row |= _verdict(batch, self._predictor.threshold)
            row["seconds"] = f"{time.perf_counter() - start:.4f}"
            if self._overlays:
                if not shows_all(self._predictor.pre_processor):  # maps show only what the model sees
                    batch.image = seen(self._predictor.pre_processor, batch.image)
                _save_overlay(self._visualizer, batch, self._overlays / path.relative_to(self._folder), name)
        self._table.append(row | {"time": datetime.now().astimezone().isoformat(timespec="milliseconds")})
        return True

    def _predict(self, image: torch.Tensor, name: str) -> ImageBatch:
        try:
            return self._predictor(image)
        except Exception:
            tell(f"{name}: cannot be scored")
            raise


def _read(path: Path) -> tuple[torch.Tensor | None, str]:
    """Read an image, or say why not."""
    try:
        return read_image(path), ""
    except ValueError as error:
        return None, str(error)


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
    """Save the overlay of an image, or say why there is none; the image has its score either way."""
    try:
        picture = visualizer.visualize(batch)
    except Exception as error:  # such as for pictures of one pixel
        tell(f"{name}: no overlay, {type(error).__name__}: {error}")
    else:
        _save(picture, file)


def _save(picture: Image.Image, file: Path) -> None:
    """Save a picture; an error names its file, which Pillow's does not."""
    try:
        with whole_file(file) as unfinished:
            picture.save(unfinished)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error
