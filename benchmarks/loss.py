# SPDX-License-Identifier: Apache-2.0

"""Times the loss forward and backward beside its formula in torch operations, eager and under torch.compile.

"hardest" is the loss with `hard_share=0.02`.

They take turns in one process, so that a busy machine slows all of them, and before each step the caches are emptied.
Every figure is a median. On CUDA it is the time on the device, whose caches are too small for most of a batch. The
floor is what the machine needs to read the features twice, forward and backward, and to write the gradient, at the read
and write speed measured in the same run. The memory is the most that torch's allocator holds at a time beyond the
features. It includes the student's gradient, which all must make.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    LAYOUTS,
    CacheEviction,
    Timer,
    describe_machine,
    make_features,
    measure_bandwidth,
    nbytes,
    peak_bytes,
    print_machine,
    save,
    time_in_turns,
)
from rich.console import Console
from rich.table import Table

from anomalib_stfpm_ext import StfpmExtLoss
from anomalib_stfpm_ext.loss import formula


def measure(
    batch: int, layout: str, dtype: torch.dtype, device: torch.device, seconds: float, bandwidth: dict[str, float]
) -> dict[str, Any]:
    """Time one case after making sure that all candidates compute the same."""
    teacher, student = make_features(batch, 256, layout, dtype, device)
    for level in student:
        level.requires_grad_()
    torch.compiler.reset()

    def step(loss: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        def forward_and_backward() -> torch.Tensor:
            for level in student:
                level.grad = None
            value = loss(teacher, student)
            value.backward()
            return value.detach()

        return forward_and_backward

    steps = {name: step(loss) for name, loss in LOSSES.items()}
    memory, gradients = {}, {}
    for name, candidate in steps.items():
        candidate()  # compiles
        for level in student:
            level.grad = None
        memory[name] = peak_bytes(candidate, device)
        gradients[name] = [level.grad for level in student]
    for name in ("eager", "compiled"):
        torch.testing.assert_close(gradients[name], gradients["ours"], rtol=1e-3, atol=1e-8)
    del gradients
    case = {"batch": batch, "layout": layout, "dtype": str(dtype).removeprefix("torch.")}
    gradient_bytes = nbytes(student)
    before = CacheEviction() if device.type == "cpu" else lambda: None
    return case | {
        "seconds": time_in_turns(steps, seconds, Timer(device).device_seconds, before),
        "floor": 2 * nbytes(teacher, student) / bandwidth["read"] + gradient_bytes / bandwidth["write"],
        "peak_bytes": memory,
        "gradient_bytes": gradient_bytes,
    }


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "eager": formula,
    "compiled": torch.compile(formula),
    "ours": StfpmExtLoss(),
    "hardest": StfpmExtLoss(0.02),
}


def print_table(cases: list[dict[str, Any]]) -> None:
    """Print one row for each case."""
    table = Table(title="loss of ResNet18 features at 256x256, forward and backward: milliseconds (median), peak MB")
    columns = ["batch", "layout", "dtype", *LOSSES, "floor", "x eager", "x compiled", "hardest/ours", "of floor"]
    for column in (*columns, *(f"MB {name}" for name in LOSSES), "MB gradient"):
        table.add_column(column, justify="right")
    for case in cases:
        seconds = case["seconds"]
        table.add_row(
            *(str(case[key]) for key in ("batch", "layout", "dtype")),
            *(f"{1e3 * seconds[name]:.1f}" for name in LOSSES),
            f"{1e3 * case['floor']:.1f}",
            *(f"{seconds[peer] / seconds['ours']:.1f}" for peer in ("eager", "compiled")),
            f"{seconds['hardest'] / seconds['ours']:.2f}",
            f"{case['floor'] / seconds['ours']:.0%}",
            *(f"{case['peak_bytes'][name] / 1e6:.1f}" for name in LOSSES),
            f"{case['gradient_bytes'] / 1e6:.1f}",
        )
    Console(width=150).print(table)


def main() -> None:
    """Measure the cases given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each case")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    device = arguments.device
    machine = describe_machine(device) | {"bandwidth": measure_bandwidth(device)}
    print_machine(machine)
    cases = [
        measure(batch, layout, getattr(torch, dtype), device, arguments.seconds, machine["bandwidth"])
        for dtype in arguments.dtypes
        for batch in arguments.batches
        for layout in LAYOUTS
    ]
    print_table(cases)
    if arguments.json:
        save(arguments.json, machine, cases)


if __name__ == "__main__":
    main()
