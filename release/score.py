# SPDX-License-Identifier: Apache-2.0

"""Scores features with the installed package, which needs NumPy alone, and compares the maps with the tests' reference.

Prints the instruction set that was picked, a checksum over all maps and the time of a call, as JSON.
"""

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import processor
import reference

from anomalib_stfpm_ext import anomaly_map
from anomalib_stfpm_ext.ops import native

RESNET18 = ((64, 4), (128, 8), (256, 16))  # channels and stride of each level
CASES: list[dict[str, Any]] = [
    {},
    {"weights": [0.5, 2.25, 0.25]},
    {"combine": "sum", "weights": [0.5, 2, 0]},
    {"combine": "maximum"},
    {"combine_size": (16, 24)},
]
ROUNDS = 100


def make_features(batch: int, size: tuple[int, int], dtype: str) -> tuple[Any, Any]:
    """Make the teacher's features and the student's."""
    rng = np.random.default_rng(0)
    shapes = [(batch, channels, *(-(-side // stride) for side in size)) for channels, stride in RESNET18]
    # No logarithms, whose last bit differs between systems.
    teacher = [rng.random(shape) - 0.5 for shape in shapes]
    student = [level + 0.1 * rng.random(level.shape) for level in teacher]
    return [level.astype(dtype) for level in teacher], [level.astype(dtype) for level in student]


def check() -> str:
    """Compare all cases with the reference; return the checksum of the maps."""
    checksum = hashlib.sha256()
    for dtype, tolerance in (("float32", 1e-5), ("float16", 1e-5), ("float64", 1e-10)):
        for size in ((64, 96), (97, 130)):
            teacher, student = make_features(2, size, dtype)
            for case in CASES:
                results = anomaly_map(teacher, student, size, level_maps=True, **case)
                expected = reference.anomaly_map(teacher, student, size, **case)
                for result, wanted in zip(results, expected, strict=True):
                    np.testing.assert_allclose(result, wanted, rtol=tolerance, atol=1e-30, err_msg=f"{dtype} {case}")
                    checksum.update(result.tobytes())
    return checksum.hexdigest()


def measure(batch: int) -> float:
    """Return the milliseconds that a call takes, the median."""
    teacher, student = make_features(batch, (256, 256), "float32")
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        anomaly_map(teacher, student, (256, 256))
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


if __name__ == "__main__":
    if native.selected_isa() != processor.best_isa():
        sys.exit(f"The processor has {processor.best_isa()}, and {native.selected_isa()} was picked.")
    print(
        json.dumps(
            {
                "compiler": native.compiler,
                "isa": native.selected_isa(),
                "sha256": check(),
                "milliseconds": [measure(batch) for batch in (1, 8)],
            }
        )
    )
