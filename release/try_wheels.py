# SPDX-License-Identifier: Apache-2.0

"""Tries the wheels of dist/, each in a fresh environment of its Python: right maps, and as fast as a build by GCC.

Wheels for x86-64 run here; beside each of them runs what the machine's own compiler makes of the sdist. One wheel for
aarch64 runs under qemu-user, with the Python of Debian that debootstrap unpacks. All maps have to be identical bit for
bit. Run it as root on a Debian on x86-64 with the packages debootstrap and qemu-user-static, or with --skip-aarch64.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from wheels import ROOT, find_python, run

SLOWER = 1.1  # times GCC's build, at most
ROUNDS = 5
DEBIAN, DEBIANS_PYTHON = "bookworm", "3.11"


def score(*command: Any, **environ: str) -> dict[str, Any]:
    """Run release/score.py, which also refuses a wrong instruction set, with a Python."""
    printed = run(*command, ROOT / "release" / "score.py", env=os.environ | environ)
    result: dict[str, Any] = json.loads(printed)
    return result


def try_here(wheel: Path, version: str, sdist: Path) -> dict[str, Any]:
    """Try a wheel for this machine; the times are the medians of rounds, in turns with GCC's build."""
    with tempfile.TemporaryDirectory() as folder:
        run(find_python(version), "-m", "venv", f"{folder}/venv")
        pip = (f"{folder}/venv/bin/pip", "--disable-pip-version-check", "install", "--no-deps")
        run(*pip, "numpy", wheel)
        run(*pip, "--target", f"{folder}/gcc", sdist, env=os.environ | {"SKBUILD_CMAKE_DEFINE": "STFPM_EXT_CUDA=OFF"})
        python, ours, theirs = f"{folder}/venv/bin/python", [], []
        for _ in range(ROUNDS):
            ours.append(score(python))
            theirs.append(score(python, PYTHONPATH=f"{folder}/gcc"))
    ratios = [
        statistics.median(a["milliseconds"][case] for a in ours)
        / statistics.median(b["milliseconds"][case] for b in theirs)
        for case in (0, 1)
    ]
    if max(ratios) > SLOWER:
        sys.exit(f"{wheel.name} takes {ratios} times as long as GCC's build of the same sdist")
    return ours[0] | {"beside": theirs[0]["compiler"], "sha256s": {theirs[0]["sha256"]}, "ratios": ratios}


def try_emulated(wheel: Path) -> dict[str, Any]:
    """Try a wheel for aarch64 under qemu-user, whose times mean nothing."""
    with tempfile.TemporaryDirectory() as folder:
        # The first stage alone, since the second would run programs of aarch64 in a chroot.
        options = "--arch=arm64 --variant=minbase --foreign --include=python3"
        run("debootstrap", *options.split(), DEBIAN, f"{folder}/root")
        for package in Path(folder, "root/var/cache/apt/archives").glob("*.deb"):
            run("dpkg-deb", "--extract", package, f"{folder}/root")
        options = f"--no-deps --only-binary=:all: --target {folder}/site --python-version {DEBIANS_PYTHON}"
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)]
        run(sys.executable, "-m", "pip", "install", *options.split(), *platforms, "numpy", wheel)
        python = ("qemu-aarch64-static", "-L", f"{folder}/root", f"{folder}/root/usr/bin/python{DEBIANS_PYTHON}")
        return score(*python, PYTHONPATH=f"{folder}/site")


def main() -> None:
    """Try all that is there, and say what was not tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder of the sdist and the wheels")
    parser.add_argument("--skip-aarch64", action="store_true")
    arguments = parser.parse_args()
    (sdist,) = arguments.dist.resolve().glob("*.tar.gz")
    checksums = set()
    for wheel in sorted(sdist.parent.glob("*.whl")):
        major, minor, architecture = re.fullmatch(r".*-cp(\d)(\d+)-.*_(x86_64|aarch64)\.whl", wheel.name).groups()  # type: ignore[union-attr]
        version = f"{major}.{minor}"
        if architecture == "x86_64":
            result = try_here(wheel, version, sdist)
            checksums |= result["sha256s"]
            times = " and ".join(f"{ratio:.2f}" for ratio in result["ratios"])
            beside = f"{times} times the time of {result['beside']}'s at batch 1 and 8"
        elif version != DEBIANS_PYTHON or arguments.skip_aarch64:
            print(f"{wheel.name}: not tried")
            continue
        else:
            result, beside = try_emulated(wheel), "under qemu"
        checksums.add(result["sha256"])
        print(f"{wheel.name}: {result['compiler']}, {result['isa']}, right maps, {beside}")
    if len(checksums) != 1:
        sys.exit(f"The maps are not identical bit for bit: {checksums}")
    print(f"All maps are identical bit for bit: {checksums.pop()}")


if __name__ == "__main__":
    main()
