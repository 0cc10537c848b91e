# SPDX-License-Identifier: Apache-2.0

"""Private names of torch and Lightning still mean what ``_compat`` says of them."""

from collections import namedtuple

import pytest
import torch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.autograd import forward_ad
from torch.utils.data import DataLoader

from anomalib_stfpm_ext import _compat
from anomalib_stfpm_ext.inference.threshold import MiddleThreshold


def test_transforms_are_seen():
    seen = []

    def function(value):
        seen.append(_compat.is_transformed())
        return value.sum()

    function(torch.ones(2))
    torch.func.grad(function)(torch.ones(2))
    with forward_ad.dual_level():
        function(torch.ones(2))
    function(torch.ones(2))
    assert seen == [False, True, True, False]


def test_dispatch_modes_are_seen():
    assert not _compat.is_dispatched()
    with torch._subclasses.FakeTensorMode():
        assert _compat.is_dispatched()
    assert not _compat.is_dispatched()


def test_tracing_is_seen():
    seen = []

    def function(value):
        seen.append(_compat.is_tracing())
        return value + 1

    torch.jit.trace(function, torch.ones(2), check_trace=False)
    function(torch.ones(2))
    assert seen == [True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_stream_is_the_current_one():
    device = torch.device("cuda", 0)
    assert _compat.current_stream(device) == torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.stream(torch.cuda.Stream(device)) as stream:
        assert _compat.current_stream(device) == torch.cuda.current_stream(device).cuda_stream != 0, stream


def test_changes_in_place_are_counted():
    tensor = torch.ones(2)
    (before,) = _compat.versions([tensor])
    tensor.add_(1)
    assert _compat.versions([tensor]) == [before + 1]


def test_tensors_are_the_modules_own():
    module = nn.Sequential(nn.BatchNorm2d(2))
    module.register_parameter("absent", None)
    assert _compat.own_tensors([module]) == []
    norm = module[0]
    expected = [*norm.parameters(), *norm.buffers()]
    assert [id(tensor) for tensor in _compat.own_tensors([module, norm])] == [id(tensor) for tensor in expected]


def test_descendants_are_all_modules_once():
    shared = nn.ReLU()
    module = nn.Sequential(nn.Sequential(shared, nn.BatchNorm2d(2)), shared)
    module.register_module("absent", None)
    found = _compat.descendants(module)
    assert len(found) == 4
    assert set(found) == set(module.modules())


def test_tiles_are_what_torch_finds_on_this_cpu():
    assert _compat.has_tiles("bfloat16") in (True, False)
    assert _compat.has_tiles("bfloat16") or not _compat.has_tiles("float16")


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_seen(register):
    module = nn.ReLU()
    assert not _compat.has_hooks(module)
    handle = getattr(module, register)(lambda *_: None)
    assert _compat.has_hooks(module)
    handle.remove()
    assert not _compat.has_hooks(module)


def test_compiled_modules_are_seen():
    assert _compat.is_compiled(torch.compile(nn.ReLU()))
    assert not _compat.is_compiled(nn.Sequential(nn.ReLU()))


def test_programs_return_named_tuples(tmp_path):
    pair = namedtuple("Pair", ["first", "second"])
    pair.__module__ = __name__

    class Network(nn.Module):
        def forward(self, value):
            return pair(value + 1, value + 2)

    for _ in range(2):  # whoever comes second changes nothing
        _compat.register_namedtuple(pair, "anomalib_stfpm_ext.tests.Pair")
    program = torch.export.export(Network(), (torch.ones(2),))
    torch.export.save(program, tmp_path / "program.pt2")
    result = torch.export.load(tmp_path / "program.pt2").module()(torch.ones(2))
    assert isinstance(result, pair)
    assert result.second.tolist() == [3, 3]


@pytest.mark.skipif(_compat.lacks_packed_convolution() is not None, reason="this torch has no packed convolution")
@pytest.mark.parametrize("add", [False, True])
def test_packed_convolutions_convolve(add):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1).eval()
    images = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = convolution(images)
        other = torch.randn_like(expected) if add else None
        geometry = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
        packed = _compat.pack_convolution(convolution.weight, geometry, images.shape)
        result = _compat.convolve_packed(images, other, packed, convolution.bias, geometry, "relu", [])
        torch.testing.assert_close(result, (expected + other if add else expected).relu())


class Recorder(LightningModule):
    """Notes what the functions say during a fit."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.batches = 0

    def on_fit_start(self):
        source = _compat.data_source(self.trainer.fit_loop)
        assert len(source.dataloader()) == 4
        source.instance = DataLoader(torch.ones(6, 2), batch_size=2)
        _compat.forget_loader(self.trainer)

    def training_step(self, batch):
        self.batches += 1
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_fit_takes_the_loader_that_replaced_its_own(tmp_path):
    model = Recorder()
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(model, DataLoader(torch.ones(8, 2), batch_size=2))
    assert model.batches == 3


@pytest.mark.parametrize("wanted", [True, False])
def test_the_users_word_on_samplers_is_found(wanted):
    assert _compat.uses_distributed_sampler(Trainer(use_distributed_sampler=wanted, logger=False)) is wanted


def test_synchronisation_of_batch_norms_is_replaced():
    trainer = Trainer(strategy=DDPStrategy(), accelerator="cpu", devices=2, sync_batchnorm=True, logger=False)
    replacement = TorchSyncBatchNorm()
    _compat.replace_layer_sync(trainer, DDPStrategy, replacement)  # it is of another class, and stays
    assert isinstance(trainer.strategy._layer_sync, TorchSyncBatchNorm)
    assert trainer.strategy._layer_sync is not replacement
    _compat.replace_layer_sync(trainer, TorchSyncBatchNorm, replacement)
    assert trainer.strategy._layer_sync is replacement
    alone = Trainer(accelerator="cpu", devices=1, logger=False)
    _compat.replace_layer_sync(alone, TorchSyncBatchNorm, replacement)
    assert getattr(alone.strategy, "_layer_sync", None) is None


def test_thresholds_of_image_scores_are_replaced():
    post_processor = PostProcessor()
    before = post_processor._image_threshold_metric
    _compat.replace_image_threshold(post_processor, MiddleThreshold, MiddleThreshold)  # it is of another class
    assert post_processor._image_threshold_metric is before
    _compat.replace_image_threshold(post_processor, F1AdaptiveThreshold, MiddleThreshold)
    after = post_processor._image_threshold_metric
    assert isinstance(after, MiddleThreshold)
    assert (after.fields, after.strict) == (before.fields, before.strict)
    _compat.replace_image_threshold(None, F1AdaptiveThreshold, MiddleThreshold)
