# SPDX-License-Identifier: Apache-2.0

"""Times map and verdict of one image beside programs that want the processor, too, as a camera's software may.

Such a program is a loop that does nothing. ResNet18 at 256x256, float32; the routes are some of pipeline.py's, in turns
in one process. "map, one thread" is what the map takes where nobody helps.
"""

import argparse
import contextlib
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anomalib.models.image.stfpm.anomaly_map import AnomalyMapGenerator
from common import describe_machine, make_features, print_machine, sample_in_turns, save
from pipeline import SIZE, make_images, make_models, make_routes
from rich.console import Console
from rich.table import Table

from anomalib_stfpm_ext.scorer import anomaly_map

VERDICTS = ("Stfpm", "StfpmExt", "Stfpm, OpenVINO f32", "Stfpm, OpenVINO")


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run programs that want a processor each."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    time.sleep(0.5)
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def on_one_thread(call: Callable[[], Any]) -> Any:
    """Run a call with one of torch's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return call()
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 1, 2], help="programs beside this one")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each number of loops")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # advice of Lightning and the exporters
    logging.disable(logging.WARNING)

    machine = describe_machine()
    print_machine(machine)
    teacher, student = make_features(1, SIZE, "channels_last", torch.float32)
    theirs, names = AnomalyMapGenerator(), [str(level) for level in range(len(teacher))]
    sides = {
        f"{side}_features": dict(zip(names, of_side, strict=True))
        for side, of_side in (("teacher", teacher), ("student", student))
    }
    ours = partial(anomaly_map, teacher, student, (SIZE, SIZE))
    maps = {
        "map, anomalib": partial(theirs, **sides, image_size=(SIZE, SIZE)),
        "map": ours,
        "map, one thread": partial(on_one_thread, ours),
    }
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        file = make_images(Path(folder) / "images", 20)
        routes = make_routes(make_models(torch.device("cpu")), torch.device("cpu"), Path(folder), file.parents[1])
        images = torch.rand(1, 3, SIZE, SIZE)
        verdicts = {name: partial(routes[name], images) for name in VERDICTS}
        for loops in arguments.loops:
            with busy_loops(loops):
                samples = {
                    **sample_in_turns(maps, arguments.seconds / 3),
                    **sample_in_turns(verdicts, arguments.seconds),
                }
            percentiles = {name: statistics.quantiles(of_name, n=20)[-1] for name, of_name in samples.items()}
            medians = {name: statistics.median(of_name) for name, of_name in samples.items()}
            cases.append({"loops": loops, "seconds": medians, "seconds_95": percentiles})
    table = Table(title="milliseconds of one image: median (95th percentile)")
    for column in ("loops", *cases[0]["seconds"]):
        table.add_column(column, justify="right")
    for case in cases:
        pairs = zip(case["seconds"].values(), case["seconds_95"].values(), strict=True)
        table.add_row(str(case["loops"]), *(f"{1e3 * median:.2f} ({1e3 * late:.1f})" for median, late in pairs))
    Console(width=150).print(table)
    if arguments.json:
        save(arguments.json, machine, cases)


if __name__ == "__main__":
    main()
