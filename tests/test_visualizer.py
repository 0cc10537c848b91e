# SPDX-License-Identifier: Apache-2.0

"""Pictures of test and predict: anomalib's, pixel for pixel, whole when the command ends."""

import copy
import pickle

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from helpers import QUIET, folder
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Pad, Resize

from anomalib_stfpm_ext import StfpmExt, visualizer
from anomalib_stfpm_ext.data.transforms import seen, shows_all
from anomalib_stfpm_ext.visualizer import BackgroundImageVisualizer

NORMALIZE = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def make_model(**arguments) -> StfpmExt:
    torch.manual_seed(0)
    settings = {"teacher_weights": False, "image_size": (48, 64)} | arguments
    model = StfpmExt("test_resnet", ["layer1", "layer3"], **settings)
    for name in ("image_min", "pixel_min"):
        getattr(model.post_processor, name).fill_(0)
    for name in ("image_max", "pixel_max", "_image_threshold", "_pixel_threshold"):
        getattr(model.post_processor, name).fill_(0.01)
    return model


def pictures(root) -> dict[str, np.ndarray]:
    found = sorted(root.rglob("*.png"))
    return {str(path.relative_to(root)): np.asarray(Image.open(path)) for path in found}


@pytest.mark.parametrize("stage", ["test", "predict"])
@pytest.mark.parametrize("options", [{}, {"fields": ["image", "anomaly_map"], "field_size": (64, 32)}], ids=str)
def test_anomalibs_pictures_pixel_for_pixel(images, tmp_path, stage, options):
    for kind in (ImageVisualizer, BackgroundImageVisualizer):
        model = make_model(visualizer=kind(output_dir=tmp_path / kind.__name__, **options))
        getattr(Engine(default_root_dir=tmp_path, **QUIET), stage)(model, datamodule=folder(images, eval_batch_size=3))
    expected, got = pictures(tmp_path / "ImageVisualizer"), pictures(tmp_path / "BackgroundImageVisualizer")
    assert expected.keys() == got.keys()
    assert len(got) >= 4
    for name, picture in expected.items():
        assert np.array_equal(picture, got[name]), name
    assert not list(tmp_path.rglob(".*.png"))


def test_it_is_the_models_and_its_threads_are_not_copied():
    model = make_model()
    assert type(model.visualizer) is BackgroundImageVisualizer
    for copied in (copy.deepcopy(model.visualizer), pickle.loads(pickle.dumps(model.visualizer))):
        assert copied.fields == model.visualizer.fields
        assert copied._threads is None
    given = ImageVisualizer()
    assert make_model(visualizer=given).visualizer is given


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_a_picture_that_cannot_be_written_ends_the_command(images, tmp_path, stage):
    (tmp_path / "output").write_text("a file where a folder is wanted")
    model = make_model(visualizer=BackgroundImageVisualizer(output_dir=tmp_path / "output"))
    with pytest.raises(RuntimeError, match=r"visualizer: wanted a picture that can be drawn and written, got .*png"):
        getattr(Engine(default_root_dir=tmp_path, **QUIET), stage)(model, datamodule=folder(images))
    assert model.visualizer._threads is None


def test_nothing_half_written_is_left(images, tmp_path, monkeypatch):
    def save(_picture, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    model = make_model(visualizer=BackgroundImageVisualizer(output_dir=tmp_path / "output"))
    with pytest.raises(RuntimeError, match="No space left on device"):
        Engine(default_root_dir=tmp_path, **QUIET).test(model, datamodule=folder(images))
    assert not [path for path in (tmp_path / "output").rglob("*") if path.is_file()]


def test_few_pictures_wait(images, tmp_path, monkeypatch):
    monkeypatch.setattr(visualizer, "MOST_WAITING", 1)
    model = make_model(visualizer=BackgroundImageVisualizer(output_dir=tmp_path / "output"))
    Engine(default_root_dir=tmp_path, **QUIET).test(model, datamodule=folder(images))
    assert len(pictures(tmp_path / "output")) >= 4


@pytest.mark.parametrize("transform", [[Resize((64, 64)), CenterCrop((32, 48))], [Resize((32, 32)), Pad(8)]], ids=str)
def test_where_places_move_pictures_show_what_the_model_sees(images, tmp_path, transform):
    pre_processor = PreProcessor(Compose([*transform, NORMALIZE]))
    options = {"fields": ["image"], "overlay_fields": [("image", [])], "text_config": {"enable": False}}
    model = make_model(
        image_size=None,
        pre_processor=pre_processor,
        visualizer=BackgroundImageVisualizer(output_dir=tmp_path / "output", field_size=(48, 48), **options),
    )
    Engine(default_root_dir=tmp_path, **QUIET).test(model, datamodule=folder(images))
    for name, picture in pictures(tmp_path / "output").items():
        if "bad" in name:
            source = Image.open(next(images.glob(f"bad/{name.rsplit('/', 1)[-1]}")))
            tensor = torch.from_numpy(np.array(source)).permute(2, 0, 1) / 255
            shown = (seen(pre_processor, tensor) * 255).round().byte().permute(1, 2, 0).numpy()
            expected = np.asarray(Image.fromarray(shown).resize((48, 48)))
            assert np.abs(picture[:, :48].astype(int) - expected).max() <= 2, name


def test_which_transforms_keep_places():
    assert shows_all(None)
    assert shows_all(PreProcessor(Compose([Resize(32), NORMALIZE])))
    assert not shows_all(PreProcessor(Compose([Resize(32), Compose([CenterCrop(16)]), NORMALIZE])))


def test_deep_photographs_are_shown_as_they_are_scored(tmp_path):
    (tmp_path / "deep").mkdir()
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep" / "0.png")
    options = {"fields": ["image"], "overlay_fields": [("image", [])], "text_config": {"enable": False}}
    model = make_model(
        visualizer=BackgroundImageVisualizer(output_dir=tmp_path / "output", field_size=(64, 64), **options)
    )
    Engine(default_root_dir=tmp_path, **QUIET).predict(model, data_path=tmp_path / "deep")
    (picture,) = pictures(tmp_path / "output").values()
    assert (
        np.abs(picture[:, :64, 0].astype(float) - values / 257).max() <= 6
    )  # resized to the model's size, and to the picture's
