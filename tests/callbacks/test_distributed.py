# SPDX-License-Identifier: Apache-2.0

"""Two processes (gloo, on the CPU) do what one does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import TorchSyncBatchNorm

from anomalib_stfpm_ext import StfpmExt, load_model
from anomalib_stfpm_ext.callbacks.distributed import DistributedSetup

SCRIPT = Path(__file__).with_name("distributed_run.py")


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory) -> tuple[dict, dict, dict]:
    """One process's results, and those of two, which have an odd number of test images to share."""
    folder = tmp_path_factory.mktemp("distributed")
    shutil.copytree(images, folder / "images")
    (folder / "images/bad/3.png").unlink()
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder / "images", folder, str(devices)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for devices in (1, 2)
    ]
    for process in running:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output[-3000:]
    return tuple(json.loads((folder / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1"))


@pytest.mark.slow
def test_training_is_that_of_one_process_with_the_joint_batch(runs):
    one, first, second = runs
    assert len(one["losses"]) == 4
    assert first["student"] == second["student"]
    for two in (first, second):
        for name in ("losses", "held_out", "student"):
            np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_each_image_once(runs, stage):
    one, first, second = runs
    assert len(one[stage]) == 7
    assert [len(two[stage]) for two in (first, second)] == [4, 3]
    together = sorted(first[stage] + second[stage])
    assert [name for name, _ in together] == sorted(name for name, _ in one[stage])
    np.testing.assert_allclose([s for _, s in together], [s for _, s in sorted(one[stage])], rtol=1e-3)


@pytest.mark.slow
def test_figures_are_those_of_one_process(runs):
    one, *both = (run["figures"] for run in runs)
    for two in both:
        assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])  # the latter's norms hold activations
def test_batch_norm_over_all_processes(backbone):
    """The layers are replaced and put back. Torch has a CUDA implementation only, so more cannot be tested here."""
    layers = {"test_resnet": ["layer1"], "test_efficientnet": ["blocks.1"]}[backbone]
    model = StfpmExt(backbone, layers, teacher_weights=False, visualizer=False)
    student, teacher = model.model.student_model, model.model.teacher_model
    images, before = torch.randn(4, 3, 32, 32), [[*network.modules()] for network in (student, teacher)]
    model.trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", sync_batchnorm=True, logger=False)
    DistributedSetup().setup(model.trainer, model, "fit")
    sync = model.trainer.strategy._layer_sync
    assert not isinstance(sync, TorchSyncBatchNorm)

    expected = student.train()(images)[layers[0]].detach()
    assert sync.apply(model) is model
    student.double().float()  # gives the layers other buffers, as a move to another device does
    assert [*teacher.modules()] == before[1]
    norms = [module for module in student.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    assert len(norms) == sum(isinstance(module, torch.nn.BatchNorm2d) for module in before[0])
    torch.testing.assert_close(student(images)[layers[0]], expected)  # of one process, where nothing is shared
    student.eval()
    learnt = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    assert sync.revert(model) is model
    assert [*student.modules()] == before[0]
    assert not any(module.training for module in student.modules())
    assert all(torch.equal(tensor, learnt[name]) for name, tensor in student.state_dict().items())


SPAWN = """
import sys

from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib_stfpm_ext import StfpmExt, load_model
from anomalib_stfpm_ext.selection import judge

judge.FEWEST_IMAGES = 4

if __name__ == "__main__":
    data = Folder("noise", root=sys.argv[1], normal_dir="good", normal_test_dir="good_test", abnormal_dir="bad",
        train_batch_size=4, num_workers=0, seed=0)
    model = StfpmExt("test_resnet", ["layer1", "layer3"], teacher_weights=False, lr=0.1, seed=0, held_out_share=0.5,
        image_size=(48, 64), visualizer=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    one = {"accelerator": "cpu", "devices": 1, "strategy": "ddp_spawn"}
    engine = Engine(max_epochs=2, default_root_dir=sys.argv[2], **one, **quiet)
    engine.fit(model, datamodule=data)
    engine.trainer.save_checkpoint(f"{sys.argv[2]}/memory.ckpt")
    print(engine.trainer.checkpoint_callback.best_model_path)
"""


@pytest.mark.slow
def test_a_process_that_lightning_starts_gives_back_all_that_a_verdict_is_made_of(images, tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN)
    command = [sys.executable, script, images, tmp_path]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    of_worker, memory = (load_model(path) for path in (result.stdout.splitlines()[-1], tmp_path / "memory.ckpt"))
    assert memory.model.level_weights is not None
    for name, tensor in of_worker.state_dict().items():
        torch.testing.assert_close(memory.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)
