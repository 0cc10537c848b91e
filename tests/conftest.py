# SPDX-License-Identifier: Apache-2.0

"""What several test files share: the machine in pytest's header, feature pyramids, a small data set, a shell."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROLES, make_mask, make_picture
from PIL import Image

from anomalib_stfpm_ext.ops import native


def pytest_report_header() -> str:
    return (
        f"scorer: {native.selected_isa()} of {', '.join(native.built_isas)}, built by {native.compiler}; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in a new interpreter, away from the source tree, and return what it printed."""

    def run(script: str, *options: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, *options, "-c", script],
            cwd=tmp_path,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert not check or result.returncode == 0, result.stderr
        return result

    return run


class SignalStack(ctypes.Structure):
    """stack_t of signal.h."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.fixture(autouse=True)
def no_dangling_signal_stack() -> Iterator[None]:
    """OpenVINO leaves an unmapped stack for signals behind: the end of a loader's worker would be a crash."""
    yield
    disable = 2
    ctypes.CDLL(None).sigaltstack(ctypes.byref(SignalStack(None, disable, 0)), None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch use one thread: networks of a few thousand weights are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def resnet18_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a whole ResNet18, classifier included, as torchvision ships them; the values are random."""
    import timm  # here, since the tests of the scorer alone need none

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(timm.create_model("resnet18", zero_init_last=False).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of test_resnet, timm's smallest ResNet, for tests in which any network will do; the values are random."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_resnet.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    return path


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a data set for anomalib's Folder: noise, with a red patch in the bad images."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for folder, count in (("good", 8), ("good_test", 4), ("bad", 4)):
        (root / folder).mkdir()
        for index in range(count):
            pixels = rng.normal(128, 20, (48, 64, 3)).clip(0, 255).astype(np.uint8)
            if folder == "bad":
                pixels[10:30, 20:40] = (255, 0, 0)
            Image.fromarray(pixels).save(root / folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def mvtec_ad(tmp_path_factory):
    """Make two categories. Pill has no masks."""
    root, rng = tmp_path_factory.mktemp("MVTecAD"), np.random.default_rng(0)
    for category in ("bottle", "pill"):
        for role, count in ROLES.items():
            for index in range(count):
                make_picture(root / category / role / f"{index:03}.png", "good" not in role, rng)
                if category == "bottle" and "good" not in role:
                    make_mask(root / category / "ground_truth" / Path(role).name / f"{index:03}_mask.png")
    (root / "license.txt").touch()
    return root
