# SPDX-License-Identifier: Apache-2.0

"""Checkpoints and exports of version 0.1 still load, score as they did, and are trained on.

``tests/data`` holds one of each, written by commit 99931d8 after an epoch on the images of the fixture: a model of
test_resnet whose weights repeat seven values, so that the files are small. The scores were that commit's, too.
"""

import lzma
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from helpers import folder
from torchvision.transforms.v2.functional import resize

from anomalib_stfpm_ext import Predictor, StfpmExt, load_model

PICTURE = torch.linspace(0, 1, 3 * 48 * 64).view(3, 48, 64)
RAW_SCORE, SCORE = 0.6938574910163879, 0.3492


@pytest.fixture
def old_file(tmp_path):
    def unpack(name: str) -> Path:
        path = tmp_path / name
        path.write_bytes(lzma.decompress((Path(__file__).parent / "data" / f"{name}.xz").read_bytes()))
        return path

    return unpack


def test_checkpoint(old_file):
    model = load_model(old_file("model.ckpt"))
    with torch.no_grad():
        assert model.model(PICTURE[None]).pred_score.item() == pytest.approx(RAW_SCORE, rel=1e-5)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt"])
def test_predictor(old_file, name, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # anomalib's, for exports
    if name == "model.pt":  # which holds torchvision's transforms
        try:
            resize(PICTURE, [4, 4], interpolation="bilinear")
        except ValueError:
            pytest.skip("this torchvision is older than the file's, and does not know modes by name")
    predict = Predictor(old_file(name), "cpu")
    assert predict(PICTURE).pred_score.item() == pytest.approx(SCORE, abs=1e-4)
    assert predict.threshold == pytest.approx(0.5)


def test_training_goes_on(old_file, images, tmp_path):
    size = StfpmExt.configure_pre_processor((48, 64))
    model = StfpmExt(
        "test_resnet", ["layer1"], teacher_weights=False, lr=0, momentum=0, pre_processor=size, visualizer=False, seed=0
    )
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    engine = Engine(default_root_dir=tmp_path, max_epochs=2, **quiet)
    engine.fit(model, datamodule=folder(images), ckpt_path=old_file("model.ckpt"))
    first, second = model.student_selection.history
    assert tuple(first) == (0, 2, pytest.approx(0.37389083206653595), None, None)
    assert (second.epoch, second.step) == (1, 4)
