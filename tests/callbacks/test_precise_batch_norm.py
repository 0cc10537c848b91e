# SPDX-License-Identifier: Apache-2.0

"""Precise batch norm: the statistics of the student that is kept are those of its own features."""

import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.engine import Engine
from helpers import QUIET, TINY_BACKBONES, folder
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.nn.functional import dropout

from anomalib_stfpm_ext import StfpmExt
from anomalib_stfpm_ext.callbacks import precise_batch_norm
from anomalib_stfpm_ext.checkpoints import KEY


class Batches(Callback):
    """Notes the images and losses of all steps."""

    def __init__(self):
        self.images: list[torch.Tensor] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, _trainer, _model, outputs, batch, _index):
        self.images.append(batch.image.clone())
        self.losses.append(outputs["loss"].item())


class Statistics(Checkpoint):
    """Notes the first running means of every epoch and validation, after other callbacks."""

    def __init__(self):
        self.after_epoch: list[torch.Tensor] = []
        self.in_validation: list[torch.Tensor] = []

    def on_train_epoch_end(self, _trainer, model):
        self.after_epoch.append(first_norm(model).running_mean.clone())

    def on_validation_batch_start(self, trainer, model, *_):
        if not trainer.sanity_checking:
            self.in_validation.append(first_norm(model).running_mean.clone())


@pytest.fixture
def make_model(small_weights):
    def make(**arguments) -> StfpmExt:
        settings = {"layers": ["layer1", "layer2"], "teacher_weights": small_weights, "lr": 0.05, "seed": 0}
        return StfpmExt("test_resnet", **(settings | {"image_size": (48, 64), "visualizer": False} | arguments))

    return make


@pytest.fixture
def fit(images, tmp_path):
    """Fit a model on the eight good images, three in a batch, and return the engine."""

    def run(model, *callbacks, epochs=3, ckpt_path=None, **arguments) -> Engine:
        engine = Engine([*callbacks], default_root_dir=tmp_path, max_epochs=epochs, **QUIET, **arguments)
        engine.fit(model, datamodule=folder(images, train_batch_size=3), ckpt_path=ckpt_path)
        return engine

    return run


def first_norm(model: StfpmExt) -> nn.BatchNorm2d:
    return model.model.student_model.feature_extractor.conv1[1]


SAME = {"rtol": 1e-5, "atol": 1e-6}  # in float32


def by_hand(model: StfpmExt, batches: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute mean and variance of the first convolution's features, over each batch and then over all batches."""
    convolution = model.model.student_model.feature_extractor.conv1[0]
    with torch.no_grad():
        features = [convolution(batch).double().transpose(0, 1).flatten(1) for batch in batches]
    return torch.stack([f.mean(1) for f in features]).mean(0), torch.stack([f.var(1) for f in features]).mean(0)


@pytest.mark.parametrize("share", [0.2, 0])
def test_kept_student_has_the_statistics_of_the_last_epoch(make_model, fit, share):
    model, batches, statistics = make_model(held_out_share=share), Batches(), Statistics()
    engine = fit(model, batches, statistics)
    per_epoch = len(batches.images) // 3
    best = model.student_selection.best
    epoch = best.epoch if best else 2
    mean, variance = by_hand(model, batches.images[epoch * per_epoch : (epoch + 1) * per_epoch])
    norm = first_norm(model)
    torch.testing.assert_close(norm.running_mean.double(), mean, **SAME)
    torch.testing.assert_close(norm.running_var.double(), variance, **SAME)
    assert norm.momentum == 0.1
    torch.testing.assert_close(statistics.in_validation[epoch].double(), mean, **SAME)
    saved = StfpmExt.load_from_checkpoint(engine.best_model_path, visualizer=False).model.student_model.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.model.student_model.state_dict().items())


def test_losses_are_the_same(make_model, fit):
    runs = {}
    for precise_bn in (True, False):
        model, runs[precise_bn] = make_model(precise_bn=precise_bn), Batches()
        convolution = model.model.student_model.feature_extractor.conv1[0]
        convolution.register_forward_hook(lambda module, _, features: dropout(features, 0.1, module.training))
        fit(model, runs[precise_bn])
    assert runs[True].losses == runs[False].losses
    assert len(runs[True].losses) > 3


def test_running_statistics_where_it_is_off(make_model, fit):
    model, batches = make_model(precise_bn=False, held_out_share=0), Batches()
    fit(model, batches)
    mean, _ = by_hand(model, batches.images[-3:])
    assert not torch.allclose(first_norm(model).running_mean.double(), mean, rtol=1e-2)


def test_no_more_images_than_it_takes(make_model, fit, monkeypatch):
    monkeypatch.setattr(precise_batch_norm, "NUM_IMAGES", 4)
    model, batches = make_model(held_out_share=0), Batches()
    fit(model, batches, epochs=1)
    assert [len(batch) for batch in batches.images] == [3, 3, 2]
    mean, _ = by_hand(model, batches.images[1:])
    torch.testing.assert_close(first_norm(model).running_mean.double(), mean, **SAME)


@pytest.mark.parametrize("accumulated", [1, 3])  # batches without a step change running statistics, too
def test_validation_within_an_epoch_sees_the_students_own(make_model, fit, accumulated):
    model, batches, statistics = make_model(held_out_share=0, lr=0), Batches(), Statistics()
    fit(model, batches, statistics, epochs=1, val_check_interval=1, accumulate_grad_batches=accumulated)
    expected = [by_hand(model, batches.images[:seen])[0] for seen in (1, 2, 3)]
    torch.testing.assert_close(torch.stack(statistics.in_validation).double(), torch.stack(expected), **SAME)


@pytest.mark.parametrize("share", [0.2, 0])
def test_resumed_run_ends_as_the_unbroken_one(make_model, fit, share):
    unbroken, resumed = (make_model(held_out_share=share) for _ in range(2))
    fit(unbroken, epochs=3)
    half = fit(make_model(held_out_share=share), epochs=2).trainer.checkpoint_callback.best_model_path
    fit(resumed, epochs=3, ckpt_path=half)
    assert resumed.student_selection.history == unbroken.student_selection.history
    if not share:  # a random state is part of the selection's
        return
    expected = unbroken.model.student_model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.student_model.state_dict().items())


def test_resuming_with_other_statistics_is_refused(make_model, fit):
    checkpoint = fit(make_model(precise_bn=False), epochs=1).trainer.checkpoint_callback.best_model_path
    with pytest.raises(ValueError, match="precise_bn: wanted False as in the checkpoint, got True"):
        fit(make_model(), epochs=2, ckpt_path=checkpoint)


def test_older_checkpoints_go_on_with_it(make_model, fit, tmp_path):
    checkpoint = torch.load(fit(make_model(precise_bn=False), epochs=1).best_model_path, weights_only=True)
    del checkpoint[KEY]["fit"]["precise_bn"]
    torch.save(checkpoint, tmp_path / "older.ckpt")
    model, batches = make_model(), Batches()
    fit(model, batches, epochs=2, ckpt_path=tmp_path / "older.ckpt")
    assert model.student_selection.best.epoch == 1
    mean, _ = by_hand(model, batches.images)
    torch.testing.assert_close(first_norm(model).running_mean.double(), mean, **SAME)


def test_tiles_are_what_the_student_sees(make_model, fit):
    model, batches = make_model(held_out_share=0), Batches()
    tiles = TilerConfigurationCallback(enable=True, tile_size=32, stride=16)
    fit(model, batches, tiles, epochs=1)
    mean, variance = by_hand(model, [model.model.tiler.tile(images) for images in batches.images])
    torch.testing.assert_close(first_norm(model).running_mean.double(), mean, **SAME)
    torch.testing.assert_close(first_norm(model).running_var.double(), variance, **SAME)


def test_network_without_batch_norm(fit):
    arguments = {"layers": TINY_BACKBONES["test_convnext"], "teacher_weights": False, "image_size": (64, 64)}
    model = StfpmExt("test_convnext", **arguments, lr=0.01, seed=0, visualizer=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    fit(model, epochs=1)
    assert model.student_selection.best is not None


def test_bad_arguments(make_model, fit):
    with pytest.raises(TypeError, match="precise_bn: wanted True or False, got 'yes'"):
        make_model(precise_bn="yes")

    class Sharded(SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    with pytest.raises(ValueError, match=r"precise_bn: wanted a strategy .* such as ddp .*, got .*Sharded"):
        fit(make_model(held_out_share=0), strategy=Sharded(torch.device("cpu")))


def test_images_are_released(make_model, fit):
    engine = fit(make_model())
    (callback,) = (c for c in engine.trainer.callbacks if isinstance(c, precise_batch_norm.PreciseBatchNorm))
    assert not callback._batches
