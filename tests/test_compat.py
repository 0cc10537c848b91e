# SPDX-License-Identifier: Apache-2.0

"""Private names of torch, Lightning and anomalib still mean what ``_compat`` says of them."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from helpers import folder
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.autograd import forward_ad
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize

from anomalib_stfpm_ext._compat import anomalib as compat_anomalib
from anomalib_stfpm_ext._compat import lightning as compat_lightning
from anomalib_stfpm_ext._compat import torch as compat_torch
from anomalib_stfpm_ext.inference.threshold import MiddleThreshold


def test_transforms_are_seen():
    seen = []

    def function(value):
        seen.append(compat_torch.is_transformed())
        return value.sum()

    function(torch.ones(2))
    torch.func.grad(function)(torch.ones(2))
    with forward_ad.dual_level():
        function(torch.ones(2))
    function(torch.ones(2))
    assert seen == [False, True, True, False]


def test_dispatch_modes_are_seen():
    assert not compat_torch.is_dispatched()
    with torch._subclasses.FakeTensorMode():
        assert compat_torch.is_dispatched()
    assert not compat_torch.is_dispatched()


def test_tracing_is_seen():
    seen = []

    def function(value):
        seen.append(compat_torch.is_tracing())
        return value + 1

    torch.jit.trace(function, torch.ones(2), check_trace=False)
    function(torch.ones(2))
    assert seen == [True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_stream_is_the_current_one():
    device = torch.device("cuda", 0)
    assert compat_torch.current_stream(device) == torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.stream(torch.cuda.Stream(device)) as stream:
        assert compat_torch.current_stream(device) == torch.cuda.current_stream(device).cuda_stream != 0, stream


def test_changes_in_place_are_counted():
    tensor = torch.ones(2)
    (before,) = compat_torch.versions([tensor])
    tensor.add_(1)
    assert compat_torch.versions([tensor]) == [before + 1]


def test_tensors_are_the_modules_own():
    module = nn.Sequential(nn.BatchNorm2d(2))
    module.register_parameter("absent", None)
    assert compat_torch.own_tensors([module]) == []
    norm = module[0]
    expected = [*norm.parameters(), *norm.buffers()]
    assert [id(tensor) for tensor in compat_torch.own_tensors([module, norm])] == [id(tensor) for tensor in expected]


def test_descendants_are_all_modules_once():
    shared = nn.ReLU()
    module = nn.Sequential(nn.Sequential(shared, nn.BatchNorm2d(2)), shared)
    module.register_module("absent", None)
    found = compat_torch.descendants(module)
    assert len(found) == 4
    assert set(found) == set(module.modules())


def test_tiles_are_what_torch_finds_on_this_cpu():
    assert compat_torch.has_tiles("bfloat16") in (True, False)
    assert compat_torch.has_tiles("bfloat16") or not compat_torch.has_tiles("float16")


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_seen(register):
    module = nn.ReLU()
    assert not compat_torch.has_hooks(module)
    handle = getattr(module, register)(lambda *_: None)
    assert compat_torch.has_hooks(module)
    handle.remove()
    assert not compat_torch.has_hooks(module)


def test_compiled_modules_are_seen():
    assert compat_torch.is_compiled(torch.compile(nn.ReLU()))
    assert not compat_torch.is_compiled(nn.Sequential(nn.ReLU()))


def test_programs_return_named_tuples(tmp_path):
    pair = namedtuple("Pair", ["first", "second"])
    pair.__module__ = __name__

    class Network(nn.Module):
        def forward(self, value):
            return pair(value + 1, value + 2)

    for _ in range(2):  # whoever comes second changes nothing
        compat_torch.register_namedtuple(pair, "anomalib_stfpm_ext.tests.Pair")
    program = torch.export.export(Network(), (torch.ones(2),))
    torch.export.save(program, tmp_path / "program.pt2")
    result = torch.export.load(tmp_path / "program.pt2").module()(torch.ones(2))
    assert isinstance(result, pair)
    assert result.second.tolist() == [3, 3]


@pytest.mark.skipif(compat_torch.lacks_packed_convolution() is not None, reason="this torch has no packed convolution")
@pytest.mark.parametrize("add", [False, True])
def test_packed_convolutions_convolve(add):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1).eval()
    images = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = convolution(images)
        other = torch.randn_like(expected) if add else None
        geometry = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
        packed = compat_torch.pack_convolution(convolution.weight, geometry, images.shape)
        result = compat_torch.convolve_packed(images, other, packed, convolution.bias, geometry, "relu", [])
        torch.testing.assert_close(result, (expected + other if add else expected).relu())


class Counter(LightningModule):
    """Counts the batches of a fit."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.batches = 0

    def training_step(self, batch):
        self.batches += 1
        return self.layer(batch).sum()

    def predict_step(self, batch):
        return self.layer(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Change(Callback):
    """Notes the loader that a fit has at its start, and has it take another one."""

    def __init__(self, change):
        self.change = change

    def on_fit_start(self, trainer, pl_module):
        self.data, self.loader = (
            get(trainer.fit_loop) for get in (compat_lightning.get_data, compat_lightning.get_loader)
        )
        self.change(trainer.fit_loop)


class Data(LightningDataModule):
    """Gives a loader of four batches."""

    def train_dataloader(self):
        return DataLoader(torch.ones(8, 2), batch_size=2)


def half(loader: DataLoader) -> DataLoader:
    return DataLoader(loader.dataset[: len(loader.dataset) // 2], loader.batch_size)


@pytest.fixture
def fit(tmp_path):
    def run(data, callback) -> tuple[Counter, Trainer]:
        model, settings = Counter(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(max_epochs=1, callbacks=[callback], default_root_dir=tmp_path, **settings)
        trainer.fit(model, data)
        return model, trainer

    return run


@pytest.mark.parametrize("has_one", [False, True])  # as a learning rate finder leaves the loop
@pytest.mark.parametrize("data", [Data(), Data().train_dataloader()], ids=["data module", "loader"])
def test_a_fit_takes_the_loader_that_replaced_its_own(fit, data, has_one):
    other = DataLoader(torch.ones(6, 2), batch_size=2)

    def replace(loop):
        if has_one:
            loop.setup_data()
        compat_lightning.replace_loader(loop, other)

    change = Change(replace)
    model, _ = fit(data, change)
    assert change.data is data
    assert len(change.loader) == 4
    assert model.batches == 3


@pytest.mark.parametrize("data", [Data(), Data().train_dataloader()], ids=["data module", "loader"])
def test_loaders_of_a_loop_are_intercepted_until_they_are_released(fit, data):
    model, trainer = fit(data, Change(lambda loop: compat_lightning.intercept_loaders(loop, half)))
    assert model.batches == 2
    assert len(compat_lightning.get_loader(trainer.fit_loop)) == 2
    for _ in range(2):  # whoever comes second changes nothing
        compat_lightning.release_loaders(trainer.fit_loop)
    assert len(compat_lightning.get_loader(trainer.fit_loop)) == 4


def test_a_model_has_its_trainer_and_is_fitted_within_a_fit_alone(fit):
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append((compat_lightning.trainer_of(pl_module) is trainer, compat_lightning.is_fitting(pl_module)))

        def on_predict_start(self, trainer, pl_module):
            seen.append((compat_lightning.trainer_of(pl_module) is trainer, compat_lightning.is_fitting(pl_module)))

    model, trainer = fit(Data(), Look())
    trainer.predict(model, Data().train_dataloader())
    assert seen == [(True, True), (True, False)]
    assert compat_lightning.trainer_of(Counter()) is None
    assert not compat_lightning.is_fitting(Counter())


@pytest.mark.parametrize("wanted", [True, False])
def test_the_users_word_on_samplers_is_found(wanted):
    assert compat_lightning.uses_distributed_sampler(Trainer(use_distributed_sampler=wanted, logger=False)) is wanted


def test_synchronisation_of_batch_norms_is_replaced():
    trainer = Trainer(strategy=DDPStrategy(), accelerator="cpu", devices=2, sync_batchnorm=True, logger=False)
    replacement = TorchSyncBatchNorm()
    compat_lightning.replace_layer_sync(trainer, DDPStrategy, replacement)  # it is of another class, and stays
    assert isinstance(trainer.strategy._layer_sync, TorchSyncBatchNorm)
    assert trainer.strategy._layer_sync is not replacement
    compat_lightning.replace_layer_sync(trainer, TorchSyncBatchNorm, replacement)
    assert trainer.strategy._layer_sync is replacement
    alone = Trainer(accelerator="cpu", devices=1, logger=False)
    compat_lightning.replace_layer_sync(alone, TorchSyncBatchNorm, replacement)
    assert getattr(alone.strategy, "_layer_sync", None) is None


def test_thresholds_of_image_scores_are_replaced():
    post_processor = PostProcessor()
    before = post_processor._image_threshold_metric
    compat_anomalib.replace_image_threshold(post_processor, MiddleThreshold, MiddleThreshold)  # it is of another class
    assert post_processor._image_threshold_metric is before
    compat_anomalib.replace_image_threshold(post_processor, F1AdaptiveThreshold, MiddleThreshold)
    after = post_processor._image_threshold_metric
    assert isinstance(after, MiddleThreshold)
    assert (after.fields, after.strict) == (before.fields, before.strict)
    compat_anomalib.replace_image_threshold(None, F1AdaptiveThreshold, MiddleThreshold)


def test_images_get_the_size_of_the_model_that_has_been_loaded(images, tmp_path):
    model, data = Counter(), folder(images)
    compat_anomalib.resize_as(model)  # without a trainer, there is nothing to do
    trainer = Trainer(logger=False, default_root_dir=tmp_path)
    model.trainer = trainer
    compat_anomalib.resize_as(model)  # without a data module, too
    data.trainer = SimpleNamespace(model=SimpleNamespace(pre_processor=PreProcessor(Resize((8, 8)))))
    data.setup()
    assert data.test_data.augmentations.size == [8, 8]
    data.trainer.model.pre_processor = PreProcessor(Resize((4, 4)))
    trainer.datamodule = data
    compat_anomalib.resize_as(model)
    assert data.test_data.augmentations.size == [4, 4]
