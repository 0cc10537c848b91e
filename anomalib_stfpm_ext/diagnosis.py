# SPDX-License-Identifier: Apache-2.0

"""A diagnosis to paste into a bug report, for ``stfpm-ext info`` and ``python -m anomalib_stfpm_ext``."""

import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata, util
from pathlib import Path


def diagnose() -> bool:
    """Print versions, what the extension holds and picks, and whether anomalib knows the model.

    Returns:
        bool: Whether all is well.
    """
    print(f"python               {platform.python_version()} at {sys.executable}")
    print(f"machine              {platform.platform()} {platform.machine()}")
    for package in ("anomalib-stfpm-ext", "anomalib", "torch", "torchvision", "timm", "lightning", "numpy"):
        print(f"{package:<20} {_attempt(partial(metadata.version, package))[1]}")
    print(f"package              {Path(__file__).parent}")
    checks = {
        "compiled scorer": _scorer,
        "CUDA": _cuda,
        "packed convolutions": _packed,
        "scores correctly": _scores,
        "anomalib knows it": _registered,
    }
    all_well = True
    for name, check in checks.items():
        well, answer = _attempt(check)
        all_well &= well
        print(f"{name:<20} {'' if well else 'NO: '}{answer}")
    return all_well


def _attempt(question: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, question()
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"


def _scorer() -> str:
    from .ops import native

    if not native.is_built:
        return "none, torch operations do its work, slower (docs/install.md)"
    built, picked = ", ".join(native.built_isas), native.selected_isa()
    return f"version {native.__version__}, built by {native.compiler}; holds {built}; this machine picks {picked}"


def _cuda() -> str:
    import torch

    from .ops import native
    from .ops.anomaly_map import why_no_kernel

    architectures = native.cuda_architectures or "none, features on a GPU are scored by torch operations"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    answer = f"scorer holds {architectures}; torch was built for CUDA {torch.version.cuda}, sees {device}"
    reason = why_no_kernel(torch.device("cuda")) if torch.cuda.is_available() and native.cuda_architectures else None
    return f"{answer}; torch operations score there: {reason}" if reason else answer


def _packed() -> str:
    from .inference.packing import why_not_packed

    reason = why_not_packed()
    return f"no, inference on the CPU is slower: {reason}" if reason else "yes, the fast way on the CPU"


def _scores() -> str:
    import numpy as np

    from . import anomaly_map

    teacher = [np.array([3.0, 4.0], np.float32).reshape(1, 2, 1, 1)]
    student = [np.array([4.0, -3.0], np.float32).reshape(1, 2, 1, 1)]
    score = anomaly_map(teacher, student, (2, 2))[1].item()
    if abs(score - 1) > 1e-6:  # perpendicular vectors
        msg = f"a distance of 1 came out as {score}"
        raise ArithmeticError(msg)
    return "yes"


def _registered() -> str:
    models = sys.modules.get("anomalib.models")
    if models is None:  # its import takes seconds
        spec = util.find_spec("anomalib.models")
        execute = spec and spec.loader and spec.loader.exec_module
        known = getattr(execute, "__module__", "") == "_anomalib_stfpm_ext_autoload"
    else:
        known = "stfpm_ext" in models.list_models()
    if not known:
        msg = "StfpmExt is not among anomalib's models; is _anomalib_stfpm_ext_autoload.pth in site-packages?"
        raise LookupError(msg)
    return "yes" if models else "yes, it imports StfpmExt after its own models"
