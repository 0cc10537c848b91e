# SPDX-License-Identifier: Apache-2.0

"""The paper's table, measured anew: ``python -m anomalib_stfpm_ext.reproduce --help`` is the command.

Trains and evaluates a model for every category and seed, on raw scores. A run that was finished is not repeated, one
that was interrupted goes on from its last epoch, and the tables are written anew after every run.
"""

import ctypes
import hashlib
import inspect
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import numpy as np
import pandas as pd
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import AnomalibDataModule, Folder, ImageBatch, MVTecAD, Visa
from anomalib.data.datamodules.image.visa import VISA_CATEGORIES
from anomalib.data.datasets.image import mvtecad, visa
from anomalib.engine import Engine
from anomalib.metrics import AUPRO
from anomalib.pipelines.components.base import Job, JobGenerator
from anomalib.pipelines.components.runners import ParallelRunner, SerialRunner
from anomalib.pipelines.components.runners.parallel import ParallelExecutionError
from anomalib.pipelines.components.runners.serial import SerialExecutionError
from anomalib.utils.cv import connected_components_cpu
from anomalib.visualization.image.functional import overlay_image, visualize_anomaly_map
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image
from torchmetrics.functional.classification import binary_auroc

from .errors import fail
from .lightning_model import StfpmExt
from .visualization import draw_sheet, pick

METRICS = {
    "image_AUROC": "image AUROC",
    "pixel_AUROC": "pixel AUROC",
    "AUPRO": "AUPRO (0.3)",
    "rescaled_PRO": "PRO, rescaled",
}
MEAN = "mean of all"  # categories of the data set
PR_SET_PDEATHSIG = 1  # of prctl, from Linux's headers

# Image AUROC of the paper's authors, from the README of their code, and of anomalib, from the README of its Stfpm.
_MVTEC_AD = {
    "carpet": (0.964, 0.954),
    "grid": (0.982, 0.982),
    "leather": (0.951, 0.989),
    "tile": (0.982, 0.949),
    "wood": (0.996, 0.961),
    "bottle": (1.000, 0.979),
    "cable": (0.936, 0.838),
    "capsule": (0.893, 0.759),
    "hazelnut": (1.000, 0.999),
    "metal_nut": (0.983, 0.956),
    "pill": (0.951, 0.705),
    "screw": (0.895, 0.835),
    "toothbrush": (0.897, 0.997),
    "transistor": (0.939, 0.853),
    "zipper": (0.961, 0.645),
    MEAN: (0.955, 0.893),
}
# By data set, source, metric and category. The authors' PRO is the rescaled one. For VisA neither of the two has
# figures; that one is of others' measurements of STFPM.
PUBLISHED: dict[str, dict[str, dict[str, dict[str, float]]]] = {
    "MVTecAD": {
        "paper": {
            "image_AUROC": {category: paper for category, (paper, _) in _MVTEC_AD.items()},
            "pixel_AUROC": {MEAN: 0.970},
            "rescaled_PRO": {MEAN: 0.928},
        },
        "anomalib": {
            "image_AUROC": {category: anomalib for category, (_, anomalib) in _MVTEC_AD.items()},
            "pixel_AUROC": {MEAN: 0.951},
        },
    },
    "Visa": {"on record": {"image_AUROC": {MEAN: 0.833}}},
}
ALL_CATEGORIES = {"MVTecAD": _MVTEC_AD.keys() - {MEAN}, "Visa": set(VISA_CATEGORIES)}


@dataclass(frozen=True)
class Category:
    """The folder of a category, in MVTec AD's layout.

    Args:
        folder (Path): The folder.
        defects (list[str]): Its kinds of defects.
        masks (bool): Whether it has masks.
    """

    folder: Path
    defects: list[str]
    masks: bool

    @classmethod
    def check(cls, data: str, folder: Path) -> "Category":
        """Look at the folder before anything is trained.

        Args:
            data (str): The data set.
            folder (Path): The folder.

        Returns:
            Category: What the folder has.

        Raises:
            ValueError: If it lacks images, or has masks for some defective images only.
        """
        extensions = mvtecad.IMG_EXTENSIONS if data == "MVTecAD" else visa.EXTENSIONS

        def count(*parts: str) -> int:
            return sum(path.suffix in extensions for path in folder.joinpath(*parts).rglob("*"))

        defects = sorted(path.name for path in folder.glob("test/*") if path.is_dir() and path.name != "good")
        num_defective = sum(count("test", defect) for defect in defects)
        for role, num_images in (
            ("train/good", count("train", "good")),
            ("test/good", count("test", "good")),
            ("a folder of test/ other than good", num_defective),
        ):
            if not num_images:
                fail(ValueError, "root", f"images ({', '.join(extensions)}) in {role} of {folder}", "none")
        num_masks = count("ground_truth")
        if num_masks not in {0, num_defective}:
            wanted = f"a mask for each of the {num_defective} defective test images of {folder}, or none at all"
            fail(ValueError, "root", wanted, f"{num_masks} masks")
        return cls(folder, defects, num_masks > 0)


@dataclass(frozen=True)
class Plan:
    """What all runs have in common.

    Args:
        data (str): The data set, by the name of anomalib's data module.
        root (Path): Its folder.
        output (Path): Where results go.
        categories (dict[str, Category]): The categories by name.
        model (dict[str, Any]): Arguments of :class:`StfpmExt`.
        max_epochs (int): Epochs to train.
        workers (int): Processes that load the images of one run.
    """

    data: str
    root: Path
    output: Path
    categories: dict[str, Category]
    model: dict[str, Any]
    max_epochs: int
    workers: int

    def settings(self) -> dict[str, Any]:
        """Return what the results depend on, besides category and seed.

        Returns:
            dict[str, Any]: Settings that JSON can express. Of the file of teacher weights it is the content that
                counts, not the name.
        """
        teacher = self.model["teacher_weights"]
        if isinstance(teacher, Path):
            teacher = f"sha256 {hashlib.sha256(teacher.read_bytes()).hexdigest()}"
        model = {**self.model, "layers": list(self.model["layers"]), "teacher_weights": teacher}
        return {"data": self.data, "root": str(self.root.resolve()), **model, "max_epochs": self.max_epochs}

    def claim_output(self) -> None:
        """Write the settings into the output folder, or compare them with what is there.

        Raises:
            ValueError: If the folder has results of other settings.
        """
        file, settings = self.output / "settings.json", self.settings()
        if not file.exists():
            _write(file, json.dumps(settings, indent=2))
            return
        before = json.loads(file.read_text())
        for name in {**before, **settings}:
            if before.get(name) != settings.get(name):
                wanted = f"{before.get(name)}, as for the results in {self.output} (or another output)"
                fail(ValueError, name, wanted, settings.get(name))

    def run_folder(self, category: str, seed: int) -> Path:
        """Return where a run is kept.

        Args:
            category (str): The category.
            seed (int): The seed.

        Returns:
            Path: Its folder.
        """
        return self.output / category / f"seed_{seed}"

    def datamodule(self, category: str) -> AnomalibDataModule:
        """Make the data module of a category.

        Args:
            category (str): The category.

        Returns:
            AnomalibDataModule: anomalib's own for the data set. It insists on masks: where there are none, one for
                folders. The test images take no part in the training.
        """
        arguments: dict[str, Any] = {"val_split_mode": "none", "num_workers": self.workers}
        found = self.categories[category]
        if found.masks:
            module = MVTecAD if self.data == "MVTecAD" else Visa
            return module(root=self.root, category=category, **arguments)
        return Folder(
            name=category,
            root=found.folder,
            normal_dir="train/good",
            normal_test_dir="test/good",
            abnormal_dir=[f"test/{defect}" for defect in found.defects],
            **arguments,
        )


class ReproduceJob(Job):
    """Trains and evaluates one model.

    Args:
        plan (Plan): What all runs have in common.
        category (str): The category.
        seed (int): The seed.
    """

    name = "reproduce"

    def __init__(self, plan: Plan, category: str, seed: int) -> None:
        self.plan, self.category, self.seed = plan, category, seed

    def run(self, task_id: int | None = None) -> dict[str, Any]:
        """Train from where the last attempt stopped, if any, evaluate, and write results and tables.

        Args:
            task_id (int | None): The GPU, if several work side by side.

        Returns:
            dict[str, Any]: The results.
        """
        if task_id is not None:  # a process of its own, which must not outlive the one that started it
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        start = time.perf_counter()
        folder = self.plan.run_folder(self.category, self.seed)
        checkpoint = folder / "model.ckpt"
        datamodule = self.plan.datamodule(self.category)
        # Without a post-processor, maps and scores stay as they are: anomalib's clamps them, which makes ties.
        model = StfpmExt(**self.plan.model, seed=self.seed, post_processor=False, evaluator=False, visualizer=False)
        with tempfile.TemporaryDirectory() as workspace:  # for anomalib's numbered folders
            engine = Engine(
                default_root_dir=workspace,
                callbacks=[ModelCheckpoint(folder, filename="model", enable_version_counter=False)],
                devices=[task_id or 0] if torch.cuda.is_available() else 1,
                max_epochs=self.plan.max_epochs,
                limit_val_batches=0,
                enable_progress_bar=task_id is None,
            )
            resumed = checkpoint.exists()
            engine.fit(model, datamodule=datamodule, ckpt_path=checkpoint if resumed else None)
            trained = time.perf_counter()
            chosen = model.student_selection.best
            # From the checkpoint, which holds the chosen student, also where there was nothing left to train.
            batches = engine.predict(model, datamodule=datamodule, ckpt_path=checkpoint)
        metrics = measure(batches)
        draw_contact_sheet(folder / "contact_sheet.png", batches)
        labels = torch.cat([batch.gt_label for batch in batches])
        results = {
            "category": self.category,
            "seed": self.seed,
            **metrics,
            "masks": self.plan.categories[self.category].masks,
            "images": {
                "train": len(datamodule.train_data),
                "good": int((labels == 0).sum()),
                "defective": int((labels == 1).sum()),
            },
            "chosen_epoch": chosen and chosen.epoch,
            "resumed": resumed,
            "seconds": {"fit": trained - start, "evaluation": time.perf_counter() - trained},
            "device": _name(engine.trainer.strategy.root_device),
            "versions": {name: metadata.version(name) for name in ("anomalib-stfpm-ext", "anomalib", "timm", "torch")},
            "settings": self.plan.settings(),
        }
        _write(folder / "run.json", json.dumps(results, indent=2))
        write_tables(self.plan.data, self.plan.output)
        print(f"{self.category}, seed {self.seed}: image AUROC {metrics['image_AUROC']:.3f}")
        return results

    @staticmethod
    def collect(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Gather results.

        Args:
            results (list[dict[str, Any]]): Results of the runs.

        Returns:
            list[dict[str, Any]]: The same.
        """
        return results

    @staticmethod
    def save(results: list[dict[str, Any]]) -> None:
        """Save nothing: each run has, and the tables are made from all that is there.

        Args:
            results (list[dict[str, Any]]): Unused.
        """
        del results


class ReproduceJobGenerator(JobGenerator):
    """Makes the jobs that are still to be done, all categories of a seed before the next seed."""

    @property
    def job_class(self) -> type[Job]:
        """Class of the jobs.

        Returns:
            type[Job]: The class.
        """
        return ReproduceJob

    def generate_jobs(
        self, args: dict[str, Any] | None = None, prev_stage_result: Any = None
    ) -> Iterator[ReproduceJob]:
        """Make the jobs.

        Args:
            args (dict[str, Any] | None): ``plan`` and ``seeds``.
            prev_stage_result (Any): Unused.

        Yields:
            ReproduceJob: A run without results.
        """
        del prev_stage_result
        plan, seeds = (args or {})["plan"], (args or {})["seeds"]
        for seed in seeds:
            for category in plan.categories:
                if not (plan.run_folder(category, seed) / "run.json").exists():
                    yield ReproduceJob(plan, category, seed)


def measure(batches: Sequence[ImageBatch]) -> dict[str, float | None]:
    """Compute the metrics of raw maps and scores.

    Args:
        batches (Sequence[ImageBatch]): All test images, with maps, scores, labels and, if there are any, masks.

    Returns:
        dict[str, float | None]: Each of ``METRICS``; without masks, ``None`` for those of pixels.

    Raises:
        FloatingPointError: If a score is not finite.
    """
    scores = torch.cat([batch.pred_score.flatten() for batch in batches])
    labels = torch.cat([batch.gt_label for batch in batches])
    if not scores.isfinite().all():
        msg = f"{(~scores.isfinite()).sum()} of {len(scores)} scores are not finite: the training has diverged"
        raise FloatingPointError(msg)
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    metrics["image_AUROC"] = _auroc(scores, labels)
    if all(batch.gt_mask is not None for batch in batches):
        maps = torch.cat([batch.anomaly_map for batch in batches])
        masks = torch.cat([batch.gt_mask for batch in batches])
        aupro = AUPRO(fields=["anomaly_map", "gt_mask"], fpr_limit=0.3)
        for batch in batches:
            aupro.update(batch)
        metrics["pixel_AUROC"] = _auroc(maps.flatten(), masks.flatten())
        metrics["AUPRO"] = float(aupro.compute())
        metrics["rescaled_PRO"] = rescaled_pro(maps.squeeze(1), masks)
    return metrics


def _auroc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    # torchmetrics takes scores above 1 for logits, and their sigmoid has ties. Powers of 2 divide without rounding.
    exponent = torch.frexp(scores.max()).exponent.clamp(min=0)
    return float(binary_auroc(torch.ldexp(scores, -exponent), labels.int()))


def rescaled_pro(maps: torch.Tensor, masks: torch.Tensor, fpr_limit: float = 0.3, steps: int = 4000) -> float | None:
    """Compute the per-region overlap as the paper's authors do, which is not the usual AUPRO.

    Both take the area under the mean overlap of the defective regions over the false positive rate, up to a limit.
    The usual one divides by the limit. The authors take thresholds at equal distances over the range of the maps, and
    then stretch both axes of what lies within the limit from 0 to 1: the overlap too, so that it is biased upward.

    Args:
        maps (torch.Tensor): Anomaly maps ``(N, H, W)``.
        masks (torch.Tensor): Masks ``(N, H, W)`` of 0 and 1.
        fpr_limit (float): Highest false positive rate. Defaults to ``0.3``.
        steps (int): Number of thresholds. Defaults to the authors' ``4000``.

    Returns:
        float | None: The area, or ``None`` where there are no two points within the limit to stretch between.
    """
    regions = connected_components_cpu(masks[:, None].float()).flatten().long()  # 0, the background, and 1 to R
    scores = maps.flatten().double()
    lowest, highest = scores.min(), scores.max()
    thresholds = highest - torch.arange(steps) * ((highest - lowest) / steps)

    background = scores[regions == 0].sort().values
    above = len(background) - torch.searchsorted(background, thresholds, right=True)
    fpr = above.double() / len(background)

    weights = 1 / regions.bincount().double()  # each region counts as much as any other
    defective, order = scores[regions > 0].sort(descending=True)
    covered = weights[regions[regions > 0][order]].cumsum(0) / regions.max()
    above = len(defective) - torch.searchsorted(defective.flip(0), thresholds, right=True)
    overlap = torch.cat([torch.zeros(1).double(), covered])[above]

    fpr, overlap = fpr[fpr <= fpr_limit], overlap[fpr <= fpr_limit]
    if fpr.max() == fpr.min() or overlap.max() == overlap.min():
        return None
    fpr, overlap = ((axis - axis.min()) / (axis.max() - axis.min()) for axis in (fpr, overlap))
    return float(torch.trapezoid(overlap, fpr))


def draw_contact_sheet(file: Path, batches: Sequence[ImageBatch]) -> None:
    """Draw some good and some defective images, evenly spread over their scores, each above its heat map.

    Args:
        file (Path): The PNG file to be written.
        batches (Sequence[ImageBatch]): All test images, with maps, scores and labels.
    """
    scores = torch.cat([batch.pred_score.flatten() for batch in batches])
    labels = torch.cat([batch.gt_label for batch in batches])
    maps = torch.cat([batch.anomaly_map for batch in batches]).squeeze(1)
    paths = [path for batch in batches for path in batch.image_path]
    # One scale for the whole sheet. Maps are products of levels, mostly near 0: the root shows more than the peaks.
    heat = (maps / maps.max()).sqrt()
    rows = []
    for title, label in (("good", 0), ("defective", 1)):
        picked = pick(scores, labels, label)
        pictures = []
        for index in picked:
            photograph = Image.open(paths[index]).convert("RGB").resize((heat.shape[2], heat.shape[1]))
            overlay = overlay_image(photograph, visualize_anomaly_map(heat[index].numpy())).convert("RGB")
            pictures.append(np.vstack([np.asarray(photograph), np.asarray(overlay)]))
        rows.append((title, pictures, [f"score {scores[index]:.3g}" for index in picked]))
    draw_sheet(file, rows)


def make_table(data: str, runs: pd.DataFrame) -> pd.DataFrame:
    """Put published figures and ours side by side.

    Args:
        data (str): The data set.
        runs (pd.DataFrame): One row for each run.

    Returns:
        pd.DataFrame: A row for each category, one for the mean of these, and one for the mean as published, where ours
            stands only if we have all categories, each with what the metric needs. For each metric the published
            figures, our mean over the seeds, and the standard deviation where there are several.
    """
    groups = runs.groupby("category")
    table = pd.DataFrame(index=groups.size().index)
    for metric in METRICS:
        for source, figures in PUBLISHED[data].items():
            if metric in figures:
                table[f"{metric} {source}"] = pd.Series(figures[metric])
        table[f"{metric} ours"] = groups[metric].mean()
        table[f"{metric} spread"] = groups[metric].std()
    means = table.drop(columns=table.filter(like=" spread").columns).mean()
    published = pd.Series(
        {
            f"{metric} {source}": figures[MEAN]
            for source, metrics in PUBLISHED[data].items()
            for metric, figures in metrics.items()
        }
    )
    if set(table.index) == ALL_CATEGORIES[data]:
        complete = table.filter(like=" ours").notna().all()
        published = pd.concat([published, means[complete.index[complete]]])
    table.loc[f"mean of these {len(groups)}"] = means
    table.loc[MEAN] = published
    table["seeds"] = groups["seed"].nunique().astype("Int64")
    table["masks"] = groups["masks"].all().astype("boolean")
    return table


def to_markdown(data: str, table: pd.DataFrame) -> str:
    """Write the table for people.

    Args:
        data (str): The data set.
        table (pd.DataFrame): See :func:`make_table`.

    Returns:
        str: Markdown, with notes on what the figures are and which are missing.
    """

    def cell(row: str, column: str) -> str:
        value, spread = table.loc[row, column], table.loc[row].get(column.replace(" ours", " spread"))
        if pd.isna(value):
            return "-"
        if column == "seeds":
            return str(value)
        return f"{value:.3f}" + (f" ± {spread:.3f}" if column.endswith(" ours") and pd.notna(spread) else "")

    columns = [name for name in table.columns if not name.endswith(" spread") and name != "masks"]
    heads = [f"{METRICS[name.split(' ', 1)[0]]}, {name.split(' ', 1)[1]}" if " " in name else name for name in columns]
    lines = [f"# {data}", "", f"| category | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(cell(row, column) for column in columns)} |" for row in table.index]
    notes = ["256x256, raw scores. PRO, rescaled: the authors' measure, biased upward; AUPRO (0.3) is the usual one."]
    if table[[f"{metric} spread" for metric in METRICS]].notna().any(axis=None):
        notes.append("±: standard deviation over the seeds.")
    without_masks = table.index[table["masks"] == False]  # noqa: E712  # NA, of the means, is neither
    if len(without_masks):
        notes.append(f"Without masks, hence without pixel metrics and not in their means: {', '.join(without_masks)}.")
    return "\n".join([*lines, "", *notes, ""])


def write_tables(data: str, output: Path) -> None:
    """Write ``results.md``, ``results.csv`` and ``results.json`` from the runs that have finished so far.

    Args:
        data (str): The data set.
        output (Path): Folder of the runs.
    """
    runs = pd.DataFrame([json.loads(file.read_text()) for file in sorted(output.glob("*/seed_*/run.json"))])
    if runs.empty:
        return
    runs[list(METRICS)] = runs[list(METRICS)].astype(float)  # None, where no category has masks
    table = make_table(data, runs)
    _write(output / "results.md", to_markdown(data, table))
    _write(output / "results.csv", table.to_csv(index_label="category"))
    _write(output / "results.json", table.to_json(orient="index", indent=2))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _write(file: Path, text: str) -> None:
    """Write all of a file or none, also where processes write it at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def find_categories(data: str, root: Path, wanted: Sequence[str]) -> dict[str, Category]:
    """Look for the categories; VisA as it is published is first converted by anomalib, which copies it.

    Args:
        data (str): The data set.
        root (Path): Its folder.
        wanted (Sequence[str]): Names of categories; none for all that are there.

    Returns:
        dict[str, Category]: The categories by name.

    Raises:
        FileNotFoundError: If there is no such folder, or no category in it.
        ValueError: If a category is missing or incomplete.
    """
    if not root.is_dir():
        fail(FileNotFoundError, "root", f"the folder of {data}", root)
    base = root
    if data == "Visa":
        base, split = root / "visa_pytorch", root / "split_csv" / "1cls.csv"
        raw = [category for category in VISA_CATEGORIES if (root / category).is_dir()]
        if not base.exists() and raw and split.is_file():
            Visa(root, raw[0]).prepare_data()
    # anomalib makes folders for VisA's absent categories too, but leaves them empty.
    found = sorted(path.parent.parent.name for path in base.glob("*/train/good") if any(path.iterdir()))
    if not found:
        layout = (
            "CATEGORY/train/good" if data == "MVTecAD" else "visa_pytorch/CATEGORY/train/good or split_csv/1cls.csv"
        )
        fail(FileNotFoundError, "root", f"the folder of {data}, with {layout}", root)
    missing = [category for category in wanted if category not in found]
    if missing:
        fail(ValueError, "categories", f"some of {', '.join(found)}, which are in {root}", ", ".join(missing))
    categories = {category: Category.check(data, base / category) for category in wanted or found}
    if data == "Visa" and split.is_file():  # a conversion that was interrupted looks like any other to anomalib
        expected = pd.read_csv(split)["object"].value_counts()
        for category, num_expected in expected.reindex(list(categories)).dropna().items():
            num_found = sum(path.is_file() for path in (base / str(category)).glob("t*/*/*"))  # train and test
            if num_found != num_expected:
                wanted_images = f"the {num_expected:.0f} images of {split} in {base / str(category)}"
                fail(ValueError, "root", wanted_images, f"{num_found}; remove {base} to have it made anew")
    return categories


def reproduce(
    data: Literal["MVTecAD", "Visa"],
    root: Path,
    model: dict[str, Any],
    categories: list[str] | str = "all",
    seeds: list[int] | str = "0",
    max_epochs: int = 100,
    output: Path | None = None,
    devices: int | None = None,
    workers: int | None = None,
) -> None:
    """Train and evaluate StfpmExt on MVTec AD or VisA, at 256x256 and on raw scores, and tabulate it.

    Args:
        data: The data set, by the name of anomalib's data module.
        root: Its folder, in any layout that the data module reads.
        model: Arguments of StfpmExt.
        categories: Some of its categories, as in bottle,pill. Defaults to all that are there.
        seeds: Seeds of the runs, as in 0,1,2.
        max_epochs: Epochs to train. Defaults to the paper's 100.
        output: Folder of the results. Defaults to results/reproduce/ and the name of the data set.
        devices: Runs that go on at the same time, each on a GPU of its own. Defaults to the number of GPUs; 1 if none.
        workers: Processes that load the images of one run. Defaults to its share of the processor cores, up to 8.

    Raises:
        FileNotFoundError: If the folder of the data set or the file of weights does not exist.
        ValueError: If an argument is out of range, a category is missing or incomplete, or the output folder holds
            results of other settings.
        RuntimeError: If a run fails; the others are made all the same.
    """
    num_gpus = torch.cuda.device_count()
    devices = max(num_gpus, 1) if devices is None else devices
    if not 1 <= devices <= (num_gpus or len(os.sched_getaffinity(0))):
        fail(ValueError, "devices", f"1 to {num_gpus} GPUs" if num_gpus else "1 to the number of cores", devices)
    if max_epochs < 1:
        fail(ValueError, "max_epochs", "at least 1", max_epochs)
    if workers is None:
        workers = min(8, len(os.sched_getaffinity(0)) // devices)
    if workers < 0:
        fail(ValueError, "workers", "at least 0", workers)
    if isinstance(seeds, str):
        if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
            fail(ValueError, "seeds", "whole numbers with commas between", seeds)
        seeds = [int(seed) for seed in seeds.split(",")]
    seeds = list(dict.fromkeys(seeds))  # two processes must not share a run
    if isinstance(categories, str):
        categories = [] if categories == "all" else [category.strip() for category in categories.split(",")]
    if model["teacher_weights"] is False:
        fail(ValueError, "teacher_weights", "true or a file of weights", False)
    output = output or Path("results/reproduce") / data
    found = find_categories(data, root, categories)
    StfpmExt(**model)  # so that wrong weights are one error now, and those of the internet are fetched once
    plan = Plan(data, root, output, found, model, max_epochs, workers)
    plan.claim_output()

    generator = ReproduceJobGenerator()
    runner = SerialRunner(generator) if devices == 1 else ParallelRunner(generator, n_jobs=devices)
    try:
        runner.run({"plan": plan, "seeds": seeds})
    except (SerialExecutionError, ParallelExecutionError) as error:
        failed = [f"{job.category} with seed {job.seed}" for job in generator({"plan": plan, "seeds": seeds})]
        msg = f"no results of {', '.join(failed)}, for reasons told above; the same command tries only them again"
        raise RuntimeError(msg) from error
    finally:
        write_tables(data, output)
    print((output / "results.md").read_text(encoding="utf-8"))
    print(f"Tables, checkpoints and contact sheets are in {output}")


def make_parser() -> jsonargparse.ArgumentParser:
    """Make the parser of this command.

    Returns:
        jsonargparse.ArgumentParser: The parser, whose options are those of :func:`reproduce` and of ``StfpmExt``.
    """
    parser = jsonargparse.ArgumentParser(prog="python -m anomalib_stfpm_ext.reproduce")
    parser.add_function_arguments(reproduce, as_positional=False, skip={"model"})
    of_runs: set[str | int] = {"seed", "pre_processor", "post_processor", "evaluator", "visualizer"}
    parser.add_class_arguments(StfpmExt, as_positional=False, skip=of_runs)
    return parser


def run(given: dict[str, Any]) -> None:
    """Reproduce, and end as a command does.

    Args:
        given (dict[str, Any]): The arguments of :func:`reproduce` and of ``StfpmExt``.
    """
    own = set(inspect.signature(reproduce).parameters)
    model = {name: value for name, value in given.items() if name not in own}
    try:
        reproduce(**{name: value for name, value in given.items() if name in own}, model=model)
    except SIGTERMException:  # of Lightning, and with an exit status of 0
        sys.exit(128 + signal.SIGTERM)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments (list[str] | None): Its arguments. Defaults to ``None``, those of the process.
    """
    run(make_parser().parse_args(arguments).as_dict())


if __name__ == "__main__":
    main()
