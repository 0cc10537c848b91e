# SPDX-License-Identifier: Apache-2.0

"""Times what `anomalib test` and `anomalib predict` do for a folder, pictures included: Stfpm and StfpmExt in turn.

The time is that from the first decoded image to the last picture on disk, without the start of Python, which is the
same for both. Each model has its defaults, and both have the same random weights: ResNet18 at 256x256, photographs of
512x512, batches of 32.
"""

import argparse
import logging
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from common import describe_machine, print_machine, save, time_in_turns
from pipeline import make_images, make_models
from rich.console import Console
from rich.table import Table

from anomalib_stfpm_ext.inference.precision import why_not
from anomalib_stfpm_ext.visualizer import BackgroundImageVisualizer


def run(stage: str, name: str, precision: Any, images: Path, output: Path) -> None:
    """Test or predict, and draw."""
    model: Any = make_models(torch.device("cpu"))[name]
    model.visualizer = (BackgroundImageVisualizer if name == "StfpmExt" else type(model).configure_visualizer)()
    if name == "StfpmExt":
        model.model.score_by(model.model.level_weights, precision)
    data = Folder("images", root=images, normal_dir="good", normal_test_dir="good", num_workers=0)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    engine = Engine(accelerator="cpu", default_root_dir=output / f"{stage} {name} {precision}", **quiet)
    getattr(engine, stage)(model, datamodule=data)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    machine = describe_machine(torch.device("cpu"))
    print_machine(machine)
    routes = [("Stfpm", "float32"), ("StfpmExt", "float32")]
    if why_not("bfloat16", "cpu") is None:
        routes.append(("StfpmExt", "bfloat16"))
    cases = []
    table = Table(title=f"{arguments.images} photographs, decoded, scored and drawn, milliseconds each (medians)")
    for column in ("command", "model", "precision", "ms", "x Stfpm"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        images = make_images(Path(folder) / "images", arguments.images).parents[1]
        for stage in ("test", "predict"):
            calls = {
                f"{name}, {precision}": partial(run, stage, name, precision, images, Path(folder))
                for name, precision in routes
            }
            seconds = time_in_turns(calls, 0.0, turns=arguments.rounds)
            cases.append({"command": stage, "images": arguments.images, "seconds": seconds})
            for (name, precision), each in zip(routes, seconds.values(), strict=True):
                ratio = seconds["Stfpm, float32"] / each
                table.add_row(stage, name, precision, f"{1e3 * each / arguments.images:.1f}", f"{ratio:.2f}")
    Console(width=100).print(table)
    if arguments.json:
        save(arguments.json, machine, cases)


if __name__ == "__main__":
    main()
