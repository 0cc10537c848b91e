# SPDX-License-Identifier: Apache-2.0

"""Pictures of results besides anomalib's own; ``stfpm-ext draw`` is the command.

They show the anomaly maps of the single levels beside their product, a histogram of the scores of good and defective
images, and sheets of pictures spread over the scores.
"""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from .data.images import check_image
from .errors import fail
from .exports.resizing import pre_process
from .lightning_model import StfpmExt
from .scorer import anomaly_map

PICTURES_PER_ROW = 8
MAX_DISTANCE = 2.0  # of teacher and student at a level, when their features are opposite


@dataclass(frozen=True)
class LevelMaps:
    """The raw anomaly maps of an image, of the single levels and of their product.

    Args:
        names (list[str]): The levels, from the finest to the coarsest.
        sizes (list[tuple[int, int]]): Height and width of their features.
        maps (np.ndarray): Their distances ``(levels, h, w)`` at the size at which they are combined, float32, from 0
            to 2.
        product (np.ndarray): The anomaly map ``(H, W)``, float32.
        score (float): The image score, the maximum of the product.
        weights (list[float]): The exponents of the levels' maps in the product.
    """

    names: list[str]
    sizes: list[tuple[int, int]]
    maps: np.ndarray
    product: np.ndarray
    score: float
    weights: list[float]


def raw_threshold(model: StfpmExt, pixels: bool = False) -> float | None:
    """Return the threshold of raw scores; the one of anomalib's predictions is for scores of 0 to 1.

    Args:
        model (StfpmExt): The model.
        pixels (bool): Whether to return the threshold of pixels, not of images. Defaults to ``False``.

    Returns:
        float | None: The threshold, shifted as the post-processor's sensitivity asks, or ``None`` where no validation
            has set one.
    """
    post = model.post_processor
    if post is None:
        return None
    if pixels:
        threshold, low, high, sensitivity = post.pixel_threshold, post.pixel_min, post.pixel_max, post.pixel_sensitivity
    else:
        threshold, low, high, sensitivity = post.image_threshold, post.image_min, post.image_max, post.image_sensitivity
    threshold = float(threshold + (0.5 - sensitivity) * (high - low))
    return None if np.isnan(threshold) else threshold


@torch.inference_mode()
def measure_levels(model: StfpmExt, image: torch.Tensor) -> LevelMaps:
    """Compare teacher and student at each level.

    Args:
        model (StfpmExt): The model, in evaluation mode.
        image (torch.Tensor): The image ``(3, H, W)`` as :func:`.read_image` reads it: floats of 0 to 1, neither
            0 to 255 nor normalised, since the model normalises them itself.

    Returns:
        LevelMaps: The maps, for the size that the model's pre-processor gives the image.

    Raises:
        TypeError: If the image is no tensor of floats.
        ValueError: If its shape or its range is wrong.
    """
    check_image(image)
    images = pre_process(model.pre_processor, image[None].to(model.device))
    teacher, student = model.model.features(images)
    size, combine_size = tuple(images.shape[-2:]), model.model.combine_size(teacher)
    weights = model.model.level_weights
    product, score, maps = anomaly_map(
        teacher, student, size, weights=weights, combine_size=combine_size, level_maps=True
    )
    sizes = {name: (features.shape[-2], features.shape[-1]) for name, features in teacher.items()}
    order = sorted(range(len(sizes)), key=lambda level: -np.prod(list(sizes.values())[level]))
    return LevelMaps(
        [list(sizes)[level] for level in order],
        [list(sizes.values())[level] for level in order],
        maps[0, order].cpu().numpy(),
        product[0, 0].cpu().numpy(),
        float(score),
        [weights[level] if weights else 1.0 for level in order],
    )


def draw_levels(
    image: np.ndarray, levels: LevelMaps, mask: np.ndarray | None = None, threshold: float | None = None
) -> Image.Image:
    """Draw an image, its mask if it has one, the maps of the levels and their product.

    All maps have one colour scale, from 0 to twice the threshold's root, or to the largest distance where there is no
    threshold. To fit it, the product of L levels is shown as its Lth root, the geometric mean of the levels' distances.

    Args:
        image (np.ndarray): The image ``(H, W, 3)``.
        levels (LevelMaps): See :func:`measure_levels`.
        mask (np.ndarray | None): The mask ``(H, W)`` of the defects. Defaults to ``None``.
        threshold (float | None): Raw threshold of the pixels. Defaults to ``None``.

    Returns:
        Image.Image: The picture.
    """
    count = len(levels.names)
    root = rf"$^{{1/{count}}}$" if count > 1 else ""
    height, width = levels.product.shape
    panels: list[tuple[str, np.ndarray, dict[str, Any]]] = [("image", image, {})]
    if mask is not None:
        panels.append(("mask", mask, {"cmap": "gray"}))
    line = threshold ** (1 / count) if threshold is not None and threshold > 0 else None
    end = min(MAX_DISTANCE, 2 * line) if line else max(levels.maps.max(), np.finfo(np.float32).tiny)
    colours = {"cmap": "inferno", "vmin": 0, "vmax": end}
    grades = ["fine", *["middle"] * (count - 2), "coarse"]
    weighted = any(weight != 1 for weight in levels.weights)
    for grade, name, size, level, weight in zip(
        grades, levels.names, levels.sizes, levels.maps, levels.weights, strict=False
    ):
        exponent = f", exponent {weight:.2f}" if weighted else ""
        panels.append((f"{grade}: {name}\n{size[0]} x {size[1]}{exponent}", level, colours))
    panels.append(
        (f"product{root}\nscore{root} {levels.score ** (1 / count):.2g}", levels.product ** (1 / count), colours)
    )

    figure = Figure(figsize=(2.4 * len(panels) + 1.5, 2.35 * height / width + 0.8), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (title, panel, how) in zip(axes, panels, strict=True):
        # All of one size, so that a place in one is the same place in the others.
        drawn = axis.imshow(panel, extent=(0, width, height, 0), **how)
        axis.set(title=title, xticks=[], yticks=[])
    more = "max" if end < levels.maps.max() else "neither"
    bar = figure.colorbar(drawn, ax=axes, label=f"distance; product{root}", extend=more, pad=0.01)
    if line:
        bar.ax.axhline(line, color="cyan", linewidth=2)
        bar.set_ticks([0, line, end], labels=["0", f"threshold{root} {line:.2g}", f"{end:.2g}"])
    return _render(figure)


def draw_histogram(
    scores: torch.Tensor, labels: torch.Tensor, threshold: float | None = None, bins: int = 40
) -> Image.Image:
    """Draw how the scores of good and of defective images are spread, and where the threshold lies.

    Args:
        scores (torch.Tensor): Raw image scores ``(N,)``. Scores of 0, which have no logarithm, are drawn at the
            smallest score above 0.
        labels (torch.Tensor): 1 for defective images, 0 for good ones ``(N,)``.
        threshold (float | None): Raw threshold: images above it count as defective. Defaults to ``None``.
        bins (int): Number of bars. Defaults to ``40``.

    Returns:
        Image.Image: The picture.

    Raises:
        ValueError: If a score is not finite or negative, or none is above 0.
    """
    values, defective = scores.double().numpy(), labels.bool().numpy()
    if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        fail(ValueError, "scores", "finite numbers of at least 0, one of them above", values)
    values = values.clip(values[values > 0].min())
    ends = [values.min(), values.max(), *([threshold] if threshold and threshold > 0 else [])]
    edges = np.geomspace(min(ends) / 1.05, max(ends) * 1.05, bins + 1).tolist()

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    axis = figure.subplots()
    for name, chosen, colour in (("good", values[~defective], "tab:blue"), ("defective", values[defective], "tab:red")):
        text = f"{name}: {len(chosen)} images"
        if threshold is not None:
            above = int((chosen > threshold).sum())
            wrong = f"{above} above" if name == "good" else f"{len(chosen) - above} not above"
            text += f", {wrong} the threshold"
        axis.hist(chosen, edges, histtype="stepfilled", alpha=0.5, color=colour, edgecolor=colour, label=text)
    if threshold is not None:
        axis.axvline(threshold, color="black", linestyle="--", label=f"threshold: {threshold:.3g}")
    axis.set(xscale="log", xlabel="image score (raw, logarithmic scale)", ylabel="images")
    digits = (1, 2, 5) if edges[-1] > 10 * edges[0] else range(1, 10)
    axis.xaxis.set_major_locator(LogLocator(subs=digits))
    axis.xaxis.set_major_formatter("{x:g}")  # 2 and 0.01, not powers of 10
    axis.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside upper center", frameon=False)
    return _render(figure)


def _render(figure: Figure) -> Image.Image:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


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
        file (Path): The PNG file to write.
        rows (list[tuple[str, list[np.ndarray], list[str]]]): Title, pictures and captions of each row. The pictures
            have one size; a row may hold fewer than the sheet is wide.
        colours (Any): How matplotlib colours gray pictures: arguments of ``imshow``.
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
