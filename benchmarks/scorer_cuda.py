# SPDX-License-Identifier: Apache-2.0

"""Times the scorer on a CUDA device beside anomalib's map generator, eager and under torch.compile, in one process.

Needs torch alone: where anomalib is not installed, its generator's operations are stated here. Features and results
rotate through more memory than the L2 cache holds; the candidates take turns; every figure is a median. "device" is the
time on the device with calls back to back, "graph" the same replayed from a CUDA graph, "wall" one call from Python
until its result is there. The floor is what the device needs for the compulsory bytes at the copy bandwidth measured in
the same run. (The eager generator copies from the host and so waits for the device in each call: there is no graph of
it, and its "device" includes Python.)

Compiling takes longest: all cases are measured without it first, and then, while time is left, with it.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    LAYOUTS,
    Pyramid,
    Timer,
    describe_machine,
    make_features,
    measure_bandwidth,
    nbytes,
    print_machine,
    save,
    time_in_turns,
)
from torch.nn import functional as F

from anomalib_stfpm_ext import anomaly_map
from anomalib_stfpm_ext.ops import native

Scorer = Callable[[Pyramid, Pyramid], tuple[torch.Tensor, ...]]  # map and score


def generator(size: int) -> Scorer:
    """Return anomalib's map generator with the score, or the same operations where anomalib is not installed."""
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

    def amap_and_score(teacher: Pyramid, student: Pyramid) -> tuple[torch.Tensor, ...]:
        result = amap(teacher, student)
        return result, result.amax(dim=(1, 2, 3))

    return amap_and_score


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
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Case:
    """Features of one kind, and what was measured on them.

    Args:
        batch (int): Images at a time.
        size (int): Height and width of an image.
        layout (str): One of ``LAYOUTS``.
        dtype (torch.dtype): Dtype of the features.
        device (torch.device): Where they are.
        bandwidth (float): Bytes a second of a copy.
    """

    def __init__(
        self, batch: int, size: int, layout: str, dtype: torch.dtype, device: torch.device, bandwidth: float
    ) -> None:
        self.timer, self.size = Timer(device), size
        cache = torch.cuda.get_device_properties(device).L2_cache_size if self.timer.cuda else 1 << 20
        self._make_sets = partial(make_sets, batch, size, layout, dtype, device, 4 * cache)
        self.figures: dict[str, Any] = {"batch": batch, "size": size, "layout": layout}
        self.figures["dtype"] = str(dtype).removeprefix("torch.")
        features = make_features(batch, size, layout, dtype, device)
        self.figures["floor"] = (nbytes(*features) + 4 * batch * size**2) / bandwidth

    def measure(self, compile_peers: bool, seconds: float) -> None:
        """Time all candidates after making sure that they agree, and ours with itself bit for bit."""
        sets, eager = self._make_sets(), generator(self.size)
        candidates: dict[str, Scorer] = {
            "ours": lambda teacher, student: anomaly_map(teacher, student, (self.size, self.size)),
            "eager": eager,
        }
        if compile_peers:
            torch.compiler.reset()
            candidates["compiled"] = torch.compile(eager)
            candidates["max-autotune"] = torch.compile(eager, mode="max-autotune-no-cudagraphs")
        self._check(candidates, *sets[0])

        def all_sets(candidate: Scorer) -> None:
            results = [candidate(*features) for features in sets]  # kept, so that each call writes elsewhere
            del results

        features = itertools.cycle(sets)
        works: dict[str, Callable[[], Any]] = {name: partial(all_sets, c) for name, c in candidates.items()}
        times = {"device": time_in_turns(works, seconds / 3, self.timer.device_seconds)}
        if self.timer.cuda:
            graphs = {name: capture(work) for name, work in works.items() if name != "eager"}
            times["graph"] = time_in_turns(graphs, seconds / 3, self.timer.device_seconds)
        for kind, medians in times.items():
            self.figures[f"{kind}_seconds"] = {name: median / len(sets) for name, median in medians.items()}
        single = {name: lambda c=c: c(*next(features)) for name, c in candidates.items()}
        self.figures["wall_seconds"] = time_in_turns(single, seconds / 3, self.timer.wall_seconds)

    @staticmethod
    def _check(candidates: Mapping[str, Scorer], teacher: Pyramid, student: Pyramid) -> None:
        ours = candidates["ours"](teacher, student)
        for again in (candidates["ours"](teacher, student) for _ in range(3)):
            assert all(map(torch.equal, again, ours)), "not the same bits in every run"
        # Half-precision features are exact in float32, which is what the eager code must compute in to compare.
        wide = [[level.float() for level in side] for side in (teacher, student)]
        for name, candidate in candidates.items():
            torch.testing.assert_close(
                candidate(*wide)[1], ours[1], rtol=1e-3, atol=0, msg=partial("{}: {}".format, name)
            )


COLUMNS = {"device": ("eager", "compiled", "max-autotune", "ours"), "graph": ("compiled", "max-autotune", "ours")}


def table(cases: list[dict[str, Any]]) -> str:
    """Return one row of Markdown for each case, times in microseconds."""
    names = [f"{kind}: {name}" for kind, columns in COLUMNS.items() for name in columns]
    names += ["floor", "of floor", "x eager", "x compiled", "wall: eager", "ours", "x eager"]
    lines = [f"| batch | size | layout | dtype | {' | '.join(names)} |", "|---" * (len(names) + 4) + "|"]
    for case in cases:
        device, wall = case["device_seconds"], case["wall_seconds"]
        graph = case.get("graph_seconds", device)
        cells = [str(case[key]) for key in ("batch", "size", "layout", "dtype")]
        for times, columns in zip((device, graph), COLUMNS.values(), strict=True):
            cells += [f"{1e6 * times[name]:.1f}" if name in times else "" for name in columns]
        compiled = min((device[name] for name in ("compiled", "max-autotune") if name in device), default=None)
        cells += [f"{1e6 * case['floor']:.1f}", f"{case['floor'] / graph['ours']:.0%}"]
        cells += [f"{device['eager'] / device['ours']:.1f}", f"{compiled / device['ours']:.1f}" if compiled else ""]
        cells += [f"{1e6 * wall[name]:.0f}" for name in ("eager", "ours")] + [f"{wall['eager'] / wall['ours']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the cases given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"])
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on each case, compilation apart")
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds after which nothing more is compiled")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cpu tries this script out")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--table", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    start, device = time.monotonic(), arguments.device
    if device.type == "cuda" and not (torch.cuda.is_available() and native.cuda_architectures):
        parser.error("a CUDA device and a build with CUDA are needed")

    machine = describe_machine(device) | {"bandwidth": measure_bandwidth(device)}
    print_machine(machine)
    kinds = itertools.product(arguments.dtypes, arguments.sizes, arguments.batches, LAYOUTS)
    cases = [
        Case(batch, size, layout, getattr(torch, dtype), device, machine["bandwidth"]["copy"])
        for dtype, size, batch, layout in kinds
    ]
    longest = 0.0
    for compile_peers in (False, True):
        for case in cases:
            before = time.monotonic()
            if compile_peers and before + longest - start > arguments.deadline:
                print("no time left to compile the others")
                return
            case.measure(compile_peers, arguments.seconds)
            longest = max(longest, time.monotonic() - before)
            measured = [case.figures for case in cases if "device_seconds" in case.figures]
            print(table([case.figures]).splitlines()[-1], flush=True)
            if arguments.json:  # after each case, so that a session which is cut off keeps what it has
                save(arguments.json, machine, measured)
            if arguments.table:
                heading = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "bandwidth")
                copy = f"copy {machine['bandwidth']['copy'] / 1e9:.0f} GB/s"
                arguments.table.write_text(f"{heading}; {copy}; microseconds\n\n{table(measured)}\n")


if __name__ == "__main__":
    main()
