# SPDX-License-Identifier: Apache-2.0

"""Trains, validates, tests and predicts in as many processes as asked for, and notes what each of them saw."""

import json
import sys
from pathlib import Path

import torch
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator
from anomalib.metrics.base import AnomalibMetric
from lightning.pytorch import Callback, seed_everything
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from anomalib_stfpm_ext import StfpmExt

BATCH = 6  # of all processes together: every image in each step, since with several Lightning shuffles
LAYERS = ["stages.0", "stages.2"]


class MeanScore(AnomalibMetric, MeanMetric):
    """Differs if an image is counted twice, which AUROC often does not."""


class Seen(Callback):
    """Notes the joint batch's loss of every step, and the images of the other stages with their scores."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.images: dict[str, list[tuple[str, float]]] = {"validate": [], "test": [], "predict": []}

    def on_train_batch_end(self, trainer, *_):
        self.losses.append(trainer.callback_metrics["train_loss_step"].item())

    def _note(self, stage, batch):
        names = [Path(path).parent.name + Path(path).name for path in batch.image_path]
        self.images[stage] += zip(names, batch.pred_score.flatten().tolist(), strict=True)

    def on_validation_batch_end(self, trainer, _module, _outputs, batch, *_):
        if trainer.state.fn == "validate":
            self._note("validate", batch)

    def on_test_batch_end(self, _trainer, _module, _outputs, batch, *_):
        self._note("test", batch)

    def on_predict_batch_end(self, _trainer, _module, outputs, *_):
        self._note("predict", outputs)


def main(images: str, output: str, devices: int) -> None:
    """Fit, validate, test and predict; one JSON file for each process."""
    data = Folder(
        "noise",
        root=images,
        normal_dir="good",
        normal_test_dir="good_test",
        abnormal_dir="bad",
        eval_batch_size=2,
        num_workers=0,
        val_split_mode="same_as_test",
    )
    data.setup()
    training = DataLoader(data.train_data, batch_size=BATCH // devices, collate_fn=ImageBatch.collate)
    seed_everything(0)
    metrics = [MeanScore(fields=["pred_score"]), AUROC(fields=["pred_score", "gt_label"])]
    # A network without batch norm, so that a process's images do not matter to another's.
    model = StfpmExt(
        "test_convnext",
        LAYERS,
        teacher_weights=False,
        lr=0.1,
        pre_processor=StfpmExt.configure_pre_processor((64, 64)),
        evaluator=Evaluator(test_metrics=metrics),
        visualizer=False,
    )
    seen = Seen()
    strategy = {"strategy": "ddp", "devices": devices} if devices > 1 else {"devices": 1}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    engine = Engine([seen], max_epochs=4, accelerator="cpu", default_root_dir=output, **strategy, **quiet)
    engine.fit(model, training, data.test_dataloader())
    student = [tensor.double().sum().item() for tensor in model.model.student_model.state_dict().values()]
    choice = model.student_selection
    engine.validate(model, datamodule=data, verbose=False)
    (figures,) = engine.test(model, datamodule=data, verbose=False)
    engine.predict(model, datamodule=data)
    result = {
        "losses": seen.losses,
        "student": student,
        "held_out": [measurement.value for measurement in choice.history],
        "figures": figures,
        **seen.images,
    }
    Path(output, f"{devices}_{engine.trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
