# SPDX-License-Identifier: Apache-2.0

"""The command that reproduces the paper's table, on tiny data sets in the layouts of MVTec AD and VisA."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.data.datamodules.image.visa import VISA_CATEGORIES
from helpers import make_mask, make_picture
from PIL import Image
from skimage.measure import label
from sklearn.metrics import auc, roc_auc_score
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import normalize, pil_to_tensor, resize

from anomalib_stfpm_ext import StfpmExt
from anomalib_stfpm_ext.cli import main
from anomalib_stfpm_ext.figures import pick
from anomalib_stfpm_ext.metrics import measure, rescaled_pro
from anomalib_stfpm_ext.reproduce.command import make_parser
from anomalib_stfpm_ext.reproduce.runs import GONE
from anomalib_stfpm_ext.reproduce.tables import PUBLISHED, make_table, to_markdown


@pytest.fixture
def visa(tmp_path):
    """Make a category in the layout in which VisA is published."""
    root, rng, rows = tmp_path / "visa", np.random.default_rng(0), []
    for split, kind, count in (("train", "normal", 6), ("test", "normal", 3), ("test", "anomaly", 3)):
        for index in range(count):
            image = f"candle/Data/Images/{kind.title()}/{split}{index}.JPG"
            mask = f"candle/Data/Masks/Anomaly/{split}{index}.png" if kind == "anomaly" else ""
            make_picture(root / image, kind == "anomaly", rng)
            if mask:
                make_mask(root / mask)
            rows.append(["candle", split, kind, image, mask])
    (root / "split_csv").mkdir()
    with (root / "split_csv" / "1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])
    return root


def command(root: Path, output: Path, *options: object, data: str = "MVTecAD") -> None:
    given = ["--data", data, "--root", root, "--output", output, "--max_epochs", 1, "--lr", 0.1, *options]
    main(["reproduce", *map(str, given)])


@pytest.fixture(scope="module")
def small(small_weights):
    """Choose timm's smallest ResNet."""
    teacher = ["--layers", "[layer1,layer2]", "--teacher_weights", small_weights]
    return ["--backbone", "test_resnet", *teacher, "--workers", 0]


@pytest.fixture(scope="module")
def two_seeds(small):
    return [*small, "--seeds", "0,1"]


@pytest.fixture(scope="module")
def output(mvtec_ad, two_seeds, tmp_path_factory):
    output = tmp_path_factory.mktemp("reproduced")
    command(mvtec_ad, output, *two_seeds)
    return output


def run_of(output: Path, category: str, seed: int) -> dict:
    return json.loads((output / category / f"seed_{seed}" / "run.json").read_text())


def test_tables_have_published_figures_and_ours(output):
    table = pd.read_csv(output / "results.csv", index_col="category")
    runs = [run_of(output, "bottle", seed) for seed in (0, 1)]
    assert table.index.tolist() == ["bottle", "pill", "mean of these 2", "mean of all"]
    assert table["image_AUROC paper"].tolist() == [1.0, 0.951, 0.9755, 0.955]
    np.testing.assert_allclose(table["image_AUROC anomalib"], [0.979, 0.705, 0.842, 0.893])
    for metric in ("image_AUROC", "pixel_AUROC", "AUPRO", "rescaled_PRO"):
        values = [run[metric] for run in runs]
        assert 0 <= min(values) <= max(values) <= 1
        assert table.loc["bottle", f"{metric} ours"] == pytest.approx(np.mean(values))
        assert table.loc["bottle", f"{metric} spread"] == pytest.approx(np.std(values, ddof=1))
    assert table.loc["mean of these 2", "image_AUROC ours"] == pytest.approx(table["image_AUROC ours"][:2].mean())
    assert table.loc["mean of all", ["pixel_AUROC paper", "rescaled_PRO paper"]].tolist() == [0.970, 0.928]
    assert np.isnan(table.loc["mean of all", "image_AUROC ours"])  # of 15 categories
    assert table.loc["bottle", "seeds"] == 2
    as_json = json.loads((output / "results.json").read_text())
    assert as_json["bottle"]["pixel_AUROC ours"] == pytest.approx(table.loc["bottle", "pixel_AUROC ours"])


def test_missing_masks_leave_pixel_metrics_out_and_are_told(output):
    run = run_of(output, "pill", 0)
    assert (run["pixel_AUROC"], run["AUPRO"], run["rescaled_PRO"]) == (None, None, None)
    assert run["image_AUROC"] is not None
    assert json.loads((output / "results.json").read_text())["pill"]["masks"] is False
    text = (output / "results.md").read_text()
    assert "Without masks, hence without pixel metrics and not in their means: pill." in text
    (row,) = (line for line in text.splitlines() if line.startswith("| pill "))
    assert row.startswith("| pill | 0.951 | 0.705 | 0.")
    assert row.endswith(" | - | - | - | - | - | - | 2 |")


def test_metrics_are_of_raw_maps_at_256(output, mvtec_ad):
    model = StfpmExt.load_from_checkpoint(output / "bottle" / "seed_1" / "model.ckpt").eval()
    scores, labels, maps, masks = [], [], [], []
    for path in sorted(mvtec_ad.glob("bottle/test/*/*.png")):
        image = resize(pil_to_tensor(Image.open(path)) / 255, [256, 256], antialias=True)
        image = normalize(image, [0.5] * 3, [0.5] * 3)  # as this teacher's weights want it
        with torch.no_grad():
            result = model.model(image[None])
        mask = np.zeros((256, 256))
        if path.parent.name != "good":
            drawn = Image.open(mvtec_ad / "bottle" / "ground_truth" / path.parent.name / f"{path.stem}_mask.png")
            nearest = np.ix_(np.arange(256) * 48 // 256, np.arange(256) * 64 // 256)
            mask = np.asarray(drawn)[nearest] > 0
        scores.append(result.pred_score.item())
        labels.append(path.parent.name != "good")
        maps.append(result.anomaly_map.numpy().ravel())
        masks.append(mask.ravel())
    run = run_of(output, "bottle", 1)
    assert run["images"] == {"train": 6, "good": 3, "defective": 4}
    assert run["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    expected = roc_auc_score(np.concatenate(masks), np.concatenate(maps))
    assert run["pixel_AUROC"] == pytest.approx(expected, abs=1e-4)  # batches round otherwise than single images


def test_contact_sheets(output):
    for category in ("bottle", "pill"):
        sheet = np.asarray(Image.open(output / category / "seed_0" / "contact_sheet.png").convert("RGB"))
        assert sheet.shape[1] == 8 * 2 * 80
        columns = [part.min() for part in np.array_split(sheet[:, 30:-30], 8, axis=1)]
        assert all(column < 200 for column in columns[:4])  # three good images and four defective ones
        assert columns[5:] == [255, 255, 255]


def test_finished_runs_are_not_repeated(output, mvtec_ad, two_seeds, monkeypatch):
    monkeypatch.setattr(StfpmExt, "training_step", lambda *_: pytest.fail("trained again"))
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/*/*")}
    assert len(before) == 2 * 2 * 3
    command(mvtec_ad, output, *two_seeds)
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/*/*")} == before


def test_run_that_was_interrupted_after_training_is_only_evaluated(output, mvtec_ad, two_seeds, tmp_path, monkeypatch):
    again = shutil.copytree(output, tmp_path / "again")
    (again / "bottle" / "seed_0" / "run.json").unlink()
    monkeypatch.setattr(StfpmExt, "training_step", lambda *_: pytest.fail("trained again"))
    command(mvtec_ad, again, *two_seeds)
    before, after = run_of(output, "bottle", 0), run_of(again, "bottle", 0)
    assert (before["resumed"], after["resumed"]) == (False, True)
    assert [after[metric] for metric in ("image_AUROC", "AUPRO")] == [
        before[metric] for metric in ("image_AUROC", "AUPRO")
    ]


def test_other_settings_are_an_error(output, mvtec_ad, two_seeds, small_weights, tmp_path):
    other = tmp_path / "other.pth"
    weights = torch.load(small_weights)
    torch.save({**weights, "conv1.0.weight": 2 * weights["conv1.0.weight"]}, other)
    for name, value, message in (
        ("max_epochs", 3, "max_epochs: wanted 1, as for the results in .*, got 3"),
        (
            "layers",
            "[layer1]",
            r"layers: wanted \['layer1', 'layer2'\], .*, got \['layer1'\]",
        ),
        ("teacher_weights", other, "teacher_weights: wanted sha256 .*, got sha256 "),
    ):
        with pytest.raises(SystemExit, match=message):
            command(mvtec_ad, output, *two_seeds, f"--{name}", value)
    (tmp_path / "moved").symlink_to(mvtec_ad)
    command(tmp_path / "moved", output, *two_seeds)  # the same
    shutil.copytree(mvtec_ad, tmp_path / "copy")
    with pytest.raises(SystemExit, match=r"root: wanted .*MVTecAD.*, as for the results in .*, got .*copy"):
        command(tmp_path / "copy", output, *two_seeds)


def test_interrupted_training_goes_on_as_if_it_had_not_been(mvtec_ad, small, tmp_path, monkeypatch):
    options = [*small, "--categories", "bottle", "--max_epochs", 3]
    command(mvtec_ad, tmp_path / "whole", *options)
    epochs = []

    def interrupt_second_epoch(self):
        epochs.append(self.current_epoch)
        if epochs == [0, 1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(StfpmExt, "on_train_epoch_start", interrupt_second_epoch)
    with pytest.raises(SystemExit):
        command(mvtec_ad, tmp_path / "parts", *options)
    folder = tmp_path / "parts" / "bottle" / "seed_0"
    assert [path.name for path in folder.iterdir()] == ["model.ckpt"]
    command(mvtec_ad, tmp_path / "parts", *options)
    assert epochs == [0, 1, 1, 2]
    whole, parts = (run_of(tmp_path / name, "bottle", 0) for name in ("whole", "parts"))
    assert (whole["resumed"], parts["resumed"]) == (False, True)
    assert whole["chosen_epoch"] in {0, 1, 2}
    for name in ("image_AUROC", "pixel_AUROC", "AUPRO", "rescaled_PRO", "chosen_epoch"):
        assert parts[name] == whole[name]


def test_failing_run_leaves_the_others(mvtec_ad, small, tmp_path, caplog):
    root = shutil.copytree(mvtec_ad, tmp_path / "root")
    (root / "bottle" / "train" / "good" / "000.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="RuntimeError: no results of bottle with seed 0, for reasons told above"):
        command(root, tmp_path / "output", *small)
    assert "UnidentifiedImageError" in caplog.text
    table = pd.read_csv(tmp_path / "output" / "results.csv", index_col="category")
    assert table.index.tolist() == ["pill", "mean of these 1", "mean of all"]


@pytest.mark.slow
def test_side_by_side(mvtec_ad, small, tmp_path):
    command(mvtec_ad, tmp_path, *small, "--devices", 2)
    assert run_of(tmp_path, "bottle", 0)["category"] == "bottle"
    assert pd.read_csv(tmp_path / "results.csv").category.tolist()[:2] == ["bottle", "pill"]


def test_visa_as_published(visa, small, tmp_path):
    """And with hidden files in what is made of it."""
    command(visa, tmp_path / "output", *small, data="Visa")
    run = run_of(tmp_path / "output", "candle", 0)
    assert run["images"] == {"train": 6, "good": 3, "defective": 3}
    assert run["AUPRO"] is not None
    table = pd.read_csv(tmp_path / "output" / "results.csv", index_col="category")
    assert table.index.tolist() == ["candle", "mean of these 1", "mean of all"]
    assert table.loc["mean of all", "image_AUROC on record"] == 0.833

    (visa / "visa_pytorch" / "candle" / "train" / "good" / "._000.JPG").write_bytes(b"resource fork")
    command(visa, tmp_path / "again", *small, data="Visa")
    again = run_of(tmp_path / "again", "candle", 0)
    assert (again["images"], again["pixel_AUROC"]) == (run["images"], run["pixel_AUROC"])

    (visa / "visa_pytorch" / "candle" / "train" / "good" / "train0.JPG").unlink()
    with pytest.raises(
        SystemExit, match=r"root: wanted the 12 images of .*1cls.csv in .*candle, got 11; remove .*visa_py"
    ):
        command(visa, tmp_path / "other", *small, data="Visa")


def test_any_folder_of_that_layout(mvtec_ad, small, tmp_path):
    root, sizes = tmp_path / "tiles", ((70, 40), (40, 90))  # width and height
    for path in (mvtec_ad / "bottle").rglob("*.png"):
        target = root / path.relative_to(mvtec_ad / "bottle")
        target.parent.mkdir(parents=True, exist_ok=True)
        if "ground_truth" in path.parts:  # of its image's size, and one that is empty
            picture = target.parents[2] / "test" / target.parent.name / target.name.replace("_mask.png", ".jpg")
            mask = Image.open(path).resize(sizes[int(picture.stem) % 2])
            (mask if picture.stem == "000" else mask.point(lambda _: 0)).save(target)
        else:
            Image.open(path).convert("L").resize(sizes[int(path.stem) % 2]).save(target.with_suffix(".jpg"))
    (root / "ground_truth" / "good").mkdir()
    Image.new("L", sizes[0]).save(root / "ground_truth" / "good" / "000_mask.png")
    for output, folder in ((tmp_path / "one", root), (tmp_path / "all", tmp_path)):
        command(folder, output, *small, "--categories", "tiles", data="Folder")
        table = pd.read_csv(output / "results.csv", index_col="category")
        assert table.index.tolist() == ["tiles", "mean of these 1"]
        assert table.loc["tiles"].filter(like=" ours").between(0, 1).all()
    assert run_of(tmp_path / "one", "tiles", 0)["images"] == {"train": 6, "good": 3, "defective": 4}


def test_the_papers_rules_are_the_default():
    defaults = make_parser().get_defaults()
    assert [defaults[name] for name in ("lr", "selection", "precise_bn")] == [0.4, "held_out_map", False]


def test_results_of_before_an_argument_came_are_of_its_default(output, mvtec_ad, two_seeds):
    file = output / "settings.json"
    settings = json.loads(file.read_text())
    older = {name: value for name, value in settings.items() if name not in ("selection", "precision")}
    try:
        file.write_text(json.dumps(older))
        command(mvtec_ad, output, *two_seeds)
        for name, value, before in (
            ("selection", "synthetic", "held_out_map"),
            ("precision", "bf16-mixed", "32-true"),
        ):
            with pytest.raises(SystemExit, match=f"{name}: wanted {before}, as for the results in .*, got {value}"):
                command(mvtec_ad, output, *two_seeds, f"--{name}", value)
    finally:
        file.write_text(json.dumps(settings))


def test_results_of_arguments_that_are_gone_are_not_mixed_with_others(output, mvtec_ad, two_seeds):
    file = output / "settings.json"
    settings = json.loads(file.read_text())
    try:
        file.write_text(json.dumps({**settings, **GONE}))
        command(mvtec_ad, output, *two_seeds)  # they had the values that are left
        file.write_text(json.dumps({**settings, **GONE, "ema_decay": 0.9}))
        with pytest.raises(SystemExit, match=r"ema_decay: wanted 0\.9, as for the results in .*, got None"):
            command(mvtec_ad, output, *two_seeds)
    finally:
        file.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--root", "/nowhere"], "FileNotFoundError: root: wanted the folder of MVTecAD, got /nowhere"),
        (
            ["--data", "Visa"],
            "root: wanted the folder of Visa, with visa_pytorch/CATEGORY/.* or split_csv/1cls.csv, got",
        ),
        (["--categories", "bottle,bottel"], "categories: wanted some of bottle, pill, which are in .*, got bottel"),
        (["--seeds", "0,one"], "seeds: wanted whole numbers, as in .0,1,2., got 0,one"),
        (["--max_epochs", 0], "max_epochs: wanted at least 1, got 0"),
        (["--devices", 0], "devices: wanted 1 to .*, got 0"),
        (["--workers", -1], "workers: wanted at least 0, got -1"),
        (["--teacher_weights", "/nowhere.pth"], "FileNotFoundError: teacher_weights: .*/nowhere.pth"),
        (["--teacher_weights", "false"], "teacher_weights: wanted true or a file of weights, got False"),
        (["--layers", "[layer9]"], "layer9"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(options, message, mvtec_ad, small, tmp_path):
    with pytest.raises(SystemExit, match=message):
        command(mvtec_ad, tmp_path / "output", *small, *options)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (
            "ground_truth/broken/001_mask.png",
            "root: wanted a mask for each of the 4 defective .* or none at all, got 3 masks",
        ),
        ("train/good/*", "categories: wanted some of pill, .*, got bottle"),
        ("test/good/*", r"root: wanted images \(.png, .PNG\) in test/good of .*bottle, got none"),
        ("test/[bs]*/*", "root: wanted images .* in a folder of test/ other than good of .*bottle, got none"),
    ],
)
def test_incomplete_category(removed, message, mvtec_ad, small, tmp_path):
    root = shutil.copytree(mvtec_ad, tmp_path / "root")
    for path in root.glob(f"bottle/{removed}"):
        path.unlink()
    with pytest.raises(SystemExit, match=message):
        command(root, tmp_path / "output", *small, "--categories", "bottle")


def scatter_junk(root: Path) -> None:
    """Leave behind what notebooks, macOS and slips of the hand do."""
    shutil.copytree(root / "bottle", root / ".ipynb_checkpoints")
    for category in ("bottle", "pill"):
        shutil.copytree(root / category / "test" / "good", root / category / "test" / ".ipynb_checkpoints")
        for role in ("train/good", "test/good", "test/broken"):
            (root / category / role / "._000.png").write_bytes(b"resource fork")
            (root / category / role / "a.png").mkdir()
    (root / "bottle" / "ground_truth" / "broken" / "._000_mask.png").write_bytes(b"resource fork")


def test_hidden_files_and_folders_called_like_images_change_nothing(output, mvtec_ad, small, tmp_path):
    root = shutil.copytree(mvtec_ad, tmp_path / "root")
    scatter_junk(root)
    command(root, tmp_path / "output", *small)
    for category in ("bottle", "pill"):
        clean, run = run_of(output, category, 0), run_of(tmp_path / "output", category, 0)
        assert run["images"] == {"train": 6, "good": 3, "defective": 4}
        assert {name: value for name, value in run.items() if "AUROC" in name} == {
            name: value for name, value in clean.items() if "AUROC" in name
        }
    assert not (tmp_path / "output" / ".ipynb_checkpoints").exists()
    with pytest.raises(SystemExit, match=r"categories: wanted some of bottle, pill, .*got .ipynb_checkpoints"):
        command(root, tmp_path / "other", *small, "--categories", "[.ipynb_checkpoints]")


def test_broken_image_is_named(mvtec_ad, small, tmp_path, caplog):
    root = shutil.copytree(mvtec_ad, tmp_path / "root")
    broken = root / "bottle" / "test" / "good" / "001.png"
    broken.write_bytes(broken.read_bytes()[:900])
    with pytest.raises(SystemExit, match="no results of bottle"):
        command(root, tmp_path / "output", *small, "--categories", "bottle")
    assert "data: wanted images that can be read, got" in caplog.text
    assert "test/good/001.png: ValueError: wanted the whole picture" in caplog.text


@pytest.fixture(scope="module")
def maps_and_masks():
    rng = np.random.default_rng(0)
    masks = np.zeros((3, 24, 24), int)
    masks[0, 2:8, 3:9] = masks[0, 8, 9] = 1  # touch at a corner: one region
    masks[0, 15:17, 15:20] = masks[1, 4:20, 5:7] = 1
    maps = (rng.random(masks.shape) ** 3 + masks * rng.random(masks.shape)).astype(np.float32)
    return torch.from_numpy(maps), torch.from_numpy(masks)


def naive_curve(maps, masks, thresholds):
    """False positive rate and mean overlap of the regions, threshold by threshold."""
    maps, masks = maps.numpy().astype(float), masks.numpy()
    regions = [labels == number for labels in map(label, masks) for number in range(1, labels.max() + 1)]
    images = [image for image, labels in zip(maps, map(label, masks), strict=True) for _ in range(labels.max())]
    assert len(regions) == 3
    fpr = [(maps[masks == 0] > threshold).mean() for threshold in thresholds]
    overlap = [
        np.mean([(image[region] > threshold).mean() for image, region in zip(images, regions, strict=True)])
        for threshold in thresholds
    ]
    return np.array(fpr), np.array(overlap)


def test_rescaled_pro_is_the_authors(maps_and_masks):
    maps, masks = maps_and_masks
    highest, lowest = float(maps.max()), float(maps.min())
    fpr, overlap = naive_curve(maps, masks, [highest - step * (highest - lowest) / 200 for step in range(200)])
    fpr, overlap = fpr[fpr <= 0.3], overlap[fpr <= 0.3]
    expected = auc(fpr / fpr.max(), overlap / overlap.max())  # both begin at 0
    assert rescaled_pro(maps, masks, steps=200) == pytest.approx(expected, abs=1e-9)


def test_rescaled_pro_by_hand():
    # Two rows, since older versions of OpenCV turn a single one into a column.
    maps = torch.tensor([[[4.0, 3.0, 2.0, 1.0, 0.0]] * 2])
    masks = torch.tensor([[[1, 0, 1, 0, 0]] * 2])
    # Thresholds 4, 3, 2, 1 give false positives 0, 0, 1/3, 1/3 and overlaps 0, 1/2, 1/2, 1.
    assert rescaled_pro(maps, masks, fpr_limit=0.5, steps=4) == pytest.approx(0.5)
    assert rescaled_pro(maps, masks, fpr_limit=0.3, steps=4) is None  # no false positive within the limit


def batch_of(maps, masks, scores, labels) -> ImageBatch:
    return ImageBatch(
        image=torch.zeros(len(maps), 3, *maps.shape[1:]),
        anomaly_map=maps[:, None],
        gt_mask=masks,
        pred_score=scores[:, None],
        gt_label=labels,
    )


def test_metrics_of_small_maps(maps_and_masks):
    maps, masks = maps_and_masks
    batches = [
        batch_of(maps[part], masks[part].bool(), maps[part].amax((1, 2)), torch.tensor([1, 1, 0])[part])
        for part in (slice(0, 2), slice(2, 3))
    ]
    metrics = measure(batches)
    assert metrics["image_AUROC"] == 1
    assert metrics["pixel_AUROC"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-6)
    assert metrics["rescaled_PRO"] == rescaled_pro(maps, masks)
    fpr, overlap = naive_curve(maps, masks, [np.inf, *np.unique(maps.double())[::-1], -1])
    grid = np.append(fpr[fpr < 0.3], 0.3)
    expected = auc(grid, np.append(overlap[fpr < 0.3], np.interp(0.3, fpr, overlap))) / 0.3
    assert metrics["AUPRO"] == pytest.approx(expected, abs=1e-6)


def test_scores_above_1_make_no_ties():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.permutation(1000) * 1e-9).float()
    scores[:10] = torch.arange(10) + 1.5
    labels = torch.from_numpy(rng.integers(0, 2, 1000))
    maps, expected = torch.zeros(1000, 2, 2), roc_auc_score(labels, scores)
    assert measure([batch_of(maps, None, scores, labels)])["image_AUROC"] == pytest.approx(expected, abs=1e-6)
    assert (
        abs(binary_auroc(scores, labels).item() - expected) > 1e-3
    )  # what is avoided: the sigmoid is the same for most


def test_diverged_training_has_no_metrics():
    with pytest.raises(FloatingPointError, match="1 of 2 scores are not finite: the training has diverged"):
        measure([batch_of(torch.zeros(2, 2, 2), None, torch.tensor([0.1, torch.nan]), torch.tensor([0, 1]))])


def test_mean_of_all_has_ours_only_where_nothing_is_missing():
    categories = PUBLISHED["MVTecAD"]["paper"]["image_AUROC"].keys() - {"mean of all"}
    assert len(categories) == 15
    runs = pd.DataFrame({"category": sorted(categories), "seed": 0, "masks": True})
    runs[["image_AUROC", "pixel_AUROC", "AUPRO", "rescaled_PRO"]] = [0.9, 0.8, 0.7, 0.6]
    runs.loc[3, ["masks", "AUPRO", "pixel_AUROC", "rescaled_PRO"]] = [False, None, None, None]
    mean = make_table("MVTecAD", runs).loc["mean of all"]
    assert mean["image_AUROC ours"] == pytest.approx(0.9)
    assert np.isnan(mean["pixel_AUROC ours"])
    assert make_table("MVTecAD", runs).loc["mean of these 15", "image_AUROC paper"] == pytest.approx(0.955, abs=6e-4)
    assert "| mean of all | 0.955 | 0.893 | 0.900 |" in to_markdown("MVTecAD", make_table("MVTecAD", runs))
    runs = pd.DataFrame({"category": VISA_CATEGORIES, "seed": 0, "masks": True, "image_AUROC": 0.9})
    runs[["pixel_AUROC", "AUPRO", "rescaled_PRO"]] = 0.5
    assert "| mean of all | 0.833 | 0.900 | 0.500 |" in to_markdown("Visa", make_table("Visa", runs))


def test_pick_spreads_over_the_scores():
    scores, labels = torch.tensor([5.0, 1, 4, 2, 3, 0]), torch.tensor([1, 1, 1, 1, 1, 0])
    assert pick(scores, labels, 1) == [1, 3, 4, 2, 0]
    many = torch.arange(100.0).flip(0)
    picked = many[pick(many, torch.zeros(100), 0)]
    assert (picked[0], picked[-1], len(picked)) == (0, 99, 8)
    assert picked.diff().min() >= 14
