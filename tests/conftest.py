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


# Most of the time of `import anomalib` is that of packages that know nothing of us.
HOST = """
import os, signal, sys, traceback
import torch
import kornia, lightning.pytorch, matplotlib.pyplot, onnx, pandas, skimage.measure, sklearn.ensemble, timm, torchvision
assert not [name for name in sys.modules if name.startswith("anomalib")]
for folder in sys.stdin:
    child = os.fork()
    if not child:
        signal.alarm(300)
        os.chdir(folder.strip())
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), number)
        code = 0
        try:
            exec(open("script.py").read(), {"__name__": "__main__"})
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the end of an interpreter takes longer than most scripts
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def host() -> Iterator[subprocess.Popen[str]]:
    """Start an interpreter that forks for each script; it has imported torch and much else, but nothing of anomalib."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOST], text=True, **pipes) as host:
        yield host
        host.stdin.close()


@pytest.fixture
def forked(
    host: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script as `python` does, but in a fork of `host`, where it is the first to import anomalib."""

    def run(script: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("forked")
        (folder / "script.py").write_text(script)
        print(folder, file=host.stdin, flush=True)
        code = int(host.stdout.readline())
        printed, told = ((folder / name).read_text() for name in ("stdout", "stderr"))
        assert not check or code == 0, told
        return subprocess.CompletedProcess([], code, printed, told)

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
