# SPDX-License-Identifier: Apache-2.0

"""A fit on a CPU keeps the memory that its steps free, and gives it back at its end."""

import os
import resource
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from helpers import folder
from lightning.pytorch import Callback

from anomalib_stfpm_ext import StfpmExt

pytestmark = pytest.mark.skipif(
    any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ),
    reason="glibc has its limits from the environment",
)


def page_faults() -> int:
    """Return how many page faults it takes to use and free 256 MiB again and again.

    That is more than earlier tests leave free between what is in use, where glibc would find room without a fault.
    """
    torch.zeros(1 << 26)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(1 << 26).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


class Look(Callback):
    """Counts page faults within the fit; may end it."""

    def __init__(self, error: type[BaseException] | None = None) -> None:
        self.error = error
        self.faults = -1

    def on_train_epoch_end(self, *_):
        self.faults = page_faults()
        if self.error:
            raise self.error


def fit(look: Look, images, tmp_path) -> None:
    pre_processor = StfpmExt.configure_pre_processor((48, 64))
    model = StfpmExt("test_resnet", ["layer1"], False, lr=0.05, visualizer=False, pre_processor=pre_processor)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Engine([look], max_epochs=1, limit_val_batches=0, default_root_dir=tmp_path, **quiet).fit(model, folder(images))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_kept_until_the_fit_ends(images, tmp_path, error):
    before = page_faults()
    look = Look(error)
    if error:
        with pytest.raises((error, SystemExit)):
            fit(look, images, tmp_path)
    else:
        fit(look, images, tmp_path)
    assert 0 <= look.faults < before / 3  # the heap may grow once more
    assert page_faults() > before / 2


def test_users_own_settings_stay(images, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    before = page_faults()
    look = Look()
    fit(look, images, tmp_path)
    assert look.faults > before / 2


IN_A_THREAD = """
import sys, threading
from pathlib import Path
from test_allocator import Look, fit, page_faults

before = page_faults()
look = Look()
thread = threading.Thread(target=fit, args=(look, *map(Path, sys.argv[1:])))
thread.start()
thread.join()
print("page faults", look.faults / before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("arenas", ["", "1"])
def test_off_the_main_thread(images, tmp_path, python, arenas):
    folders = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}", "MALLOC_ARENA_MAX": arenas}
    script = IN_A_THREAD.replace("sys.argv[1:]", repr([str(images), str(tmp_path)]))
    result = python(script, **folders)
    faults = float(result.stdout.split("page faults")[1])
    if arenas:
        assert faults < 1 / 3
    assert (result.stderr + result.stdout).count("with MALLOC_ARENA_MAX=1 in the environment") == (not arenas)
