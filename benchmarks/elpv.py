# SPDX-License-Identifier: Apache-2.0

"""Trains anomalib's Stfpm and StfpmExt on monocrystalline solar cells (ELPV) and follows their image AUROC.

Both get the same images, teacher, seeds and number of steps; anomalib's is all defaults. StfpmExt holds a fifth of the
good images out, so its epochs are shorter and more. After every epoch the student is measured on the test images, by
raw scores. Of StfpmExt there are two figures: the last student and the kept one, which the held-out images chose. The
swing is the standard deviation over the epochs of a run's second half. Curve and figures of every run are kept in the
output folder: the same command goes on where it was stopped, and the table and the plot show all variants found there.
"""

import argparse
import json
import math
import os
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Stfpm
from anomalib.models.components import AnomalibModule
from common import cpu_model
from lightning.pytorch import Callback, Trainer, seed_everything
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torchmetrics.functional.classification import binary_auroc

from anomalib_stfpm_ext import StfpmExt, anomaly_map

NETWORK: dict[str, Any] = {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.1", "blocks.2", "blocks.4"]}
# Scores as they come: anomalib's post-processor clamps them, which makes ties.
RAW: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
ANOMALIB, OURS = "anomalib Stfpm", "StfpmExt"


class Curve(Callback):
    """Measures the image AUROC of the student after every epoch; of the averaged student, where there is one.

    Takes the test images through the teacher once, and the maps from the fused scorer whosesoever the model is.
    """

    def __init__(self, cells: Folder) -> None:
        self.cells = cells
        self.points: list[dict[str, Any]] = []

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Prepare the test images and their teacher's features once."""
        del trainer
        items = list(self.cells.test_data)
        images = torch.stack([pl_module.pre_processor.transform(item.image) for item in items]).to(pl_module.device)
        self.batches = images.contiguous(memory_format=torch.channels_last).split(32)
        self.teacher = [pl_module.model.teacher_model(batch) for batch in self.batches]
        self.labels = torch.tensor([int(item.gt_label) for item in items])

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Add a point."""
        pl_module.model.eval()
        choice = getattr(pl_module, "choice", None)
        with choice.averaged() if choice else nullcontext():
            student = [pl_module.model.student_model(batch) for batch in self.batches]
        pl_module.model.train()
        size = self.batches[0].shape[2:]
        scores: dict[str, list[torch.Tensor]] = {}
        for features in zip(self.teacher, student, strict=True):
            _, score, level_maps = anomaly_map(*features, size, level_maps=True)
            scores.setdefault("product", []).append(score)
            for level, maps in zip(features[0], level_maps.unbind(1), strict=True):
                scores.setdefault(level, []).append(maps.amax((1, 2)))
        levels = {name: self._auroc(torch.cat(batches).cpu()) for name, batches in scores.items()}
        auroc = levels.pop("product")
        point = {"step": trainer.global_step, "epoch": trainer.current_epoch, "AUROC": auroc, "levels": levels}
        self.points.append(point)
        print(f"  step {trainer.global_step}: image AUROC {auroc:.3f}", flush=True)

    def _auroc(self, scores: torch.Tensor) -> float:
        # torchmetrics would take scores above 1 for logits, and their sigmoid has ties.
        return float(binary_auroc(scores / scores.max(), self.labels))


def train(variant: str, options: dict[str, Any], seed: int, epochs: int, data: Path) -> dict[str, Any]:
    """Train one model, and return the curve of its AUROC with what is needed to repeat it."""
    cells = Folder(
        "elpv",
        root=data / "elpv",
        normal_dir="good",
        normal_test_dir="good_test",
        abnormal_dir="defective",
        val_split_mode="none",
        num_workers=0,
    )
    cells.setup()
    steps = epochs * math.ceil(len(cells.train_data) / cells.train_batch_size)
    weights = data / "tf_efficientnet_lite0.safetensors"
    seed_everything(seed, workers=True)
    if variant == ANOMALIB:
        # anomalib knows no file of weights; with internet, timm would download the same.
        overlay = {"pretrained_cfg_overlay": {"file": str(weights)}}
        with mock.patch("timm.create_model", partial(timm.create_model, **overlay)):
            model = Stfpm(**NETWORK, **RAW)
    else:
        # The kept features of the teacher change nothing but the time.
        model = StfpmExt(**NETWORK, **RAW, teacher_weights=weights, teacher_cache="memory", seed=seed, **options)
    curve, start = Curve(cells), time.perf_counter()
    with tempfile.TemporaryDirectory() as workspace:  # for anomalib's numbered folders
        Engine(
            callbacks=[curve],
            default_root_dir=workspace,
            max_steps=steps,
            limit_val_batches=0,
            enable_model_summary=False,
            enable_progress_bar=False,
            logger=False,
        ).fit(model, datamodule=cells)
    best = getattr(model, "student_selection", None) and model.student_selection.best
    return {
        "variant": variant,
        "options": options,
        "seed": seed,
        "epochs": epochs,
        "steps": steps,
        "images": {"train": len(cells.train_data), "test": len(cells.test_data)},
        "curve": curve.points,
        "kept": best and next(point["AUROC"] for point in curve.points if point["step"] == best.step),
        "seconds": time.perf_counter() - start,
        "machine": {"cpu": cpu_model(), "threads": torch.get_num_threads(), "device": str(model.device)},
        "versions": {name: metadata.version(name) for name in ("anomalib", "anomalib-stfpm-ext", "timm", "torch")},
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Compute mean and standard deviation over the seeds of one variant."""
    curves = [[point["AUROC"] for point in run["curve"]] for run in runs]
    figures = {
        "last": [curve[-1] for curve in curves],
        "kept": [run["kept"] for run in runs if run["kept"] is not None],
        "swing": [float(np.std(curve[len(curve) // 2 :])) for curve in curves],
    }
    spread = {
        name: {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}
        for name, values in figures.items()
        if values
    }
    return {"seeds": [run["seed"] for run in runs], **spread}


def print_table(summary: dict[str, dict[str, Any]]) -> None:
    """Print a row for each variant."""
    table = Table(title="image AUROC of solar cells, mean ± standard deviation over the seeds")
    for column in ("", "seeds", "last", "kept", "swing"):
        table.add_column(column)
    for variant, figures in summary.items():
        cells = [figures.get(column) for column in ("last", "kept", "swing")]
        texts = [
            "-"
            if cell is None
            else f"{cell['mean']:.3f}" + (f" ± {cell['std']:.3f}" if cell["std"] is not None else "")
            for cell in cells
        ]
        table.add_row(variant, str(len(figures["seeds"])), *texts)
    Console().print(table)


def plot(variants: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Draw the AUROC over the steps: a thin line for each seed, a thick one for their mean."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for index, (variant, runs) in enumerate(variants.items()):
        curves = [[point["AUROC"] for point in run["curve"]] for run in runs]
        steps = [point["step"] for point in runs[0]["curve"]]
        axes.plot(steps, np.transpose(curves), color=f"C{index}", linewidth=0.7, alpha=0.5)
        axes.plot(steps, np.mean(curves, axis=0), color=f"C{index}", linewidth=2.5, label=variant)
    axes.set(xlabel="training step", ylabel="image AUROC", title="Solar cells (ELPV, monocrystalline)")
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Train what is not yet in the output folder, and report on all that is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("demo/output"), help="what demo/prepare.py made")
    parser.add_argument("--output", type=Path, default=Path("results/elpv"), help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=12, help="of all good training images; sets the number of steps")
    parser.add_argument("--seeds", default="0,1,2", help="with commas between")
    parser.add_argument("--lr-schedule", choices=["constant", "cosine"], default="constant", help="of StfpmExt")
    parser.add_argument("--ema-decay", type=float, help="of StfpmExt")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw the curves")
    arguments = parser.parse_args()

    seeds = list(map(int, arguments.seeds.split(",")))
    options = {"lr_schedule": arguments.lr_schedule, "ema_decay": arguments.ema_decay}
    options = {name: value for name, value in options.items() if value not in (None, "constant")}
    ours = ", ".join([OURS, *(f"{name} {value}" for name, value in options.items())])
    for seed in seeds:
        for variant in (ANOMALIB, ours):
            name = f"{variant}, {arguments.epochs} epochs, seed {seed}"
            file = arguments.output / f"{name.replace(', ', '-').replace(' ', '_')}.json"
            if not file.exists():
                print(name)
                run = train(variant, options, seed, arguments.epochs, arguments.data)
                file.parent.mkdir(parents=True, exist_ok=True)
                unfinished = file.with_suffix(f".{os.getpid()}")
                unfinished.write_text(json.dumps(run, indent=1) + "\n")
                unfinished.replace(file)

    variants: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(
        (json.loads(file.read_text()) for file in arguments.output.glob("*.json")), key=lambda r: r["seed"]
    ):
        if run["epochs"] == arguments.epochs and run["seed"] in seeds:
            variants.setdefault(run["variant"], []).append(run)
    summary = {variant: summarise(variants[variant]) for variant in sorted(variants, reverse=True)}
    print_table(summary)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        runs = [run for runs in variants.values() for run in runs]
        arguments.json.write_text(json.dumps({"summary": summary, "runs": runs}, indent=1) + "\n")
    if arguments.plot:
        plot({variant: variants[variant] for variant in summary}, arguments.plot)


if __name__ == "__main__":
    main()
