# SPDX-License-Identifier: Apache-2.0

"""Students of the authors' code and checkpoints of anomalib's Stfpm, there and back; what the bridges refuse."""

import pickle
import shlex
import sys
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from anomalib.models import Stfpm
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from torch.nn.functional import interpolate, normalize
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_stfpm_ext import StfpmExt
from anomalib_stfpm_ext.cli import main
from anomalib_stfpm_ext.convert import read_anomalib_checkpoint, read_authors_student, write_authors_student

LAYERS = ["layer1", "layer2", "layer3"]
OTHER = {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.4", "blocks.1"]}


class AuthorsNetwork(torch.nn.Module):
    """ResNet18 in the authors' form, from its description."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.model = torch.nn.Sequential(*list(network.children())[:-2])

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the features that the authors compare."""
        features = []
        for child in self.model:
            images = child(images)
            features.append(images)
        return features[4:7]


def authors_map(teacher: list[torch.Tensor], student: list[torch.Tensor]) -> torch.Tensor:
    """Return the authors' map: levels multiplied at 64x64, then resized to 256x256."""
    product = torch.ones(1, 1, 64, 64)
    for t, s in zip(teacher, student, strict=True):
        distance = (normalize(t) - normalize(s)).square().sum(1, keepdim=True)
        product = product * interpolate(distance, (64, 64), mode="bilinear", align_corners=False)
    return interpolate(product, (256, 256), mode="bilinear", align_corners=False)


def shake(network: torch.nn.Module) -> None:
    """Give batch norms the statistics of a trained network, so that all of them matter."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)


@pytest.fixture(scope="module")
def student() -> AuthorsNetwork:
    torch.manual_seed(1)
    network = AuthorsNetwork(torchvision.models.resnet18(weights=None))
    shake(network)
    return network.eval()


@pytest.fixture(scope="module")
def authors_file(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("snapshots") / "best.pth.tar"
    torch.save({"category": "bottle", "state_dict": student.state_dict()}, path)
    return path


@pytest.fixture
def no_internet(monkeypatch):
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create_model(*a, **{**k, "pretrained": False}))


def anomalib_checkpoint(path: Path, **arguments) -> Stfpm:
    """Save a checkpoint of anomalib's Stfpm with random weights, as its trainer does, and return the model."""
    torch.manual_seed(2)
    model = Stfpm(**arguments)
    shake(model)
    for index, name in enumerate(("_image_threshold", "_pixel_threshold", "image_min", "pixel_min")):
        getattr(model.post_processor, name).fill_(0.01 * index)
    model.post_processor.image_max.fill_(0.7)
    model.post_processor.pixel_max.fill_(0.8)
    model.post_processor.image_sensitivity = 0.4
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return model.eval()


@pytest.mark.parametrize("prefix", ["model.", "features.", "module.net.", ""])
def test_student_of_the_authors_keeps_its_features(student, resnet18_weights, tmp_path, prefix):
    weights = {prefix + name.removeprefix("model."): tensor for name, tensor in student.state_dict().items()}
    torch.save({"category": "bottle", "state_dict": weights}, tmp_path / "best.pth.tar")
    model = read_authors_student(tmp_path / "best.pth.tar", resnet18_weights)
    ours, theirs = model.model.student_model.eval().double(), deepcopy(student).double()
    images = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        for expected, features in zip(theirs(images), ours(images).values(), strict=True):
            torch.testing.assert_close(features, expected, rtol=0, atol=1e-12)
            assert expected.abs().max() > 0.1


def test_scores_of_the_authors(authors_file, student, resnet18_weights):
    network = torchvision.models.resnet18(weights=None)
    network.load_state_dict(torch.load(resnet18_weights, weights_only=True))
    teacher = AuthorsNetwork(network).eval()
    lightning_model = read_authors_student(authors_file, resnet18_weights)
    model = lightning_model.model.eval()
    photograph = torch.rand(1, 3, 100, 140)
    resized = interpolate(photograph, (256, 256), mode="bilinear", antialias=True)
    theirs = torchvision.transforms.functional.normalize(resized, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    ours = lightning_model.pre_processor.transform(photograph)
    with torch.no_grad():
        expected = authors_map(teacher(theirs), student(theirs))
        result = model(ours)
    torch.testing.assert_close(8 * result.anomaly_map, expected, rtol=1e-4, atol=0)
    assert 8 * result.pred_score.item() == pytest.approx(expected.max().item(), rel=1e-4)


def test_authors_to_ours_and_back(authors_file, student, resnet18_weights, tmp_path):
    model = read_authors_student(authors_file, resnet18_weights)
    random_state = torch.get_rng_state()
    write_authors_student(model, tmp_path / "snapshots" / "bottle" / "best.pth.tar", "bottle")
    assert torch.equal(torch.get_rng_state(), random_state)
    content = torch.load(tmp_path / "snapshots" / "bottle" / "best.pth.tar", weights_only=True)
    assert content["category"] == "bottle"
    back, original = content["state_dict"], student.state_dict()
    assert list(back) == list(original)
    used = [name for name in original if not name.startswith("model.7.")]
    assert all(torch.equal(back[name], original[name]) for name in used)
    AuthorsNetwork(torchvision.models.resnet18(weights=None)).load_state_dict(back)  # strictly, layer4 included
    assert back["model.7.0.conv1.weight"].std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)
    write_authors_student(model, tmp_path / "again.pth.tar")
    again = torch.load(tmp_path / "again.pth.tar", weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], back[name]) for name in back)
    model.model.level_weights = (0.5, 1.0, 1.5)
    with pytest.warns(UserWarning, match=r"model: the exponents of its levels, \(0\.5, 1\.0, 1\.5\), are"):
        write_authors_student(model, tmp_path / "weighted.pth.tar")


@pytest.mark.parametrize(
    "arguments", [{}, {"backbone": "resnet34", "layers": ["layer2", "layer3"]}, OTHER], ids=["default", "34", "lite0"]
)
@pytest.mark.usefixtures("no_internet")
def test_predictions_of_anomalib(tmp_path, arguments):
    theirs = anomalib_checkpoint(tmp_path / "model.ckpt", **arguments)
    ours = read_anomalib_checkpoint(tmp_path / "model.ckpt").eval()
    images = torch.rand(1, 3, 100, 140)
    with torch.no_grad():
        raw, expected_raw = (model.model(model.pre_processor(images)) for model in (ours, theirs))
        prediction, expected = ours(images), theirs(images)
    torch.testing.assert_close(raw.anomaly_map, expected_raw.anomaly_map, rtol=1e-4, atol=0)
    torch.testing.assert_close(prediction.pred_score, expected.pred_score, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(prediction.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-6)
    assert torch.equal(prediction.pred_label, expected.pred_label)
    assert ours.post_processor.image_sensitivity == 0.4
    assert ours.post_processor.image_max == torch.tensor(0.7)


@pytest.mark.usefixtures("no_internet")
def test_transform_comes_along(tmp_path):
    transform = Compose([Resize((64, 96)), Normalize([0.1, 0.2, 0.3], [1, 1, 1])])
    anomalib_checkpoint(tmp_path / "model.ckpt", backbone="test_resnet", pre_processor=PreProcessor(transform))
    images = torch.rand(1, 3, 100, 140)
    ours = read_anomalib_checkpoint(tmp_path / "model.ckpt").pre_processor
    torch.testing.assert_close(ours.transform(images), transform(images))


@pytest.mark.usefixtures("no_internet")
def test_checkpoint_that_does_not_describe_itself(tmp_path):
    theirs = anomalib_checkpoint(tmp_path / "model.ckpt", **OTHER)
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if name.startswith("model.")}
    torch.save({"state_dict": tensors}, tmp_path / "bare.ckpt")
    ours = read_anomalib_checkpoint(tmp_path / "bare.ckpt", **OTHER)
    assert ours.pre_processor.transform.transforms[1].mean[0] == 0.485  # not the 0.5 that lite0 was trained with
    assert ours.post_processor.image_threshold.isnan()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.model.eval()(images).anomaly_map, theirs.model(images).anomaly_map, rtol=1e-4, atol=0
        )
    with pytest.raises(ValueError, match=r"backbone: '.*bare.ckpt' does not say, so wanted it as an argument"):
        read_anomalib_checkpoint(tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match=r"layers: wanted one or more of .*'blocks.4'.*got \['layer1'\]"):
        read_anomalib_checkpoint(tmp_path / "bare.ckpt", "tf_efficientnet_lite0", ["layer1"])
    with pytest.raises(ValueError, match=r"does not fit 'resnet18'.*conv1.weight is missing, wanted \(64"):
        read_anomalib_checkpoint(tmp_path / "bare.ckpt", "resnet18", LAYERS)
    with pytest.raises(ValueError, match=r"layers: '.*model.ckpt' says .*'blocks.4'.*, got \['blocks.1'\]"):
        read_anomalib_checkpoint(tmp_path / "model.ckpt", layers=["blocks.1"])
    with pytest.raises(ValueError, match=r"backbone: .* says 'tf_efficientnet_lite0', got 'resnet18'"):
        read_anomalib_checkpoint(tmp_path / "model.ckpt", backbone="resnet18")


@pytest.mark.usefixtures("no_internet")
def test_checkpoint_of_more_layers(tmp_path):
    theirs = anomalib_checkpoint(tmp_path / "model.ckpt", backbone="test_resnet")
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match=r"does not fit 'test_resnet' with layers .*layer3.*, wanted no such tensor"):
        read_anomalib_checkpoint(tmp_path / "bare.ckpt", "test_resnet", ["layer1", "layer2"])


@pytest.mark.usefixtures("no_internet")
def test_backbones_that_anomalib_compares_along_the_wrong_axis(tmp_path):
    anomalib_checkpoint(tmp_path / "model.ckpt", backbone="test_mambaout", layers=["stages.0", "stages.1"])
    with pytest.raises(ValueError, match=r"backbone: anomalib compares the \(B, H, W, C\) features of 'test_mambaout'"):
        read_anomalib_checkpoint(tmp_path / "model.ckpt")


def command(task: str, **options) -> None:
    main(["convert", task, *(part for name, value in options.items() for part in (f"--{name}", str(value)))])


@pytest.mark.usefixtures("no_internet")
def test_command_lines(authors_file, student, resnet18_weights, tmp_path, capsys):
    checkpoint = tmp_path / "new" / "authors.ckpt"
    command("from-authors", student=authors_file, output=checkpoint, teacher_weights=resnet18_weights)
    assert f"--ckpt_path {checkpoint}" in capsys.readouterr().out
    features = torch.randn(1, 3, 64, 64)
    expected = read_authors_student(authors_file, resnet18_weights).eval()(features)
    assert torch.equal(StfpmExt.load_from_checkpoint(checkpoint).eval()(features).anomaly_map, expected.anomaly_map)

    command("to-authors", checkpoint=checkpoint, output=tmp_path / "best.pth.tar", category="bottle")
    content = torch.load(tmp_path / "best.pth.tar", weights_only=True)
    assert content["category"] == "bottle"
    assert torch.equal(content["state_dict"]["model.6.1.bn2.bias"], student.state_dict()["model.6.1.bn2.bias"])

    theirs = anomalib_checkpoint(tmp_path / "stfpm.ckpt", backbone="test_resnet", layers=["layer3", "layer1"])
    bare = tmp_path / "bare.ckpt"
    torch.save({"state_dict": theirs.state_dict()}, bare)
    command("from-anomalib", checkpoint=tmp_path / "stfpm.ckpt", output=tmp_path / "ours.ckpt")
    command("from-anomalib", checkpoint=bare, output=bare, backbone="test_resnet", layers="[layer1,layer3]")
    capsys.readouterr()
    for path in ("ours.ckpt", "bare.ckpt"):
        ours = StfpmExt.load_from_checkpoint(tmp_path / path).eval()
        torch.testing.assert_close(ours(features).pred_score, theirs(features).pred_score)

    with pytest.raises(SystemExit, match=r"FileNotFoundError: checkpoint: .*absent.ckpt"):
        command("from-anomalib", checkpoint=tmp_path / "absent.ckpt", output=tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


@pytest.mark.usefixtures("no_internet")
def test_stock_anomalib_predicts_with_what_was_read(images, tmp_path, capsys, monkeypatch, forked):
    """The options that the bridge prints, given as they are."""
    anomalib_checkpoint(tmp_path / "stfpm.ckpt", backbone="test_resnet", layers=["layer1", "layer3"])
    monkeypatch.chdir(tmp_path)
    command("from-anomalib", checkpoint="stfpm.ckpt", output="ours.ckpt")
    options = capsys.readouterr().out.partition("give anomalib: ")[2]
    script = str(Path(sys.executable).with_name("anomalib"))
    command_line = [script, "predict", *shlex.split(options), "--data", str(images / "bad")]
    forked(
        f"import os, runpy, sys; os.chdir({str(tmp_path)!r}); sys.argv = {command_line}\n"
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    assert len(list(tmp_path.glob("results/**/*.png"))) == 4


class Hostile:
    """Pickles as a call that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    ("argument", "read"),
    [
        ("path", lambda path, weights: read_authors_student(path, weights)),
        ("path", lambda path, _weights: read_anomalib_checkpoint(path)),
        ("model", lambda path, _weights: write_authors_student(path, path.with_name("out"))),
        ("teacher_weights", lambda path, weights: read_authors_student(weights.with_name("good.pth"), path)),
    ],
    ids=["read-authors", "read-anomalib", "write-authors", "teacher"],
)
def test_files_that_are_no_checkpoints(authors_file, resnet18_weights, tmp_path, argument, read):
    weights = tmp_path / "weights.pth"
    weights.symlink_to(resnet18_weights)
    (tmp_path / "good.pth").symlink_to(authors_file)
    whole = authors_file.read_bytes()
    marker = tmp_path / "marker"
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.ckpt").touch()
    torch.save([1, 2, 3], tmp_path / "list.ckpt")
    torch.save({"state_dict": [1], "hyper_parameters": {}}, tmp_path / "no_tensors.ckpt")
    torch.save({"state_dict": {}, "category": Hostile(marker)}, tmp_path / "code.ckpt")
    (tmp_path / "old_code.ckpt").write_bytes(pickle.dumps({"state_dict": Hostile(marker)}))
    for name in ("half", "empty", "list", "no_tensors", "code", "old_code"):
        with pytest.raises(ValueError, match=rf"^{argument}: '.*{name}.ckpt' cannot be read as a "):
            read(tmp_path / f"{name}.ckpt", weights)
    assert not marker.exists()
    torch.load(tmp_path / "code.ckpt", weights_only=False)  # the files are hostile indeed
    assert marker.exists()
    with pytest.raises(
        FileNotFoundError, match=rf"^{argument}: wanted a .*, got '.*absent.ckpt', which does not exist"
    ):
        read(tmp_path / "absent.ckpt", weights)
    assert not (tmp_path / "out").exists()


def test_networks_that_are_not_the_authors(student, authors_file, resnet18_weights, tmp_path):
    def read(weights: dict) -> None:
        torch.save({"category": "bottle", "state_dict": weights}, tmp_path / "best.pth.tar")
        read_authors_student(tmp_path / "best.pth.tar", resnet18_weights)

    good = student.state_dict()
    for name in ("resnet34", "resnet50"):
        network = AuthorsNetwork(getattr(torchvision.models, name)(weights=None))
        with pytest.raises(ValueError, match=r"^path: .* holds no student of the authors' code: .*and \d+ more"):
            read(network.state_dict())
    with pytest.raises(ValueError, match=r"layer2.0.bn1.bias is missing, wanted \(128,\)"):
        read({name: tensor for name, tensor in good.items() if name != "model.5.0.bn1.bias"})
    with pytest.raises(ValueError, match=r"layer1.1.bn2.bias is \(3,\), wanted \(64,\)"):
        read({**good, "model.4.1.bn2.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"layer1.1.bn2.bias is text, wanted \(64,\)"):
        read({**good, "model.4.1.bn2.bias": "text"})
    with pytest.raises(ValueError, match=r"holds no student of the authors' code: conv1.weight is missing"):
        read({})
    read({name: tensor for name, tensor in good.items() if "num_batches_tracked" not in name})  # torch before 0.4.1
    with pytest.raises(ValueError, match=r"^teacher_weights: the authors' file holds the student only; .*got False"):
        read_authors_student(authors_file, teacher_weights=False)
    with pytest.raises(TypeError, match=r"^path: wanted the path of a file of the authors' code, got int"):
        read_authors_student(3, resnet18_weights)


def test_what_cannot_be_written_for_the_authors_code(tmp_path):
    for backbone, layers in (("resnet34", LAYERS), ("resnet18", LAYERS[:2]), ("resnet18", [*LAYERS, "layer4"])):
        model = StfpmExt(backbone, layers, teacher_weights=False)
        with pytest.raises(ValueError, match=rf"^model: the authors' code wants 'resnet18' .*, got '{backbone}' with"):
            write_authors_student(model, tmp_path / "best.pth.tar")
    with pytest.raises(TypeError, match=r"^model: wanted the path of a checkpoint of anomalib's Stfpm, got NoneType"):
        write_authors_student(None, tmp_path / "best.pth.tar")
    model = StfpmExt("resnet18", LAYERS, teacher_weights=False)
    with pytest.raises(TypeError, match="category: wanted a name, got int"):
        write_authors_student(model, tmp_path / "best.pth.tar", 3)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="path: wanted the path of a file to write, got int"):
        write_authors_student(model, 3)
    with pytest.raises(ValueError, match="path: wanted a file to write, got the folder"):
        write_authors_student(model, tmp_path)


@pytest.mark.usefixtures("no_internet")
def test_components_that_cannot_be_restored(tmp_path):
    anomalib_checkpoint(tmp_path / "model.ckpt", backbone="test_resnet", layers=["layer1"])
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    content["anomalib_pre_processor_config"] = {"transform": {"class_path": "os.system", "init_args": {"command": "x"}}}
    torch.save(content, tmp_path / "hostile.ckpt")
    with pytest.raises(
        ValueError, match=r"^path: the transform or the post-processing in .*hostile.ckpt.* be restored"
    ):
        read_anomalib_checkpoint(tmp_path / "hostile.ckpt")
    content["hyper_parameters"] = OrderedDict(backbone="padim_net", layers=["layer1"])
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"^backbone: timm has no model 'padim_net'"):
        read_anomalib_checkpoint(tmp_path / "other.ckpt")
    torch.save({**content, "hyper_parameters": [1]}, tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="hyper_parameters are no dictionary"):
        read_anomalib_checkpoint(tmp_path / "list.ckpt")
