# SPDX-License-Identifier: Apache-2.0

"""Level maps beside their product, the histogram of scores, and the commands that draw them."""

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from PIL import Image
from skimage.draw import disk

from anomalib_stfpm_ext import StfpmExt
from anomalib_stfpm_ext.cli import main
from anomalib_stfpm_ext.convert import save_checkpoint
from anomalib_stfpm_ext.figures import LevelMaps, draw_histogram, draw_levels, measure_levels, raw_threshold


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = StfpmExt("test_resnet", ["layer3", "layer1", "layer2"], teacher_weights=False).eval()
    for name, value in {"_image_threshold": 0.4, "image_min": 0.1, "image_max": 1.1}.items():
        getattr(model.post_processor, name).fill_(value)
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "model.ckpt"
    save_checkpoint(model, path)
    return path


@pytest.fixture
def figures(monkeypatch):
    """Hand out the figures instead of pictures of them."""
    monkeypatch.setattr("anomalib_stfpm_ext.figures._render", lambda figure: figure)


def two_levels(value: float) -> LevelMaps:
    shape = (32, 48)
    maps = np.stack([np.full(shape, value, np.float32)] * 2)
    return LevelMaps(["layer1", "layer2"], [(8, 12), (4, 6)], maps, maps.prod(0), value**2, [1, 1])


@pytest.mark.parametrize("weights", [None, (1.5, 0.5, 1.0)], ids=str)
def test_levels_are_those_of_the_anomaly_map(model, images, monkeypatch, weights):
    monkeypatch.setattr(model.model, "level_weights", weights)
    image = read_image(images / "bad" / "0.png", as_tensor=True)
    levels = measure_levels(model, image)
    with torch.inference_mode():
        expected = model.model(model.pre_processor.transform(image[None]))
    np.testing.assert_array_equal(levels.product, expected.anomaly_map[0, 0])
    assert levels.score == expected.pred_score.item() == levels.product.max()
    exponents = np.reshape(levels.weights, (3, 1, 1))
    np.testing.assert_allclose((levels.maps**exponents).prod(0), levels.product, rtol=1e-5)
    assert sorted(levels.weights) == sorted(weights or [1, 1, 1])
    assert levels.names == ["layer1", "layer2", "layer3"]  # from fine to coarse, whatever the model's order
    assert levels.sizes[0] > levels.sizes[1] > levels.sizes[2]
    coarseness = [np.abs(np.diff(level, n=2)).mean() / level.std() for level in levels.maps]
    assert coarseness == sorted(coarseness, reverse=True)


def test_levels_combined_at_the_finest_size(model, images, monkeypatch):
    monkeypatch.setattr(model.model, "combine_at", "finest")
    image = read_image(images / "bad" / "0.png", as_tensor=True)
    levels = measure_levels(model, image)
    with torch.inference_mode():
        expected = model.model(model.pre_processor.transform(image[None]))
    np.testing.assert_array_equal(levels.product, expected.anomaly_map[0, 0])
    assert levels.maps.shape[1:] == levels.sizes[0]
    assert draw_levels(np.zeros((20, 30, 3)), levels).width > 500


@pytest.mark.parametrize("sensitivity", [0.5, 0.7])
def test_raw_threshold_is_that_of_the_predictions(model, sensitivity, monkeypatch):
    monkeypatch.setattr(model.post_processor, "image_sensitivity", torch.tensor(sensitivity))
    threshold = raw_threshold(model)
    scores = torch.tensor([[threshold - 0.01], [threshold + 0.01]])
    batch = model.post_processor(type("", (), {"pred_score": scores, "anomaly_map": None}))
    assert batch.pred_label.flatten().tolist() == [False, True]


def test_no_threshold_before_a_validation():
    model = StfpmExt("test_resnet", ["layer1"], teacher_weights=False)
    assert raw_threshold(model) is None
    assert raw_threshold(StfpmExt("test_resnet", ["layer1"], teacher_weights=False, post_processor=False)) is None


@pytest.mark.usefixtures("figures")
def test_all_maps_share_a_scale_on_which_the_product_is_a_root():
    figure = draw_levels(np.zeros((20, 30, 3)), two_levels(0.3), np.eye(20, 30), threshold=0.04)
    image, mask, fine, coarse, product, bar = figure.axes
    titles = [axis.get_title() for axis in (image, mask, fine, coarse, product)]
    assert titles == [
        "image",
        "mask",
        "fine: layer1\n8 x 12",
        "coarse: layer2\n4 x 6",
        "product$^{1/2}$\nscore$^{1/2}$ 0.3",
    ]
    for axis in (fine, coarse, product):
        (drawn,) = axis.get_images()
        np.testing.assert_allclose(drawn.get_array(), 0.3, rtol=1e-6)
        assert drawn.get_clim() == pytest.approx((0, 0.4))  # twice the root of the threshold
        assert drawn.get_extent() == image.get_images()[0].get_extent() == mask.get_images()[0].get_extent()
    assert [text.get_text() for text in bar.get_yticklabels()] == ["0", "threshold$^{1/2}$ 0.2", "0.4"]


@pytest.mark.usefixtures("figures")
def test_scale_without_threshold_ends_with_the_largest_distance():
    for threshold in (None, -0.1):
        *_, product, _ = draw_levels(np.zeros((20, 30, 3)), two_levels(0.3), threshold=threshold).axes
        assert product.get_images()[0].get_clim() == pytest.approx((0, 0.3))
    *_, product, _ = draw_levels(np.zeros((20, 30, 3)), two_levels(0.3), threshold=3.0).axes
    assert product.get_images()[0].get_clim() == (0, 2)  # a distance is no larger


@pytest.mark.usefixtures("figures")
def test_histogram_counts_every_image_and_the_mistakes():
    scores = torch.tensor([0.0, 1e-4, 2e-3, 5e-3, 4e-3, 0.02, 0.3])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    (axis,) = (figure := draw_histogram(scores, labels, threshold=4.5e-3)).axes
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "good: 4 images, 1 above the threshold",
        "defective: 3 images, 1 not above the threshold",
        "threshold: 0.0045",
    ]
    assert axis.get_xscale() == "log"
    edges, counts = zip(*((patch.get_xy()[:, 0], patch.get_xy()[:, 1]) for patch in axis.patches), strict=True)
    assert all(1e-4 / 1.06 < ends.min() < 1e-4 and 0.3 < ends.max() < 0.3 * 1.06 for ends in edges)
    # stepfilled: each bar stands twice in the outline, and the outline comes back along the bottom
    assert [tops.sum() / 2 for tops in counts] == [4, 3]


@pytest.mark.parametrize("scores", [[0.1, float("nan")], [0.1, -0.1], [0.0, 0.0]])
def test_histogram_refuses_what_has_no_logarithm(scores):
    with pytest.raises(ValueError, match="scores: wanted finite numbers of at least 0"):
        draw_histogram(torch.tensor(scores), torch.tensor([0, 1]))


def draw(task: str, **options) -> None:
    main(["draw", task, *(part for name, value in options.items() for part in (f"--{name}", str(value)))])


def test_level_command(checkpoint, images, tmp_path):
    few = tmp_path / "images"
    for name in ("bad/0.png", "bad/1.png", "good/0.png"):
        (few / name).parent.mkdir(parents=True, exist_ok=True)
        (few / name).write_bytes((images / name).read_bytes())
    masks = tmp_path / "masks" / "bad"
    masks.mkdir(parents=True)
    for name in ("0.png", "1_mask.png"):
        mask = np.zeros((48, 64), np.uint8)
        mask[disk((20, 30), 10)] = 255
        Image.fromarray(mask).save(masks / name)
    draw("levels", checkpoint=checkpoint, images=few, output=tmp_path / "levels", masks=tmp_path / "masks")
    drawn = {path.relative_to(tmp_path / "levels"): Image.open(path) for path in (tmp_path / "levels").rglob("*.png")}
    assert set(drawn) == {path.relative_to(few) for path in few.rglob("*.png")}
    wide = {str(name) for name, picture in drawn.items() if picture.width == max(p.width for p in drawn.values())}
    assert wide == {"bad/0.png", "bad/1.png"}


def test_commands_take_deep_images_and_pass_over_hidden_ones(checkpoint, images, tmp_path, capsys):
    few = tmp_path / "images"
    (few / ".ipynb_checkpoints").mkdir(parents=True)
    (few / "._0.png").write_bytes(b"resource fork")
    (few / ".ipynb_checkpoints" / "0.png").write_bytes((images / "bad" / "0.png").read_bytes())
    (few / "a.png").mkdir()
    gray = np.asarray(Image.open(images / "bad" / "0.png").convert("L"))
    Image.fromarray(gray).save(few / "8.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(few / "16.png")
    (few / "8.jfif").touch()
    draw("levels", checkpoint=checkpoint, images=few, output=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["16.png", "8.png"]
    assert capsys.readouterr().err.count("images: not drawn: 1 file of .jfif (anomalib reads .bmp, ") == 1
    shown = [np.asarray(Image.open(tmp_path / "out" / name)) for name in ("8.png", "16.png")]
    assert np.array_equal(*shown)
    draw("histogram", checkpoint=checkpoint, good=few, defective=few, output=tmp_path / "histogram.png")
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "8_mask.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=r"masks: wanted masks that can be read, got .*8_mask.png"):
        draw("levels", checkpoint=checkpoint, images=few, output=tmp_path / "out", masks=masks)


def test_histogram_command(checkpoint, images, tmp_path):
    file = tmp_path / "new" / "histogram.png"
    draw("histogram", checkpoint=checkpoint, good=images / "good_test", defective=images / "bad", output=file)
    colours = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3).astype(int)
    assert (colours[:, 2] > colours[:, 0] + 30).any()  # blue
    assert (colours[:, 0] > colours[:, 2] + 30).any()  # red


def test_errors_of_the_commands(checkpoint, images, tmp_path, tmp_path_factory):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    broken = tmp_path_factory.mktemp("broken")
    (broken / "x.png").write_bytes((images / "bad" / "0.png").read_bytes()[:200])
    out = tmp_path / "out"
    for options, message in (
        ({"checkpoint": tmp_path / "none.ckpt"}, "FileNotFoundError: checkpoint: wanted a checkpoint"),
        ({"checkpoint": tmp_path / "text.ckpt"}, "ValueError: checkpoint: .* cannot be read"),
        ({"images": tmp_path}, "ValueError: images: wanted a folder with images"),
        ({"output": images / "bad"}, "ValueError: output: wanted a folder that does not"),
        ({"output": images}, "ValueError: output: wanted a folder that does not hold"),
        ({"images": broken}, r"ValueError: images: wanted an image that can be read, got .*x.png"),
        ({"masks": images}, "ValueError: masks: wanted masks of images"),
    ):
        with pytest.raises(SystemExit, match=message):
            draw("levels", **{"checkpoint": checkpoint, "images": images / "bad", "output": out, **options})
    with pytest.raises(SystemExit, match="ValueError: defective: wanted"):
        draw("histogram", checkpoint=checkpoint, good=images, defective=tmp_path / "no", output=tmp_path / "a.png")
