# SPDX-License-Identifier: Apache-2.0

"""Times the scorer beside anomalib's map generator, eager and under torch.compile, in one process.

They take turns, so that a busy machine slows all of them, and each finds the caches full of another's data; every
figure is a median. Two floors stand beside them: what the machine needs to read the features once and write the map
once, at the read and write speed measured in the same run; and torch's own sum over the same features. "out=" is ours
with memory of the caller, which spares the page faults of a fresh map.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anomalib.models.image.stfpm.anomaly_map import AnomalyMapGenerator
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from anomalib_stfpm_ext import _core, anomaly_map

RESNET18 = ((64, 4), (128, 8), (256, 16))  # channels and stride of each level
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def cpu_model() -> str:
    """Name the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def make_features(batch: int, size: int, layout: str, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Make the features of a ResNet18's teacher and student for images of one size."""
    teacher, student = {}, {}
    for channels, stride in RESNET18:
        features = torch.randn(batch, channels, size // stride, size // stride)
        for side, noise in ((teacher, 0.0), (student, 0.1)):
            noisy = features + noise * torch.randn_like(features)
            side[f"stride {stride}"] = noisy.to(dtype).contiguous(memory_format=LAYOUTS[layout])
    return [teacher, student]


def time_in_turns(candidates: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Return the median seconds of each candidate; all run in turn until the time is up, five times at least."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times[next(iter(times))]) < 5:
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(samples) for name, samples in times.items()}


def measure_bandwidth() -> dict[str, float]:
    """Measure how many bytes a second torch reads (sum) and writes (fill) with its threads, far beyond the caches."""
    buffer = torch.ones(1 << 28)  # 1 GiB
    seconds = time_in_turns({"read": buffer.sum, "write": lambda: buffer.fill_(1.0)}, 2.0)
    return {name: buffer.nbytes / duration for name, duration in seconds.items()}


def measure(batch: int, size: int, layout: str, dtype: torch.dtype, bandwidth: dict[str, float]) -> dict[str, Any]:
    """Time one case after making sure that all candidates compute the same."""
    teacher, student = make_features(batch, size, layout, dtype)
    generator = AnomalyMapGenerator()
    torch.compiler.reset()
    compiled = torch.compile(AnomalyMapGenerator())
    arguments = {"teacher_features": teacher, "student_features": student, "image_size": (size, size)}
    out = [torch.zeros(batch, 1, size, size), torch.zeros(batch)]
    candidates = {  # ours after the slowest, which leaves the least of the features in the caches
        "sum": lambda: [level.sum() for side in (teacher, student) for level in side.values()],
        "eager": lambda: generator(**arguments).amax(dim=(1, 2, 3)),
        "ours": lambda: anomaly_map(teacher, student, (size, size)),
        "compiled": lambda: compiled(**arguments).amax(dim=(1, 2, 3)),
        "ours, out=": lambda: anomaly_map(teacher, student, (size, size), out=out),
    }
    if dtype == torch.float32:
        for name in ("eager", "compiled"):
            torch.testing.assert_close(
                candidates[name](), anomaly_map(teacher, student, (size, size))[1], rtol=1e-3, atol=0
            )
    seconds = time_in_turns(candidates, 3.0)
    read = sum(level.nbytes for side in (teacher, student) for level in side.values())
    floor = read / bandwidth["read"] + 4 * batch * size**2 / bandwidth["write"]
    case = {"batch": batch, "size": size, "layout": layout, "dtype": str(dtype).removeprefix("torch.")}
    return case | {"seconds": seconds, "floor": floor}


def measure_overhead() -> dict[str, float]:
    """Time calls in a row, for 3 levels of one value each (nothing but overhead) and for a 64x64 image.

    Microseconds suffer most from a busy machine: each figure is the median of the quietest of ten rounds.
    """
    points = [[torch.ones(1, 1, 1, 1) for _ in RESNET18] for _ in range(2)]
    teacher, student = make_features(1, 64, "NCHW", torch.float32)
    calls = {
        "3 levels of one value": lambda: anomaly_map(*points, (1, 1)),
        "64x64": lambda: anomaly_map(teacher, student, (64, 64)),
    }
    return {name: min(time_in_turns({name: call}, 0.3)[name] for _ in range(10)) for name, call in calls.items()}


def print_table(cases: list[dict[str, Any]]) -> None:
    """Print one row for each case."""
    table = Table(title="anomaly map and score of ResNet18 features, milliseconds (median)")
    for column in (
        "batch",
        "size",
        "layout",
        "dtype",
        "eager",
        "compiled",
        "ours",
        "out=",
        "sum",
        "floor",
        "x eager",
        "x compiled",
        "of floor",
    ):
        table.add_column(column, justify="right")
    for case in cases:
        seconds = case["seconds"]
        table.add_row(
            *(str(case[key]) for key in ("batch", "size", "layout", "dtype")),
            *(f"{1e3 * seconds[name]:.3f}" for name in ("eager", "compiled", "ours", "ours, out=", "sum")),
            f"{1e3 * case['floor']:.3f}",
            *(f"{seconds[peer] / seconds['ours']:.1f}" for peer in ("eager", "compiled")),
            f"{case['floor'] / seconds['ours']:.0%}",
        )
    Console(width=140).print(table)


def draw(cases: list[dict[str, Any]], file: Path) -> None:
    """Draw the speed-up over both peers by batch and by image size, and the share of the machine's bandwidth."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    by_batch = [case for case in cases if case["size"] == 256]
    by_size = [case for case in cases if case["batch"] == 1]
    for axis, selected, key in ((axes[0], by_batch, "batch"), (axes[1], by_size, "size")):
        for layout, line in zip(LAYOUTS, ("-", "--"), strict=True):
            points = sorted((case for case in selected if case["layout"] == layout), key=lambda case: case[key])
            for peer, colour in (("eager", "tab:orange"), ("compiled", "tab:blue")):
                speedup = [case["seconds"][peer] / case["seconds"]["ours"] for case in points]
                axis.plot(
                    [case[key] for case in points], speedup, line, color=colour, marker="o", label=f"{peer}, {layout}"
                )
        axis.set(xscale="log", yscale="log", xlabel=key, ylabel="times faster than anomalib")
        axis.set_xticks([case[key] for case in points], [str(case[key]) for case in points], minor=False)
        axis.axhline(1, color="grey", linewidth=0.5)
    axes[0].legend(fontsize=8)
    for layout, line in zip(LAYOUTS, ("-", "--"), strict=True):
        points = sorted((case for case in by_batch if case["layout"] == layout), key=lambda case: case["batch"])
        for name, colour in (("eager", "tab:orange"), ("compiled", "tab:blue"), ("ours", "tab:green")):
            share = [case["floor"] / case["seconds"][name] for case in points]
            axes[2].plot(
                [case["batch"] for case in points], share, line, color=colour, marker="o", label=f"{name}, {layout}"
            )
    axes[2].set(xscale="log", ylim=(0, 1), xlabel="batch", ylabel="share of the machine's bandwidth")
    axes[2].set_xticks([case["batch"] for case in points], [str(case["batch"]) for case in points], minor=False)
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=75)


def main() -> None:
    """Measure the cases given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="batches of 256x256 images")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 1024, 4096], help="sizes of single images")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw them, as a PNG")
    arguments = parser.parse_args()

    bandwidth = measure_bandwidth()
    machine = {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": _core.selected_isa(),
        "compiler": _core.compiler,
        "torch": torch.__version__,
        "bandwidth": bandwidth,
        "call_seconds": measure_overhead(),
    }
    print(f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, torch {machine['torch']}")
    print(f"read {bandwidth['read'] / 1e9:.1f} GB/s, write {bandwidth['write'] / 1e9:.1f} GB/s")
    for name, seconds in machine["call_seconds"].items():
        print(f"a call in a row, {name}: {1e6 * seconds:.0f} microseconds")
    cases = [
        measure(batch, size, layout, getattr(torch, dtype), bandwidth)
        for dtype in arguments.dtypes
        for batch, size in [(batch, 256) for batch in arguments.batches] + [(1, size) for size in arguments.sizes]
        for layout in LAYOUTS
    ]
    print_table(cases)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine, "cases": cases}, indent=1) + "\n")
    if arguments.plot:
        draw(cases, arguments.plot)


if __name__ == "__main__":
    main()
