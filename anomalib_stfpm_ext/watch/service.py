# SPDX-License-Identifier: Apache-2.0

"""The service: looks into the folder again and again, and gives each image that has settled a row in the table."""

import math
import time
from pathlib import Path
from typing import Literal

from ..console import printable, tell
from ..errors import fail


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
    sensitivity: float | None = None,
    pattern: str = "*",
) -> None:
    """Score images as they arrive in a folder, until Ctrl-C or SIGTERM.

    Args:
        checkpoint: The trained model: a checkpoint (.ckpt) or an export for torch (.pt).
        folder: The folder, with its subfolders. Images that are already there are scored, too.
        csv: File that gets a row for each image, or version of an image. What is in there is not scored again.
        overlays: Folder for overlays as anomalib makes them, named like the images.
        once: End when all images in the folder are scored.
        interval: Seconds between two looks. A file that has changed in between is still being written.
        patience: Seconds for which a file that is not whole, or cannot be read, is tried again before it counts as
            broken.
        device: Where the model runs. Defaults to a GPU if there is one.
        teacher_weights: The teacher's weights, for a checkpoint that leaves them out.
        sensitivity: From 0 to 1, moves the threshold: above 0.5 more images are defective. Defaults to the model's.
        pattern: What the names of files have to match, such as "cam1_*.png". Names of folders do not matter.

    Raises:
        FileNotFoundError: If the folder or the model does not exist.
        ValueError: If an argument is out of range, a file is not what it should be, or ``once`` finds only pictures of
            formats that are not read.
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
    from ..prediction import Predictor
    from .folder import Arrivals
    from .scoring import Scoring
    from .table import ScoreTable

    predictor = Predictor(checkpoint, device, teacher_weights, sensitivity)
    arrivals = Arrivals(folder, overlays, pattern, patience)
    lost = False
    with ScoreTable(csv) as table:
        scoring = Scoring(predictor, folder, table, overlays, patience)
        print(printable(f"Watching {folder}; scores go to {csv}"), flush=True)
        while True:
            began = time.monotonic()
            try:
                settled, changing = arrivals.look()
            except OSError as error:
                if once:
                    raise
                if not lost:
                    tell(f"{error}; waiting for it to come back")
                lost = True
                time.sleep(interval)
                continue
            pause = max(interval, 4 * (time.monotonic() - began))  # a fifth of a core at most, however many files
            if lost:
                tell(f"{folder} is back")
            lost = False
            all_scored = scoring.score(settled) and not changing
            if once and all_scored:
                if arrivals.passed_over and not settled:
                    fail(ValueError, "folder", "images", f"only files of {', '.join(sorted(arrivals.passed_over))}")
                print(printable(_summary(len(settled), folder, pattern, csv)), flush=True)
                return
            time.sleep(pause)


def _summary(num_images: int, folder: Path, pattern: str, csv: Path) -> str:
    if num_images:
        return f"All {num_images} images have a row in {csv}"
    return f"There are no images in {folder}" + ("" if pattern == "*" else f" whose names match {pattern}")
