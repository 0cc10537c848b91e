# SPDX-License-Identifier: Apache-2.0

"""``csrc/cpu`` compiles, without warnings, for systems that none of our machines is; nothing of it runs."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def find_zig() -> Path | None:
    try:
        return Path(distribution("ziglang").locate_file("ziglang/zig"))
    except PackageNotFoundError:
        return None


@pytest.mark.slow
@pytest.mark.skipif(find_zig() is None, reason="needs ziglang")
@pytest.mark.parametrize(("system", "target"), [("Windows", "x86_64-windows-gnu"), ("Darwin", "aarch64-macos")])
def test_csrc_compiles(system, target, tmp_path):
    settings = {
        "CMAKE_SYSTEM_NAME": system,
        "CMAKE_CXX_COMPILER": find_zig(),
        "CMAKE_CXX_COMPILER_ARG1": f"c++ -target {target}",
        "CMAKE_TRY_COMPILE_TARGET_TYPE": "STATIC_LIBRARY",  # zig builds a whole C library for the first program
        "CMAKE_INSTALL_NAME_TOOL": "install_name_tool",  # looked for, and not called
        "SKBUILD_PROJECT_VERSION": "0",
        "STFPM_EXT_CUDA": "OFF",
        "STFPM_EXT_WERROR": "ON",
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    cmake = Path(sys.executable).with_name("cmake")
    for command in ([cmake, "-S", ROOT, "-B", tmp_path, *options], [cmake, "--build", tmp_path]):
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        assert result.returncode == 0, result.stdout
