# SPDX-License-Identifier: Apache-2.0

"""Headers of ``csrc/`` hide none of the system's from those who compile with ``-I csrc``."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_no_header_is_called_like_one_of_the_systems():
    command, english = [COMPILER, "-x", "c++", "-E", "-v", os.devnull], {**os.environ, "LC_ALL": "C"}
    report = subprocess.run(command, capture_output=True, text=True, check=True, env=english).stderr
    listing = report.partition("#include <...> search starts here:\n")[2]
    folders = [Path(line.strip()) for line in listing.partition("End of search list")[0].splitlines()]
    system = {file.name for folder in folders for file in folder.iterdir() if not file.is_dir()}
    assert {"vector", "math.h"} <= system  # they are found
    assert system.isdisjoint(file.name for file in CSRC.rglob("*.*"))
