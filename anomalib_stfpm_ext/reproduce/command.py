# SPDX-License-Identifier: Apache-2.0

"""The command: it checks the arguments, and makes the runs that are still missing, in parallel on several GPUs."""

import ast
import inspect
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse

from .. import choices
from ..errors import fail
from ..files import lock


def reproduce(
    data: Literal["MVTecAD", "Visa", "Folder"],
    root: Path,
    model: dict[str, Any],
    categories: list[str] | str | None = None,
    seeds: list[int] | str | None = None,
    max_epochs: int = 100,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    output: Path | None = None,
    devices: int | None = None,
    workers: int | None = None,
) -> None:
    """Train and evaluate StfpmExt at 256x256 and on raw scores, and tabulate it beside published figures.

    Args:
        data: MVTecAD, Visa, or Folder for any other in MVTec AD's layout, with images of any kind that anomalib reads.
        root: Its folder, in any layout that the data module reads. With Folder, also the folder of one category.
        model: Arguments of StfpmExt.
        categories: Some of its categories, as in [bottle,pill]. Defaults to all that are there.
        seeds: Seeds of the runs, as in [0,1,2]. Defaults to seed 0.
        max_epochs: Epochs to train. Defaults to the paper's 100.
        precision: Precision of the training. bf16-mixed is faster where the machine computes in bfloat16.
        output: Folder of the results. Defaults to results/reproduce/ and the name of the data set.
        devices: Number of runs at the same time, each on its own GPU. Defaults to the number of GPUs; 1 if none.
        workers: Processes that load the images of one run. Defaults to its share of the processor cores, up to 8.

    Raises:
        FileNotFoundError: If the folder of the data set or the file of weights does not exist.
        ValueError: If an argument is out of range, a category is missing or incomplete, or the output folder holds
            results with other settings.
        RuntimeError: If a run fails; the others are still made.
    """
    import torch

    from ..lightning_model import StfpmExt
    from ..scorer import cpu_count
    from .datasets import find_categories
    from .runs import Plan, run_all

    num_gpus = torch.cuda.device_count()
    devices = max(num_gpus, 1) if devices is None else devices
    if not 1 <= devices <= (num_gpus or cpu_count()):
        fail(ValueError, "devices", f"1 to {num_gpus} GPUs" if num_gpus else "1 to the number of cores", devices)
    if max_epochs < 1:
        fail(ValueError, "max_epochs", "at least 1", max_epochs)
    if workers is None:
        workers = min(8, cpu_count() // devices)
    if workers < 0:
        fail(ValueError, "workers", "at least 0", workers)
    if isinstance(seeds, str):  # version 0.1 had 0,1,2 without brackets
        if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
            fail(ValueError, "seeds", "whole numbers, as in [0,1,2]", seeds)
        seeds = [int(seed) for seed in seeds.split(",")]
    seeds = list(dict.fromkeys(seeds or [0]))  # two processes must not share a run
    if isinstance(categories, str):
        categories = [] if categories == "all" else [category.strip() for category in categories.split(",")]
    if model["teacher_weights"] is False:
        fail(ValueError, "teacher_weights", "true or a file of weights", False)
    output = output or Path("results/reproduce") / data
    found = find_categories(data, root, categories or [])
    StfpmExt(**model)  # so that wrong weights fail now, and weights from the internet are fetched once
    plan = Plan(data, root, output, found, model, max_epochs, precision, workers)
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as file:
        no_lock = lock(file, output, "another process reproduces into it")
        if no_lock:
            print(no_lock, file=sys.stderr)
        plan.claim_output()
        run_all(plan, seeds, devices)
    print((output / "results.md").read_text(encoding="utf-8"))
    print(f"Tables, checkpoints and contact sheets are in {output}")


def make_parser() -> jsonargparse.ArgumentParser:
    """Make the parser of this command.

    Returns:
        jsonargparse.ArgumentParser: The parser, whose options are those of :func:`reproduce` and of ``StfpmExt``.
    """
    parser = jsonargparse.ArgumentParser(prog="python -m anomalib_stfpm_ext.reproduce")
    parser.add_function_arguments(reproduce, as_positional=False, skip={"model"})
    of_runs: set[str | int] = {"seed", "pre_processor", "post_processor", "evaluator", "visualizer"}
    parser.add_class_arguments(_arguments_of_model(), as_positional=False, skip=of_runs)
    parser.set_defaults(**choices.PAPERS_RULES)
    return parser


def _arguments_of_model() -> type:
    """Make a class with the documented arguments of ``StfpmExt`` from its source, since its import takes seconds."""
    source = Path(__file__).parents[1] / "lightning_model.py"
    if not source.exists():  # an installation of bytecode alone
        from ..lightning_model import StfpmExt

        return StfpmExt
    (model,) = (node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    (init,) = (node for node in model.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    init.body = [ast.Pass()]
    model.name, model.bases, model.body = "Arguments", [], [model.body[0], init]  # docstring and signature
    of_anomalib = dict.fromkeys(("PreProcessor", "PostProcessor", "Evaluator", "Visualizer"), object)  # not options
    names: dict[str, Any] = {**vars(choices), **of_anomalib, "Literal": Literal, "Path": Path, "Sequence": Sequence}
    exec(compile(ast.fix_missing_locations(ast.Module([model], [])), source, "exec"), names)
    return names["Arguments"]  # type: ignore[no-any-return]


def run(given: dict[str, Any]) -> None:
    """Reproduce, and exit with SIGTERM's status if that signal ended a fit.

    Args:
        given (dict[str, Any]): The arguments of :func:`reproduce` and of ``StfpmExt``.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    own = set(inspect.signature(reproduce).parameters)
    model = {name: value for name, value in given.items() if name not in own}
    try:
        reproduce(**{name: value for name, value in given.items() if name in own}, model=model)
    except SIGTERMException:  # Lightning's, whose exit status would be 0
        sys.exit(128 + signal.SIGTERM)
