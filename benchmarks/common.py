# SPDX-License-Identifier: Apache-2.0

"""What the benchmarks share: features, clocks, the machine. It needs torch alone, as CUDA machines lack anomalib."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports each start otherwise

import torch
from torch.profiler import ProfilerActivity, profile

from anomalib_stfpm_ext.ops import native

RESNET18 = ((64, 4), (128, 8), (256, 16))  # channels and stride of each level
LEVEL_WEIGHTS = (0.6, 1.1, 1.3)  # such as StfpmExt chooses
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
Pyramid = list[torch.Tensor]


def cpu_model() -> str:
    """Name the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Say what runs: processor, GPU, threads, the scorer's build, and the versions of whatever is installed."""
    installed = {distribution.name for distribution in metadata.distributions()}
    packages = ("anomalib-stfpm-ext", "anomalib", "torch", "torchvision", "timm", "lightning", "openvino")
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": native.selected_isa(),
        "compiler": native.compiler,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages if package in installed},
        **(_describe_gpu(device) if torch.device(device).type == "cuda" else {}),
    }


def _describe_gpu(device: torch.device | str) -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, check=False, capture_output=True, text=True).stdout if shutil.which(query[0]) else ""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver.partition("\n")[0] or "unknown",
        "cuda": torch.version.cuda,
        "scorer_holds": native.cuda_architectures,
    }


def make_features(
    batch: int, size: int, layout: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Pyramid, Pyramid]:
    """Make the features of a ResNet18's teacher and student for images of one size."""
    teacher: Pyramid = []
    student: Pyramid = []
    for channels, stride in RESNET18:
        features = torch.randn(batch, channels, size // stride, size // stride, device=device)
        for side, noise in ((teacher, 0.0), (student, 0.1)):
            noisy = features + noise * torch.randn_like(features)
            side.append(noisy.to(dtype).contiguous(memory_format=LAYOUTS[layout]))
    return teacher, student


def nbytes(*sides: Pyramid) -> int:
    """Return the bytes of all features."""
    return sum(level.nbytes for side in sides for level in side)


class Timer:
    """Time on a device; on the CPU, time on the clock."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.cuda = torch.device(device).type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def device_seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds that the device takes for all that `work` enqueues.

        The device is kept busy until all is enqueued, so that it never waits for Python, unless `work` itself waits for
        the device.
        """
        if not self.cuda:
            return self.wall_seconds(work)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(10_000_000)  # cycles: some 5 ms
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def wall_seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds until `work` is done."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start


def time_in_turns(*arguments: Any, **options: Any) -> dict[str, float]:
    """Return the median seconds of each candidate; the arguments are those of :func:`sample_in_turns`."""
    return {name: statistics.median(samples) for name, samples in sample_in_turns(*arguments, **options).items()}


def sample_in_turns(
    candidates: Mapping[str, Callable[[], Any]],
    seconds: float,
    clock: Callable[[Callable[[], Any]], float] | None = None,
    before: Callable[[], Any] = lambda: None,
    turns: int = 5,
) -> dict[str, list[float]]:
    """Return the seconds that each candidate takes each time.

    Args:
        candidates (Mapping[str, Callable]): What to time. All run in turn, so that a busy machine slows all of them.
        seconds (float): How long to go on.
        clock (Callable | None): Takes a candidate and returns its seconds. Defaults to the CPU's.
        before (Callable): Called before each candidate, outside its time.
        turns (int): The fewest turns.

    Returns:
        dict[str, list[float]]: The seconds by name.
    """
    clock = clock or Timer().wall_seconds
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times[next(iter(times))]) < turns:
        for name, candidate in candidates.items():
            before()
            times[name].append(clock(candidate))
    return times


class CacheEviction:
    """Fills the CPU's caches with a buffer of its own when it is called, whatever ran before.

    It only reads: lines that were written to would have to go to memory during the next measurement.
    """

    def __init__(self, megabytes: int = 256) -> None:
        self.buffer = torch.ones(megabytes << 18)  # float32

    def __call__(self) -> None:
        """Read the buffer."""
        self.buffer.sum()


def peak_bytes(step: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Return the most memory that torch's allocator holds at a time during a step, beyond what it held before."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure_bandwidth(device: torch.device | str = "cpu") -> dict[str, float]:
    """Measure how many bytes a second torch reads (sum), writes (fill) and copies, far beyond the caches.

    A copy counts for what it reads and what it writes.
    """
    buffer = torch.ones(1 << 28, device=device)  # 1 GiB
    other = torch.empty_like(buffer)
    works: dict[str, Callable[[], Any]] = {
        "read": buffer.sum,
        "write": lambda: other.fill_(1.0),
        "copy": lambda: other.copy_(buffer),
    }
    seconds = time_in_turns(works, 2.0, Timer(device).device_seconds)
    return {name: (2 if name == "copy" else 1) * buffer.nbytes / duration for name, duration in seconds.items()}


def print_machine(machine: dict[str, Any]) -> None:
    """Print what runs, and at which bandwidth."""
    print(f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, torch {machine['torch']}")
    if "gpu" in machine:
        print(
            f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}; code for {machine['scorer_holds']}"
        )
    if "bandwidth" in machine:
        print(", ".join(f"{name} {speed / 1e9:.1f} GB/s" for name, speed in machine["bandwidth"].items()))


def save(file: Path, machine: dict[str, Any], cases: list[dict[str, Any]], **more: Any) -> None:
    """Write the figures as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine, "cases": cases, **more}, indent=1) + "\n")
