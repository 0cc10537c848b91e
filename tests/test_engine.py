# SPDX-License-Identifier: Apache-2.0

"""StfpmExt through stock anomalib: every subcommand, checkpoints, seeds."""

import copy
import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from helpers import QUIET, folder
from lightning.pytorch import Callback
from torch._dynamo.utils import counters

from anomalib_stfpm_ext import StfpmExt, StfpmExtModel
from anomalib_stfpm_ext.loss import formula


def train(images: Path, weights: Path, output: Path, seed: int = 0) -> tuple[Engine, StfpmExt, list[dict[str, float]]]:
    from lightning.pytorch import seed_everything

    seed_everything(seed)
    engine = Engine(max_epochs=4, accelerator="cpu", default_root_dir=output, logger=False)
    model = StfpmExt("test_resnet", teacher_weights=weights, lr=0.1, visualizer=False)
    return engine, model, engine.train(model, datamodule=folder(images))


def scores(model: StfpmExt, images: Path, **arguments) -> torch.Tensor:
    engine = Engine(accelerator="cpu", logger=False, default_root_dir=images / "results")
    batches = engine.predict(model, dataset=PredictDataset(images / "bad"), **arguments)
    return torch.cat([batch.pred_score.flatten() for batch in batches])


@pytest.fixture(scope="module")
def trained(images, small_weights, tmp_path_factory):
    engine, model, metrics = train(images, small_weights, tmp_path_factory.mktemp("trained"))
    return model, Path(engine.trainer.checkpoint_callback.best_model_path), metrics


def test_training_learns_to_tell_good_from_bad(trained):
    assert trained[2][0]["image_AUROC"] == 1.0


def test_same_seed_same_scores(trained, images, small_weights, tmp_path):
    again = train(images, small_weights, tmp_path)[1]
    other = train(images, small_weights, tmp_path, seed=1)[1]
    assert torch.equal(scores(again, images), scores(trained[0], images))
    assert not torch.equal(scores(other, images), scores(trained[0], images))


def test_checkpoint_loads_without_the_teachers_file(trained, images):
    model, checkpoint, _ = trained
    expected = scores(model, images)
    assert torch.equal(scores(StfpmExt.load_from_checkpoint(checkpoint), images), expected)
    assert torch.equal(scores(StfpmExt("test_resnet", teacher_weights=False), images, ckpt_path=checkpoint), expected)
    content = torch.load(checkpoint, weights_only=True)
    assert content["hyper_parameters"]["backbone"] == "test_resnet"


class HardGradients(Callback):
    """Works out by torch's own operations what gradients the first step should have had."""

    def on_fit_start(self, _trainer, model):
        self.student, self.of_batches, self.of_step = copy.deepcopy(model.model.student_model).train(), [], []

    def on_before_optimizer_step(self, _trainer, model, _optimizer):
        parameters = model.model.student_model.parameters()
        self.of_step = self.of_step or [parameter.grad.clone() for parameter in parameters]

    def on_train_batch_end(self, _trainer, model, _outputs, batch, index):
        if index < 2:
            teacher, student = (list(net(batch.image).values()) for net in (model.model.teacher_model, self.student))
            loss = formula(teacher, student, hard_share=0.1)
            self.of_batches.append(torch.autograd.grad(loss, list(self.student.parameters())))


def test_the_hardest_positions_of_each_batch_teach(images, tmp_path):
    """With accumulation, the gradient is the mean of the batches'."""
    quick = {"teacher_weights": False, "image_size": (48, 64), "visualizer": False}
    model = StfpmExt("test_resnet", ["layer1", "layer3"], hard_share=0.1, **quick)
    gradients = HardGradients()
    engine = Engine([gradients], max_epochs=1, accumulate_grad_batches=2, default_root_dir=tmp_path, **QUIET)
    engine.fit(model, datamodule=folder(images, train_batch_size=3))
    for gradient, *of_batches in zip(gradients.of_step, *gradients.of_batches, strict=True):
        torch.testing.assert_close(gradient, sum(of_batches) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compiled_inference(images, tmp_path):
    """Same scores by compiled code, which neither training, checkpoints, exports nor copies know."""
    arguments = {"backbone": "test_resnet", "layers": ["layer1", "layer3"], "teacher_weights": False}
    eager = StfpmExt(**arguments, visualizer=False)
    model = StfpmExt(**arguments, visualizer=False, compile_mode="reduce-overhead")
    model.load_state_dict(eager.state_dict())
    expected, before = scores(eager, images), counters["stats"]["unique_graphs"]
    for each in (copy.deepcopy(model), model):
        torch.testing.assert_close(scores(each, images), expected, rtol=1e-4, atol=0)
        assert counters["stats"]["unique_graphs"] == before + (each is model)
    model.train().model(torch.rand(2, 3, 64, 64))
    assert model.to_torch(tmp_path).exists()
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.slow
def test_changing_weights_and_sizes_do_not_end_compiled_inference():
    """After some versions of a function, torch goes on without a compiler."""
    options = {"backbone": "test_resnet", "layers": ["layer1", "layer2"], "teacher_weights": False}
    model = StfpmExtModel(**options, compile_mode="default").eval()
    eager = StfpmExtModel(**options).eval()
    eager.load_state_dict(model.state_dict())
    before = None
    with torch.inference_mode():
        for step in range(12):
            images = torch.rand(1, 3, 64, 64)
            model.level_weights = eager.level_weights = (1 + step / 100, 1 - step / 100)
            torch.testing.assert_close(model(images).anomaly_map, eager(images).anomaly_map, rtol=1e-4, atol=1e-7)
            before = before or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == before
        for size in range(32, 32 + 12 * 16, 16):
            images = torch.rand(1, 3, size, 2 * size)
            torch.testing.assert_close(model(images).anomaly_map, eager(images).anomaly_map, rtol=1e-4, atol=1e-7)


def anomalib(*arguments: str, cwd: Path) -> str:
    """Run the stock command line as a user would."""
    command = [str(Path(sys.executable).with_name("anomalib")), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def image_metrics(output: str) -> list[str]:
    """Return the rows of AUROC and F1 in the table that anomalib prints."""
    return [line for line in output.splitlines() if "image_" in line]


@pytest.mark.slow
def test_command_line(images, tmp_path):
    """Train from a YAML, then every other subcommand on the checkpoint, with each way to name the class."""
    data = {"name": "noise", "root": str(images), "normal_dir": "good", "normal_test_dir": "good_test"}
    data |= {"abnormal_dir": "bad", "num_workers": 0, "train_batch_size": 4}
    model = {"backbone": "test_resnet", "layers": ["layer1", "layer3"], "teacher_weights": False, "lr": 0.1, "seed": 0}
    trainer = {"max_epochs": 1, "logger": False, "accelerator": "cpu"}

    def config(class_path: str) -> Path:
        path = tmp_path / f"{class_path}.yaml"
        content = {
            "model": {"class_path": class_path, "init_args": model},
            "data": {"class_path": "Folder", "init_args": data},
            "trainer": trainer,
        }
        path.write_text(yaml.safe_dump(content))
        return path

    help_text = anomalib("train", "--model.help", "StfpmExt", cwd=tmp_path)
    for argument in ("backbone", "layers", "teacher_weights", "lr", "held_out_share"):
        assert f"--model.{argument} " in help_text
    metrics = image_metrics(anomalib("train", "--config", config("StfpmExt"), cwd=tmp_path))
    assert len(metrics) == 2
    assert list(tmp_path.glob("results/StfpmExt/noise/v0/images/bad/*.png"))
    checkpoint = tmp_path / "results/StfpmExt/noise/v0/weights/lightning/model.ckpt"
    again = anomalib("test", "--config", config("anomalib.models.StfpmExt"), "--ckpt_path", checkpoint, cwd=tmp_path)
    assert image_metrics(again) == metrics
    anomalib("validate", "--config", config("anomalib_stfpm_ext.StfpmExt"), "--ckpt_path", checkpoint, cwd=tmp_path)
    anomalib("fit", "--config", config("StfpmExt"), cwd=tmp_path)
    first, second = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (checkpoint, Path(str(checkpoint).replace("v0", "v1")))
    )
    student = [name for name in first if "student_model" in name]
    assert all(torch.equal(first[name], second[name]) for name in student)  # the same seed
    named = ["--model", "StfpmExt", "--model.backbone", "test_resnet", "--model.layers", "[layer1,layer3]"]
    named += ["--model.teacher_weights", "false", "--ckpt_path", checkpoint]
    anomalib("predict", *named, "--data", images / "bad", cwd=tmp_path)
    anomalib("export", *named, "--export_type", "torch", cwd=tmp_path)
    assert list(tmp_path.glob("results/**/model.pt"))


@pytest.mark.slow
def test_benchmark(images, tmp_path):
    """The benchmark of anomalib offers no number of epochs, so it trains the default of 100, here of one small step."""
    one = tmp_path / "one"
    for image in ("good/0.png", "good/1.png", "good_test/0.png", "bad/0.png"):
        (one / image).parent.mkdir(parents=True, exist_ok=True)
        (one / image).write_bytes((images / image).read_bytes())
    init_args = {"backbone": "test_resnet", "layers": ["layer1"], "teacher_weights": False, "visualizer": False}
    data = {
        "name": "one",
        "root": str(one),
        "normal_dir": "good",
        "normal_test_dir": "good_test",
        "abnormal_dir": "bad",
    }
    benchmark = {
        "seed": 0,
        "model": {"class_path": "anomalib_stfpm_ext.StfpmExt", "init_args": init_args | {"pre_processor": False}},
        "data": {"class_path": "Folder", "init_args": data | {"num_workers": 0, "val_split_mode": "same_as_test"}},
    }
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump({"accelerator": ["cpu"], "benchmark": benchmark}))
    anomalib("benchmark", "--config", "benchmark.yaml", cwd=tmp_path)
    with next(tmp_path.glob("runs/benchmark/*/results.csv")).open() as file:
        assert "image_AUROC" in next(csv.DictReader(file))


def test_diagnosis(forked):
    result = forked("import runpy; runpy.run_module('anomalib_stfpm_ext', run_name='__main__')", check=False)
    assert result.returncode == 0, result.stdout
    assert "anomalib knows it    yes" in result.stdout
    assert "NO:" not in result.stdout
