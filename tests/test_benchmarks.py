# SPDX-License-Identifier: Apache-2.0

"""A benchmark takes too long for a test; that it starts shows that its imports and arguments are sound."""

import os
import runpy
import shutil
import site
import subprocess
import sys
from pathlib import Path

import _anomalib_stfpm_ext_autoload
import pytest

from anomalib_stfpm_ext.ops import native

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", sorted(file.name for file in BENCHMARKS.glob("*.py") if file.name != "common.py"))
def test_starts(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    assert f"usage: {name}" in capsys.readouterr().out


def test_gpu_session_tests_what_it_has_built(tmp_path):
    """Its pytest finds the tests, the build outside of site-packages, and no other package of ours."""
    package = tmp_path / "anomalib_stfpm_ext"
    shutil.copytree(BENCHMARKS.parent / "anomalib_stfpm_ext", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(native._core.__file__, package)
    shutil.copy(_anomalib_stfpm_ext_autoload.__file__, tmp_path)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    script = (BENCHMARKS / "gpu_session.sh").read_text().splitlines()
    command = next(line for line in script if line.startswith("tests=("))
    result = subprocess.run(
        ["bash", "-c", f'{command}; "${{tests[@]}}" --collect-only --quiet'],
        cwd=BENCHMARKS.parent,
        # As on a machine without the plugin: no .pth file is read.
        env={
            **os.environ,
            "python": str(tmp_path / "python"),
            "PYTHONPATH": os.pathsep.join([str(tmp_path), *site.getsitepackages()]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "test_cuda.py::test_exactly_one_launch" in result.stdout
