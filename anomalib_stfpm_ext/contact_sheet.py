# SPDX-License-Identifier: Apache-2.0

"""Pictures of test images, spread evenly over their scores, on one sheet."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

PICTURES_PER_ROW = 8


def pick(scores: torch.Tensor, labels: torch.Tensor, label: int) -> list[int]:
    """Pick images of one label, evenly spread from the lowest score to the highest: the failures too.

    Args:
        scores (torch.Tensor): Image scores ``(N,)``.
        labels (torch.Tensor): Labels ``(N,)``.
        label (int): The label.

    Returns:
        list[int]: Indices of as many images as a row takes, or of all if there are fewer.
    """
    indices = (labels == label).nonzero().flatten()
    indices = indices[scores[indices].argsort()]
    count = min(PICTURES_PER_ROW, len(indices))
    return indices[torch.linspace(0, len(indices) - 1, count).round().long()].tolist()


def draw_sheet(file: Path, rows: list[tuple[str, list[np.ndarray], list[str]]], **colours: Any) -> None:
    """Draw rows of pictures with a caption under each.

    Args:
        file (Path): The PNG file to be written.
        rows (list[tuple[str, list[np.ndarray], list[str]]]): Title, pictures and captions of each row. The pictures
            are of one size; a row may hold fewer than the sheet is wide.
        colours (Any): How matplotlib shows pictures without colour.
    """
    height, width = rows[0][1][0].shape[:2]
    size = (2 * PICTURES_PER_ROW, len(rows) * (2 * height / width + 0.4))
    figure, axes = plt.subplots(len(rows), PICTURES_PER_ROW, figsize=size)
    for row_axes, (title, pictures, captions) in zip(axes, rows, strict=True):
        row_axes[0].set_ylabel(title)
        for axis in row_axes[len(pictures) :]:
            axis.set_axis_off()
        for axis, picture, caption in zip(row_axes, pictures, captions, strict=False):
            axis.imshow(picture, **colours)
            axis.set(xticks=[], yticks=[], xlabel=caption)
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    plt.close(figure)
