# SPDX-License-Identifier: Apache-2.0

"""Allocator tuning: a training on a CPU keeps its memory from step to step."""

import ctypes
import os
import platform
import threading

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from .fit_resource import FitResource

# mallopt's parameters, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4


class AllocatorTuning(FitResource):
    """Lets glibc keep freed memory while a fit runs on a CPU.

    Activations are larger than the blocks that glibc keeps by default. Without this callback, each step would request
    its memory from the system again, page fault by page fault. The limits apply to the whole process. Limits in the
    environment (``MALLOC_...``, ``GLIBC_TUNABLES``) take precedence. ``MALLOC_ARENA_MAX=1`` helps: threads other than
    the main one have their own arenas, which never keep blocks of this size.

    Attributes:
        active (bool): Whether memory is kept now.
    """

    active = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep memory from now on."""
        del pl_module
        has_arenas = os.environ.get("MALLOC_ARENA_MAX") != "1"
        names = os.environ.keys() - {"MALLOC_ARENA_MAX"}
        chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in names)
        if trainer.strategy.root_device.type == "cpu" and platform.libc_ver()[0] == "glibc" and not chosen:
            self.active = True
            limit_malloc({MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1})
            if has_arenas and threading.current_thread() is not threading.main_thread():
                rank_zero_info(
                    "This fit does not run on the main thread: with MALLOC_ARENA_MAX=1 in the environment of the "
                    "process, its steps would take about a tenth less time."
                )

    def release(self) -> None:
        """Set the limits that glibc reaches by itself once large blocks have been freed."""
        if self.active:
            self.active = False
            limit_malloc({MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20})
            ctypes.CDLL(None).malloc_trim(0)


def limit_malloc(limits: dict[int, int]) -> None:
    """Set limits of glibc's allocator.

    Args:
        limits (dict[int, int]): Bytes or counts by mallopt's parameter.
    """
    libc = ctypes.CDLL(None)
    for parameter, limit in limits.items():
        libc.mallopt(parameter, limit)
