# SPDX-License-Identifier: Apache-2.0

"""benchmarks/gpu_session.sh, up to where it needs a GPU: a machine with CUDA is no place to find out that it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_session.sh"
NOT_THERE = ("anomalib", "lightning", "timm", "torchvision")  # on a machine that has torch alone


@pytest.fixture
def wheels(tmp_path):
    """Download what the script's header says."""
    folder = tmp_path / "wheels"
    command = next(line.strip("# ") for line in SCRIPT.read_text().splitlines() if "pip download" in line)
    command = [sys.executable, "-m", *command.replace("WHEELS", str(folder)).split()]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("pip reaches no index")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_builds_without_a_network_and_its_steps_start(wheels, tmp_path):
    for name in NOT_THERE:
        (tmp_path / "path" / name).mkdir(parents=True)
        (tmp_path / "path" / name / "__init__.py").write_text(f"raise ImportError('no {name}')")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # no .pth file is read, as without the plugin
    python.chmod(0o755)
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    environ = {
        **os.environ,
        "PYTHON": str(python),
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), *packages]),
        "ARCHITECTURE": "90",
        "PIP_NO_CACHE_DIR": "1",
        "https_proxy": "http://127.0.0.1:9",  # where nobody answers
        "http_proxy": "http://127.0.0.1:9",
    }
    result = subprocess.run(
        [SCRIPT, "--build-only", tmp_path / "results", wheels],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "for CUDA 90, 90 (PTX)" in result.stdout
    assert "test_cuda.py::test_exactly_one_launch" in (tmp_path / "results" / "tests.log").read_text()
    assert {log.stem for log in (tmp_path / "results").iterdir()} == {"build", "look", "tests", "scorer_cuda", "loss"}
