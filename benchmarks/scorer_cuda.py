# SPDX-License-Identifier: Apache-2.0

"""Times the scorer on a CUDA device beside anomalib's map generator, eager and under torch.compile, in one process.

Needs torch alone: where anomalib is not installed, its generator's operations are stated here. Features rotate through
more memory than the L2 cache holds; the candidates take turns; every figure is a median. "device" is the time on the
device with calls back to back, "wall" one call from Python until its result is there, "graph" one call in a CUDA graph.
The floor is what the device needs for the compulsory bytes at the copy bandwidth measured in the same run.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from anomalib_stfpm_ext import _core, anomaly_map

RESNET18 = ((64, 4), (128, 8), (256, 16))  # channels and stride of each level
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
Pyramid = list[torch.Tensor]
Scorer = Callable[[Pyramid, Pyramid], torch.Tensor]


def generator(size: int) -> Scorer:
    """Return anomalib's map generator and the score, or the same operations where anomalib is not installed."""
    try:
        from anomalib.models.image.stfpm.anomaly_map import AnomalyMapGenerator
    except ImportError:

        def amap(teacher: Pyramid, student: Pyramid) -> torch.Tensor:
            product = torch.ones(teacher[0].shape[0], 1, size, size)
            for t, s in zip(teacher, student, strict=True):
                distance = 0.5 * torch.norm(F.normalize(t) - F.normalize(s), p=2, dim=-3, keepdim=True) ** 2
                product = product.to(t.device)
                product *= F.interpolate(distance, size=(size, size), align_corners=False, mode="bilinear")
            return product

    else:
        theirs = AnomalyMapGenerator()

        def amap(teacher: Pyramid, student: Pyramid) -> torch.Tensor:
            levels = [dict(enumerate(side)) for side in (teacher, student)]
            result: torch.Tensor = theirs(
                teacher_features=levels[0], student_features=levels[1], image_size=(size, size)
            )
            return result

    return lambda teacher, student: amap(teacher, student).amax(dim=(1, 2, 3))


class Timer:
    """Time on a device; on the CPU, for trying this script out, time on the clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def device_seconds(self, work: Callable[[], Any]) -> float:
        """Return what the device takes for all that `work` enqueues."""
        if not self.cuda:
            return self.wall_seconds(work)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def wall_seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds until `work` is done."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start


def copy_bandwidth(device: torch.device, timer: Timer) -> float:
    """Measure the bytes a second, read and written, of a copy far beyond the caches."""
    source = torch.ones(1 << 28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / statistics.median(timer.device_seconds(lambda: target.copy_(source)) for _ in range(10))


def make_sets(batch: int, size: int, layout: str, dtype: torch.dtype, device: torch.device, total: int) -> list[Any]:
    """Make sets of features of teacher and student, together at least `total` bytes, three at least."""
    sets: list[Any] = []
    while len(sets) < 3 or len(sets) * sum(level.nbytes for side in sets[0] for level in side) < total:
        teacher, student = [], []
        for channels, stride in RESNET18:
            level = torch.randn(batch, channels, size // stride, size // stride, device=device)
            for side, noise in ((teacher, 0.0), (student, 0.1)):
                noisy = (level + noise * torch.randn_like(level)).to(dtype)
                side.append(noisy.contiguous(memory_format=LAYOUTS[layout]))
        sets.append((teacher, student))
    return sets


def capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """Record a call into a CUDA graph, and return what replays it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(
    batch: int, size: int, layout: str, dtype: torch.dtype, device: torch.device, bandwidth: float, seconds: float
) -> dict[str, Any]:
    """Time one case after making sure that all candidates compute the same."""
    timer = Timer(device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if timer.cuda else 1 << 20
    sets = make_sets(batch, size, layout, dtype, device, 4 * cache)
    eager = generator(size)
    candidates: dict[str, Scorer] = {
        "eager": eager,
        "ours": lambda teacher, student: anomaly_map(teacher, student, (size, size))[1],
        "compiled": torch.compile(eager),
        "max-autotune": torch.compile(eager, mode="max-autotune-no-cudagraphs"),
    }
    torch.compiler.reset()
    ours = candidates["ours"](*sets[0])
    for name, candidate in candidates.items():
        if dtype == torch.float32:
            torch.testing.assert_close(candidate(*sets[0]), ours, rtol=1e-3, atol=0, msg=lambda m, n=name: f"{n}: {m}")

    def all_sets(candidate: Scorer) -> None:
        for teacher, student in sets:
            candidate(teacher, student)

    works: dict[str, Callable[[], Any]] = {name: lambda c=c: all_sets(c) for name, c in candidates.items()}
    if timer.cuda:
        works |= {f"{name}, graph": capture(work) for name, work in works.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    walls: dict[str, list[float]] = {name: [] for name in candidates}
    for work in works.values():
        work()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or len(walls["ours"]) < 3:
        for name, work in works.items():
            times[name].append(timer.device_seconds(work) / len(sets))
        for index, (name, candidate) in enumerate(candidates.items()):
            teacher, student = sets[(len(walls[name]) + index) % len(sets)]
            walls[name].append(timer.wall_seconds(lambda c=candidate, t=teacher, s=student: c(t, s)))
    compulsory = sum(level.nbytes for side in sets[0] for level in side) + 4 * batch * size**2
    return {
        "batch": batch,
        "size": size,
        "layout": layout,
        "dtype": str(dtype).removeprefix("torch."),
        "device_seconds": {name: statistics.median(samples) for name, samples in times.items()},
        "wall_seconds": {name: statistics.median(samples) for name, samples in walls.items()},
        "floor": compulsory / bandwidth,
    }


def table(cases: list[dict[str, Any]]) -> str:
    """Return one row of Markdown for each case, times in microseconds."""
    names = ["eager", "compiled", "max-autotune", "ours", "ours, graph"]
    lines = [
        f"| batch | size | layout | dtype | {' | '.join(names)} | floor | of floor | wall: eager | ours |",
        "|---" * (len(names) + 8) + "|",
    ]
    for case in cases:
        device, wall = case["device_seconds"], case["wall_seconds"]
        cells = [str(case[key]) for key in ("batch", "size", "layout", "dtype")]
        cells += [f"{1e6 * device[name]:.1f}" if name in device else "" for name in names]
        cells += [f"{1e6 * case['floor']:.1f}", f"{case['floor'] / device['ours']:.0%}"]
        cells += [f"{1e6 * wall[name]:.0f}" for name in ("eager", "ours")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the cases given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"])
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on each case, compilation apart")
    parser.add_argument("--device", default="cuda", help="cpu tries this script out")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--table", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not (torch.cuda.is_available() and _core.cuda_architectures):
        parser.error("a CUDA device and a build with CUDA are needed")

    bandwidth = copy_bandwidth(device, Timer(device))
    machine = {"torch": torch.__version__, "cuda": torch.version.cuda, "copy_bandwidth": bandwidth}
    machine |= {"scorer_holds": _core.cuda_architectures, "compiler": _core.compiler}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["driver"] = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split("\n")[0]
    heading = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "copy_bandwidth")
    heading += f"; copy {bandwidth / 1e9:.0f} GB/s; microseconds"
    print(heading, flush=True)
    cases: list[dict[str, Any]] = []
    for dtype, size, batch, layout in itertools.product(arguments.dtypes, arguments.sizes, arguments.batches, LAYOUTS):
        cases.append(measure(batch, size, layout, getattr(torch, dtype), device, bandwidth, arguments.seconds))
        print(table(cases).splitlines()[-1], flush=True)
        if arguments.json:  # after each case, so that a session which is cut off keeps what it has
            arguments.json.write_text(json.dumps({"machine": machine, "cases": cases}, indent=1) + "\n")
        if arguments.table:
            arguments.table.write_text(f"{heading}\n\n{table(cases)}\n")


if __name__ == "__main__":
    main()
