# SPDX-License-Identifier: Apache-2.0

"""anomalib's data modules, callbacks, metrics, loggers and its own tests of every model, with StfpmExt."""

import csv
import shutil
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import BTech, Folder, MVTecAD, PredictDataset, Tabular, Visa
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.loggers import AnomalibTensorBoardLogger
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Max, F1Score
from anomalib.models import Stfpm, get_model
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from anomalib_stfpm_ext import StfpmExt

BACKBONE, LAYERS = "test_resnet", ["layer1", "layer2"]
SMALL = {"train_batch_size": 4, "eval_batch_size": 4, "num_workers": 0}
IMAGE, PIXEL = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]


def make_model(**arguments) -> StfpmExt:
    settings = {"teacher_weights": False, "lr": 0.1, "seed": 0, "visualizer": False}
    settings |= {"pre_processor": StfpmExt.configure_pre_processor((64, 64))}
    return StfpmExt(BACKBONE, LAYERS, **(settings | arguments))


def make_engine(output: Path, *callbacks, **arguments) -> Engine:
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return Engine([*callbacks], default_root_dir=output, **(settings | arguments))


@pytest.fixture(scope="module")
def trained(mvtec_ad, tmp_path_factory) -> tuple[StfpmExt, list[dict[str, float]], Path]:
    """Train with every metric and two loggers, and draw."""
    output = tmp_path_factory.mktemp("trained")
    metrics = [AUROC(IMAGE, prefix="image_"), AUPR(IMAGE), F1Max(IMAGE), F1Score(["pred_label", "gt_label"])]
    metrics += [AUROC(PIXEL, prefix="pixel_"), AUPRO(PIXEL), F1Max(PIXEL, prefix="pixel_")]
    validation = AUROC(IMAGE, prefix="val_")
    model = make_model(visualizer=True, evaluator=Evaluator(val_metrics=validation, test_metrics=metrics))
    loggers = [CSVLogger(output, "csv", ""), AnomalibTensorBoardLogger(output, "board", "")]
    engine = make_engine(output, logger=loggers, log_every_n_steps=1)
    return model, engine.train(model, datamodule=MVTecAD(mvtec_ad, "bottle", **SMALL)), output


def test_metrics(trained):
    (metrics,) = trained[1]
    assert metrics.keys() == {"image_AUROC", "AUPR", "F1Max", "F1Score", "pixel_AUROC", "AUPRO", "pixel_F1Max"}
    assert all(0 <= value <= 1 for value in metrics.values())
    assert min(metrics["image_AUROC"], metrics["pixel_AUROC"]) > 0.8


def test_loggers(trained):
    _, metrics, output = trained
    with next(output.glob("csv/**/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    for name in ("train_loss_step", "train_loss_epoch", "held_out_map", "val_AUROC", "image_AUROC"):
        assert [float(row[name]) for row in rows if row.get(name)], name
    assert float(rows[-1]["pixel_AUROC"]) == pytest.approx(metrics[0]["pixel_AUROC"])
    assert next(output.glob("board/**/events.*")).stat().st_size > 500


def test_visualizer(trained):
    drawn = {path.parent.name for path in trained[2].glob("StfpmExt/MVTecAD/bottle/v0/images/**/*.png")}
    assert drawn == {"good", "broken", "scratched"}


def test_a_picture_is_scored_alike_however_it_comes(trained, mvtec_ad, tmp_path):
    model, folder = trained[0], mvtec_ad / "bottle/test/broken"
    engine = make_engine(tmp_path)
    dataset = PredictDataset(folder)
    loader = DataLoader(dataset, batch_size=2, collate_fn=dataset.collate_fn)
    results = []
    for road in (
        {"data_path": folder},
        {"data_path": folder / "000.png"},
        {"dataset": dataset},
        {"dataloaders": loader},
        {"datamodule": MVTecAD(mvtec_ad, "bottle", **SMALL)},
    ):
        batches = engine.predict(model, **road)
        pictures = [
            (path, score) for batch in batches for path, score in zip(batch.image_path, batch.pred_score, strict=True)
        ]
        results += [score.item() for path, score in pictures if Path(path) == folder / "000.png"]
    assert len(results) == 5
    assert results == pytest.approx(results[:1] * 5, rel=1e-4)


def btech(mvtec_ad: Path, tmp_path: Path) -> BTech:
    for role, theirs in {"train/good": "train/ok", "test/good": "test/ok", "test/broken": "test/ko"}.items():
        shutil.copytree(mvtec_ad / "bottle" / role, tmp_path / "01" / theirs)
    masks = tmp_path / "01/ground_truth/ko"
    masks.mkdir(parents=True)
    for mask in (mvtec_ad / "bottle/ground_truth/broken").iterdir():
        shutil.copy(mask, masks / mask.name.replace("_mask", ""))
    return BTech(tmp_path, "01", **SMALL)


def visa(mvtec_ad: Path, tmp_path: Path) -> Visa:
    """Its layout after anomalib has prepared it is MVTec AD's, with other masks' names."""
    root = tmp_path / "visa_pytorch/candle"
    for role, theirs in {"train/good": "train/good", "test/good": "test/good", "test/broken": "test/bad"}.items():
        shutil.copytree(mvtec_ad / "bottle" / role, root / theirs)
    (root / "ground_truth/bad").mkdir(parents=True)
    for picture in (root / "test/bad").iterdir():
        mask = mvtec_ad / "bottle/ground_truth/broken" / f"{picture.stem}_mask.png"
        shutil.copy(mask, root / "ground_truth/bad" / picture.name)
        picture.rename(picture.with_suffix(".JPG"))
    for picture in [*root.glob("*/good/*.png")]:
        picture.rename(picture.with_suffix(".JPG"))
    return Visa(tmp_path, "candle", **SMALL)


def folder(mvtec_ad: Path, _tmp_path: Path) -> Folder:
    return Folder(
        "bottle",
        "train/good",
        mvtec_ad / "bottle",
        abnormal_dir="test/broken",
        normal_test_dir="test/good",
        mask_dir="ground_truth/broken",
        **SMALL,
    )


def tabular(mvtec_ad: Path, _tmp_path: Path) -> Tabular:
    root, rows = mvtec_ad / "bottle", []
    for split, kind in (("train", "good"), ("test", "good"), ("test", "broken")):
        for picture in sorted((root / split / kind).iterdir()):
            mask = str(root / f"ground_truth/{kind}/{picture.stem}_mask.png") if kind == "broken" else ""
            rows.append([str(picture), int(kind == "broken"), split, mask])
    samples = pd.DataFrame(rows, columns=["image_path", "label_index", "split", "mask_path"])
    return Tabular("bottle", samples, **SMALL)


@pytest.mark.parametrize("make_data", [folder, btech, visa, tabular])  # and MVTecAD above
def test_data_modules(make_data, mvtec_ad, tmp_path):
    (metrics,) = make_engine(tmp_path / "results").train(make_model(), datamodule=make_data(mvtec_ad, tmp_path))
    assert metrics.keys() == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"}
    assert metrics["pixel_AUROC"] > 0.8


def test_tiling_callback_gives_stfpms_maps(monkeypatch, mvtec_ad, tmp_path):
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create_model(*a, **{**k, "pretrained": False}))
    theirs, ours = Stfpm("resnet18", LAYERS, visualizer=False), StfpmExt("resnet18", LAYERS, False, visualizer=False)
    theirs.model.load_state_dict(ours.model.state_dict(), strict=False)  # but for exponents and precision
    maps = []
    for model in (theirs, ours):
        model.pre_processor.transform = StfpmExt.configure_pre_processor((64, 128)).transform
        tiling = TilerConfigurationCallback(enable=True, tile_size=64, stride=32)
        (batch,) = make_engine(tmp_path, tiling).predict(model, data_path=mvtec_ad / "bottle/test/broken/000.png")
        maps.append(batch.anomaly_map)
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-4, atol=1e-7)
    ours.model.tiler = None
    (whole,) = make_engine(tmp_path).predict(ours, data_path=mvtec_ad / "bottle/test/broken/000.png")
    assert not torch.allclose(whole.anomaly_map, maps[1], rtol=1e-2)


def test_what_anomalib_does_to_every_model(monkeypatch, mvtec_ad, tmp_path):
    """The calls of its tests/integration/model/test_models.py, with a tiny network and without the download."""
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create_model(*a, **{**k, "pretrained": False}))

    def objects() -> tuple[StfpmExt, MVTecAD, Engine]:
        data = MVTecAD(root=mvtec_ad, category="bottle", train_batch_size=2, num_workers=0)
        engine = Engine(logger=False, default_root_dir=tmp_path, max_epochs=1, devices=1, max_steps=-1)
        return get_model("stfpm_ext", backbone=BACKBONE, layers=LAYERS, image_size=(64, 64)), data, engine

    model, data, engine = objects()
    engine.fit(model=model, datamodule=data)
    checkpoint = f"{tmp_path}/{model.name}/{data.name}/bottle/v0/weights/lightning/model.ckpt"
    for call in ("test", "train", "validate", "predict"):
        model, data, engine = objects()
        assert getattr(engine, call)(model=model, datamodule=data, ckpt_path=checkpoint)
    for export_type in (ExportType.TORCH, ExportType.OPENVINO):  # the latter by way of ExportType.ONNX
        model, _, engine = objects()
        assert engine.export(model=model, ckpt_path=checkpoint, export_type=export_type).is_file()
