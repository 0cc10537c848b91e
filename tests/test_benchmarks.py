# SPDX-License-Identifier: Apache-2.0

"""A benchmark takes too long for a test; that it starts shows that its imports and arguments are sound."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", sorted(file.name for file in BENCHMARKS.glob("*.py") if file.name != "common.py"))
def test_starts(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    assert f"usage: {name}" in capsys.readouterr().out
