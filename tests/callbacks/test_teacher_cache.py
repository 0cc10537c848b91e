# SPDX-License-Identifier: Apache-2.0

"""The teacher's features, kept between epochs: same losses, fewer runs of the teacher, and what is refused."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from helpers import folder
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset
from torchvision.transforms import v2

from anomalib_stfpm_ext import StfpmExt
from anomalib_stfpm_ext.callbacks import teacher_cache
from anomalib_stfpm_ext.callbacks.teacher_cache import TeacherCache

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = ["layer1", "layer2"]


class Record(Callback):
    """Notes losses, and how many images the teacher has seen at the start of each epoch and in all."""

    def __init__(self, model: StfpmExt) -> None:
        self.losses: list[float] = []
        self.images: list[int] = []
        self.count = 0
        model.model.teacher_model.register_forward_pre_hook(self.add)

    def add(self, _module, arguments):
        self.count += len(arguments[0])

    def on_train_batch_end(self, _trainer, _module, outputs, *_):
        self.losses.append(outputs["loss"].item())

    def on_train_epoch_start(self, *_):
        self.images.append(self.count)


@pytest.fixture
def make_model():
    def make(**arguments) -> StfpmExt:
        settings = {"backbone": "test_resnet", "layers": LAYERS, "teacher_weights": False, "lr": 0.05, "seed": 0}
        settings |= {"pre_processor": StfpmExt.configure_pre_processor((48, 64)), "visualizer": False}
        return StfpmExt(**(settings | arguments))

    return make


@pytest.fixture
def fit(images, tmp_path, make_model):
    """Fit a model on the eight good images for three epochs; return the model and what was recorded."""

    def run(*callbacks, data=None, loader=None, trainer=None, **arguments) -> tuple[StfpmExt, Record]:
        model = make_model(**arguments)
        record = Record(model)
        settings = {"max_epochs": 3, "limit_val_batches": 0, "default_root_dir": tmp_path} | QUIET | (trainer or {})
        if loader is not None:
            Trainer(callbacks=[record, *callbacks], **settings).fit(model, loader)
        else:
            Engine([record, *callbacks], **settings).fit(model, datamodule=data or folder(images))
        return model, record

    return run


def same_run(first: tuple[StfpmExt, Record], second: tuple[StfpmExt, Record]) -> bool:
    """Tell whether losses, held-out maps and the student that is kept have the same bits."""
    students = [model.model.student_model.state_dict() for model, _ in (first, second)]
    return (
        first[1].losses == second[1].losses
        and getattr(first[0].student_selection, "history", None)
        == getattr(second[0].student_selection, "history", None)
        and all(torch.equal(tensor, students[1][name]) for name, tensor in students[0].items())
    )


@pytest.mark.parametrize("options", [{}, {"held_out_share": 0}], ids=str)
def test_same_bits_and_the_teacher_runs_in_the_first_epoch_only(fit, options):
    plain = fit(**options, teacher_cache=None)
    assert (plain[1].images, plain[1].count) == ([0, 8, 16], 24)
    assert len(set(plain[1].losses)) == 6
    for cache in ({}, {"teacher_cache": "memory"}, {"teacher_cache": "disk"}):
        cached = fit(**options, **cache)
        assert same_run(cached, plain)
        assert (cached[1].images, cached[1].count) == ([0, 8, 8], 8)


@pytest.mark.parametrize(
    "arguments",
    [
        {"data": {"num_workers": 2}},
        {"data": {"val_split_mode": "from_train", "val_split_ratio": 0.25}},
        {"trainer": {"precision": "bf16-mixed"}},
        {"callbacks": [TilerConfigurationCallback(enable=True, tile_size=[48, 32], stride=[48, 32])]},
        {"callbacks": [LearningRateFinder(num_training_steps=3)]},
        {"trainer": {"limit_val_batches": None, "val_check_interval": 0.5}},
        {"arguments": {"backbone": "test_convnext", "layers": ["stages.0", "stages.1"], "teacher_weights": False}},
    ],
    ids=["workers", "validation images", "bfloat16", "tiles", "learning rate finder", "half epochs", "layer norm"],
)
def test_same_bits_however_one_trains(fit, images, arguments):
    def run(**cache):
        data = folder(images, **arguments.get("data", {}))
        settings = cache | arguments.get("arguments", {})
        return fit(*arguments.get("callbacks", []), data=data, trainer=arguments.get("trainer"), **settings)

    plain, cached = run(teacher_cache=None), run(teacher_cache="memory")
    assert same_run(cached, plain)
    assert cached[1].count < plain[1].count


def test_learning_rate_finder_goes_before(fit):
    _, record = fit(LearningRateFinder(num_training_steps=3), teacher_cache="memory", held_out_share=0)
    assert record.images[0] > 0  # those of the finder
    assert record.images[1:] == [record.count] * 2 == [record.images[0] + 8] * 2


class Pairs(Dataset):
    """Images of a user's own: no paths, the first two the same, noise on one of them if asked to."""

    def __init__(self, noise: float = 0, size: int = 48) -> None:
        self.images = torch.rand(4, 3, 48, 64, generator=torch.Generator().manual_seed(0))
        self.images[1] = self.images[0]
        self.noise, self.size = noise, size

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        height = self.size if index == 3 else 48
        return self.images[index, :, :height] + self.noise * torch.randn(()) * (index == 2), 0


def collate(items) -> ImageBatch:
    return ImageBatch(image=torch.stack([image for image, _ in items]))


class Stream(IterableDataset):
    """Images that come without a number."""

    def __iter__(self):
        return iter(Pairs())


def test_loader_of_the_users_own(fit):
    loader = DataLoader(Pairs(), batch_size=2, shuffle=True, drop_last=True, collate_fn=collate, num_workers=1)
    runs = [fit(loader=loader, teacher_cache=location, held_out_share=0.25) for location in (None, "memory")]
    assert same_run(*runs)
    assert runs[0][1].count > runs[1][1].count
    assert loader.collate_fn is collate  # the user's loader stays as it was


class OwnConfig(PreProcessor):
    """Saves its transform in a way of its own; anomalib's cannot save a random one, and is refused before."""

    def checkpoint_config(self):
        return {"transform": {}}


def test_images_that_change_are_refused(fit, images):
    loader = DataLoader(Pairs(noise=0.1), batch_size=2, collate_fn=collate)
    wanted = "teacher_cache: wanted images that are the same in every epoch"
    with pytest.raises(ValueError, match=f"{wanted}, got more than the 4 images of an epoch"):
        fit(loader=loader, teacher_cache="memory", held_out_share=0)
    with pytest.raises(ValueError, match=r"teacher_cache: wanted images of one size, with features .*12, 16.*8, 16"):
        fit(
            loader=DataLoader(Pairs(size=32), batch_size=1, collate_fn=collate),
            teacher_cache="memory",
            held_out_share=0,
            pre_processor=False,
        )

    flip = v2.RandomHorizontalFlip()
    for arguments, got in (
        (
            {"data": folder(images, train_augmentations=flip)},
            r"no random train_augmentations, got .*RandomHorizontalFl",
        ),
        ({"data": folder(images, augmentations=v2.Compose([flip]))}, "no random train_augmentations, got .*Horizontal"),
        ({"pre_processor": OwnConfig(flip)}, "no random pre_processor, got .*RandomHorizontalFlip"),
        ({"loader": [loader], "held_out_share": 0}, "in one DataLoader whose images can be counted, got list"),
        ({"loader": DataLoader(Stream(), collate_fn=collate), "held_out_share": 0}, "got DataLoader of Stream"),
    ):
        with pytest.raises(ValueError, match=f"{wanted}.*{got}"):
            fit(teacher_cache="memory", **arguments)


class Brighter(Callback):
    """Changes batches after they were loaded, in each epoch in another way."""

    def on_train_batch_start(self, trainer, _module, batch, _index):
        batch.image = batch.image * (1 + trainer.current_epoch)


def test_images_that_change_keep_no_features_by_default(fit, images, caplog, monkeypatch):
    noisy = DataLoader(Pairs(noise=0.1), batch_size=2, collate_fn=collate)
    for arguments, reason in (
        ({"data": folder(images, train_augmentations=v2.RandomHorizontalFlip())}, "no random train_augmentations"),
        ({"pre_processor": OwnConfig(v2.RandomHorizontalFlip())}, "no random pre_processor"),
        ({"loader": noisy, "held_out_share": 0}, "more than the 4 images of an epoch"),
        ({"loader": DataLoader(Stream(), collate_fn=collate), "held_out_share": 0}, "got DataLoader of Stream"),
        ({"callbacks": [Brighter()]}, "more than the 8 images of an epoch"),
        ({"free": 10**6}, "wanted 0.3 MB in 1/4 of the free memory, for .* of 8 images, got 0.2 MB"),
    ):
        settings = dict(arguments)
        callbacks = settings.pop("callbacks", [])
        if free := settings.pop("free", None):
            monkeypatch.setattr(teacher_cache, "_free_memory", lambda free=free: free)
        runs = []
        for cache in ({"teacher_cache": None}, {}):
            caplog.clear()
            runs.append(fit(*callbacks, **settings, **cache))
        assert same_run(*runs)
        assert len(re.findall(f"features are not kept between epochs.*{reason}", caplog.text)) == 1


def test_no_features_are_kept_on_a_gpu_by_default():
    cache = TeacherCache("auto")
    cache.on_train_start(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda"))), None)
    images = torch.zeros(2, 3, 8, 8)
    for _ in range(2):
        assert cache.features(images, lambda images: {"layer1": images})["layer1"] is images


def test_wherever_images_come_from(fit):
    class Own(PreProcessor):
        pass

    batches = DataLoader(Pairs(), batch_sampler=BatchSampler(range(4), 2, False), collate_fn=collate)
    for arguments in (
        {"pre_processor": Own(StfpmExt.configure_pre_processor((48, 64)).transform)},
        {"loader": batches, "held_out_share": 0},
        {"trainer": {"reload_dataloaders_every_n_epochs": 1}, "held_out_share": 0},
    ):
        plain, cached = fit(teacher_cache=None, **arguments), fit(teacher_cache="memory", **arguments)
        assert same_run(cached, plain)
        assert cached[1].count * 3 == plain[1].count


def test_memory_that_cannot_be_had(fit, monkeypatch, tmp_path, caplog):
    def refuse(*_arguments, **_settings):
        msg = "can't allocate memory"
        raise RuntimeError(msg)

    images = torch.zeros(2, 3, 8, 8)
    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache.torch, "empty", refuse)
        for location in ("memory", "auto"):
            cache = TeacherCache(location)
            cache._num_images = 2
            wanted = "teacher_cache: wanted .* of 2 images, got can't allocate"
            if location == "memory":
                with pytest.raises(ValueError, match=wanted):
                    cache.features(images, lambda images: {"layer1": images})
            else:
                assert cache.features(images, lambda images: {"layer1": images})["layer1"] is images
                assert re.search(f"features are not kept between epochs. {wanted}", caplog.text)
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    monkeypatch.setattr(teacher_cache.tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"teacher_cache: wanted 0.3 MB in .*nowhere, which TMPDIR names, .*No such"):
        fit(teacher_cache="disk")


@pytest.mark.parametrize("location", ["memory", "disk"])
def test_features_that_do_not_fit_are_refused(fit, monkeypatch, location):
    # Of test_resnet's levels at 48x64, 32 channels at 12x16 and 48 at 6x8, in 8 images.
    size = 8 * 4 * (32 * 12 * 16 + 48 * 6 * 8)
    for free in (size, size - 30000):
        monkeypatch.setattr(teacher_cache, "_free_memory", lambda free=free: free)
        monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _, free=free: type("", (), {"free": free}))
        if free == size:
            fit(teacher_cache=location)
            continue
        message = "teacher_cache: wanted 0.3 MB .*of 8 images, got 0.2 MB"
        with pytest.raises(ValueError, match=message):
            fit(teacher_cache=location)


@pytest.mark.parametrize("version", teacher_cache._GROUP_FILES)
@pytest.mark.parametrize("limited", [".", "slurm/job_7", "slurm/job_7/step_0"])
def test_memory_of_a_container_or_job(monkeypatch, tmp_path, version, limited):
    """Within a container its group is at the top; that of a job of SLURM or systemd is not, and may have groups."""
    whole = teacher_cache._free_memory()
    folder, limit, usage, inactive = teacher_cache._GROUP_FILES[version]
    monkeypatch.setattr(teacher_cache, "_GROUPS", tmp_path)
    monkeypatch.setattr(teacher_cache, "_GROUPS_OF_PROCESS", tmp_path / "own")
    (tmp_path / "own").write_text(f"5:cpu,cpuacct:/\n4:{version}:/slurm/job_7/step_0\n1:name=systemd:/a:b\n")
    assert teacher_cache._free_memory() == pytest.approx(whole, rel=0.2)  # no files, no limit
    group = tmp_path / folder / limited
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.stat").write_text(f"cache 7000\n{inactive} 5000\n")
    (group / usage).write_text("30000\n")
    (group / limit).write_text("max\n")
    assert teacher_cache._free_memory() == pytest.approx(whole, rel=0.2)
    (group / limit).write_text("100000\n")
    assert teacher_cache._free_memory() == 100000 - 30000 + 5000


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fit, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(teacher_cache.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    models = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            models.append(module)
            mapped = Path("/proc/self/maps").read_text()
            assert f"{tmp_path}/tmp/stfpm_ext_" in mapped
            assert "(deleted)" in mapped
            assert module.cache._levels
            if fails and trainer.current_epoch == 1:
                raise KeyError

    if fails:
        with pytest.raises(KeyError):
            fit(Look(), teacher_cache="disk")
    else:
        fit(Look(), teacher_cache="disk")
    assert not list((tmp_path / "tmp").iterdir())
    assert not models[0].cache._levels
    assert f"{tmp_path}/tmp" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("location", ["ram", ""])
def test_places_that_are_none(make_model, location):
    with pytest.raises(
        ValueError, match=f"teacher_cache: wanted one of .*'memory', 'disk'.* or None, got '{location}'"
    ):
        make_model(teacher_cache=location)


def test_pickles_of_older_versions_say_more(make_model):
    cache = make_model(teacher_cache="disk").cache
    assert pickle.loads(pickle.dumps(cache)).location == "disk"
    cache.__setstate__({"location": "memory", "half": True})
    assert cache.location == "memory"
    assert cache.__getstate__() == {"location": "memory"}


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_features_come_back_in_dtype_and_layout_of_the_teacher(layout):
    cache = TeacherCache("memory")
    cache._num_images = 6
    images = torch.rand(6, 3, 8, 8)
    images[1] = images[0]

    def teacher(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"layer1": images.bfloat16().contiguous(memory_format=layout)}

    for numbers in ([0, 1, 2], [2, 3], [4, 5]):
        cache.features(images[numbers], teacher)
    assert len(cache._rows) == 5
    assert cache._levels["layer1"].rows.dtype == torch.bfloat16
    batch = images[torch.randperm(6)]
    expected, features = teacher(batch)["layer1"], cache.features(batch, None)["layer1"]
    assert torch.equal(features, expected)
    assert (features.dtype, features.stride()) == (expected.dtype, expected.stride())


def test_checkpoints_and_exports_hold_no_features(fit, tmp_path):
    class Look(Callback):
        def on_train_epoch_end(self, trainer, module):
            assert module.cache._levels
            trainer.save_checkpoint(tmp_path / "model.ckpt")
            exported = torch.load(module.to_torch(tmp_path), weights_only=False)["model"]
            assert (exported.cache._levels, exported.cache.location) == ({}, module.cache.location)

    model, _ = fit(Look(), teacher_cache="memory", trainer={"max_epochs": 1})
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert "TeacherCache" not in checkpoint["callbacks"]
    assert checkpoint["state_dict"].keys() == model.state_dict().keys()
    assert StfpmExt.load_from_checkpoint(tmp_path / "model.ckpt").cache.location == "memory"


def test_resumed_run_ends_as_the_unbroken_one(fit, images, tmp_path, make_model):
    unbroken = fit(teacher_cache=None)
    fit(teacher_cache="memory", trainer={"max_epochs": 2})
    model = make_model(teacher_cache="disk")
    engine = Engine(max_epochs=3, limit_val_batches=0, default_root_dir=tmp_path, **QUIET)
    checkpoint = next(tmp_path.glob("**/v1/**/*.ckpt"))
    engine.fit(model, datamodule=folder(images), ckpt_path=checkpoint)
    assert model.student_selection.history == unbroken[0].student_selection.history


DDP = """
import json
import os
import sys
from pathlib import Path

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback
from anomalib_stfpm_ext import StfpmExt

class Record(Callback):
    losses, images = [], 0

    def on_train_batch_end(self, _trainer, _module, outputs, *_):
        self.losses.append(outputs["loss"].item())

    def add(self, _module, arguments):
        self.images += len(arguments[0])

images, output = sys.argv[1:]
torch.set_num_threads(1)
for location in (None, "memory"):
    record = Record()
    record.losses = []
    data = Folder(name="noise", root=images, normal_dir="good", normal_test_dir="good_test", abnormal_dir="bad",
        train_batch_size=2, num_workers=0)
    model = StfpmExt("test_resnet", ["layer1", "layer2"], False, lr=0.05, held_out_share=0.3, seed=0,
        visualizer=False, pre_processor=StfpmExt.configure_pre_processor((48, 64)), teacher_cache=location)
    model.model.teacher_model.register_forward_pre_hook(record.add)
    own = Path(output, os.environ.get("LOCAL_RANK", "0"))  # anomalib's numbered folders are no matter for two
    engine = Engine([record], default_root_dir=own, max_epochs=4, accelerator="cpu", devices=2, strategy="ddp",
        logger=False, enable_progress_bar=False, limit_val_batches=0)
    engine.fit(model, datamodule=data)
    result = {"losses": record.losses, "history": model.student_selection.history, "images": record.images}
    Path(output, f"{location}{engine.trainer.global_rank}.json").write_text(json.dumps(result))
"""


@pytest.mark.slow
def test_two_processes(images, tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    command = [sys.executable, script, images, tmp_path]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in (0, 1):
        plain, cached = (json.loads((tmp_path / f"{name}{rank}.json").read_text()) for name in ("None", "memory"))
        assert cached["losses"] == plain["losses"]
        assert cached["history"] == plain["history"]
        assert cached["images"] < plain["images"]


def test_operating_system_that_does_not_say_what_is_free(monkeypatch):
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) != "/proc/meminfo" and exists(path))
    with pytest.raises(ValueError, match="teacher_cache: wanted an operating system that says how much memory is free"):
        teacher_cache._free_memory()
