# SPDX-License-Identifier: Apache-2.0

"""Scoring in a reduced precision: near float32, the same everywhere, and never an infinite score."""

import pytest
import torch
from helpers import LAYERS, TINY_BACKBONES, skip_unless_computed

from anomalib_stfpm_ext import StfpmExtModel, feature_pyramid, torch_model
from anomalib_stfpm_ext.inference import folding, precision
from anomalib_stfpm_ext.inference.packing import why_not_packed
from anomalib_stfpm_ext.inference.precision import dtype_on, why_not

REDUCED = ["bfloat16", "float16"]


def forget() -> None:
    why_not.cache_clear()
    dtype_on.cache_clear()
    why_not_packed.cache_clear()


@pytest.fixture
def told(monkeypatch):
    """What the user is told; what was told before is told again."""
    said: list[str] = []
    monkeypatch.setattr(precision, "rank_zero_info", said.append)
    for module in (precision, feature_pyramid, torch_model):
        monkeypatch.setattr(module, "rank_zero_warn", said.append)
    forget()
    yield said
    forget()


@pytest.fixture
def any_machine(told, monkeypatch):
    """Take every CPU for one with tiles: oneDNN computes in these precisions elsewhere, too, only slower."""
    monkeypatch.setattr(precision, "why_not_packed", lambda: None)
    monkeypatch.setattr(precision, "has_tiles", lambda _: True)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    return told


def make(backbone: str = "resnet18", layers=LAYERS) -> StfpmExtModel:
    torch.manual_seed(0)
    return StfpmExtModel(backbone, layers, teacher_weights=False).eval()


@pytest.mark.usefixtures("any_machine")
@pytest.mark.parametrize("name", REDUCED)
@pytest.mark.parametrize("backbone", ["resnet18", *TINY_BACKBONES])
@torch.no_grad()
def test_near_float32_in_batches_and_alone(backbone, name):
    skip_unless_computed(name)
    model, images = make(backbone, TINY_BACKBONES.get(backbone, LAYERS)), torch.randn(6, 3, 64, 96)
    exact = model(images)
    model.precision = name
    reduced = model(images)
    assert reduced.anomaly_map.dtype == torch.float32
    assert model.features(images)[0][model.teacher_model.finest].dtype == getattr(torch, name)
    torch.testing.assert_close(reduced.pred_score, exact.pred_score, rtol=0.05, atol=1e-4)
    assert not torch.equal(reduced.anomaly_map, exact.anomaly_map)
    alone = torch.cat([model(image[None]).pred_score for image in images])
    torch.testing.assert_close(alone, reduced.pred_score, rtol=1e-2, atol=1e-5)
    model.precision = "float32"
    assert torch.equal(model(images).anomaly_map, exact.anomaly_map)


@torch.no_grad()
def test_notices_new_weights(any_machine):
    skip_unless_computed("bfloat16")
    model, images = make(), torch.randn(1, 3, 64, 64)
    model.precision = "bfloat16"
    before = model(images).pred_score
    model.student_model.load_state_dict(model.teacher_model.state_dict())
    assert model(images).pred_score < before / 100
    assert any_machine == ["Inference: the networks compute in bfloat16."]  # once


@pytest.mark.parametrize("name", REDUCED)
@torch.no_grad()
def test_a_machine_without_tiles_computes_in_float32_and_says_so(told, monkeypatch, name):
    monkeypatch.setattr(precision, "has_tiles", lambda _: False)
    model, images = make(), torch.randn(1, 3, 64, 64)
    expected = model(images)
    model.precision = name
    for _ in range(2):
        assert torch.equal(model(images).anomaly_map, expected.anomaly_map)
    assert len(told) == 1
    assert told[0].startswith(f"inference_precision: the networks compute in float32, not in {name}, since ")


def test_a_limit_on_onednn_counts(told, monkeypatch):
    monkeypatch.setattr(precision, "has_tiles", lambda _: True)
    monkeypatch.setattr(precision, "why_not_packed", lambda: None)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for limit, wanted in (("AVX512_CORE_BF16", torch.float32), ("avx512_core_amx", torch.bfloat16)):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        forget()
        assert dtype_on("bfloat16", "cpu") == wanted, told


def test_other_devices_compute_in_float32(told):
    assert dtype_on("bfloat16", "mps") == torch.float32
    assert "it has not been measured on 'mps' devices" in told[0]


@torch.no_grad()
def test_overflow_in_float16_is_scored_in_float32_and_told(any_machine):
    skip_unless_computed("float16")
    model, images = make(), torch.randn(2, 3, 64, 64)
    for network in (model.teacher_model, model.student_model):
        network.feature_extractor.bn1.weight.mul_(1e6)
    expected = model(images).pred_score
    model.precision = "float16"
    for _ in range(2):
        score = model(images).pred_score
        assert torch.equal(score, expected)
        assert score.isfinite().all()
    assert sum("overflow in float16" in line for line in any_machine) == 1


@pytest.mark.usefixtures("any_machine")
@torch.no_grad()
def test_networks_with_hooks_compute_in_it_as_well():
    model, images = make(), torch.randn(1, 3, 64, 64)
    model.precision = "bfloat16"
    expected, seen = model(images).pred_score, []
    model.student_model.feature_extractor.layer2.register_forward_hook(lambda *values: seen.append(values[2].dtype))
    torch.testing.assert_close(model(images).pred_score, expected, rtol=0.05, atol=1e-4)
    assert seen == [torch.bfloat16]


@pytest.mark.usefixtures("any_machine")
def test_gradients_are_of_float32():
    model, images = make(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images).pred_score
    model.precision = "bfloat16"
    score = model(images).pred_score
    score.sum().backward()
    torch.testing.assert_close(score, expected)
    assert model.student_model.feature_extractor.conv1.weight.grad.isfinite().all()


@pytest.mark.usefixtures("any_machine")
def test_training_makes_no_copy_in_it(monkeypatch):
    model, images = make(), torch.randn(2, 3, 64, 64)
    model.precision = "bfloat16"
    folded = []
    original = feature_pyramid.fold
    monkeypatch.setattr(
        feature_pyramid, "fold", lambda *arguments: folded.append(arguments[2:]) or original(*arguments)
    )
    model.train()
    for _ in range(3):
        model(images)
    model.eval()
    for _ in range(3):
        model(images)  # gradients are wanted
    assert folded == [(torch.float32,)]  # the teacher's


@torch.no_grad()
def test_a_network_that_cannot_compute_in_it_stays_in_float32(any_machine, monkeypatch, caplog):
    def refuse(network, dtype):
        if dtype != torch.float32:
            msg = "no such kernel"
            raise RuntimeError(msg)
        return network

    folding._warn_once.cache_clear()
    monkeypatch.setattr(folding, "_cast", refuse)
    model, images = make(), torch.randn(1, 3, 64, 64)
    expected = model(images).anomaly_map
    model.precision = "bfloat16"
    torch.testing.assert_close(model(images).anomaly_map, expected)
    assert "no such kernel" in caplog.text
    assert "inference_precision: 'resnet18' cannot compute in torch.bfloat16, and goes on in float32." in any_machine


@pytest.mark.usefixtures("any_machine")
@torch.no_grad()
@pytest.mark.slow
def test_compiled_inference_computes_in_it_as_well():
    torch.manual_seed(0)
    model = StfpmExtModel("test_resnet", ["layer1"], teacher_weights=False, compile_mode="default").eval()
    images = torch.randn(2, 3, 32, 32)
    exact = model(images).anomaly_map
    model.precision = "bfloat16"
    reduced = model(images).anomaly_map
    assert not torch.equal(reduced, exact)
    torch.testing.assert_close(reduced, exact, rtol=0.1, atol=0.02)
