# SPDX-License-Identifier: Apache-2.0

"""Checkpoints: read without running code from them, and saved without the teacher, which they then name instead.

The teacher is half of the model, and many models share it.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from anomalib.utils.serialization import anomalib_safe_globals

from .errors import fail
from .feature_pyramid import Teacher

CHECKPOINT_KEY = "stfpm_ext_teacher"
TEACHER_PREFIX = "model.teacher_model."  # of the teacher's tensors in a checkpoint's state_dict


def load_content(path: str) -> dict[str, Any]:
    """Load a checkpoint of Lightning's, without running code from it.

    Args:
        path (str): The file.

    Returns:
        dict[str, Any]: Its content, on the CPU, with ``state_dict`` and ``hyper_parameters``.

    Raises:
        ValueError: If it has no state dict.
    """
    with anomalib_safe_globals():
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        msg = "it has no state_dict"
        raise ValueError(msg)
    if not isinstance(content.setdefault("hyper_parameters", {}), dict):
        msg = "its hyper_parameters are no dictionary"
        raise ValueError(msg)
    return content


def leave_out(checkpoint: dict[str, Any], teacher: Teacher) -> None:
    """Replace the teacher's tensors in a checkpoint by its name and checksum.

    Args:
        checkpoint (dict[str, Any]): The checkpoint, which is changed.
        teacher (Teacher): The teacher.
    """
    state, tensors = checkpoint["state_dict"], teacher.state_dict()
    for name in tensors:
        state.pop(TEACHER_PREFIX + name, None)  # a sharded state is not all here
    checkpoint[CHECKPOINT_KEY] = {
        "backbone": teacher.backbone,
        "layers": teacher.layers,
        "sha256": checksum(tensors),
    }


def bring_back(checkpoint: dict[str, Any], teacher: Teacher) -> None:
    """Put the teacher's tensors into a checkpoint that names it; one that holds its teacher stays as it is.

    Args:
        checkpoint (dict[str, Any]): The checkpoint, which is changed.
        teacher (Teacher): The teacher.

    Raises:
        ValueError: If it is not the teacher that the checkpoint names.
    """
    named = checkpoint.get(CHECKPOINT_KEY)
    if named is None:
        return
    tensors = teacher.state_dict()
    if (got := checksum(tensors)) != named["sha256"]:
        wanted = (
            f"True or the file of the teacher that the checkpoint names and leaves out, {named['backbone']!r} "
            f"with layers {named['layers']} and sha256 {named['sha256']}"
        )
        fail(ValueError, "teacher_weights", wanted, "none" if teacher.is_random else f"one with sha256 {got}")
    checkpoint["state_dict"].update({TEACHER_PREFIX + name: tensor for name, tensor in tensors.items()})


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Compute what tells networks apart: SHA-256 of names, dtypes, shapes and values of the tensors.

    Args:
        tensors (Mapping[str, torch.Tensor]): The tensors by name, on any device and in any memory layout.

    Returns:
        str: The checksum, in hexadecimal.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not name.endswith("num_batches_tracked"):  # absent from old files, and of no effect
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
