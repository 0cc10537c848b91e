# SPDX-License-Identifier: Apache-2.0

"""Values of images: those of 8 bits as anomalib reads them, deeper ones by the range of their type, or an error."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.data.utils import read_image as read_8_bits
from anomalib.engine import Engine
from helpers import folder, make_picture
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_stfpm_ext import Predictor, StfpmExt
from anomalib_stfpm_ext._compat.lightning import get_loader
from anomalib_stfpm_ext.convert import save_checkpoint
from anomalib_stfpm_ext.data import images as images_module
from anomalib_stfpm_ext.data.images import find_images, read_image, read_right
from anomalib_stfpm_ext.figures import measure_levels

VALUES = np.arange(256, dtype=np.uint8).reshape(16, 16)  # of 8 bits
DEEP = VALUES.astype(np.uint16) * 257


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("images") / "model.ckpt"
    save_checkpoint(make_model(), path)
    return path


def make_model() -> StfpmExt:
    return StfpmExt("test_resnet", ["layer1", "layer2"], False, image_size=(64, 64), seed=0, visualizer=False)


def write_pgm(path: Path, maximum: int) -> None:
    pixels = (VALUES.astype(np.uint32) * maximum // 255).astype(">u2")
    path.write_bytes(b"P5 16 16 %d\n" % maximum + pixels.tobytes())


WRITERS = {
    "a.png": lambda path: Image.fromarray(DEEP).save(path),
    "a.tif": lambda path: tifffile.imwrite(path, DEEP),
    "big_endian.tif": lambda path: tifffile.imwrite(path, DEEP, byteorder=">"),
    "compressed.tif": lambda path: tifffile.imwrite(path, DEEP, compression="lzw", predictor=True),
    "inverted.tif": lambda path: tifffile.imwrite(path, 65535 - DEEP, photometric="miniswhite"),
    "floats.tif": lambda path: tifffile.imwrite(path, VALUES.astype(np.float32) / 255),
    "a.pgm": lambda path: write_pgm(path, 65535),
    "color.tif": lambda path: tifffile.imwrite(path, np.stack([DEEP] * 3, -1), photometric="rgb"),
    # The same tag that other software fills with each picture's own maximum, which must not become the scale.
    "maximum.tif": lambda path: tifffile.imwrite(path, DEEP, extratags=[(281, "H", 1, 4095, True)]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_deep_images_have_the_values_of_those_of_8_bits(name, tmp_path):
    WRITERS[name](tmp_path / name)
    image = read_image(tmp_path / name)
    Image.fromarray(VALUES).save(tmp_path / "8.png")
    wanted = read_8_bits(tmp_path / "8.png", as_tensor=True)
    assert (type(image), image.stride()) == (type(wanted), wanted.stride())
    torch.testing.assert_close(image, wanted, rtol=0, atol=1e-7 if name == "floats.tif" else 0)


def write_12_bits(path: Path) -> None:
    try:
        tifffile.imwrite(path, DEEP >> 4, bitspersample=12)
    except NotImplementedError:
        pytest.skip("this imagecodecs writes no 12 bits")


@pytest.mark.parametrize(
    ("name", "write"), [("a.tif", write_12_bits), ("a.pgm", lambda path: write_pgm(path, 4095))], ids=["TIFF", "PGM"]
)
def test_files_that_say_12_bits_are_scaled_by_them(name, write, tmp_path):
    write(tmp_path / name)
    image = read_image(tmp_path / name)
    assert (image.min(), image.max()) == (0, 1)
    torch.testing.assert_close(image[0], torch.from_numpy(VALUES / 255).float(), rtol=0, atol=3e-4)


def test_12_bits_in_16_are_dark_alike_whatever_the_picture_and_told_once(tmp_path, caplog):
    for name, factor in (("bright.png", 1.0), ("dim.png", 0.5)):
        Image.fromarray(((DEEP >> 4) * factor).astype(np.uint16)).save(tmp_path / name)
    images_module._tell_scale.cache_clear()
    with caplog.at_level(logging.WARNING):
        bright, dim = read_image(tmp_path / "bright.png"), read_image(tmp_path / "dim.png")
    assert bright.max() == pytest.approx(4095 / 65535)
    assert dim.max() == pytest.approx(2047 / 65535)
    assert [record.message[:25] for record in caplog.records] == ["Images of 16 bits of gray"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_images_of_8_bits_are_anomalibs_bit_for_bit(mode, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    assert torch.equal(read_image(path), read_8_bits(path, as_tensor=True))


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (DEEP.astype(np.float32), {}, "wanted floats from 0 to 1, got .*a.tif: 0 to 65535"),
        (np.full((9, 9), np.nan, np.float32), {}, "wanted floats from 0 to 1, got .*a.tif: nan"),
        (DEEP.astype(np.uint32), {}, "a.tif: ValueError: wanted .*got integers that have a sign, or 32 bits"),
        (DEEP.astype(np.int16), {}, "a.tif: ValueError: wanted .*got integers that have a sign"),
        (np.stack([DEEP] * 3), {"photometric": "rgb", "planarconfig": "separate"}, "a.tif: .*Pillow misreads"),
        (VALUES / 255, {}, "a.tif: UnidentifiedImageError"),  # float64
    ],
)
def test_what_cannot_be_scaled_is_an_error_that_names_the_file(pixels, options, message, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    with pytest.raises(ValueError, match=f"image: wanted .*{message}|image: {message}"):
        read_image(tmp_path / "a.tif")


@pytest.fixture
def both(images, tmp_path):
    """Make the same gray images in 8 and in 16 bits."""
    for path in images.rglob("*.png"):
        gray = np.asarray(Image.open(path).convert("L"))
        for name, pixels in (("8", gray), ("16", gray.astype(np.uint16) * 257)):
            file = tmp_path / name / path.relative_to(images)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return tmp_path / "8", tmp_path / "16"


def make_engine(tmp_path: Path) -> Engine:
    return Engine(accelerator="cpu", max_epochs=2, logger=False, default_root_dir=tmp_path, enable_progress_bar=False)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("val_split_mode", ["same_as_test", "from_train"])
def test_training_and_scores_are_those_of_8_bits(val_split_mode, both, tmp_path):
    results = []
    for root in both:
        model, engine = make_model(), make_engine(tmp_path / f"results{root.name}")
        data = folder(root, val_split_mode=val_split_mode)
        engine.fit(model, datamodule=data)
        train_data = data.train_data
        batches = [
            *engine.predict(model, dataset=PredictDataset(root / "bad")),
            *engine.predict(model, datamodule=data),
            *engine.predict(model, dataloaders=[DataLoader(data.test_data, 2, collate_fn=data.test_data.collate_fn)]),
        ]
        (measured,) = engine.test(model, datamodule=data)
        scores = torch.cat([batch.pred_score.flatten() for batch in batches])
        results.append((scores, measured, [found.value for found in model.student_selection.history]))
        assert data.train_data is train_data
        assert type(train_data).__name__ == "FolderDataset"
    (scores_8, measured_8, history_8), (scores_16, measured_16, history_16) = results
    assert len(scores_8) == 20
    torch.testing.assert_close(scores_16, scores_8, rtol=0, atol=1e-3)
    assert measured_16 == pytest.approx(measured_8, abs=1e-3)
    assert history_16 == pytest.approx(history_8, abs=1e-5)


def test_wrapped_data_sets_are_augmented_as_anomalibs_are(mvtec_ad):
    data = Folder("n", root=mvtec_ad / "bottle", normal_dir="train/good", abnormal_dir="test/broken",
                  mask_dir="ground_truth/broken", augmentations=RandomHorizontalFlip(), num_workers=0)  # fmt: skip
    data.setup()
    for dataset in (data.test_data, Subset(data.test_data, [1]), ConcatDataset([data.train_data, data.test_data])):
        torch.manual_seed(0)
        wanted = [dataset[index] for index in range(len(dataset))]
        torch.manual_seed(0)
        other = read_right(dataset)
        assert type(other) is not type(dataset) or other is not dataset
        for item, index in zip(wanted, range(len(dataset)), strict=True):
            got = other[index]
            assert torch.equal(got.image, item.image)
            assert (got.gt_mask is None) == (item.gt_mask is None)
            assert got.gt_mask is None or torch.equal(got.gt_mask, item.gt_mask)
            assert (got.image_path, got.mask_path, got.gt_label) == (item.image_path, item.mask_path, item.gt_label)


def test_loaders_that_cannot_be_followed_refuse_deep_images(both, tmp_path):
    dataset = PredictDataset(both[1] / "bad")
    combined = CombinedLoader([DataLoader(dataset, collate_fn=dataset.collate_fn)], "sequential")
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"data: wanted images of 8 bits where .*, got .*0.png, of Pillow's mode I"):
        trainer.predict(make_model(), combined)


def test_synthetic_anomalies_of_deep_images_are_refused(both, tmp_path):
    for root, refused in zip(both, (False, True), strict=True):
        data = folder(root, val_split_mode="synthetic")
        engine = make_engine(tmp_path / root.name)
        if refused:
            with pytest.raises(ValueError, match=r"data: wanted images of 8 bits for synthetic anomalies"):
                engine.fit(make_model(), datamodule=data)
        else:
            engine.fit(make_model(), datamodule=data)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_names_a_broken_file(num_workers, images, tmp_path):
    shutil.copytree(images, tmp_path / "data")
    broken = tmp_path / "data" / "good" / "3.bmp"
    Image.open(broken.with_suffix(".png")).save(broken)
    broken.with_suffix(".png").unlink()
    broken.write_bytes(broken.read_bytes()[:-900])  # only reading tells
    data = folder(tmp_path / "data", num_workers=num_workers)
    with pytest.raises(ValueError, match=r"data: wanted an image that can be read, got .*good/3.bmp: \w+Error: "):
        make_engine(tmp_path).fit(make_model(), datamodule=data)


@pytest.mark.parametrize("case", ["half", "pages"])
def test_data_sets_refuse_files_that_do_not_hold_one_whole_picture(case, images, tmp_path):
    shutil.copytree(images, tmp_path / "data")
    picture, path = Image.open(images / "bad" / "0.png"), tmp_path / "data" / "bad" / "0.tif"
    if case == "half":
        picture.save(path, "JPEG", quality=95)
        path.write_bytes(path.read_bytes()[:-900] + bytes(900))
    else:
        picture.save(path, save_all=True, append_images=[picture])
    data = folder(tmp_path / "data")
    with pytest.raises(ValueError, match=r"data: wanted images that can be read, got .*bad/0\.tif: ValueError: wanted"):
        make_engine(tmp_path).test(make_model(), datamodule=data)
    data.setup()
    for dataset in (data.test_data, PredictDataset(tmp_path / "data" / "bad")):
        loader = DataLoader(dataset, collate_fn=dataset.collate_fn)
        with pytest.raises(ValueError, match=r"data: wanted an image that can be read, got .*bad/0\.tif: ValueError"):
            Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path).predict(make_model(), loader)


def test_pictures_that_are_passed_over_are_told(images, tmp_path):
    shutil.copytree(images, tmp_path / "data")
    for name in ("0.jfif", "1.jfif", "2.HEIC", "readme.txt", "._3.jfif", "scores.h5"):
        (tmp_path / "data" / "good" / name).touch()
    told = r"data: .*: 1 file of .heic, 2 files of .jfif \(anomalib reads .bmp, .jpeg, "
    with pytest.warns(UserWarning, match=told):
        make_engine(tmp_path).validate(make_model(), datamodule=folder(tmp_path / "data"))
    with pytest.warns(UserWarning, match=told):
        make_engine(tmp_path).predict(make_model(), dataset=PredictDataset(tmp_path / "data" / "good"))


def test_other_models_of_the_same_trainer_read_as_anomalib_does(images, tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    dataset = PredictDataset(images / "bad")
    loader = DataLoader(dataset, collate_fn=dataset.collate_fn)
    trainer.predict(make_model(), loader)
    assert trainer.predict_dataloaders.dataset is not dataset
    assert get_loader(trainer.predict_loop) is loader


def test_hidden_files_and_folders_called_like_images_are_passed_over(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("b/1.png", "0.JPG", ".hidden/0.png", "b/._1.png", "folder.png/2.png"):
        make_picture(tmp_path / ".data" / name, False, rng)
    found = [path.relative_to(tmp_path / ".data").as_posix() for path in find_images(tmp_path / ".data")]
    assert found == ["0.JPG", "b/1.png", "folder.png/2.png"]


@pytest.mark.parametrize(
    ("change", "error", "got"),
    [
        (lambda image: image * 255, ValueError, "values from .* to 255"),
        (lambda image: (image - 0.45) / 0.22, ValueError, "values from -2"),
        (lambda image: image * float("nan"), ValueError, "values from nan to nan"),
        (lambda image: (image * 255).to(torch.uint8), TypeError, r"torch\.uint8"),
        (lambda image: image[None], ValueError, r"shape \(1, 3, 64, 64\)"),
        (lambda image: image[:1], ValueError, r"shape \(1, 64, 64\)"),
        (lambda image: image.numpy(), TypeError, "ndarray"),
    ],
)
def test_predictor_refuses_what_is_no_image_of_0_to_1(change, error, got, checkpoint):
    image = torch.linspace(0, 1, 3 * 64 * 64).reshape(3, 64, 64)
    predictor = Predictor(checkpoint, "cpu")
    predictor(image * 1.005)  # what resampling overshoots
    for score in (predictor, lambda image: measure_levels(make_model().eval(), image)):
        with pytest.raises(error, match=rf"image: wanted an image \(3, H, W\) of floats from 0 to 1, .*got {got}"):
            score(change(image))
