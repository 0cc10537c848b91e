# SPDX-License-Identifier: Apache-2.0

"""The inference copy: the network's features, made anew whenever the network has changed, and never in silence."""

import gc
import pickle
import weakref

import pytest
import timm
import torch
from helpers import LAYERS, TINY_BACKBONES
from torch.fx.experimental.proxy_tensor import make_fx

from anomalib_stfpm_ext import StfpmExt, feature_pyramid
from anomalib_stfpm_ext.__main__ import diagnose
from anomalib_stfpm_ext.feature_pyramid import Student
from anomalib_stfpm_ext.inference import folding, packing
from anomalib_stfpm_ext.inference.folding import PackedConv2d, fold
from anomalib_stfpm_ext.inference.packing import why_not_packed


@pytest.fixture
def model(resnet18_weights):
    return StfpmExt("resnet18", teacher_weights=resnet18_weights)


@pytest.fixture
def log(caplog):
    """What is logged; what was logged before is logged again."""
    folding._warn_once.cache_clear()
    return caplog


@pytest.mark.parametrize("backbone", TINY_BACKBONES)
def test_inference_folds_batch_norm_and_notices_new_weights(backbone):
    student = Student(backbone, TINY_BACKBONES[backbone]).eval()
    norms = [module for module in student.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    images = torch.randn(2, 3, 64, 64)
    for seed in (0, 1):
        with torch.no_grad():
            for norm in norms:  # in place, as training and loading do
                norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=torch.manual_seed(seed)))
        expected = student(images)  # with gradients, and so as it is
        with torch.no_grad():
            for layer, features in student(images).items():
                torch.testing.assert_close(features, expected[layer], rtol=1e-4, atol=1e-4)
    folded = student._folded[0]
    left = [name for name, module in folded.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert left in ([], ["bn1"])  # after a stem of several convolutions
    assert len(pickle.dumps(student)) < 1.2 * len(pickle.dumps(Student(backbone, TINY_BACKBONES[backbone])))


def test_inference_notices_steps_that_torch_does_not_count():
    student, images = Student("test_resnet", ["layer1", "layer3"]).eval(), torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5, fused=True)
    for _ in range(2):
        student(images)["layer3"].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for features, expected in zip(student(images).values(), student.feature_extractor(images), strict=True):
                torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_hooks_replaced_modules_and_norms_in_training_mode():
    student, images = Student("test_resnet", ["layer1", "layer3"]).eval(), torch.randn(2, 3, 64, 64)
    stem, calls = student.feature_extractor.conv1, []
    with torch.no_grad():
        expected = student(images)["layer1"]
        handle = stem.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(student(images)["layer1"], expected, rtol=1e-4, atol=1e-4)
        handle.remove()
        student(images)
        assert calls == [1]
        student.feature_extractor.act1 = torch.nn.GELU()
        assert not torch.allclose(student(images)["layer1"], expected, rtol=0.1)
        norm = student.feature_extractor.bn1
        norm.train()
        student(images)
        assert norm.num_batches_tracked == 1


def distribute(weight: torch.nn.Parameter) -> None:
    torch.from_dlpack(weight.detach())[:] *= -1


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.mul_(1.5),
        lambda weight: weight.data.copy_(torch.randn_like(weight)),
        lambda weight: weight.data.clamp_(-1e-3, 1e-3),
        lambda weight: weight.data[3].zero_(),  # a filter that is pruned
        lambda weight: weight.data[-1].mul_(0.5),
        lambda weight: weight.detach().numpy().__imul__(1.01),
        distribute,
    ],
)
@pytest.mark.parametrize(
    "name", ["conv1.0.weight", "conv1.3.weight", "layer3.0.bn1.weight", "layer1.0.bn1.running_mean"]
)
@torch.no_grad()
def test_changes_that_torch_does_not_count_are_noticed(name, change):
    student, images = Student("test_resnet", ["layer1", "layer3"]).eval(), torch.randn(1, 3, 64, 64)
    weight = student.feature_extractor.state_dict(keep_vars=True)[name]
    weight.add_(0.1 * torch.rand_like(weight))
    student(images)
    change(weight)
    for features, expected in zip(student(images).values(), student.feature_extractor(images), strict=True):
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "first", [torch.zeros(0, 3, 64, 64), torch.full((1, 3, 64, 64), torch.nan)], ids=["empty", "nan"]
)
def test_folds_whatever_the_first_images_are(first):
    student = Student("test_resnet", ["layer1", "layer3"]).eval()
    with torch.no_grad():
        student(first)
        student(torch.rand(1, 3, 64, 64))
    assert student._folded[0] is not student.feature_extractor


def test_many_images_go_through_in_parts(monkeypatch):
    monkeypatch.setattr(feature_pyramid, "CPU_PIXELS", 2 * 64 * 64)
    student, images = Student("resnet18", LAYERS).eval(), torch.randn(5, 3, 64, 64)
    expected, sizes = student(images), []
    with torch.no_grad():
        student(images)
        folded = student._folded[0]
        forward = folded.forward
        folded.forward = lambda images: sizes.append(len(images)) or forward(images)
        for layer, features in student(images).items():
            torch.testing.assert_close(features, expected[layer], rtol=1e-4, atol=1e-4)
        student(torch.randn(3, 3, 128, 128))  # of which one has more pixels than that
    assert sizes == [2, 2, 1, 1, 1, 1]


@pytest.mark.skipif(why_not_packed(), reason="only x86-64 keeps weights in oneDNN's layout")
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [3, 5, (3, 4)], ids=str)
@torch.no_grad()
def test_padding_as_tensorflow_has_it_is_packed(kernel, stride):
    convolution = timm.layers.Conv2dSame(4, 8, kernel, stride=stride)
    packed = folding._pack(torch.nn.Sequential(convolution))[0]
    assert isinstance(packed, PackedConv2d)
    for size in ((16, 16), (15, 18), (7, 32)):
        features = torch.randn(2, 4, *size)
        torch.testing.assert_close(packed(features), convolution(features), rtol=1e-4, atol=1e-4)
    assert packed.weight.is_mkldnn


@pytest.mark.skipif(why_not_packed(), reason="only x86-64 keeps weights in oneDNN's layout")
@pytest.mark.parametrize("backbone", ["resnet18", "test_efficientnet"])
def test_weights_in_onednns_layout_serve_images_of_any_shape(backbone):
    layers = TINY_BACKBONES.get(backbone, ["layer1", "layer3"])
    student = Student(backbone, layers).eval().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        student(torch.randn(2, 3, 64, 64))
    convolutions = [module for module in student._folded[0].modules() if isinstance(module, PackedConv2d)]
    assert len(convolutions) == sum(type(module) is torch.nn.Conv2d for module in student.modules())
    packed = [module.weight for module in convolutions]
    assert all(weight.is_mkldnn for weight in packed)
    for shape in ((1, 3, 96, 70), (3, 3, 64, 64), (0, 3, 64, 64)):
        images = torch.randn(shape)
        with torch.no_grad():
            for features, expected in zip(student(images).values(), student.feature_extractor(images), strict=True):
                torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert all(module.weight is weight for module, weight in zip(convolutions, packed, strict=True))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"should be the same|expected scalar type"):
        student(torch.randn(1, 3, 64, 64).bfloat16())


def test_convolutions_that_pad_in_their_own_way_keep_their_results():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.reflected = torch.nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
            self.same = torch.nn.Conv2d(3, 3, 3, padding="same")
            self.timms = timm.layers.Conv2dSame(3, 3, 3, stride=2)
            self.exact = torch.nn.Conv2d(3, 3, 1).double()

        def forward(self, images):
            return [self.reflected(images), self.same(images), self.timms(images), self.exact(images.double())]

    network, images = Network().eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        folded = fold(network, images)
        assert folded is not network
        for features, expected in zip(folded(images), network(images), strict=True):
            torch.testing.assert_close(features, expected)


class Tricky(torch.nn.Module):
    """Sums and activations after convolutions, of which oneDNN may do some with the convolution and some not."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.first, self.second = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Conv2d(3, 3, 3, padding=1)
        self.to_one = torch.nn.Conv2d(3, 1, 1)
        self.relu, self.relu6, self.silu = torch.nn.ReLU(inplace=True), torch.nn.ReLU6(), torch.nn.SiLU()
        self.scale = torch.nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        first = self.first(images)
        match self.case:
            case "sum and relu" | "relu and sum":
                first += self.second(images)
                return [self.relu(first)]
            case "silu after a sum":
                return [self.silu(images + first)]
            case "relu6, scaled":
                return [self.relu6(self.second(8 * images)) * self.scale]
            case "the same convolution twice":
                return [self.relu(first), self.silu(self.first(images + 1))]
            case "read before the activation":
                return [first.clone(), self.relu(first)]
            case "sum after the activation":
                return [self.relu(first) + images]
            case "three summands":
                return [self.relu(self.second(images) + first + images)]
            case "another shape":
                return [self.relu(self.to_one(images) + first)]
            case "a number":
                return [self.relu(first + 1), torch.add(self.second(images), images, alpha=2)]
            case "flow":
                return [self.relu(first) if images.shape[-1] > 4 else first]
            case "flow by value":
                return [self.relu(first) if images.sum() > 0 else first]
        raise AssertionError(self.case)


@pytest.mark.skipif(why_not_packed(), reason="only x86-64 leaves sums and activations to oneDNN")
@pytest.mark.parametrize(
    ("case", "joined"),
    [
        ("sum and relu", 1),
        ("silu after a sum", 0),
        ("relu6, scaled", 1),
        ("the same convolution twice", 0),
        ("read before the activation", 0),
        ("sum after the activation", 1),
        ("three summands", 0),
        ("another shape", None),
        ("a number", 0),
        ("flow", None),
        ("flow by value", None),
    ],
)
def test_sums_and_activations_in_onednn(case, joined):
    network, images = Tricky(case).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        folded = fold(network, images)
        for inputs in (images, images[:1, :, :5, :7], images[:, :, :, :3], -images):
            for features, expected in zip(folded(inputs), network(inputs), strict=True):
                torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(folded, torch.fx.GraphModule) == (joined is not None)
    if joined is not None:
        activations = [module for module in folded.modules() if getattr(module, "activation", None)]
        assert len(activations) == joined


@pytest.mark.skipif(why_not_packed(), reason="only x86-64 leaves sums and activations to oneDNN")
@pytest.mark.parametrize(
    ("backbone", "layers", "left"),
    [
        ("resnet18", LAYERS, {"InferenceMaxPool2d"}),
        ("wide_resnet50_2", LAYERS, {"InferenceMaxPool2d"}),
        ("mobilenetv2_100", ["blocks.1", "blocks.2"], set()),
    ],
)
def test_resnets_are_nothing_but_convolutions(backbone, layers, left):
    student = Student(backbone, layers).eval()
    with torch.no_grad():
        student(torch.randn(1, 3, 64, 64))
    graph = student._folded[0].graph
    modules = dict(student._folded[0].named_modules())
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    assert {type(modules[node.target]).__name__ for node in calls} - left == {"PackedConv2d"}


def test_networks_that_cannot_be_copied_or_want_their_weights_stay_as_they_are(log):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, images):
            return [torch.nn.functional.conv2d(self.first(images), self.first.weight)]

    images = torch.randn(2, 3, 8, 8)
    tied, uncopied = Tied().eval(), Tricky("a number").eval()
    uncopied.result = uncopied.first(images)  # with gradients, as timm's LeViT keeps its biases
    with torch.no_grad():
        for network in (tied, uncopied):
            log.clear()
            assert fold(network, images) is network
            assert "no inference copy is made" in log.text


def test_forward_mode_and_other_default_devices():
    student = Student("test_resnet", ["layer1"]).eval().requires_grad_(False)
    images = torch.randn(2, 3, 64, 64)
    student(images)

    def total(images):
        return student(images)["layer1"].sum()

    assert torch.func.jvp(total, (images,), (images,))[1] != 0
    with torch.device("meta"), torch.no_grad():
        next(student.parameters()).mul_(2)  # so that it is folded anew
        assert student(images)["layer1"].device.type == "cpu"


def test_copies_that_are_out_of_date_are_freed_at_once():
    student, images = Student("resnet18", LAYERS).eval(), torch.randn(1, 3, 64, 64)
    copies = []
    gc.disable()
    try:
        for _ in range(3):
            with torch.no_grad():
                student.feature_extractor.conv1.weight.mul_(2)
                student(images)
            copies.append(weakref.ref(student._folded[0]))
        assert [copy() is None for copy in copies] == [True, True, False]
    finally:
        gc.enable()


def test_only_plain_inference_folds(model):
    student, images = model.model.student_model.eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = student(images)["layer1"]
        assert student._folded
        student.half().float()  # other weights, maybe at the same address
        assert not torch.equal(student(images)["layer1"], expected)
        student.train()
        assert not student._folded
        student(images)
        student.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert student(images)["layer1"].dtype == torch.bfloat16
        graph = make_fx(student)(images)  # traces the network itself, with its batch norms
        assert "batch_norm" in graph.code
        assert not student._folded
        assert student.to("meta")(images.to("meta"))["layer1"].shape == expected.shape


def test_a_network_that_cannot_be_folded_stays_as_it_is(log):
    class Crossed(torch.nn.Module):
        """The norm stands after the second convolution, and follows the first."""

        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)
            self.norm = torch.nn.BatchNorm2d(3)
            torch.nn.init.uniform_(self.norm.running_var)

        def forward(self, images):
            return [self.second(self.norm(self.first(images)))]

    network = Crossed().eval()
    with torch.no_grad():
        assert fold(network, torch.randn(1, 3, 8, 8)) is network
        assert "no inference copy is made, which is slower. the copy's features are not the network's" in log.text
        log.clear()
        assert fold(network, torch.randn(1, 3, 8, 8)) is network
    assert not log.records  # once is enough


def test_resnets_have_a_copy_without_a_word(log):
    student = Student("resnet18", LAYERS).eval()
    with torch.no_grad():
        student(torch.randn(1, 3, 64, 64))
    assert not log.records


@pytest.fixture
def torch_without_packed_convolutions(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(packing, "lacks_packed_convolution", lambda: "mkldnn._convolution_pointwise")
    why_not_packed.cache_clear()
    yield
    why_not_packed.cache_clear()


@pytest.mark.usefixtures("torch_without_packed_convolutions")
def test_a_torch_that_has_renamed_its_operator_is_told(log, capsys):
    student, images = Student("test_resnet", ["layer1"]).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        student(images)
        assert not any(isinstance(module, PackedConv2d) for module in student._folded[0].modules())
    missing = f"torch {torch.__version__} has no mkldnn._convolution_pointwise"
    assert f"convolutions rearrange their weights at every call, which is slower. {missing}" in log.text
    assert diagnose()
    assert f"packed convolutions  no, inference on the CPU is slower: {missing}" in capsys.readouterr().out
