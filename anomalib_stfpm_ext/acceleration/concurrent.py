# SPDX-License-Identifier: Apache-2.0

"""Teacher and student at the same time, where torch has two threads: one for each of them."""

import platform
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from ..ops import native

Result = TypeVar("Result")


def can_run_concurrently(device: torch.device) -> bool:
    """Tell whether :func:`run_concurrently` pays on a device.

    With more than two threads, each computation would need several, and torch's pool cannot be parted. Only
    x86-64 has been measured.

    Args:
        device (torch.device): Where both computations run.

    Returns:
        bool: Whether it does.
    """
    return device.type == "cpu" and platform.machine() == "x86_64" and torch.get_num_threads() == 2


def run_concurrently(first: Callable[[], Result], second: Callable[[], Result]) -> tuple[Result, Result]:
    """Run two computations of about equal length, without gradients, at the same time, each on one of torch's threads.

    Two threads that share a network wait for each other after every layer. With a network each, they wait once.

    Note:
        torch's profiler follows the caller's thread alone, and so sees one of the two.

    Args:
        first (Callable[[], Result]): One of them.
        second (Callable[[], Result]): The other.

    Returns:
        tuple[Result, Result]: What they return.
    """
    run = partial(_without_gradients, torch.is_inference_mode_enabled())
    return native.run_both(partial(run, first), partial(run, second))


def _without_gradients(inference: bool, computation: Callable[[], Result]) -> Result:
    with torch.inference_mode(inference), torch.no_grad():  # modes are each thread's own
        return computation()
