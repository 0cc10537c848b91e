# SPDX-License-Identifier: Apache-2.0

"""Says how good and how fast the demo's model is, and puts its pictures where a person looks at them."""

import argparse
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import Folder
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torchmetrics.functional.classification import binary_auroc, binary_f1_score

from anomalib_stfpm_ext import StfpmExt, anomaly_map
from anomalib_stfpm_ext.console import escape_what_the_terminal_lacks
from anomalib_stfpm_ext.figures import PICTURES_PER_ROW, draw_histogram, draw_sheet, pick


class PartTimer:
    """Adds up the seconds that each part of the model takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def __call__(self, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on the part's account, and return its result."""
        start = time.perf_counter()
        result = function(*arguments)
        self.seconds[part] += time.perf_counter() - start
        return result


@torch.inference_mode()
def score_cells(
    model: StfpmExt, cells: Folder
) -> tuple[list[Path], torch.Tensor, torch.Tensor, torch.Tensor, PartTimer]:
    """Score every test image, one at a time as on an inspection line.

    Args:
        model (StfpmExt): The trained model.
        cells (Folder): The images.

    Returns:
        tuple: Paths, scores, labels and anomaly maps of all images, and the time of the model's parts.
    """
    cells.setup()
    stfpm, timer = model.eval().model, PartTimer()
    score_features = partial(anomaly_map, weights=stfpm.level_weights)
    paths, scores, labels, maps = [], [], [], []
    for item in track(cells.test_data, description="scoring"):
        image = timer("resize, normalise", model.pre_processor.transform, item.image[None])
        teacher = timer("teacher", stfpm.teacher_model, image)
        student = timer("student", stfpm.student_model, image)
        amap, score = timer("map", score_features, teacher, student, image.shape[-2:])
        paths.append(Path(item.image_path))
        scores.append(score)
        labels.append(item.gt_label)
        maps.append(amap[0, 0])
    return paths, torch.cat(scores), torch.stack(labels).int(), torch.stack(maps), timer


def print_results(scores: torch.Tensor, labels: torch.Tensor, threshold: float, timer: PartTimer) -> None:
    """Print accuracy and time per image.

    Args:
        scores (torch.Tensor): Image scores ``(N,)``.
        labels (torch.Tensor): 1 for defective images ``(N,)``.
        threshold (float): Score from which on an image counts as defective.
        timer (PartTimer): Time of the model's parts over all images.
    """
    table = Table(title="Monocrystalline solar cells (ELPV)", show_header=False)
    table.add_row("test images", f"{int((labels == 0).sum())} good, {int(labels.sum())} defective")
    table.add_row("image AUROC", f"{binary_auroc(scores, labels):.3f}")
    table.add_row("F1 (threshold chosen on these images)", f"{binary_f1_score(scores > threshold, labels):.3f}")
    table.add_section()
    for part, seconds in timer.seconds.items():
        table.add_row(f"{part}, seconds per image", f"{seconds / len(scores):.5f}")
    table.add_row("all of it, seconds per image", f"{sum(timer.seconds.values()) / len(scores):.5f}")
    Console().print(table)


def main() -> None:
    """Report on the checkpoint given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="the trained model")
    parser.add_argument("output", type=Path, help="folder of the demo; pictures go to its folder pictures")
    arguments = parser.parse_args()

    escape_what_the_terminal_lacks()
    model = StfpmExt.load_from_checkpoint(arguments.checkpoint)
    cells = Folder(
        "elpv",
        root=arguments.output / "elpv",
        normal_dir="good",
        normal_test_dir="good_test",
        abnormal_dir="defective",
        val_split_mode="same_as_test",
        num_workers=0,
    )
    paths, scores, labels, maps, timer = score_cells(model, cells)
    threshold = float(model.post_processor.image_threshold)
    print_results(scores, labels, threshold, timer)

    overlays = arguments.checkpoint.resolve().parents[2] / "images"  # anomalib's, made while it tested the model
    pictures = arguments.output / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir()
    overlay_rows, map_rows = [], []
    for title, label in (("good", 0), ("defective", 1)):
        picked = pick(scores, labels, label)
        captions = [f"score / threshold {scores[index] / threshold:.2f}" for index in picked]
        overlay_pictures = []
        for path in (paths[index] for index in picked):
            picture = shutil.copy(overlays / path.parent.name / path.name, pictures / f"{title}_{path.name}")
            image_and_overlay = np.hsplit(np.asarray(Image.open(picture)), 2)  # side by side, as demo/elpv.yaml asks
            overlay_pictures.append(np.vstack(image_and_overlay))
        overlay_rows.append((title, overlay_pictures, captions))
        map_rows.append((title, [maps[index].sqrt().numpy() for index in picked], captions))
    draw_sheet(pictures / "contact_sheet.png", overlay_rows)
    draw_sheet(pictures / "heat_maps.png", map_rows, cmap="inferno", vmin=0, vmax=(2 * threshold) ** 0.5)
    draw_histogram(scores, labels, threshold).save(pictures / "histogram.png")
    print(f"Overlays of {2 * PICTURES_PER_ROW} cells, and all of them on one sheet: {pictures / 'contact_sheet.png'}")


if __name__ == "__main__":
    main()
