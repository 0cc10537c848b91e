# SPDX-License-Identifier: Apache-2.0

"""Times the scorer beside anomalib's map generator, eager and under torch.compile, in one process.

They take turns, so that a busy machine slows all of them, and before each call the caches are emptied. Every figure is
a median. Two floors stand beside them: what the machine needs to read the features once and write the map once, at the
read and write speed measured in the same run; and torch's own sum over the same features. "out=" is ours with memory of
the caller, which saves the page faults of a fresh map; "core" is the compiled function alone on that memory, without
Python's checks and torch's dispatch.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from anomalib.models.image.stfpm.anomaly_map import AnomalyMapGenerator
from common import (
    LAYOUTS,
    LEVEL_WEIGHTS,
    RESNET18,
    CacheEviction,
    describe_machine,
    make_features,
    measure_bandwidth,
    nbytes,
    print_machine,
    save,
    time_in_turns,
)
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from anomalib_stfpm_ext import anomaly_map
from anomalib_stfpm_ext.ops import native
from anomalib_stfpm_ext.ops.anomaly_map import TENSORS
from anomalib_stfpm_ext.ops.arguments import check_options


def measure(batch: int, size: int, layout: str, dtype: torch.dtype, bandwidth: dict[str, float]) -> dict[str, Any]:
    """Time one case after making sure that all candidates compute the same."""
    teacher, student = make_features(batch, size, layout, dtype)
    generator = AnomalyMapGenerator()
    torch.compiler.reset()
    compiled = torch.compile(AnomalyMapGenerator())
    arguments = {
        "teacher_features": dict(enumerate(teacher)),
        "student_features": dict(enumerate(student)),
        "image_size": (size, size),
    }
    out = [torch.zeros(batch, 1, size, size), torch.zeros(batch)]
    options = check_options(None, "product", None, False, RESNET18)
    call = native.scorer_call(teacher, student, out, options, TENSORS)
    candidates = {
        "sum": lambda: [level.sum() for side in (teacher, student) for level in side],
        "eager": lambda: generator(**arguments).amax(dim=(1, 2, 3)),
        "compiled": lambda: compiled(**arguments).amax(dim=(1, 2, 3)),
        "ours": lambda: anomaly_map(teacher, student, (size, size)),
        "ours, out=": lambda: anomaly_map(teacher, student, (size, size), out=out),
        "ours, weights": lambda: anomaly_map(teacher, student, (size, size), weights=LEVEL_WEIGHTS),
        "core": lambda: native.anomaly_map(call, torch.get_num_threads()),
    }
    scores = anomaly_map(teacher, student, (size, size))[1]
    candidates["core"]()
    torch.testing.assert_close(out[1], scores, rtol=0, atol=0)
    if dtype == torch.float32:
        for name in ("eager", "compiled"):
            torch.testing.assert_close(candidates[name](), scores, rtol=1e-3, atol=0)
    seconds = time_in_turns(candidates, 3.0, before=CacheEviction())
    floor = nbytes(teacher, student) / bandwidth["read"] + out[0].nbytes / bandwidth["write"]
    case = {"batch": batch, "size": size, "layout": layout, "dtype": str(dtype).removeprefix("torch.")}
    return case | {"seconds": seconds, "floor": floor}


def measure_overhead() -> dict[str, float]:
    """Time calls in a row, for 3 levels of one value each (nothing but overhead) and for a 64x64 image.

    Microseconds suffer most from a busy machine: each figure is the median of the quietest of ten rounds.
    """
    point = [torch.ones(1, 1, 1, 1) for _ in RESNET18]
    teacher, student = make_features(1, 64, "NCHW", torch.float32)
    calls = {
        "3 levels of one value": lambda: anomaly_map(point, point, (1, 1)),
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
        "weights",
        "core",
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
            *(
                f"{1e3 * seconds[name]:.3f}"
                for name in ("eager", "compiled", "ours", "ours, out=", "ours, weights", "core", "sum")
            ),
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
    machine = describe_machine() | {"bandwidth": bandwidth, "call_seconds": measure_overhead()}
    print_machine(machine)
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
        save(arguments.json, machine, cases)
    if arguments.plot:
        draw(cases, arguments.plot)


if __name__ == "__main__":
    main()
