# SPDX-License-Identifier: Apache-2.0

"""Trains StfpmExt and anomalib's Stfpm on real images, and compares the rules that choose the student and its score.

Both get the same images, teacher, seeds and number of steps; all else of anomalib's are defaults. Every few epochs the
student is compared with the teacher on the test images. When the training is over, each rule chooses among those
students. Only the last rule knows the test images:

- "held_out_map": the lowest mean map of the held-out images, and all levels count the same;
- "synthetic": StfpmExt's default, which also weights the levels;
- "last": the last student, as anomalib's Stfpm keeps it;
- "oracle": the best one on the test images, which nobody can choose in practice.

StfpmExt is trained five times: with its defaults, with a `hard_share` of 0.1 and of 0.02, at the paper's learning rate,
and at this rate with running statistics (`precise_bn=False`). In the last training, "held_out_map" is the paper's
choice.

The swing is the standard deviation of the image AUROC over the second half of the training. Each run is kept in the
output folder with contact sheets: the same command goes on where it was stopped, and the table has all runs there. It
is the first table of docs/results.md, and --plot draws the picture beneath it.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import timm
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from anomalib.models import Stfpm
from anomalib.models.components import AnomalibModule
from common import cpu_model
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from matplotlib import pyplot as plt

from anomalib_stfpm_ext import StfpmExt
from anomalib_stfpm_ext.choices import PAPERS_RATE
from anomalib_stfpm_ext.metrics import METRICS, measure
from anomalib_stfpm_ext.ops.reference import squared_distance
from anomalib_stfpm_ext.reproduce.runs import draw_contact_sheet
from anomalib_stfpm_ext.selection.record import Measurement, best_of

NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"backbone": "resnet18", "layers": ["layer1", "layer2", "layer3"]},
    "tf_efficientnet_lite0": {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.1", "blocks.2", "blocks.4"]},
}
# Scores as they come: anomalib's post-processor clamps them, which makes ties.
RAW: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
ANOMALIB, OURS, HARD, HARDER, SMALL_STEPS, RUNNING = (
    "anomalib Stfpm",
    "StfpmExt",
    "StfpmExt, hard_share 0.1",
    "StfpmExt, hard_share 0.02",
    "StfpmExt, learning rate 0.4",
    "StfpmExt, learning rate 0.4, running statistics",
)
VARIANTS: dict[str, dict[str, Any]] = {
    OURS: {},
    HARD: {"hard_share": 0.1},
    HARDER: {"hard_share": 0.02},
    SMALL_STEPS: {"lr": PAPERS_RATE},
    RUNNING: {"lr": PAPERS_RATE, "precise_bn": False},
}
CHOICES = ("held_out_map", "synthetic", "last", "oracle")
RULES = {ANOMALIB: ("last", "oracle"), **dict.fromkeys(VARIANTS, CHOICES)}
OPTIONS = ("epochs", "precision", "image_size")  # of a training
PLOT_COLUMNS = 3

Distances = list[torch.Tensor]  # of each level, (N, 1, H_l, W_l)


class Comparison(Checkpoint):
    """Compares teacher and student on the test images every few epochs.

    It is a ``Checkpoint`` since Lightning calls those last, when the student has its statistics.

    Args:
        test_data (Any): The test images.
        every (int): Number of epochs.

    Attributes:
        distances (dict[int, Distances]): By training step, in half precision.
    """

    def __init__(self, test_data: Any, every: int) -> None:
        self.test_data, self.every = test_data, every
        self.distances: dict[int, Distances] = {}

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Prepare the test images and their teacher's features once."""
        images = (pl_module.pre_processor.transform(item.image[None]) for item in self.test_data)
        # Resized one by one, since photographs may differ in size.
        batches = torch.cat(list(images)).contiguous(memory_format=torch.channels_last)
        self.batches = torch.split(batches, 16)
        with trainer.precision_plugin.forward_context():
            self.teacher = [pl_module.model.teacher_model(batch) for batch in self.batches]

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Compare."""
        if (trainer.current_epoch + 1) % self.every:
            return
        pl_module.model.eval()
        with trainer.precision_plugin.forward_context():
            student = [pl_module.model.student_model(batch) for batch in self.batches]
        pl_module.model.train()
        by_batch = [
            [(0.5 * squared_distance(t[level].float(), s[level].float())).half() for level in t]
            for t, s in zip(self.teacher, student, strict=True)
        ]
        self.distances[trainer.global_step] = [torch.cat(level) for level in zip(*by_batch, strict=True)]
        print(f"  step {trainer.global_step}", flush=True)


def open_data(folder: Path) -> Folder:
    """Open images in MVTec AD's layout, or those of demo/prepare.py."""
    roles: dict[str, Any] = {"normal_dir": "good", "normal_test_dir": "good_test", "abnormal_dir": "defective"}
    if (folder / "train" / "good").is_dir():
        kinds = sorted(path.name for path in folder.glob("test/*") if path.is_dir() and path.name != "good")
        roles = {"normal_dir": "train/good", "normal_test_dir": "test/good"}
        roles["abnormal_dir"] = [f"test/{kind}" for kind in kinds]
        if (folder / "ground_truth").is_dir():
            roles["mask_dir"] = [f"ground_truth/{kind}" for kind in kinds]
    data = Folder(folder.name, root=folder, **roles, val_split_mode="none", num_workers=0)
    data.setup()
    return data


def train(variant: str, arguments: argparse.Namespace, seed: int, data: Folder) -> tuple[Comparison, Any, float]:
    """Train one model; return the comparisons, StfpmExt's measurements and the seconds."""
    network = NETWORKS[arguments.backbone]
    size = (arguments.image_size, arguments.image_size)
    seed_everything(seed, workers=True)
    if variant == ANOMALIB:
        # anomalib takes no file of weights; with internet, timm would download the same.
        overlay = {"pretrained_cfg_overlay": {"file": str(arguments.teacher_weights)}}
        with mock.patch("timm.create_model", partial(timm.create_model, **overlay)):
            model = Stfpm(**network, **RAW, pre_processor=Stfpm.configure_pre_processor(size))
    else:
        options = {"teacher_weights": arguments.teacher_weights, "image_size": size}
        model = StfpmExt(**network, **RAW, **options, **VARIANTS[variant], seed=seed)
    held_out = math.ceil(0.2 * len(data.train_data))
    steps = arguments.epochs * math.ceil((len(data.train_data) - held_out) / data.train_batch_size)
    comparison, start = Comparison(data.test_data, arguments.every), time.perf_counter()
    with tempfile.TemporaryDirectory() as workspace:  # for anomalib's numbered folders
        Engine(
            callbacks=[comparison],
            default_root_dir=workspace,
            max_steps=steps,
            precision=arguments.precision,
            limit_val_batches=0,
            enable_model_summary=False,
            enable_progress_bar=False,
            logger=False,
        ).fit(model, datamodule=data)
    selection = getattr(model, "student_selection", None)
    return comparison, selection.history if selection else [], time.perf_counter() - start


def evaluate(
    distances: dict[int, Distances], history: list[Measurement], data: Folder, sheet: Callable[[str], Path]
) -> dict[str, Any]:
    """Let each rule choose among the students that were compared, and measure the choices.

    Args:
        distances (dict[int, Distances]): See :class:`Comparison`.
        history (list[Measurement]): StfpmExt's measurements; empty for anomalib's Stfpm.
        data (Folder): The images.
        sheet (Callable[[str], Path]): Where a rule's contact sheet goes.

    Returns:
        dict[str, Any]: The curve over the steps, and by rule the step with its metrics.
    """
    items = list(data.test_data)
    labels = torch.tensor([bool(item.gt_label) for item in items])
    has_masks = all(item.gt_mask is not None for item in items if item.gt_label)
    known = {measurement.step: measurement for measurement in history}

    def predict(step: int, weights: tuple[float, ...] | None) -> ImageBatch:
        maps = [torch.nn.functional.interpolate(d.float(), (256, 256), mode="bilinear") for d in distances[step]]
        weighted = [level**weight for level, weight in zip(maps, weights or [1] * len(maps), strict=True)]
        amap = torch.stack(weighted).prod(0)
        return ImageBatch(
            image=torch.zeros(len(items), 3, 1, 1),
            anomaly_map=amap,
            pred_score=amap.amax((1, 2, 3)),
            gt_label=labels,
            image_path=[item.image_path for item in items],
        )

    def with_masks(batch: ImageBatch) -> ImageBatch:
        if has_masks:
            masks = [torch.zeros(1, 1) if item.gt_mask is None else item.gt_mask.float() for item in items]
            resized = [torch.nn.functional.interpolate(mask[None, None], (256, 256)) for mask in masks]
            batch.gt_mask = torch.cat(resized)[:, 0].bool()
        return batch

    curve: list[dict[str, Any]] = []
    for step in distances:
        point = {"step": step, "image_AUROC": measure([predict(step, None)])["image_AUROC"]}
        if known:
            measurement = known[step]
            weighted = measure([predict(step, measurement.level_weights)])["image_AUROC"]
            point |= {**measurement._asdict(), "weighted_image_AUROC": weighted}
        curve.append(point)
    plain = [point["image_AUROC"] for point in curve]
    steps = list(distances)
    chosen: dict[str, tuple[int, Any]] = {"last": (steps[-1], None), "oracle": (steps[int(np.argmax(plain))], None)}
    if known:
        compared = [known[step] for step in steps]
        lowest = min(compared, key=lambda measurement: measurement.value)
        ours = best_of(compared)
        assert ours is not None
        chosen |= {"held_out_map": (lowest.step, None), "synthetic": (ours.step, ours.level_weights)}
    figures = {}
    for rule, (step, weights) in chosen.items():
        batch = with_masks(predict(step, weights))
        draw_contact_sheet(sheet(rule), [batch])
        of_rule = [point["weighted_image_AUROC" if rule == "synthetic" else "image_AUROC"] for point in curve]
        figures[rule] = {"step": step, **measure([batch]), "swing": float(np.std(of_rule[len(of_rule) // 2 :]))}
    return {"curve": curve, "rules": figures}


def tabulate(runs: list[dict[str, Any]]) -> str:
    """Make the table: mean and standard deviation over the seeds."""
    rows = [
        {**{name: run[name] for name in ("data", "backbone", "epochs", "variant", "seed")}, "rule": rule, **figures}
        for run in runs
        for rule, figures in run["rules"].items()
        if rule in RULES[run["variant"]]
    ]
    columns = [*METRICS, "swing"]
    frame = pd.DataFrame(rows)
    frame[columns] = frame[columns].astype(float)
    groups = frame.groupby(["data", "backbone", "epochs", "variant", "rule"])
    mean, spread = groups[columns].mean(), groups[columns].std()
    lines = [f"| data | teacher | epochs | model | rule | seeds | {' | '.join([*METRICS.values(), 'swing'])} |"]
    lines.append("|---" * (len(columns) + 6) + "|")
    for key, values in mean.iterrows():
        texts = [
            "-"
            if np.isnan(values[name])
            else f"{values[name]:.3f}" + ("" if np.isnan(spread.loc[key, name]) else f" ± {spread.loc[key, name]:.3f}")
            for name in columns
        ]
        lines.append(f"| {' | '.join(map(str, key))} | {groups.size()[key]} | {' | '.join(texts)} |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    """Draw the AUROC over the steps, a line for each run; only StfpmExt's own rules weight the levels."""
    names = sorted({(run["data"], run["backbone"]) for run in runs})
    columns, rows = min(len(names), PLOT_COLUMNS), math.ceil(len(names) / PLOT_COLUMNS)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 4 * rows), layout="constrained", squeeze=False)
    axes = axes.flatten()
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    lines = {
        (RUNNING, "image_AUROC"): ("C0", "paper's rules"),
        (SMALL_STEPS, "weighted_image_AUROC"): ("C1", SMALL_STEPS),
        (OURS, "weighted_image_AUROC"): ("C3", OURS),
        (HARD, "weighted_image_AUROC"): ("C4", HARD),
        (ANOMALIB, "image_AUROC"): ("C2", ANOMALIB),
    }
    for axis, name in zip(axes[: len(names)], names, strict=True):
        for (variant, key), (colour, label) in lines.items():
            of_name = [run for run in runs if (run["data"], run["backbone"], run["variant"]) == (*name, variant)]
            for index, run in enumerate(of_name):
                points = [(point["step"], point[key]) for point in run["curve"]]
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=None if index else label)
        axis.set(xlabel="training step", ylabel="image AUROC", title=", ".join(name))
        axis.grid(alpha=0.3)
    lines_by_label = {line.get_label(): line for axis in axes for line in axis.get_legend_handles_labels()[0]}
    axes[0].legend(lines_by_label.values(), lines_by_label)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def _sheet(prefix: Path, rule: str) -> Path:
    return prefix.with_name(f"{prefix.name}-{rule}.png")


def main() -> None:
    """Train what is not yet in the output folder, and report on all that is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="images in MVTec AD's layout, or those of demo/prepare.py")
    parser.add_argument("--backbone", choices=NETWORKS, default="resnet18")
    parser.add_argument("--teacher-weights", type=Path, help="file of the teacher's weights")
    parser.add_argument("--epochs", type=int, default=100, help="of the images that are not held out")
    parser.add_argument("--every", type=int, default=5, help="epochs between two looks at the test images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--image-size", type=int, default=256, help="height and width")
    parser.add_argument("--precision", default="32-true", help="the trainer's, such as bf16-mixed")
    parser.add_argument("--output", type=Path, default=Path("results/verdicts"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--plot", type=Path, help="where to draw the curves")
    arguments = parser.parse_args()

    given = {option: getattr(arguments, option) for option in OPTIONS}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds if arguments.data else ():
        for variant in arguments.variants:
            data = open_data(arguments.data)
            name = "-".join(map(str, (data.name, arguments.backbone, variant, arguments.epochs, seed)))
            name = name.replace(",", "").replace(" ", "_")
            file = arguments.output / f"{name}.json"
            if file.exists():
                before = json.loads(file.read_text())
                if any(before.get(option, given[option]) != given[option] for option in OPTIONS):
                    parser.error(f"--output: {file} has other options than {given}; take another folder")
                continue
            print(name)
            comparison, history, seconds = train(variant, arguments, seed, data)
            sheet = partial(_sheet, arguments.output / name)
            packages = ("anomalib", "anomalib-stfpm-ext", "timm", "torch")
            run = {
                "data": data.name,
                "backbone": arguments.backbone,
                "variant": variant,
                "seed": seed,
                **given,
                "images": {"train": len(data.train_data), "test": len(data.test_data)},
                **evaluate(comparison.distances, history, data, sheet),
                "seconds": seconds,
                "machine": {"cpu": cpu_model(), "threads": torch.get_num_threads()},
                "versions": {package: metadata.version(package) for package in packages},
            }
            unfinished = file.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(run, indent=1) + "\n")
            unfinished.replace(file)

    runs = [json.loads(file.read_text()) for file in sorted(arguments.output.glob("*.json"))]
    print(tabulate(runs))
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=1) + "\n")
    if arguments.plot:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
