# SPDX-License-Identifier: Apache-2.0

"""The choice of the student by held-out images: what is held out, who is kept, what a checkpoint brings back."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import ImageBatch
from anomalib.data.datasets.base import image as anomalib_dataset
from anomalib.engine import Engine
from helpers import QUIET, folder
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)
from torchvision import tv_tensors
from torchvision.transforms import v2

from anomalib_stfpm_ext import StfpmExt, StfpmExtModel
from anomalib_stfpm_ext.callbacks import finite_loss, learning_rate
from anomalib_stfpm_ext.checkpoints import KEY
from anomalib_stfpm_ext.selection import judge
from anomalib_stfpm_ext.selection.hold_out import split
from anomalib_stfpm_ext.selection.record import SCORING, STUDENT_PREFIX, Measurement, best_of
from anomalib_stfpm_ext.selection.synthetic import add_anomaly


@pytest.fixture
def make_model(small_weights):
    def make(**arguments) -> StfpmExt:
        settings = {"layers": ["layer1", "layer2"], "teacher_weights": small_weights, "lr": 0.05, "seed": 0}
        settings |= {"pre_processor": StfpmExt.configure_pre_processor((48, 64)), "visualizer": False}
        settings |= {"precise_bn": False}  # which would change the students that these tests make
        return StfpmExt("test_resnet", **(settings | arguments))

    return make


@pytest.fixture
def fit(images, tmp_path):
    """Fit a model on the eight good images, and return the engine."""

    def run(model, *callbacks, epochs=3, data=None, ckpt_path=None, **arguments) -> Engine:
        engine = Engine([*callbacks], default_root_dir=tmp_path, max_epochs=epochs, **QUIET, **arguments)
        engine.fit(model, datamodule=data or folder(images), ckpt_path=ckpt_path)
        return engine

    return run


def content(engine: Engine) -> dict:
    return torch.load(engine.best_model_path, weights_only=True)


def fit_of(checkpoint: dict) -> dict | None:
    """Return what resuming needs."""
    return checkpoint[KEY]["fit"]


def student_of(state: dict) -> dict[str, torch.Tensor]:
    """Take the student out of a model's state dict."""
    return {name.removeprefix(STUDENT_PREFIX): t for name, t in state.items() if name.startswith(STUDENT_PREFIX)}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Tell whether all tensors have the same bits, where NaN (a threshold that was not needed) equals NaN."""
    return first.keys() == second.keys() and all(
        torch.equal(tensor.isnan(), second[name].isnan())
        and torch.equal(tensor.nan_to_num(), second[name].nan_to_num())
        for name, tensor in first.items()
    )


class Steer(Callback):
    """Makes the student the teacher plus noise after every step, of a strength that depends on the epoch."""

    def __init__(self, *noise: float) -> None:
        self.noise = noise

    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.model.student_model.load_state_dict(self.student(pl_module, trainer.current_epoch))

    def student(self, model: StfpmExt, epoch: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(epoch)
        return {
            name: tensor + self.noise[epoch] * tensor.std() * torch.randn(tensor.shape, generator=generator)
            if name.endswith(("conv1.weight", "conv1.0.weight"))
            else tensor
            for name, tensor in model.model.teacher_model.state_dict().items()
        }


class Seen(Callback):
    """Notes the images of every training step, and breaks those of one epoch if asked to."""

    def __init__(self, broken_epoch: int | None = None) -> None:
        self.training: list[str] = []
        self.broken_epoch = broken_epoch

    def on_train_batch_start(self, trainer, pl_module, batch, _batch_idx):
        assert all(module.training for module in pl_module.model.student_model.modules())
        assert not any(module.training for module in pl_module.model.teacher_model.modules())
        self.training += [Path(path).name for path in batch.image_path]
        if trainer.current_epoch == self.broken_epoch:
            batch.image = batch.image * torch.nan


class Untouched(Callback):
    """Wants that nothing draws random numbers from the end of an epoch, before the student is measured, to the next."""

    def on_train_epoch_end(self, *_):
        self.state = torch.get_rng_state()

    def on_train_epoch_start(self, trainer, _pl_module):
        assert trainer.current_epoch == 0 or torch.equal(torch.get_rng_state(), self.state)


class Shake(Callback):
    """Makes the student of epoch 1 worse than that of epoch 0, so that the best is not the one in training."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.current_epoch == 1:
            pl_module.model.student_model.feature_extractor.conv1[0].weight.data *= -1


def test_the_split_is_the_authors_and_leaves_the_random_state_alone():
    before, torch_before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    for number, share, seed in ((2, 0.2, 0), (8, 0.2, 0), (209, 0.2, 0), (30, 0.1, 7)):
        theirs = train_test_split(range(number), test_size=share, random_state=seed)[1]
        assert split(number, share, seed).tolist() == theirs
    assert np.random.get_state()[1].tolist() == before
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_training_sees_neither_held_out_nor_test_images(make_model, fit, images, monkeypatch):
    read = []
    read_image = anomalib_dataset.read_image

    class Spy(v2.Transform):
        def __init__(self):
            super().__init__()
            self.images = 0

        def transform(self, inpt, _params):
            self.images += isinstance(inpt, tv_tensors.Image)
            return inpt

    def spy(path, **arguments):
        read.append(Path(path).relative_to(images).as_posix())
        return read_image(path, **arguments)

    monkeypatch.setattr(anomalib_dataset, "read_image", spy)
    in_training, in_test = Spy(), Spy()
    data = folder(images, train_augmentations=in_training, test_augmentations=in_test)
    held_out = {f"{index}.png" for index in split(8, 0.2, 0)}
    for number in (1, 2):  # the second fit finds the data module as the first did
        seen = Seen()
        read.clear()
        fit(make_model(seed=None), seen, epochs=2, data=data, limit_val_batches=0)
        assert sorted(seen.training) == sorted(2 * list({f"{index}.png" for index in range(8)} - held_out))
        assert sorted(read) == sorted([f"good/{name}" for name in seen.training] + 2 * [f"good/{n}" for n in held_out])
        assert (in_training.images, in_test.images) == (number * 2 * 6, number * 2 * 2)
        assert len(data.train_data) == 8


def test_best_student_is_validated_saved_tested_and_kept(make_model, fit, images):
    model, steer = make_model(), Steer(0.3, 0.1, 0.5, 0.2)
    engine = fit(model, steer, Seen(), epochs=4)
    values = [measurement.value for measurement in model.student_selection.history]
    assert [measurement.epoch for measurement in model.student_selection.history] == [0, 1, 2, 3]
    assert np.argsort(values).tolist() == [1, 3, 0, 2]
    assert model.student_selection.best == model.student_selection.history[1]
    assert engine.trainer.callback_metrics["held_out_map"].item() == pytest.approx(values[3])

    checkpoint, best, last = content(engine), steer.student(model, 1), steer.student(model, 3)
    assert same(model.model.student_model.state_dict(), best)
    assert same(student_of(checkpoint["state_dict"]), best)
    choice = fit_of(checkpoint)
    assert same(choice["student"], last)
    assert {name: choice[name] for name in ("share", "seed", "images", "epoch", "held_out_map")} == {
        "share": 0.2,
        "seed": 0,
        "images": 2,
        "epoch": 1,
        "held_out_map": values[1],
    }
    assert [value for _, _, value, *_ in choice["history"]] == values

    loaded = StfpmExt.load_from_checkpoint(engine.best_model_path, visualizer=False)
    assert same(loaded.model.student_model.state_dict(), best)
    # Normalisation and threshold were taken from validation with the student that is kept.
    statistics = {name: buffer.clone() for name, buffer in loaded.post_processor.named_buffers()}
    engine.trainer.validate(loaded, datamodule=folder(images), verbose=False)
    torch.testing.assert_close(dict(loaded.post_processor.named_buffers()), statistics, rtol=0, atol=0, equal_nan=True)
    by_hand = held_out_map(loaded, images, split(8, 0.2, 0))
    assert values[1] == pytest.approx(by_hand, rel=1e-6)


def held_out_map(model: StfpmExt, images: Path, indices) -> float:
    """Compute the mean anomaly map of some of the good images, one by one."""
    data = folder(images)
    data.setup()
    pictures = [data.train_data[index].image for index in indices]
    with torch.no_grad():
        maps = [model.eval().model(model.pre_processor.transform(image[None])).anomaly_map for image in pictures]
    return torch.stack(maps).double().mean().item()


def test_synthetic_anomalies_choose(make_model, fit, images, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "FEWEST_IMAGES", 4)
    settings = {"held_out_share": 0.5, "selection": "synthetic"}
    model, steer = make_model(**settings), Steer(0.3, 0.1, 0.5, 0.2)
    each = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    engine = fit(model, steer, each, epochs=4)
    history = model.student_selection.history
    best = model.student_selection.best
    assert best == best_of(history)
    assert same(model.model.student_model.state_dict(), steer.student(model, best.epoch))
    assert engine.trainer.callback_metrics["synthetic_AUROC"].item() == pytest.approx(history[-1].synthetic_auroc)
    checkpoint = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    choice = fit_of(checkpoint)
    assert (choice["selection"], choice["synthetic_AUROC"]) == ("synthetic", best.synthetic_auroc)
    loaded = StfpmExt.load_from_checkpoint(tmp_path / "epoch=3.ckpt", visualizer=False)
    assert model.model.level_weights == loaded.model.level_weights == best.level_weights
    assert len({measurement.level_weights for measurement in history}) > 1
    assert best.synthetic_auroc == pytest.approx(synthetic_auroc(loaded, images, split(8, 0.5, 0)))

    resumed = make_model(**settings)
    fit(resumed, steer, epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.student_selection.history == history
    with pytest.raises(ValueError, match="selection: wanted synthetic as in the checkpoint, got held_out_map"):
        fit(make_model(held_out_share=0.5, selection="held_out_map"), epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")


def test_anomalies_are_scored_as_the_images_are(make_model, fit, monkeypatch):
    """By the networks themselves where the teacher's features are kept: copies may be of another precision."""

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(judge, "FEWEST_IMAGES", 4)
    monkeypatch.setattr(StfpmExtModel, "_infer", refuse)
    model = make_model(held_out_share=0.5, selection="synthetic")
    fit(model, epochs=1, limit_val_batches=0)
    assert model.student_selection.best.synthetic_auroc is not None


def synthetic_auroc(model: StfpmExt, images: Path, indices) -> float:
    """Compute the AUROC of synthetic anomalies in some of the good images, one by one."""
    data = folder(images)
    data.setup()
    with torch.no_grad():
        good = [model.pre_processor.transform(data.train_data[index].image[None]) for index in indices]
        defective = [add_anomaly(image[0], index)[None] for index, image in enumerate(good)]
        scores = [[model.eval().model(image).pred_score.item() for image in side] for side in (good, defective)]
    aurocs = [roc_auc_score([0] * len(good) + [1], [*scores[0], score]) for score in scores[1]]
    return float(np.mean(aurocs))  # four images, so one of each kind


def test_anomalies_without_a_score_stop_the_training(make_model, fit, monkeypatch):
    monkeypatch.setattr(judge, "FEWEST_IMAGES", 4)
    monkeypatch.setattr(judge, "add_anomaly", lambda image, _: image * torch.nan)
    with pytest.raises(FloatingPointError, match=r"held-out images of \d.* and an AUROC of synthetic anomalies of nan"):
        fit(make_model(held_out_share=0.5), epochs=1, limit_val_batches=0)


def test_last_student_has_no_weights_of_an_earlier_one(make_model, fit):
    model = make_model(held_out_share=0)
    model.model.score_by((0.5, 0.5), "float32")
    engine = fit(model, epochs=1)
    assert model.model.level_weights is None
    assert content(engine)["state_dict"][SCORING].tolist() == [0, 1, 1, 1]


def test_too_few_images_for_synthetic_anomalies(make_model, fit, caplog):
    model = make_model()
    with caplog.at_level(logging.INFO):
        fit(model, epochs=2)
    assert "selection: synthetic anomalies need 20 held-out images to judge by, and there are 2." in caplog.text
    history = model.student_selection.history
    assert all(measurement.synthetic_auroc is None for measurement in history)
    assert model.student_selection.best == min(history, key=lambda measurement: measurement.value)
    assert model.model.level_weights is None


def test_resumed_run_ends_as_the_unbroken_one(make_model, fit, tmp_path):
    each = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    unbroken = content(fit(make_model(hard_share=0.5), Shake(), each, epochs=4))
    broken = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert fit_of(broken)["epoch"] == 0
    assert not same(student_of(broken["state_dict"]), fit_of(broken)["student"])

    torch.rand(7)
    model = make_model(hard_share=0.5, seed=3)  # neither this seed nor the random numbers at hand matter
    resumed = content(fit(model, epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt"))
    assert same(resumed["state_dict"], unbroken["state_dict"])
    state, expected = fit_of(resumed), fit_of(unbroken)
    assert same(state.pop("student"), expected.pop("student"))
    assert torch.equal(state.pop("random_state"), expected.pop("random_state"))
    assert state == expected
    momenta = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (resumed, unbroken)]
    assert all(torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"]) for i in momenta[0])

    for share in (0.4, 0):
        with pytest.raises(ValueError, match=f"held_out_share: wanted 0.2 as in the checkpoint, got {share}"):
            fit(make_model(hard_share=0.5, held_out_share=share), ckpt_path=tmp_path / "epoch=1.ckpt")
    with pytest.raises(ValueError, match=r"hard_share: wanted 0.5 as in the checkpoint, got 1.0"):
        fit(make_model(), ckpt_path=tmp_path / "epoch=1.ckpt")


@pytest.mark.parametrize("ending", [RuntimeError("stop"), KeyboardInterrupt()], ids=repr)
def test_fit_that_is_broken_off_leaves_the_best_student(make_model, fit, ending):
    class Ending(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.current_epoch == 2:
                raise ending

    model, steer = make_model(), Steer(0.1, 0.3, 0.3)
    with pytest.raises((RuntimeError, SystemExit)):  # Lightning exits at a KeyboardInterrupt
        fit(model, steer, Ending())
    assert same(model.model.student_model.state_dict(), steer.student(model, 0))


def test_resuming_a_finished_fit_leaves_the_best_student(make_model, fit):
    steer = Steer(0.1, 0.3)
    checkpoint = fit(make_model(), steer, epochs=2).best_model_path
    model = make_model()
    fit(model, steer, epochs=2, ckpt_path=checkpoint)
    assert same(model.model.student_model.state_dict(), steer.student(model, 0))


def test_steps_that_end_within_an_epoch_end_with_a_validation(make_model, fit, images):
    """Three epochs of two steps, the last of one: the student that is kept brings its own threshold."""
    model, steer = make_model(), Steer(0.3, 0.2, 0.1)
    fit(model, steer, epochs=-1, max_steps=5)
    assert [measurement.step for measurement in model.student_selection.history] == [2, 4, 5]
    assert same(model.model.student_model.state_dict(), steer.student(model, 2))
    kept = model.post_processor.image_threshold.clone()
    Engine(**QUIET).validate(model, datamodule=folder(images))
    assert torch.equal(model.post_processor.image_threshold, kept)


def other_images(root: Path) -> Path:
    """Make a data set like ``images``, of less noise and paler defects."""
    rng = np.random.default_rng(1)
    for role, count in (("good", 8), ("good_test", 4), ("bad", 4)):
        (root / role).mkdir(parents=True)
        for index in range(count):
            pixels = rng.normal(100, 5, (48, 64, 3)).clip(0, 255).astype(np.uint8)
            if role == "bad":
                pixels[10:30, 20:40] += 30
            Image.fromarray(pixels).save(root / role / f"{index}.png")
    return root


@pytest.mark.parametrize("validated", [True, False], ids=["validated", "never validated"])
def test_a_validation_after_the_fit_is_in_force(make_model, fit, tmp_path, validated):
    others = folder(other_images(tmp_path / "others"))
    model = make_model()
    engine = fit(model, epochs=2, **({} if validated else {"limit_val_batches": 0}))
    before = verdict_of(model)
    assert before["_image_threshold"].isnan().item() != validated
    loaded = StfpmExt.load_from_checkpoint(engine.best_model_path, visualizer=False)
    assert same(verdict_of(loaded), before)
    for each in (loaded, model):
        Engine(**QUIET).validate(each, datamodule=others)
    assert same(verdict_of(model), verdict_of(loaded))
    assert not same(verdict_of(model), before)
    engine.trainer.save_checkpoint(tmp_path / "validated.ckpt")
    saved = StfpmExt.load_from_checkpoint(tmp_path / "validated.ckpt", visualizer=False)
    assert same(verdict_of(saved), verdict_of(model))


def verdict_of(model: StfpmExt) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.post_processor.state_dict().items()}


def test_checkpoints_bring_the_threshold_of_the_student_that_they_hold(make_model, fit, images, tmp_path):
    """The first student is the best, and no validation falls on it."""
    each = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    model, steer = make_model(), Steer(0.1, 0.3)
    fit(model, steer, each, epochs=2, check_val_every_n_epoch=2)
    assert verdict_of(model)["_image_threshold"].isfinite()
    for step in (3, 4):
        loaded = StfpmExt.load_from_checkpoint(tmp_path / f"step={step}.ckpt", visualizer=False)
        assert same(loaded.model.student_model.state_dict(), steer.student(model, 0))
        assert same(verdict_of(loaded), verdict_of(model))
        Engine(**QUIET).validate(loaded, datamodule=folder(images))
        assert same(verdict_of(loaded), verdict_of(model))


@pytest.mark.parametrize(
    ("settings", "fewest", "rate"),
    [
        ({"held_out_share": 0.5}, 4, 1.6),
        ({"held_out_share": 0.5}, 5, 0.4),
        ({"held_out_share": 0}, 4, 0.4),
        ({"held_out_share": 0.5, "selection": "held_out_map"}, 4, 0.4),
        ({"held_out_share": 0.5, "precise_bn": False}, 4, 0.4),
        ({"held_out_share": 0.5, "lr": 0.7}, 5, 0.7),
    ],
)
def test_rate_is_settled_when_the_held_out_images_are_counted(
    make_model, fit, monkeypatch, caplog, settings, fewest, rate
):
    monkeypatch.setattr(judge, "FEWEST_IMAGES", fewest)
    monkeypatch.setattr(learning_rate, "FEWEST_IMAGES", fewest)

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *_):
            self.seen = trainer.optimizers[0].param_groups[0]["lr"]

    seen = Rates()
    model = make_model(**({"lr": None, "precise_bn": True} | settings))
    with caplog.at_level(logging.INFO):
        fit(model, seen, epochs=1)
    assert (seen.seen, model.lr) == (rate, rate)
    assert (f"lr: {rate}, since" in caplog.text) == ("lr" not in settings)


def test_files_that_are_no_checkpoints(make_model, fit, tmp_path):
    whole = Path(fit(make_model(), epochs=1).best_model_path).read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "broken.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint_path: '.*broken.ckpt' cannot be read as a checkpoint"):
            StfpmExt.load_from_checkpoint(tmp_path / "broken.ckpt")


def test_defective_images_of_parts_are_not_held_out(make_model, images, tmp_path):
    data = folder(images)
    data.setup()
    some = ConcatDataset([Subset(data.test_data, range(1, len(data.test_data))), data.test_data])
    model = make_model(held_out_share=0.5)
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, _trainer, module, *_):
            seen.extend(some[index].gt_label.item() for index in module.student_selection.judge.loader.dataset.indices)

    loader = DataLoader(some, batch_size=4, collate_fn=data.test_data.collate_fn)
    Trainer(max_epochs=1, callbacks=[Look()], default_root_dir=tmp_path, **QUIET).fit(model, loader)
    labels = data.test_data.samples.label_index.to_numpy()
    assert model.student_selection.state()["images"] == -(-((labels[1:] == 0).sum() + (labels == 0).sum()) // 2)
    assert not any(seen)


def test_checkpoints_of_other_networks(make_model, fit):
    checkpoint = fit(make_model(), epochs=1).best_model_path
    for arguments, message in (
        ({"layers": ["layer2"]}, r"layers: wanted \['layer1', 'layer2'\] as in the checkpoint, got \['layer2'\]"),
        ({"backbone": "resnet34"}, "backbone: wanted test_resnet as in the checkpoint, got resnet34"),
    ):
        with pytest.raises(ValueError, match=message):
            StfpmExt.load_from_checkpoint(checkpoint, **arguments)
    StfpmExt.load_from_checkpoint(checkpoint, backbone="test_resnet.r160_in1k")  # of the same network
    with pytest.raises(ValueError, match="combine_at: wanted image as in the checkpoint, got finest"):
        fit(make_model(combine_at="finest"), epochs=2, ckpt_path=checkpoint)


def test_other_data_cannot_be_resumed_with(make_model, fit, images):
    engine = fit(make_model(), epochs=1)
    data = folder(images, val_split_mode="from_train", val_split_ratio=0.5)
    with pytest.raises(ValueError, match="held_out_share: wanted 2 held-out images as in the checkpoint, got 4"):
        fit(make_model(), data=data, ckpt_path=engine.best_model_path)


def test_switched_off_keeps_the_last_student(make_model, fit):
    model, steer, seen = make_model(held_out_share=0), Steer(0.1, 0.3), Seen()
    engine = fit(model, steer, seen, epochs=2)
    checkpoint = content(engine)
    assert fit_of(checkpoint) is None
    assert same(student_of(checkpoint["state_dict"]), steer.student(model, 1))
    assert same(model.model.student_model.state_dict(), steer.student(model, 1))
    assert sorted(seen.training) == sorted(2 * [f"{index}.png" for index in range(8)])
    assert "held_out_map" not in engine.trainer.callback_metrics


def test_validation_split_from_the_training_images_serves(make_model, fit, images):
    seen, data = Seen(), folder(images, val_split_mode="from_train", val_split_ratio=0.375)
    engine = fit(make_model(), seen, epochs=1, data=data)
    held_out = [int(Path(path).stem) for path in data.val_data.samples.image_path]
    assert fit_of(content(engine))["images"] == len(held_out) == 3
    assert sorted(seen.training) == [f"{index}.png" for index in range(8) if index not in held_out]
    loaded = StfpmExt.load_from_checkpoint(engine.best_model_path, visualizer=False)
    value = fit_of(content(engine))["held_out_map"]
    assert value == pytest.approx(held_out_map(loaded, images, held_out), rel=1e-6)


@pytest.fixture
def dataset(images):
    data = folder(images)
    data.setup()
    return data.train_data


@pytest.mark.parametrize("shuffle", [True, False])
def test_loader_of_the_users_own(make_model, dataset, shuffle):
    seen, model = Seen(), make_model()
    loader = DataLoader(dataset, batch_size=4, shuffle=shuffle, collate_fn=ImageBatch.collate)
    Trainer(max_epochs=2, callbacks=[seen, Untouched()], enable_checkpointing=False, **QUIET).fit(model, loader)
    training = [f"{index}.png" for index in sorted(set(range(8)) - set(split(8, 0.2, 0)))]
    assert sorted(seen.training[:6]) == sorted(seen.training[6:]) == training
    assert shuffle == (seen.training != training + training)
    assert len(model.student_selection.history) == 2


@pytest.mark.parametrize(("batch_size", "workers"), [(2, 1), (4, 0)])
def test_no_more_processes_read_held_out_images_than_batches(make_model, dataset, batch_size, workers):
    class Workers(Callback):
        def on_train_start(self, trainer, pl_module):
            self.number = pl_module.student_selection.judge.loader.num_workers

    seen = Workers()
    settings = {"num_workers": 2, "persistent_workers": True, "timeout": 60, "multiprocessing_context": "fork"}
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=ImageBatch.collate, **settings)
    model = make_model(held_out_share=0.375)
    Trainer(max_epochs=1, callbacks=[seen], enable_checkpointing=False, **QUIET).fit(model, loader)
    assert seen.number == workers  # of 3 images
    assert len(model.student_selection.history) == 1


def test_loaders_that_cannot_be_split(make_model, dataset):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(dataset)

    collate = {"collate_fn": ImageBatch.collate}
    loader = DataLoader(dataset, **collate)
    for loaders, got in (
        (DataLoader(Stream(), **collate), "the iterable .*Stream"),
        ([loader, loader], "list"),
        (DataLoader(dataset, sampler=SubsetRandomSampler([1, 2]), **collate), "SubsetRandomSampler"),
        (DataLoader(dataset, sampler=SequentialSampler(range(4)), **collate), "a sampler of 4 of 8 images"),
        (DataLoader(dataset, batch_sampler=BatchSampler(range(8), 4, False), **collate), "batch_sampler"),
    ):
        with pytest.raises(ValueError, match=f"held_out_share: wanted .* in one DataLoader.*got .*{got}"):
            Trainer(max_epochs=1, **QUIET).fit(make_model(), loaders)


@pytest.mark.parametrize(
    ("share", "error", "got"),
    [
        (-0.1, ValueError, "-0.1"),
        (1, ValueError, "1"),
        (float("nan"), ValueError, "nan"),
        (True, TypeError, "True"),
        ("0.2", TypeError, "'0.2'"),
    ],
)
def test_bad_shares(share, error, got):
    with pytest.raises(error, match=f"held_out_share: wanted a share .* and less than 1, got {got}"):
        StfpmExt(teacher_weights=False, held_out_share=share)


def test_data_and_settings_that_leave_nothing_to_choose_by(make_model, fit, images):
    def reduced(number: int, label: int = 0):
        data = folder(images)
        data.setup(TrainerFn.FITTING)
        data.train_data.samples = data.train_data.samples[:number].assign(label_index=label)
        return data

    class Sharded(SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    wanted = r"held_out_share: wanted a share that leaves good images both to hold out and to train on \(or 0 .*\), got"
    for share, data, message in (
        (0.2, reduced(1), f"{wanted} 0.2 of 1 good training images"),
        (0.99, reduced(8), f"{wanted} 0.99 of 8 good training images"),
        (0.2, reduced(8, label=1), f"{wanted} 0.2 of 0 good training images"),
        (0.2, reduced(0), "held_out_share: wanted a data module with good training images, got one without images"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(make_model(held_out_share=share), data=data)
    data = folder(images, train_batch_size=8)
    data.setup()
    loader = DataLoader(data.train_data, batch_size=8, drop_last=True, collate_fn=data.train_data.collate_fn)
    with pytest.raises(ValueError, match=r"held_out_share: .*a batch of 8 images .*, got 6 images, and drop_last=True"):
        Trainer(**QUIET).fit(make_model(), loader)
    with pytest.raises(ValueError, match=r"held_out_share: wanted a strategy .* such as ddp .*, got .*Sharded"):
        fit(make_model(), strategy=Sharded(device="cpu"))
    with pytest.raises(ValueError, match=r"held_out_share: wanted a data set that stays the same.*n_epochs=1"):
        fit(make_model(), reload_dataloaders_every_n_epochs=1)


def test_nan_stops_the_training_and_keeps_the_last_good_student(make_model, fit, images):
    model, steer = make_model(), Steer(0.1, 0.1)
    message = r"lr: .*got a loss of nan at step 3, epoch 1, learning rate 0.05.*that of epoch 0"
    with pytest.raises(FloatingPointError, match=message):
        fit(model, steer, Seen(broken_epoch=1))
    assert same(model.model.student_model.state_dict(), steer.student(model, 0))

    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.model.student_model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"at step 1, epoch 0.*the one that the training began with"):
        fit(model, Seen(broken_epoch=0))
    assert same(model.model.student_model.state_dict(), before)

    model, steer = make_model(), Steer(0.1, float("nan"))
    with pytest.raises(FloatingPointError, match=r"held-out images of nan at step 2, epoch 1.*that of epoch 0"):
        fit(model, steer, data=folder(images, train_batch_size=8))  # one step in each epoch
    assert same(model.model.student_model.state_dict(), steer.student(model, 0))

    with pytest.raises(FloatingPointError, match=r"at step 1, epoch 0.*held_out_share is 0, so none"):
        fit(make_model(held_out_share=0), Seen(broken_epoch=0))


@pytest.mark.parametrize(("share", "broken"), [(0.2, 3), (0.2, 4), (0, 4)])
def test_loss_that_is_read_a_step_later(make_model, fit, monkeypatch, share, broken):
    """As on a GPU, where nobody waits for the step at work; two steps in each epoch."""
    monkeypatch.setattr(finite_loss, "unread_losses", lambda _device: 1)

    class Break(Callback):
        def on_train_batch_start(self, trainer, _pl_module, batch, _batch_idx):
            self.step = trainer.global_step + 1
            if self.step == broken:
                batch.image = batch.image * torch.nan

    model, breaks = make_model(held_out_share=share), Break()
    with pytest.raises(FloatingPointError, match=f"got a loss of nan at step {broken}, epoch 1, learning rate 0.05"):
        fit(model, breaks)
    assert breaks.step == 4  # a step later, but not later than the end of the epoch
    if share:
        assert model.student_selection.best.epoch == 0
        assert all(tensor.isfinite().all() for tensor in model.model.student_model.state_dict().values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_do_not_wait_for_the_gpu(make_model, images, tmp_path):
    class Strict(Callback):
        def on_train_batch_start(self, _trainer, _pl_module, _batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if batch_idx == 1 else "default")  # the first step prepares things

        def on_train_epoch_end(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    settings = QUIET | {"accelerator": "cuda", "devices": 1, "default_root_dir": tmp_path}
    model = make_model()
    Trainer(max_epochs=2, callbacks=[Strict()], **settings).fit(model, datamodule=folder(images))
    assert len(model.student_selection.history) == 2


def test_early_stopping_and_checkpoints_can_follow_the_held_out_map(make_model, fit, tmp_path):
    model, steer = make_model(), Steer(0.3, 0.1, 0.5, 0.6, 0.7)
    best = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", monitor="held_out_map")
    fit(model, steer, best, EarlyStopping("held_out_map", patience=2), epochs=5)
    assert [measurement.epoch for measurement in model.student_selection.history] == [0, 1, 2, 3]
    assert Path(best.best_model_path).name == "epoch=1.ckpt"
    assert same(model.model.student_model.state_dict(), steer.student(model, 1))

    model = make_model()  # measured twice in each epoch
    fit(model, Steer(0.1, 0.2, 0.3), EarlyStopping("held_out_map", patience=1), val_check_interval=0.5)
    assert len(model.student_selection.history) < 6


def test_learning_rate_finder_goes_before(make_model, fit):
    model, seen = make_model(), Seen()
    fit(model, LearningRateFinder(num_training_steps=3), seen, epochs=2)
    assert [measurement.epoch for measurement in model.student_selection.history] == [0, 1]
    assert sorted(seen.training[-12:]) == sorted(2 * [f"{i}.png" for i in set(range(8)) - set(split(8, 0.2, 0))])


@pytest.mark.parametrize("validation", [{"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}])
def test_checkpoints_that_are_saved_by_the_validation(make_model, fit, validation):
    model, steer = make_model(), Steer(0.1, 0.3)
    checkpoint = content(fit(model, steer, epochs=2, **validation))
    assert same(student_of(checkpoint["state_dict"]), steer.student(model, 0))
    assert same(fit_of(checkpoint)["student"], steer.student(model, 1))
    steps = [measurement.step for measurement in model.student_selection.history]
    assert steps == ([1, 2, 3, 4] if "val_check_interval" in validation else [2, 4])


def test_checkpoint_of_an_older_version(make_model, fit, tmp_path):
    engine = fit(make_model(held_out_share=0), epochs=1)
    checkpoint = content(engine)
    del checkpoint["hyper_parameters"]["held_out_share"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    loaded = StfpmExt.load_from_checkpoint(tmp_path / "old.ckpt", visualizer=False)
    assert same(loaded.state_dict(), checkpoint["state_dict"])
    with pytest.warns(UserWarning, match="held_out_share: the checkpoint comes from a training that held no images"):
        fit(loaded, epochs=2, ckpt_path=tmp_path / "old.ckpt")
    assert [measurement.epoch for measurement in loaded.student_selection.history] == [1]


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("lr", float("nan"), ValueError, "a finite number of at least 0, got nan"),
        ("selection", "best", ValueError, r"one of \('held_out_map', 'synthetic'\), got 'best'"),
        ("seed", "a", TypeError, "a whole number or None, got 'a'"),
    ],
)
def test_bad_settings(argument, value, error, message):
    with pytest.raises(error, match=f"{argument}: wanted {message}"):
        StfpmExt(teacher_weights=False, **{argument: value})


def test_export_holds_one_student(make_model, fit, tmp_path):
    model = make_model()
    fit(model, epochs=1)
    exported = torch.load(model.to_torch(tmp_path), weights_only=False)["model"]
    assert same(exported.state_dict(), model.state_dict())
    assert exported.student_selection.students is None


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 100),
        ({"max_epochs": 3}, 3),
        ({"max_epochs": -1}, -1),
        ({"max_steps": 5}, -1),
        ({"max_time": "01:00:00:00"}, -1),
    ],
)
def test_hundred_epochs_unless_the_user_says_otherwise(make_model, images, tmp_path, limits, expected):
    class Stop(Callback):
        def on_train_start(self, trainer, _pl_module):
            trainer.should_stop = True

    if "max_epochs" in limits or not limits:
        engine = Engine([Stop()], default_root_dir=tmp_path, min_epochs=0, **QUIET, **limits)
        engine.fit(make_model(), datamodule=folder(images))
        trainer = engine.trainer
    else:
        trainer = Trainer(callbacks=[Stop()], default_root_dir=tmp_path, min_epochs=0, **QUIET, **limits)
        trainer.fit(make_model(), datamodule=folder(images))
    assert trainer.max_epochs == expected


DDP = """
import json
import os
import sys
from pathlib import Path

from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder
from anomalib.data.datasets.base import image as anomalib_dataset
from anomalib.engine import Engine
from anomalib_stfpm_ext import StfpmExt
from anomalib_stfpm_ext.selection import judge

images, weights, output = sys.argv[1:]
read_image = anomalib_dataset.read_image
read = []
anomalib_dataset.read_image = lambda path, **arguments: read.append(Path(path).name) or read_image(path, **arguments)


def fit(name, ckpt_path=None, **settings):
    read.clear()
    data = Folder(name="noise", root=images, normal_dir="good", normal_test_dir="good_test", abnormal_dir="bad",
        train_batch_size=2, num_workers=0)
    model = StfpmExt("resnet18", ["layer1", "layer2"], weights, lr=0.05, seed=0, visualizer=False,
        pre_processor=StfpmExt.configure_pre_processor((48, 64)), **settings)
    each_epoch = ModelCheckpoint(Path(output, name), filename="{epoch}", save_top_k=-1)
    own = Path(output, name, os.environ.get("LOCAL_RANK", "0"))  # anomalib's numbered folders are no matter for two
    engine = Engine([each_epoch], default_root_dir=own, max_epochs=2, accelerator="cpu", devices=2, strategy="ddp",
        logger=False, enable_progress_bar=False, limit_val_batches=0)
    engine.fit(model, datamodule=data, ckpt_path=ckpt_path)
    result = {"history": model.student_selection.history, "read": read, "checkpoint": each_epoch.best_model_path,
        "student": sum(float(tensor.double().sum()) for tensor in model.model.student_model.state_dict().values())}
    Path(output, f"{name}_{engine.trainer.global_rank}.json").write_text(json.dumps(result))


def spoil(batch):
    batch.image = batch.image * float("nan")
    return batch


fit("paper", held_out_share=0.3)
judge.FEWEST_IMAGES = 4
fit("synthetic", held_out_share=0.5, selection="synthetic")
for share in (0.3, 0):
    fit(f"options_{share}", held_out_share=share)
    fit(f"resumed_{share}", Path(output, f"options_{share}", "epoch=0.ckpt"), held_out_share=share)
if os.environ.get("LOCAL_RANK", "0") == "1":
    Folder.on_after_batch_transfer = lambda self, batch, dataloader_idx: spoil(batch)
try:
    fit("broken")
except FloatingPointError as error:
    Path(output, f"broken_{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(str(error)))
"""


@pytest.mark.slow
def test_two_processes_make_one_choice(images, resnet18_weights, tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    command = [sys.executable, script, images, resnet18_weights, tmp_path]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]

    def results(name: str) -> list[dict]:
        return [json.loads((tmp_path / f"{name}_{rank}.json").read_text()) for rank in (0, 1)]

    first, second = results("paper")
    assert first["history"] == second["history"]
    assert len(first["history"]) == 2
    assert first["student"] == second["student"]
    held_out = split(8, 0.3, 0)  # three images, so that the processes' shares differ
    names = {f"{index}.png" for index in held_out}
    assert [len([name for name in process["read"] if name in names]) for process in (first, second)] == [2 * 2, 2 * 1]
    assert {name for process in (first, second) for name in process["read"] if name in names} == names

    loaded = StfpmExt.load_from_checkpoint(first["checkpoint"], visualizer=False)
    best = min(value for _, _, value, *_ in first["history"])
    assert best == pytest.approx(held_out_map(loaded, images, held_out), rel=1e-6)

    first, second = results("synthetic")
    assert first["history"] == second["history"]
    assert first["student"] == second["student"]
    kept = best_of(Measurement(*measurement) for measurement in first["history"])
    loaded = StfpmExt.load_from_checkpoint(first["checkpoint"], visualizer=False)
    assert kept.synthetic_auroc == pytest.approx(synthetic_auroc(loaded, images, split(8, 0.5, 0)))

    for share in (0.3, 0):
        processes = results(f"options_{share}") + results(f"resumed_{share}")
        assert len(processes[0]["history"]) == (2 if share else 0)
        for process in processes[1:]:
            assert process["history"] == processes[0]["history"]
            assert process["student"] == processes[0]["student"]
        unbroken, resumed = (torch.load(processes[index]["checkpoint"], weights_only=True) for index in (0, 2))
        assert same(resumed["state_dict"], unbroken["state_dict"])
        if share:
            assert same(fit_of(resumed)["student"], fit_of(unbroken)["student"])

    for message in results("broken"):  # of NaN in the second process alone
        assert "got a loss of nan at step 1, epoch 0" in message
