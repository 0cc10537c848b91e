# SPDX-License-Identifier: Apache-2.0

"""Times the way from an image to its verdict, and a training epoch: anomalib's Stfpm and StfpmExt, side by side.

All routes run ResNet18 at 256x256, with the same random weights. They are: eager; under torch.compile; in bfloat16 and
float16 where this machine gains by them; eager and in these also with an exponent for each level, as a fit ends by
default; and anomalib's OpenVINO export, held to float32 on as many threads, as OpenVINO runs it by default, and
quantised to INT8 (by NNCF, on the images made here). Those in float32 without exponents must give the same maps. They
take turns in one process; every figure is a median.

A verdict takes images in memory through pre-processing, both networks, map, score, normalisation and thresholds. These
parts are also timed one by one, as is the decoding before them; teacher and student are timed alone, and both as the
model runs them. Memory is the peak growth of the process during a call; for OpenVINO, which keeps its memory, during
the first. On CUDA, it is the most that torch's allocator holds at a time beyond images and weights.
"""

import argparse
import copy
import ctypes
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from anomalib.data import Folder, InferenceBatch
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType
from anomalib.models import Stfpm
from common import LEVEL_WEIGHTS, Timer, describe_machine, peak_bytes, print_machine, save, time_in_turns
from lightning.pytorch import Callback, Trainer
from matplotlib import pyplot as plt
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from anomalib_stfpm_ext import StfpmExt, anomaly_map
from anomalib_stfpm_ext.inference.precision import PRECISIONS, why_not

try:
    import openvino
except ImportError:
    openvino = None

SIZE = 256
WEIGHTED = "exponents"
PARTS = ("decode, resize", "pre-processing", "teacher", "student", "both", "map", "post-processing")
Route = Callable[[torch.Tensor], Any]


def make_models(device: torch.device) -> dict[str, Stfpm | StfpmExt]:
    """Make both models with the same random weights, thresholds and ranges; nothing is downloaded."""
    torch.manual_seed(0)
    quiet: dict[str, Any] = {"evaluator": False, "visualizer": False}
    with mock.patch("timm.create_model", partial(_create_untrained, timm.create_model)):
        stfpm = Stfpm(**quiet)
    ours = StfpmExt(teacher_weights=False, **quiet)
    stfpm.model.load_state_dict(ours.model.state_dict(), strict=False)  # but for exponents and precision
    with torch.inference_mode():
        largest = ours.eval().model(torch.rand(1, 3, SIZE, SIZE)).pred_score.item()
    for model in (stfpm, ours):
        for name, value in (("min", 0.0), ("max", 2 * largest)):
            getattr(model.post_processor, f"image_{name}").fill_(value)
            getattr(model.post_processor, f"pixel_{name}").fill_(value)
        model.post_processor._image_threshold.fill_(largest)
    return {"Stfpm": stfpm.eval().to(device), "StfpmExt": ours.eval().to(device)}


def _create_untrained(create_model: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return create_model(*arguments, **{**options, "pretrained": False})


def make_routes(models: dict[str, Any], device: torch.device, folder: Path, images: Path) -> dict[str, Route]:
    """Return, by name, what takes images to verdicts."""
    variants = dict(models)
    for precision in PRECISIONS[1:]:
        if why_not(precision, device.type) is None:
            variants[f"StfpmExt, {precision}"] = copy.deepcopy(models["StfpmExt"])
            variants[f"StfpmExt, {precision}"].model.score_by(None, precision)
    for name in [name for name in variants if name.startswith("StfpmExt")]:
        variants[f"{name}, {WEIGHTED}"] = copy.deepcopy(variants[name])
        weighted = variants[f"{name}, {WEIGHTED}"].model
        weighted.score_by(LEVEL_WEIGHTS, weighted.precision)
    routes: dict[str, Route] = {name: torch.inference_mode()(model) for name, model in variants.items()}
    mode = "reduce-overhead" if device.type == "cuda" else None  # with CUDA graphs
    routes["StfpmExt, torch.compile"] = torch.no_grad()(torch.compile(models["StfpmExt"], mode=mode))
    if openvino is None or device.type != "cpu":
        print("without OpenVINO: " + ("not installed" if openvino is None else "it runs on the CPU"))
        return routes
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    onnx_kwargs = {"opset_version": 18, "verbose": False}
    for name, model in models.items():
        file = model.to_openvino(folder / name, onnx_kwargs=onnx_kwargs)
        routes[f"{name}, OpenVINO f32"] = partial(_infer, openvino.Core().compile_model(file, "CPU", settings))
        routes[f"{name}, OpenVINO"] = partial(_infer, openvino.Core().compile_model(file, "CPU"))
    calibration = images_of(images, val_split_mode="from_train", val_split_ratio=0.9)  # anomalib calibrates on val data
    calibration.setup()
    quantised = models["Stfpm"].to_openvino(
        folder / "INT8", compression_type=CompressionType.INT8_PTQ, datamodule=calibration, onnx_kwargs=onnx_kwargs
    )
    routes["Stfpm, OpenVINO INT8"] = partial(_infer, openvino.Core().compile_model(quantised, "CPU"))
    return routes


def _infer(network: Any, images: torch.Tensor) -> InferenceBatch:
    results = network(images.numpy())
    return InferenceBatch(**{output.any_name: torch.from_numpy(result) for output, result in results.items()})


def growth(call: Callable[[], Any]) -> int:
    """Return by how much a call raises the process's resident memory at its highest."""

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def measure_routes(routes: dict[str, Route], batch: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time all routes on one batch after making sure that they come to the same verdict."""
    images = torch.rand(batch, 3, SIZE, SIZE, device=device)
    calls = {name: partial(route, images) for name, route in routes.items()}
    expected = calls["Stfpm"]()
    memory = {}
    for name, call in calls.items():
        if "OpenVINO" in name:
            memory[name] = growth(call)
        else:
            call()  # folds, compiles
            memory[name] = growth(call) if device.type == "cpu" else peak_bytes(call, device)
        verdict = call()
        if name.endswith(("OpenVINO", "INT8", WEIGHTED, *PRECISIONS[1:])):
            continue
        torch.testing.assert_close(verdict.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(verdict.pred_score.flatten(), expected.pred_score.flatten(), rtol=1e-3, atol=1e-4)
    return {"seconds": time_in_turns(calls, seconds, Timer(device).wall_seconds), "peak_bytes": memory}


def measure_parts(
    models: dict[str, Any], batch: int, device: torch.device, seconds: float, file: Path
) -> dict[str, dict[str, float]]:
    """Time each part of the way for both models; decoding is the same for both."""
    images = torch.rand(batch, 3, SIZE, SIZE, device=device)
    calls: dict[str, Callable[[], Any]] = {}
    resize = models["StfpmExt"].pre_processor.transform.transforms[0]
    calls["decode, resize"] = lambda: [resize(read_image(file, as_tensor=True)) for _ in range(batch)]
    for name, model in models.items():
        networks = model.model
        with torch.inference_mode():
            normalised = model.pre_processor(images)
            teacher, student = networks.teacher_model(normalised), networks.student_model(normalised)
            result = networks(normalised)
        if isinstance(model, StfpmExt):
            both: Callable[..., Any] = networks.features
            score: Callable[..., Any] = anomaly_map
        else:
            both = partial(_their_features, networks)
            score = partial(_their_map, networks.anomaly_map_generator)
        steps = {
            "pre-processing": partial(model.pre_processor, images),
            "teacher": partial(networks.teacher_model, normalised),
            "student": partial(networks.student_model, normalised),
            "both": partial(both, normalised),
            "map": partial(score, teacher, student, (SIZE, SIZE)),
            "post-processing": partial(model.post_processor, result),
        }
        calls |= {f"{name}: {part}": torch.inference_mode()(step) for part, step in steps.items()}
    times = time_in_turns(calls, seconds, Timer(device).wall_seconds)
    return {name: {part: times.get(f"{name}: {part}", times[PARTS[0]]) for part in PARTS} for name in models}


def _their_features(networks: Any, images: torch.Tensor) -> tuple[Any, Any]:
    return networks.teacher_model(images), networks.student_model(images)


def _their_map(generator: Any, teacher: Any, student: Any, image_size: tuple[int, int]) -> torch.Tensor:
    amap = generator(teacher_features=teacher, student_features=student, image_size=image_size)
    return torch.amax(amap, dim=(-2, -1))


class LastEpoch(Callback):
    """Times the last epoch, and what the model does after its steps."""

    seconds = math.nan

    def on_train_epoch_start(self, *_: Any) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self._start


def measure_epochs(images: Path, device: torch.device, workers: int, batch: int, rounds: int) -> dict[str, float]:
    """Time a training epoch of both models on the same images, ours also with a fifth of them held out.

    In our first epoch the teacher runs, and in later ones, on a CPU, it does not: its features were kept. First epochs
    take longer for other reasons too, so the first is compared with the first, and later ones with later ones.
    """

    def fit(
        name: str,
        epochs: int = 1,
        held_out_share: float = 0.0,
        selection: str = "held_out_map",
        precision: Any = "32-true",
    ) -> float:
        model: Any = make_models(device)[name].train()
        if name == "StfpmExt":
            model.student_selection.share, model.student_selection.selection = held_out_share, selection
        timer = LastEpoch()
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision=precision,
            max_epochs=epochs,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[timer],
        )
        data = images_of(images, train_batch_size=batch, num_workers=workers)
        trainer.fit(model, datamodule=data)
        return timer.seconds

    fits = {
        "Stfpm, the first": partial(fit, "Stfpm"),
        "Stfpm, later ones": partial(fit, "Stfpm", epochs=2),
        "StfpmExt, the first": partial(fit, "StfpmExt"),
        "StfpmExt, later ones": partial(fit, "StfpmExt", epochs=2),
        "StfpmExt, the first, a fifth held out": partial(fit, "StfpmExt", held_out_share=0.2),
        "StfpmExt, later ones, a fifth held out": partial(fit, "StfpmExt", epochs=2, held_out_share=0.2),
        "StfpmExt, later ones, a fifth held out and judging": partial(
            fit, "StfpmExt", epochs=2, held_out_share=0.2, selection="synthetic"
        ),
    }
    if why_not("bfloat16", device.type) is None:
        for name in ("Stfpm", "StfpmExt"):
            fits[f"{name}, later ones, bf16-mixed"] = partial(fit, name, epochs=2, precision="bf16-mixed")
    return time_in_turns(fits, 0.0, clock=lambda fit: fit(), turns=rounds)


def images_of(root: Path, **arguments: Any) -> Folder:
    """Return the data module of what :func:`make_images` has made."""
    splits = {"test_split_mode": "none", "val_split_mode": "none"} | arguments
    return Folder("images", root=root, normal_dir="good", **splits)


def make_images(folder: Path, count: int) -> Path:
    """Write images that compress as photographs do, and return the first."""
    (folder / "good").mkdir(parents=True)
    for index in range(count):
        coarse = torch.rand(1, 3, 16, 16)
        image = F.interpolate(coarse, (512, 512), mode="bicubic") + 0.02 * torch.randn(1, 3, 512, 512)
        pixels = (255 * image[0].clamp(0, 1)).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "good" / f"{index:03}.png")
    return folder / "good" / "000.png"


def print_tables(cases: list[dict[str, Any]], epochs: dict[str, float]) -> None:
    """Print the routes, the parts and the epochs."""
    routes = Table(title="image in memory to verdict, ResNet18 at 256x256 (medians)")
    for column in ("batch", "route", "ms", "images/s", "x Stfpm", "MB"):
        routes.add_column(column, justify="left" if column == "route" else "right")
    for case in cases:
        for name, seconds in case["seconds"].items():
            routes.add_row(
                str(case["batch"]),
                name,
                f"{1e3 * seconds:.1f}",
                f"{case['batch'] / seconds:.1f}",
                f"{case['seconds']['Stfpm'] / seconds:.2f}",
                f"{case['peak_bytes'][name] / 1e6:.0f}",
            )
    parts = Table(title="its parts, milliseconds (medians)")
    for column in ("batch", "model", *PARTS):
        parts.add_column(column, justify="right")
    for case in cases:
        for name, times in case["parts"].items():
            parts.add_row(str(case["batch"]), name, *(f"{1e3 * times[part]:.2f}" for part in PARTS))
    console = Console(width=120)
    console.print(routes)
    console.print(parts)
    for name, seconds in epochs.items():
        kind = name.partition(", ")[2].partition(", a fifth held out")[0]
        peer = epochs[f"Stfpm, {kind}"]
        console.print(f"training epoch, {name}: {seconds:.2f} s, x Stfpm {peer / seconds:.2f}")


def draw(cases: list[dict[str, Any]], file: Path) -> None:
    """Draw what the parts of both models take, and how much faster than Stfpm each route is."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 3.6))
    rows = [(case, name) for case in cases for name in case["parts"]][::-1]
    labels = [f"{name}, batch {case['batch']}" for case, name in rows]
    start = [0.0] * len(rows)
    for part in (part for part in PARTS if part not in ("teacher", "student")):
        widths = [1e3 * case["parts"][name][part] / case["batch"] for case, name in rows]
        left.barh(labels, widths, left=start, label="teacher and student" if part == "both" else part)
        start = [before + width for before, width in zip(start, widths, strict=True)]
    left.set(xlabel="milliseconds for each image")
    left.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    names = list(cases[0]["seconds"])
    height = 0.8 / len(cases)
    for index, case in enumerate(cases):
        speedup = [case["seconds"]["Stfpm"] / case["seconds"][name] for name in names]
        places = [place + (index - (len(cases) - 1) / 2) * height for place in range(len(names))]
        right.barh(places, speedup, height, label=f"batch {case['batch']}")
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(xlabel="times as fast as anomalib's eager Stfpm, image in memory to verdict")
    right.axvline(1, color="grey", linewidth=0.5)
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=75)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=30.0, help="for the routes of each batch, and for their parts")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--images", type=int, default=128, help="in the training epoch")
    parser.add_argument("--workers", type=int, default=0, help="of the training's data loader")
    parser.add_argument("--rounds", type=int, default=3, help="of training epochs; 0 leaves them out")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw them, as a PNG")
    arguments = parser.parse_args()
    device = arguments.device
    warnings.filterwarnings("ignore")  # advice of Lightning and the exporters
    logging.disable(logging.WARNING)

    machine = describe_machine(device)
    print_machine(machine)
    with tempfile.TemporaryDirectory() as folder:
        file = make_images(Path(folder) / "images", arguments.images)
        models = make_models(device)
        routes = make_routes(models, device, Path(folder), file.parents[1])
        cases = []
        for batch in arguments.batches:
            case = {"batch": batch, **measure_routes(routes, batch, device, arguments.seconds)}
            cases.append(case | {"parts": measure_parts(models, batch, device, arguments.seconds, file)})
        epochs = {}
        if arguments.rounds:
            machine |= {"workers": arguments.workers, "images": arguments.images}
            epochs = measure_epochs(file.parents[1], device, arguments.workers, 32, arguments.rounds)
    print_tables(cases, epochs)
    if arguments.json:
        save(arguments.json, machine, cases, epoch_seconds=epochs)
    if arguments.plot:
        draw(cases, arguments.plot)


if __name__ == "__main__":
    main()
