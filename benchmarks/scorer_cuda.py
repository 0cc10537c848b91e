# SPDX-License-Identifier: Apache-2.0

"""Times the scorer on a CUDA device beside anomalib's map generator, eager and under torch.compile, in one process.

Needs torch alone: where anomalib is not installed, its generator's operations are stated here. Features rotate through
more memory than the L2 cache holds; the candidates take turns; every figure is a median. "device" is the time on the
device with calls back to back, "wall" one call from Python until its result is there, "graph" one call in a CUDA graph.
The floor is what the device needs for the compulsory bytes at the copy bandwidth measured in the same run.
"""

import argparse
import itertools
import statistics
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import LAYOUTS, Pyramid, Timer, describe_machine, make_features, nbytes, save, time_in_turns
from torch.nn import functional as F

from anomalib_stfpm_ext import _core, anomaly_map

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


def copy_bandwidth(device: torch.device, timer: Timer) -> float:
    """Measure the bytes a second, read and written, of a copy far beyond the caches."""
    source = torch.ones(1 << 28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / statistics.median(timer.device_seconds(lambda: target.copy_(source)) for _ in range(10))


def make_sets(
    batch: int, size: int, layout: str, dtype: torch.dtype, device: torch.device, total: int
) -> list[tuple[Pyramid, Pyramid]]:
    """Make sets of features of teacher and student, together at least `total` bytes, three at least."""
    sets = [make_features(batch, size, layout, dtype, device)]
    while len(sets) < 3 or len(sets) * nbytes(*sets[0]) < total:
        sets.append(make_features(batch, size, layout, dtype, device))
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
            torch.testing.assert_close(candidate(*sets[0]), ours, rtol=1e-3, atol=0, msg=partial("{}: {}".format, name))

    def all_sets(candidate: Scorer) -> None:
        for teacher, student in sets:
            candidate(teacher, student)

    features = itertools.cycle(sets)

    def one_set(candidate: Scorer) -> None:
        candidate(*next(features))

    works: dict[str, Callable[[], Any]] = {name: partial(all_sets, c) for name, c in candidates.items()}
    if timer.cuda:
        works |= {f"{name}, graph": capture(work) for name, work in works.items()}
    device_seconds = time_in_turns(works, seconds / 2, timer.device_seconds)
    single = {name: partial(one_set, candidate) for name, candidate in candidates.items()}
    return {
        "batch": batch,
        "size": size,
        "layout": layout,
        "dtype": str(dtype).removeprefix("torch."),
        "device_seconds": {name: duration / len(sets) for name, duration in device_seconds.items()},
        "wall_seconds": time_in_turns(single, seconds / 2, timer.wall_seconds),
        "floor": (nbytes(*sets[0]) + 4 * batch * size**2) / bandwidth,
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
    machine = describe_machine() | {"cuda": torch.version.cuda, "copy_bandwidth": bandwidth}
    machine["scorer_holds"] = _core.cuda_architectures
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
            save(arguments.json, machine, cases)
        if arguments.table:
            arguments.table.write_text(f"{heading}\n\n{table(cases)}\n")


if __name__ == "__main__":
    main()
