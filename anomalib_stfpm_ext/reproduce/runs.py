# SPDX-License-Identifier: Apache-2.0

"""Runs: a model is trained and evaluated for each category and seed, and goes on where it was interrupted."""

import ctypes
import hashlib
import inspect
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import AnomalibDataModule, Folder, ImageBatch, MVTecAD, Visa
from anomalib.engine import Engine
from anomalib.pipelines.components.base import Job, JobGenerator
from anomalib.pipelines.components.runners import ParallelRunner, SerialRunner
from anomalib.pipelines.components.runners.parallel import ParallelExecutionError
from anomalib.pipelines.components.runners.serial import SerialExecutionError
from anomalib.visualization.image.functional import overlay_image, visualize_anomaly_map
from torchvision.transforms.v2.functional import to_pil_image

from ..choices import PAPERS_RULES
from ..data.images import read_image
from ..errors import fail
from ..figures import draw_sheet, pick
from ..files import write_file
from ..lightning_model import StfpmExt
from ..metrics import measure
from .datasets import Category, leave_out_junk
from .tables import write_tables

# Former arguments of StfpmExt, and the values that they always have now.
GONE = {
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "lr_schedule": "constant",
    "ema_decay": None,
    "teacher_cache_half": False,
}
PR_SET_PDEATHSIG = 1  # of prctl, from Linux's headers


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
        precision (str): Precision of the training.
        workers (int): Processes that load the images of one run.
    """

    data: str
    root: Path
    output: Path
    categories: dict[str, Category]
    model: dict[str, Any]
    max_epochs: int
    precision: str
    workers: int

    def settings(self) -> dict[str, Any]:
        """Return what the results depend on, besides category and seed.

        Returns:
            dict[str, Any]: Settings that JSON can express. The content of the file of teacher weights counts, not its
                name.
        """
        teacher = self.model["teacher_weights"]
        if isinstance(teacher, Path):
            teacher = f"sha256 {hashlib.sha256(teacher.read_bytes()).hexdigest()}"
        model = {**self.model, "layers": list(self.model["layers"]), "teacher_weights": teacher}
        data = {"data": self.data, "root": str(self.root.resolve())}
        return {**data, **model, "max_epochs": self.max_epochs, "precision": self.precision}

    def claim_output(self) -> None:
        """Write the settings into the output folder, or compare them with what is there.

        Raises:
            ValueError: If the folder has results with other settings.
        """
        file, settings = self.output / "settings.json", self.settings()
        if not file.exists():
            write_file(file, json.dumps(settings, indent=2))
            return
        # Arguments that were added later had their defaults.
        defaults = {name: option.default for name, option in inspect.signature(StfpmExt).parameters.items()}
        defaults |= {"precision": "32-true", **PAPERS_RULES}
        before = {**defaults, **GONE, **json.loads(file.read_text())}
        for name, value in {**GONE, **settings}.items():
            if before[name] != value:
                wanted = f"{before[name]}, as for the results in {self.output} (or another output)"
                fail(ValueError, name, wanted, value)

    def run_folder(self, category: str, seed: int) -> Path:
        """Return the folder of a run.

        Args:
            category (str): The category.
            seed (int): The seed.

        Returns:
            Path: The folder.
        """
        return self.output / category / f"seed_{seed}"

    def datamodule(self, category: str, view: Path) -> AnomalibDataModule:
        """Make the data module of a category.

        Args:
            category (str): The category.
            view (Path): Where links to the images go if there is junk beside them; it lasts as long as the run.

        Returns:
            AnomalibDataModule: anomalib's own for the data set, which requires masks; otherwise ``Folder``. The test
                images take no part in the training.
        """
        arguments: dict[str, Any] = {"val_split_mode": "none", "num_workers": self.workers}
        found = self.categories[category]
        has_junk = leave_out_junk(found.folder, view)
        if found.masks and not has_junk and self.data != "Folder":
            module = MVTecAD if self.data == "MVTecAD" else Visa
            return module(root=self.root, category=category, **arguments)
        if found.masks:  # in any folder, or in a view, whose links the modules above do not follow
            arguments["mask_dir"] = [f"ground_truth/{defect}" for defect in found.defects]
        return Folder(
            name=category,
            root=view if has_junk else found.folder,
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
            task_id (int | None): The GPU, if several work in parallel.

        Returns:
            dict[str, Any]: The results.
        """
        # In parallel a run is a process of its own, which must not outlive the one that started it.
        if task_id is not None and sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        start = time.perf_counter()
        folder = self.plan.run_folder(self.category, self.seed)
        checkpoint = folder / "model.ckpt"
        # Without a post-processor, maps and scores stay as they are: anomalib's clamps them, which makes ties.
        model = StfpmExt(**self.plan.model, seed=self.seed, post_processor=False, evaluator=False, visualizer=False)
        with tempfile.TemporaryDirectory() as workspace:  # for anomalib's numbered folders
            datamodule = self.plan.datamodule(self.category, Path(workspace, "view"))
            engine = Engine(
                default_root_dir=workspace,
                callbacks=[ModelCheckpoint(folder, filename="model", enable_version_counter=False)],
                devices=[task_id or 0] if torch.cuda.is_available() else 1,
                max_epochs=self.plan.max_epochs,
                precision=self.plan.precision,
                limit_val_batches=0,
                enable_progress_bar=task_id is None,
            )
            resumed = checkpoint.exists()
            engine.fit(model, datamodule=datamodule, ckpt_path=checkpoint if resumed else None)
            trained = time.perf_counter()
            chosen = model.student_selection.best
            # From the checkpoint, which holds the chosen student even if nothing was left to train.
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
            "synthetic_AUROC": chosen and chosen.synthetic_auroc,
            "level_weights": chosen and chosen.level_weights,
            "resumed": resumed,
            "seconds": {"fit": trained - start, "evaluation": time.perf_counter() - trained},
            "device": _name(engine.trainer.strategy.root_device),
            "versions": {name: metadata.version(name) for name in ("anomalib-stfpm-ext", "anomalib", "timm", "torch")},
            "settings": self.plan.settings(),
        }
        write_file(folder / "run.json", json.dumps(results, indent=2))
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
        """Save nothing: each run has saved its results, and the tables are made from them.

        Args:
            results (list[dict[str, Any]]): Unused.
        """
        del results


class ReproduceJobGenerator(JobGenerator):
    """Makes the jobs that are still missing, all categories of a seed before the next seed."""

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


def run_all(plan: Plan, seeds: list[int], devices: int) -> None:
    """Make the runs that have no results yet.

    Args:
        plan (Plan): What they have in common.
        seeds (list[int]): Seeds of the runs.
        devices (int): Number of runs at the same time.

    Raises:
        RuntimeError: If a run fails; the others are still made.
    """
    generator = ReproduceJobGenerator()
    runner = SerialRunner(generator) if devices == 1 else ParallelRunner(generator, n_jobs=devices)
    try:
        runner.run({"plan": plan, "seeds": seeds})
    except (SerialExecutionError, ParallelExecutionError) as error:
        failed = [f"{job.category} with seed {job.seed}" for job in generator({"plan": plan, "seeds": seeds})]
        msg = f"no results of {', '.join(failed)}, for reasons told above; the same command tries only them again"
        raise RuntimeError(msg) from error
    finally:
        write_tables(plan.data, plan.output)


def draw_contact_sheet(file: Path, batches: Sequence[ImageBatch]) -> None:
    """Draw some good and some defective images, evenly spread over their scores, each above its heat map.

    Args:
        file (Path): The PNG file to write.
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
            photograph = to_pil_image(read_image(paths[index])).resize((heat.shape[2], heat.shape[1]))
            overlay = overlay_image(photograph, visualize_anomaly_map(heat[index].numpy())).convert("RGB")
            pictures.append(np.vstack([np.asarray(photograph), np.asarray(overlay)]))
        rows.append((title, pictures, [f"score {scores[index]:.3g}" for index in picked]))
    draw_sheet(file, rows)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
