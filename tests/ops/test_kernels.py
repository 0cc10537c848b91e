# SPDX-License-Identifier: Apache-2.0

"""On which devices the compiled scorer is taken to run: builds and GPUs that are made up, since none is here."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from anomalib_stfpm_ext import StfpmExtLoss, diagnosis
from anomalib_stfpm_ext.ops import anomaly_map as operators
from anomalib_stfpm_ext.ops import feature_matching, native

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes up a GPU and a build, and a list of the devices that were asked."""
    asked = []

    def make_up(capability, architectures, error=None):
        def ask(device):
            asked.append(device)
            if error is not None:
                raise RuntimeError(error)

        monkeypatch.setattr(operators, "_why_not_on_cuda", {})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(native, "cuda_architectures", architectures)
        monkeypatch.setattr(native, "try_cuda", ask)
        return asked

    return make_up


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("90", (8, 0), False),  # a build for another GPU
        ("80", (9, 0), False),  # machine code stays within a major version
        ("80", (8, 9), True),
        ("86", (8, 0), False),  # of which it needs the minor one
        ("80 (PTX)", (9, 0), True),  # the driver compiles it
        ("80 (PTX)", (12, 1), True),
        ("90 (PTX)", (8, 9), False),
        ("75, 80, 86", (8, 6), True),
        ("75, 90, 90 (PTX)", (8, 0), False),
        ("100, 120, 120 (PTX)", (12, 0), True),
        ("120 (PTX)", (10, 3), False),
        ("90a", (9, 0), True),
        ("90a, 90a (PTX)", (10, 0), False),  # that one alone
        ("100f, 100f (PTX)", (10, 3), True),
        ("100f, 100f (PTX)", (12, 0), False),  # that family alone
        ("native", (8, 0), True),  # nobody knows: the device does
    ],
)
def test_machine_code_and_ptx(machine, architectures, capability, runs):
    asked = machine(capability, architectures)
    assert operators.has_kernel(GPU) is runs
    assert asked == [0] * runs
    reason = operators.why_no_kernel(GPU)
    if runs:
        assert reason is None
    else:
        text = f"device 0 has compute capability {capability[0]}.{capability[1]}, and this build holds CUDA code for"
        assert reason == f"{text} {architectures} only"


def test_each_device_is_asked_once(machine):
    error = "CUDA: the current device: CUDA driver version is insufficient for CUDA runtime version"
    asked = machine((9, 0), "90", error)
    for _ in range(3):
        assert operators.why_no_kernel(GPU) == operators.why_no_kernel(torch.device("cuda", 1)) == error
    assert asked == [0, 1]


@pytest.mark.parametrize("error", [RuntimeError("no NVIDIA driver"), AssertionError("Torch not compiled with CUDA")])
def test_torch_without_cuda(machine, monkeypatch, error):
    def fail(_):
        raise error

    asked = machine((9, 0), "90")
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    assert operators.why_no_kernel(GPU) == str(error)
    assert asked == []


def test_builds_without_cuda_and_other_devices(machine, monkeypatch):
    machine((9, 0), "")
    assert operators.why_no_kernel(GPU) == "this build has no CUDA scorer"
    assert operators.why_no_kernel(torch.device("meta")) == "there is no scorer for meta"
    assert operators.why_no_kernel(torch.device("cpu")) is None
    machine((9, 0), "90")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert operators.why_no_kernel(GPU) == "there is no scorer for ROCm"


def test_the_scorer_says_why_and_the_loss_goes_on(machine):
    """A fake tensor stands for the one on the GPU: nothing may be read."""
    machine((8, 0), "90")
    reason = r"teacher\[0\]: wanted features on the CPU, since device 0 has compute capability 8.0, and this build"
    with FakeTensorMode(allow_non_fake_inputs=True):
        features = [torch.empty(1, 2, 4, 4, device="cuda")]
        with pytest.raises(ValueError, match=reason):
            operators._fused(features, features, 8, 8)
        with pytest.raises(ValueError, match=reason):
            feature_matching._fused(features, features)
        assert StfpmExtLoss()(features, features).device.type == "cuda"


def test_compiled_code_goes_by_the_answer_that_there_is(machine):
    """torch.compile cannot follow the search for it."""
    asked = machine((8, 0), "90")
    torch.compiler.reset()
    compiled = torch.compile(lambda number: number + operators.has_kernel(GPU), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == 1
    assert asked == []
    assert not operators.has_kernel(GPU)
    assert compiled(torch.zeros(())) == 0


def test_the_diagnosis_says_why(machine, monkeypatch):
    machine((8, 0), "90")
    for name, answer in (("is_available", True), ("get_device_name", "NVIDIA A100"), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    text = diagnosis._cuda()
    assert text.startswith("scorer holds 90; torch was built for CUDA")
    assert "sees NVIDIA A100; torch operations score there: device 0 has compute capability 8.0" in text
    machine((9, 0), "90")
    assert diagnosis._cuda().endswith("sees NVIDIA A100")
