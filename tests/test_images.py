# SPDX-License-Identifier: Apache-2.0

"""Images of more than 8 bits are read right, and what cannot be is refused by its name."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.data.utils import read_image as read_by_anomalib
from anomalib.engine import Engine
from helpers import folder
from PIL import Image

from anomalib_stfpm_ext import Predictor, StfpmExt
from anomalib_stfpm_ext.callbacks.deep_images import reading_deep
from anomalib_stfpm_ext.convert import save_checkpoint
from anomalib_stfpm_ext.images import read_image

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
GRAY = np.random.default_rng(0).integers(0, 256, (48, 64), dtype=np.uint8)


@pytest.mark.parametrize("name", ["gray.png", "gray.jpg", "colour.png", "palette.png", "alpha.png"])
def test_images_of_8_bits_are_anomalibs(tmp_path, name):
    colour = np.stack([GRAY, GRAY[::-1], GRAY[:, ::-1]], axis=-1)
    image = Image.fromarray(GRAY if "gray" in name else colour)
    image = image.convert({"palette": "P", "alpha": "RGBA"}.get(name.split(".")[0], image.mode))
    image.save(tmp_path / name)
    assert torch.equal(read_image(tmp_path / name), read_by_anomalib(tmp_path / name, as_tensor=True))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_gray_of_16_bits(tmp_path, suffix):
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / f"deep.{suffix}")
    expected = torch.from_numpy(GRAY.astype(np.float32) / 255).expand(3, -1, -1)
    torch.testing.assert_close(read_image(tmp_path / f"deep.{suffix}"), expected)


def test_floats_and_12_bits(tmp_path):
    expected = torch.from_numpy(GRAY.astype(np.float32) / 255).expand(3, -1, -1)
    Image.fromarray(GRAY.astype(np.float32) / 255).save(tmp_path / "float.tiff")
    torch.testing.assert_close(read_image(tmp_path / "float.tiff"), expected)
    Image.fromarray(GRAY.astype(np.uint16) * 16).save(tmp_path / "12.tiff", tiffinfo={281: 4080})
    torch.testing.assert_close(read_image(tmp_path / "12.tiff"), expected)


@pytest.mark.parametrize(("pixels", "got"), [(GRAY * 1.5, "float32 from 0"), (GRAY.astype(np.int32) * 9999, "int32")])
def test_numbers_of_unknown_range_are_refused(tmp_path, pixels, got):
    path = tmp_path / "unknown.tiff"
    Image.fromarray(pixels.astype(np.float32) if pixels.dtype == float else pixels).save(path)
    with pytest.raises(ValueError, match=f"image: wanted gray of 16 bits.*unknown.tiff: {got}"):
        read_image(path)


def test_broken_files_are_named(tmp_path):
    Image.fromarray(GRAY).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    (tmp_path / "folder.png").mkdir()
    for name in ("half.png", "folder.png", "absent.png"):
        with pytest.raises(ValueError, match=f"image: wanted an image that can be read, got .*{name}"):
            read_image(tmp_path / name)


@pytest.fixture(scope="module")
def deep_images(images, tmp_path_factory):
    """The images of the fixture, gray, in 8 bits and in 16."""
    root = tmp_path_factory.mktemp("deep")
    for path in sorted(images.rglob("*.png")):
        gray = np.asarray(Image.open(path).convert("L"))
        for kind, pixels in (("8", gray), ("16", gray.astype(np.uint16) * 257)):
            copy_of = root / kind / path.relative_to(images)
            copy_of.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(copy_of)
    return root


def test_deep_images_in_training_test_and_prediction(deep_images, resnet18_weights, tmp_path):
    scores, students = {}, {}
    for kind in ("8", "16"):
        model = StfpmExt("resnet18", ["layer1", "layer2"], resnet18_weights, lr=0.05, seed=0, image_size=(48, 64))
        data = folder(deep_images / kind, eval_batch_size=8)
        engine = Engine(default_root_dir=tmp_path / kind, max_epochs=1, **QUIET)
        engine.fit(model, datamodule=data)
        assert type(data.train_data).__getitem__.__globals__["read_image"] is read_by_anomalib  # as before
        students[kind] = model.model.student_model.state_dict()
        (batch,) = engine.predict(model, datamodule=data, ckpt_path=engine.best_model_path)
        dataset = PredictDataset(deep_images / kind / "bad")
        single = Engine(default_root_dir=tmp_path / kind, **QUIET).predict(
            model, dataset=dataset, ckpt_path=engine.best_model_path
        )
        predict = Predictor(engine.best_model_path, "cpu")
        files = sorted((deep_images / kind / "bad").iterdir())
        scores[kind] = [*batch.pred_score, *(one.pred_score for one in single)]
        scores[kind] += [predict(read_image(file)).pred_score for file in files]
    torch.testing.assert_close(
        torch.stack([score.squeeze() for score in scores["16"]]),
        torch.stack([score.squeeze() for score in scores["8"]]),
        rtol=1e-3,
        atol=1e-3,
    )
    torch.testing.assert_close(students["16"], students["8"], rtol=1e-3, atol=1e-3)


def test_hidden_files_end_a_run_before_it_is_paid_for(images, resnet18_weights, tmp_path):
    for path in images.rglob("*.png"):
        (tmp_path / "data" / path.relative_to(images)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / path.relative_to(images)).write_bytes(path.read_bytes())
    (tmp_path / "data" / "bad" / "._0.png").write_bytes(b"resource fork")
    model = StfpmExt("resnet18", ["layer1"], resnet18_weights, image_size=(48, 64))
    with pytest.raises(ValueError, match=r"data: wanted images without hidden files.*\._0.png"):
        Engine(default_root_dir=tmp_path, max_epochs=1, **QUIET).fit(model, datamodule=folder(tmp_path / "data"))


def test_changed_data_sets_can_be_copied_and_pickled(images):
    data = folder(images)
    data.setup()
    data.train_data.__class__ = reading_deep(type(data.train_data))
    for other in (
        copy.copy(data.train_data),
        copy.deepcopy(data.train_data),
        pickle.loads(pickle.dumps(data.train_data)),
    ):
        assert type(other) is type(data.train_data)
        assert torch.equal(other[0].image, data.train_data[0].image)


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (torch.full((3, 8, 8), 255.0), ValueError),
        (torch.randn(3, 8, 8), ValueError),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), TypeError),
        (np.zeros((3, 8, 8), np.float32), TypeError),
        (torch.zeros(8, 8, 3), ValueError),
        (torch.full((3, 8, 8), torch.nan), ValueError),
    ],
)
def test_what_is_no_image_is_refused(image, error, tmp_path):

    save_checkpoint(
        StfpmExt("test_resnet", ["layer1"], teacher_weights=False, image_size=(48, 64)), tmp_path / "m.ckpt"
    )
    with pytest.raises(error, match=r"image: wanted a tensor \(3, H, W\) of floats from 0 to 1"):
        Predictor(Path(tmp_path / "m.ckpt"), "cpu")(image)
