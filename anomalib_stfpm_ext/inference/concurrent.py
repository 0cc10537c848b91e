# SPDX-License-Identifier: Apache-2.0

"""Runs networks at the same time, where torch has a thread for each of them."""

import platform
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from ..ops import native

Result = TypeVar("Result")


def can_run_concurrently(device: torch.device, count: int) -> bool:
    """Tell whether :func:`run_concurrently` pays on a device.

    With fewer computations than threads, each of them would need several threads, and torch's pool cannot be divided.
    Only x86-64 with two threads has been measured.

    Args:
        device (torch.device): Where the computations run.
        count (int): How many there are.

    Returns:
        bool: Whether it pays.
    """
    is_measured = native.is_built and device.type == "cpu" and platform.machine() == "x86_64"
    return is_measured and 2 <= torch.get_num_threads() <= count


def run_concurrently(computations: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run computations of about equal length, without gradients, at the same time, each on one of torch's threads.

    Threads that share a network wait for each other after every layer. With a network each, they wait once.

    Note:
        torch's profiler follows the caller's thread alone, so it misses some of the computations.

    Args:
        computations (Sequence[Callable]): The computations.

    Returns:
        list: Their results, in the same order.
    """
    run = partial(_without_gradients, torch.is_inference_mode_enabled())
    return native.run_all([partial(run, computation) for computation in computations], torch.get_num_threads())


def _without_gradients(inference: bool, computation: Callable[[], Result]) -> Result:
    with torch.inference_mode(inference), torch.no_grad():  # each thread has modes of its own
        return computation()
