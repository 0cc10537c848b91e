# SPDX-License-Identifier: Apache-2.0

"""Files of weights: read without running code from them, and loaded in full or not at all."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


def read_file(argument: str, path: str | Path, kind: str, reader: Callable[[str], Any]) -> Any:
    """Read a file that an argument names.

    Args:
        argument (str): The argument that names it, for the error.
        path (str | Path): The file.
        kind (str): What it should be, for the error.
        reader (Callable[[str], Any]): Reads it. It must not run code from the file.

    Returns:
        Any: What ``reader`` returns.

    Raises:
        TypeError: If ``path`` is no path.
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be read.
    """
    if not isinstance(path, str | Path):
        msg = f"{argument}: wanted the path of {kind}, got {type(path).__qualname__}"
        raise TypeError(msg)
    if not Path(path).is_file():
        what = "is no file" if Path(path).exists() else "does not exist"
        msg = f"{argument}: wanted {kind}, got {str(path)!r}, which {what}"
        raise FileNotFoundError(msg)
    try:
        return reader(str(path))
    except Exception as error:
        reason = _what_it_is(Path(path)) or f"{type(error).__name__}: {error}"
        msg = f"{argument}: {str(path)!r} cannot be read as {kind}: {reason}"
        raise ValueError(msg) from error


def _what_it_is(path: Path) -> str | None:
    """Say what a file holds instead of weights, where its first bytes tell."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; 'git lfs pull' fetches the file itself"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, as of a download that failed"
    return None


def load_tensors(module: nn.Module, tensors: Mapping[str, Any], misfit: str) -> None:
    """Load all tensors of a module, and accept no others.

    Args:
        module (nn.Module): The module.
        tensors (Mapping[str, Any]): Its tensors by name.
        misfit (str): Start of the error's message: what does not fit what.

    Raises:
        ValueError: If tensors are missing, of another shape, or unknown to the module.
    """
    wanted = module.state_dict()
    wrong = []
    for name in {**wanted, **tensors}:
        if name not in tensors and name.endswith("num_batches_tracked"):
            continue  # absent from old files, without effect
        want = tuple(wanted[name].shape) if name in wanted else "no such tensor"
        found = tensors.get(name, "missing")
        found = tuple(found.shape) if isinstance(found, torch.Tensor) else found
        if found != want:
            wrong.append(f"{name} is {found}, wanted {want}")
    if wrong:
        msg = f"{misfit}: {_shorten(wrong)}"
        raise ValueError(msg)
    # NaN is right for a post-processor without a threshold.
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("post_processor.")}
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        msg = f"{misfit}: wanted finite numbers, got others in {_shorten(broken)}"
        raise ValueError(msg)
    module.load_state_dict(tensors, strict=False)


def _shorten(items: Sequence[str], most: int = 5) -> str:
    more = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more
