# SPDX-License-Identifier: Apache-2.0

"""What a build says where a compiler is missing or does not work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def configure(tmp_path):
    """Configure a build, and return whether that went well and what it said, in one line."""

    def run(*options: str, **env: str) -> tuple[bool, str]:
        cmake = Path(sys.executable).with_name("cmake")
        command = [cmake, "-S", ROOT, "-B", tmp_path / "build", "-DSKBUILD_PROJECT_VERSION=0", *options]
        result = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
        return result.returncode == 0, " ".join((result.stdout + result.stderr).split())

    return run


def make_nvcc(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


RELEASE = '[ "$1" = --version ] && echo "Cuda compilation tools, release {}, V0" && exit 0\n'


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "echo 'libcudart.so.12: cannot open shared object file' >&2; exit 127",
            "It says: libcudart.so.12: cannot open",
        ),
        (RELEASE.format("12.4") + "echo 'unsupported GNU version!' >&2; exit 1", "It says: unsupported GNU version!"),
        (RELEASE.format("11.8") + "exit 1", "CUDA 12 or newer is needed, and"),
    ],
    ids=["broken", "cannot compile", "old"],
)
def test_nvcc_that_does_not_work(configure, tmp_path, script, said):
    nvcc = make_nvcc(tmp_path / "nvcc", script)
    went_well, output = configure(CUDACXX=nvcc)
    assert went_well
    assert "No CUDA scorer: " in output
    assert nvcc in output
    assert said in output
    assert ("STFPM_EXT_CUDA=OFF" in output and "Warning" in output) == ("It says" in said)
    went_well, output = configure("-DSTFPM_EXT_CUDA=ON", CUDACXX=nvcc)
    assert not went_well
    assert "STFPM_EXT_CUDA=ON, but" in output
    assert said in output


def test_nvcc_that_is_not_there(configure):
    went_well, output = configure(CUDACXX="/nowhere/nvcc")
    assert went_well
    assert "No CUDA scorer: /nowhere/nvcc does not work. It says: no such file" in output


def test_no_compiler(configure):
    went_well, output = configure(CXX="/nowhere/g++")
    assert not went_well
    assert "No C++ compiler that works was found" in output
    assert "STFPM_EXT_CORE=OFF" in output
    assert configure("-DSTFPM_EXT_CORE=OFF", CXX="/nowhere/g++")[0]
