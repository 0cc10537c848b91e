# SPDX-License-Identifier: Apache-2.0

"""Checkpoints without the teacher: their size, what they give, and which teachers are refused."""

import argparse
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from omegaconf import OmegaConf

from anomalib_stfpm_ext import StfpmExt
from anomalib_stfpm_ext.checkpoints import KEY, TEACHER_PREFIX, checksum
from anomalib_stfpm_ext.convert import save_checkpoint, write_authors_student

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = ["layer1", "layer2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[Path]:
    """Make weights of two teachers."""
    paths = [tmp_path_factory.mktemp("weights") / f"{number}.pth" for number in range(2)]
    for seed, path in enumerate(paths, 10):  # not those of the models
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_resnet").state_dict(), path)
    return paths


def make_model(teacher_weights: Path | bool, **arguments) -> StfpmExt:
    settings = {"layers": LAYERS, "lr": 0.05, "seed": 0, "visualizer": False, "save_teacher": False}
    settings |= {"pre_processor": StfpmExt.configure_pre_processor((48, 64))}
    return StfpmExt("test_resnet", teacher_weights=teacher_weights, **(settings | arguments))


@pytest.fixture
def fit(images, tmp_path):
    def run(model: StfpmExt, epochs: int = 2, ckpt_path: str | None = None) -> str:
        data = Folder("noise", root=images, normal_dir="good", normal_test_dir="good_test", abnormal_dir="bad",
            train_batch_size=4, num_workers=0, seed=0)  # fmt: skip
        quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        engine = Engine(max_epochs=epochs, default_root_dir=tmp_path, **quiet)
        engine.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return engine.best_model_path

    return run


def content(path: str | Path) -> dict:
    return torch.load(path, weights_only=True)


def scores(model: StfpmExt, images: Path, **arguments) -> torch.Tensor:
    engine = Engine(accelerator="cpu", logger=False, default_root_dir=images / "results")
    batches = engine.predict(model, dataset=PredictDataset(images / "bad"), **arguments)
    return torch.cat([batch.pred_score.flatten() for batch in batches])


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor.nan_to_num(), second[name].nan_to_num()) for name, tensor in first.items()
    )


def test_half_the_size(resnet18_weights, tmp_path):
    sizes = []
    for save_teacher in (True, False):
        model = StfpmExt("resnet18", teacher_weights=resnet18_weights, save_teacher=save_teacher)
        save_checkpoint(model, tmp_path / "model.ckpt")
        sizes.append((tmp_path / "model.ckpt").stat().st_size)
    assert sizes[1] / sizes[0] == pytest.approx(0.5, abs=0.01)


def test_same_predictions(fit, images, weights, tmp_path):
    whole = make_model(weights[0], save_teacher=True)
    paths = [fit(whole)]
    half = make_model(weights[0])
    paths += [fit(half)]
    sizes = [Path(path).stat().st_size for path in paths]
    assert sizes[1] < 0.85 * sizes[0]
    states = [content(path)["state_dict"] for path in paths]
    assert states[0].keys() - states[1].keys() == {
        TEACHER_PREFIX + name for name in whole.model.teacher_model.state_dict()
    }
    assert all(torch.equal(tensor.nan_to_num(), states[0][name].nan_to_num()) for name, tensor in states[1].items())
    save_checkpoint(half, tmp_path / "half.ckpt")

    assert content(paths[0])[KEY]["teacher"] is None
    named = content(paths[1])[KEY]["teacher"]
    assert (named["backbone"], named["layers"]) == ("test_resnet", LAYERS)
    expected = scores(whole, images)
    assert torch.equal(scores(StfpmExt.load_from_checkpoint(paths[0]), images), expected)
    for path in (paths[1], tmp_path / "half.ckpt"):
        loaded = StfpmExt.load_from_checkpoint(path, teacher_weights=weights[0])
        assert torch.equal(scores(loaded, images), expected)
        assert torch.equal(scores(make_model(weights[0]), images, ckpt_path=path), expected)
    exported = torch.load(loaded.to_torch(tmp_path), weights_only=False)["model"]
    assert same(exported.state_dict(), whole.state_dict())


def test_other_teachers_are_refused(fit, images, weights, tmp_path):
    path = fit(make_model(weights[0]), epochs=1)
    sha256 = content(path)[KEY]["teacher"]["sha256"]
    message = (
        r"teacher_weights: wanted True or the file of the teacher that the checkpoint names and leaves out, "
        rf"'test_resnet' with layers \['layer1', 'layer2'\] and sha256 {sha256}, got "
    )
    with pytest.raises(ValueError, match=f"{message}none"):
        StfpmExt.load_from_checkpoint(path)
    for other, got in ((weights[1], rf"one with sha256 (?!{sha256})"), (False, "none")):
        with pytest.raises(ValueError, match=message + got):
            StfpmExt.load_from_checkpoint(path, teacher_weights=other)
        with pytest.raises(ValueError, match=message):
            scores(make_model(other), images, ckpt_path=path)
        with pytest.raises(ValueError, match=message):
            fit(make_model(other), ckpt_path=path)
    with pytest.raises(ValueError, match=r"model: wanted a checkpoint with a teacher, or else .*save_teacher=False"):
        write_authors_student(path, tmp_path / "student.pth")
    for wrong in ("no", None, 0):
        with pytest.raises(TypeError, match="save_teacher: wanted True or False, got"):
            make_model(False, save_teacher=wrong)


def test_teacher_without_weights_is_told(fit, images, weights):
    message = "teacher_weights: .* the teacher is random"
    with pytest.warns(UserWarning, match=message):
        fit(make_model(False), epochs=1)
    with pytest.warns(UserWarning, match=message):
        scores(make_model(False), images)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message)
        path = fit(make_model(weights[0], save_teacher=True), epochs=1)
        scores(make_model(False), images, ckpt_path=path)
        fit(make_model(False, save_teacher=True), ckpt_path=path)
        scores(StfpmExt.load_from_checkpoint(path), images)


def test_checkpoint_of_another_model(tmp_path):
    checkpoint = {"state_dict": {"model.memory_bank": torch.zeros(1)}, "pytorch-lightning_version": "2.6"}
    torch.save(checkpoint, tmp_path / "padim.ckpt")
    with pytest.raises(ValueError, match="checkpoint: wanted one of StfpmExt or Stfpm, got another model's"):
        StfpmExt.load_from_checkpoint(tmp_path / "padim.ckpt")


def test_resumed_run_ends_as_the_unbroken_one(fit, weights):
    unbroken = content(fit(make_model(weights[0]), epochs=3))
    path = fit(make_model(weights[0]), epochs=2)
    resumed = content(fit(make_model(weights[0]), epochs=3, ckpt_path=path))
    assert same(resumed["state_dict"], unbroken["state_dict"])
    assert resumed[KEY]["fit"]["history"] == unbroken[KEY]["fit"]["history"]


def test_images_have_the_size_of_the_checkpoint(fit, images, weights, tmp_path):
    """Whatever size the model has that loads it: data modules resize, too, and before a checkpoint is loaded."""
    path = fit(make_model(weights[0]), epochs=1)
    data = {"normal_dir": "good", "normal_test_dir": "good_test", "abnormal_dir": "bad", "num_workers": 0, "seed": 0}
    results = []
    for model in (
        StfpmExt.load_from_checkpoint(path, teacher_weights=weights[0], visualizer=False),
        make_model(weights[0], pre_processor=True, image_size=None),  # of 256x256
    ):
        engine = Engine(accelerator="cpu", logger=False, default_root_dir=tmp_path)
        batches = engine.predict(model, datamodule=Folder("noise", root=images, **data), ckpt_path=path)
        results.append(torch.cat([batch.pred_score.flatten() for batch in batches]))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": np.int64(3)},
        {"held_out_share": np.float64(0.25), "lr": np.float32(0.05), "hard_share": np.float32(0.1)},
        {"layers": OmegaConf.create(LAYERS)},
        {"layers": np.array(LAYERS), "image_size": np.array([48, 64]), "pre_processor": True},
        {"layers": tuple(map(np.str_, LAYERS)), "selection": np.str_("held_out_map"), "lr": torch.tensor(0.05)},
        {
            "held_out_share": Fraction(1, 4),
            "hard_share": Fraction(1, 3),
            "lr": Decimal("0.05"),
            "image_size": torch.Size([48, 64]),
            "pre_processor": True,
        },
    ],
    ids=str,
)
def test_what_trains_can_be_loaded(fit, weights, arguments):
    model = make_model(weights[0], **arguments)
    loaded = StfpmExt.load_from_checkpoint(fit(model, epochs=1), teacher_weights=weights[0], visualizer=False)
    assert same(loaded.state_dict(), model.state_dict())


def test_what_could_not_be_loaded_is_refused_before_the_first_step(fit, weights):
    class Mine(StfpmExt):
        def __init__(self, options, **arguments):
            super().__init__(**arguments)

    arguments = {"backbone": "test_resnet", "layers": LAYERS, "evaluator": False, "visualizer": False}
    for model, name in (
        (StfpmExt(**arguments, teacher_weights=np.str_(weights[0])), "teacher_weights"),
        (Mine(**arguments, teacher_weights=weights[0], options=argparse.Namespace(a=1)), "options"),
    ):
        with pytest.raises(TypeError, match=f"{name}: wanted a value that a checkpoint can hold"):
            fit(model, epochs=1)


def test_a_checkpoint_of_a_newer_version_is_refused(fit, weights, tmp_path):
    newer = content(fit(make_model(weights[0]), epochs=1))
    newer[KEY]["version"] += 1
    torch.save(newer, tmp_path / "newer.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint: wanted one of version 3 at most, .*got version 4"):
        StfpmExt.load_from_checkpoint(tmp_path / "newer.ckpt", teacher_weights=weights[0])


def test_checksum():
    tensors = {"a.weight": torch.rand(2, 3, 4, 5), "b": torch.rand(3), "norm.num_batches_tracked": torch.tensor(3)}
    expected = checksum(tensors)
    assert len(expected) == 64
    laid_out = tensors["a.weight"].to(memory_format=torch.channels_last)
    assert checksum({"b": tensors["b"], "a.weight": laid_out}) == expected
    for name, other in (("c", tensors["b"]), ("b", tensors["b"] + 1), ("b", tensors["b"].double())):
        assert checksum({"a.weight": laid_out, name: other}) != expected
    assert checksum({**tensors, "a.weight": laid_out.reshape(3, 2, 4, 5)}) != expected
