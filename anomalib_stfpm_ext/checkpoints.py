# SPDX-License-Identifier: Apache-2.0

"""Checkpoints: read without running code from them, for one network alone, and saved without the teacher if wanted.

The teacher is half of the model, and many models share it. A checkpoint without it names it instead.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from lightning.pytorch.utilities import rank_zero_warn

from ._compat import safe_globals
from .errors import fail
from .feature_pyramid import Teacher
from .torch_model import StfpmExtModel

CHECKPOINT_KEY = "stfpm_ext_teacher"
NETWORK_KEY = "stfpm_ext_network"
TEACHER_PREFIX = "model.teacher_model."  # of the teacher's tensors in a checkpoint's state_dict
STUDENT_PREFIX = "model.student_model."


def load_content(path: str) -> dict[str, Any]:
    """Load a Lightning checkpoint, without running code from it.

    Args:
        path (str): The file.

    Returns:
        dict[str, Any]: Its content, on the CPU, with ``state_dict`` and ``hyper_parameters``.

    Raises:
        ValueError: If it has no state dict.
    """
    with safe_globals():
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        msg = "it has no state_dict"
        raise ValueError(msg)
    if not isinstance(content.setdefault("hyper_parameters", {}), dict):
        msg = "its hyper_parameters are no dictionary"
        raise ValueError(msg)
    return content


def name_network(checkpoint: dict[str, Any], model: StfpmExtModel) -> None:
    """Say in a checkpoint which network it is of, how images are cut into tiles for it, and how it scores.

    Args:
        checkpoint (dict[str, Any]): The checkpoint, which is changed.
        model (StfpmExtModel): The networks.
    """
    checkpoint[NETWORK_KEY] = {
        "backbone": model.teacher_model.backbone,
        "layers": model.teacher_model.layers,
        "combine_at": model.combine_at,
        "tiling": describe_tiler(model.tiler),
        "precision": model.precision,
        "level_weights": model.level_weights,
    }


def describe_tiler(tiler: Tiler | None) -> dict[str, Any] | None:
    """Describe anomalib's tiler by the arguments that make another one.

    Args:
        tiler (Tiler | None): The tiler, or ``None``.

    Returns:
        dict[str, Any] | None: The arguments in plain data, or ``None``.
    """
    if tiler is None:
        return None
    return {
        "tile_size": [tiler.tile_size_h, tiler.tile_size_w],
        "stride": [tiler.stride_h, tiler.stride_w],
        "remove_border_count": tiler.remove_border_count,
        "mode": ImageUpscaleMode(tiler.mode).value,
    }


def restore_tiler(model: StfpmExtModel, network: Mapping[str, Any], must_match: bool) -> None:
    """Cut images into tiles as in the training of a checkpoint; threshold and range are of such maps.

    Args:
        model (StfpmExtModel): The networks, whose tiler is changed.
        network (Mapping[str, Any]): What :func:`check_network` returned; files of version 0.1 do not mention tiles.
        must_match (bool): Whether a tiler that the model has already must be the same.

    Raises:
        ValueError: If it must, and is not.
    """
    if "tiling" not in network:
        return
    wanted, got = network["tiling"], describe_tiler(model.tiler)
    if wanted != got and (must_match or got is not None):
        if must_match:
            fail(ValueError, "tiler", f"{wanted} as in the checkpoint", got)
        rank_zero_warn(f"tiler: the checkpoint's is in force, {wanted}, not {got}")
    if wanted != got:
        model.tiler = None if wanted is None else Tiler(**{**wanted, "mode": ImageUpscaleMode(wanted["mode"])})


def check_network(checkpoint: dict[str, Any], teacher: Teacher) -> dict[str, Any]:
    """Check that a checkpoint is of a network.

    Args:
        checkpoint (dict[str, Any]): The checkpoint, of this package or of anomalib's Stfpm.
        teacher (Teacher): The teacher, whose architecture is the student's.

    Returns:
        dict[str, Any]: What the checkpoint says of its network, maybe nothing.

    Raises:
        ValueError: If it is of another network.
    """
    if not any(name.startswith(STUDENT_PREFIX) for name in checkpoint["state_dict"]):
        fail(ValueError, "checkpoint", "one of StfpmExt or Stfpm", "another model's, without a student")
    # Lightning writes what load_from_checkpoint is given over the hyperparameters.
    saved: dict[str, Any] = checkpoint.get(NETWORK_KEY) or checkpoint.get("hyper_parameters", {})
    backbone, layers = saved.get("backbone", teacher.backbone), saved.get("layers", teacher.layers)
    if backbone.partition(".")[0] != teacher.backbone.partition(".")[0]:  # the weights' tag may be another
        fail(ValueError, "backbone", f"{backbone} as in the checkpoint", teacher.backbone)
    if list(layers) != teacher.layers:
        fail(ValueError, "layers", f"{list(layers)} as in the checkpoint", teacher.layers)
    return saved


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
