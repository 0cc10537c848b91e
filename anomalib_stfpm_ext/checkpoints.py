# SPDX-License-Identifier: Apache-2.0

"""Checkpoints: one writer and one reader. They run no code from a file, and a file fits one network alone.

Lightning writes weights, exponents, precision, threshold and range with the model's state dict. :data:`KEY` holds what
identifies their network, and what a fit needs to resume. The teacher is half of the model, and many models share it: a
checkpoint may name it instead.
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch.utilities import rank_zero_warn

from ._compat.lightning import is_fitting
from .callbacks.scoring_dtype import tell_other
from .errors import fail
from .feature_pyramid import Teacher
from .inference.precision import PRECISIONS, Precision
from .selection.record import POST_PROCESSOR_PREFIX, SCORING, STUDENT_PREFIX
from .torch_model import StfpmExtModel, encode_scoring

if TYPE_CHECKING:
    from .lightning_model import StfpmExt

KEY, VERSION = "stfpm_ext", 3  # 0.1 wrote version 1; 0.2, and later until December 2026, version 2
TEACHER_PREFIX = "model.teacher_model."  # of the teacher's tensors in the state dict


def load_content(path: str) -> dict[str, Any]:
    """Load a Lightning checkpoint, without running code from it.

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


def write(checkpoint: dict[str, Any], model: "StfpmExt") -> None:
    """Complete the checkpoint that Lightning and anomalib have made from a model.

    Args:
        checkpoint (dict[str, Any]): The checkpoint, which is changed: within a fit, it receives the kept student.
        model (StfpmExt): The model.
    """
    network, teacher, selection = model.model, model.model.teacher_model, model.student_selection
    if not is_fitting(model):  # which says by itself that no step was made
        network.warn_if_untrained()
    kept, fit = selection.before_saving(model), selection.state()
    checkpoint["state_dict"].update(kept)
    # anomalib's post-processor is module and callback at once, and Lightning saves both.
    state = checkpoint.get("callbacks", {}).get(getattr(model.post_processor, "state_key", None), {})
    state.update({name: kept[POST_PROCESSOR_PREFIX + name] for name in state if POST_PROCESSOR_PREFIX + name in kept})
    checkpoint[KEY] = {
        "version": VERSION,
        "network": {
            "backbone": teacher.backbone,
            "layers": teacher.layers,
            "combine_at": network.combine_at,
            "tiling": _describe_tiler(network.tiler),
        },
        "has_transform": getattr(model.pre_processor, "transform", None) is not None,  # anomalib may fail to save it
        "teacher": None,
        "fit": fit and {**fit, "precise_bn": model.precise_bn},
    }
    if not model.save_teacher:
        tensors = teacher.state_dict()
        for name in tensors:
            checkpoint["state_dict"].pop(TEACHER_PREFIX + name, None)  # a sharded state is incomplete
        named = {"backbone": teacher.backbone, "layers": teacher.layers, "sha256": checksum(tensors)}
        checkpoint[KEY]["teacher"] = named


def read(checkpoint: dict[str, Any], model: "StfpmExt") -> dict[str, Any] | None:
    """Prepare a checkpoint for anomalib and Lightning to load into a model, and the model for it.

    Args:
        checkpoint (dict[str, Any]): The checkpoint, of this package or of anomalib's ``Stfpm``. It is changed.
        model (StfpmExt): The model.

    Returns:
        dict[str, Any] | None: What the fit needs to resume; ``None`` if it held no images out.

    Raises:
        ValueError: If its network or teacher is another, or its version is newer; in a fit, also if tiles,
            ``combine_at`` or settings of the selection differ, or the fit had options that this version lacks.
    """
    teacher = model.model.teacher_model
    if not any(name.startswith(STUDENT_PREFIX) for name in checkpoint["state_dict"]):
        fail(ValueError, "checkpoint", "one of StfpmExt or Stfpm", "another model's, without a student")
    if KEY not in checkpoint:
        checkpoint[KEY] = _upgraded(checkpoint, len(teacher.layers))
    content: dict[str, Any] = checkpoint[KEY]
    if content["version"] > VERSION:
        wanted = f"one of version {VERSION} at most, or a newer anomalib-stfpm-ext"
        fail(ValueError, "checkpoint", wanted, f"version {content['version']}")
    network = content["network"]
    backbone, layers = network.get("backbone", teacher.backbone), network.get("layers", teacher.layers)
    if backbone.partition(".")[0] != teacher.backbone.partition(".")[0]:  # the weights' tag may be another
        fail(ValueError, "backbone", f"{backbone} as in the checkpoint", teacher.backbone)
    if list(layers) != teacher.layers:
        fail(ValueError, "layers", f"{list(layers)} as in the checkpoint", teacher.layers)
    if content["teacher"]:
        _bring_back(checkpoint["state_dict"], teacher, content["teacher"])
    if "tiling" in network:
        _restore_tiler(model.model, network["tiling"], must_match=is_fitting(model))
    if is_fitting(model):
        _check_settings(checkpoint, model)
    _keep_given(checkpoint, model)
    _score_as_asked(checkpoint, model)
    fit: dict[str, Any] | None = content["fit"]
    return fit


def _keep_given(checkpoint: dict[str, Any], model: "StfpmExt") -> None:
    """Let what the caller gave override the checkpoint, and say so; anomalib would replace it silently."""
    before = {name: checkpoint.get(f"anomalib_{name}_config") for name in model.given}
    for name, saved in before.items():
        component: Any = getattr(model, name)
        if model.given[name] and saved is not None and hasattr(component, "checkpoint_config"):
            checkpoint[f"anomalib_{name}_config"] = component.checkpoint_config()
            if checkpoint[f"anomalib_{name}_config"] != saved:
                rank_zero_warn(f"{name}: what was given is in force, and differs from the checkpoint's: {saved}")
    lost = before["pre_processor"] == {"transform": None} and checkpoint[KEY]["has_transform"]
    if lost and not model.given["pre_processor"] and model.pre_processor:
        wanted = "the one of the training, since the checkpoint could not hold it (PreProcessor() for none)"
        fail(ValueError, "pre_processor", wanted, "none")


def _score_as_asked(checkpoint: dict[str, Any], model: "StfpmExt") -> None:
    """Have the student score in the precision that model or trainer ask for, if they do.

    Threshold and range were set in the checkpoint's precision. A resumed fit sets them anew; else a warning follows.
    """
    asked = model.asked_precision
    if asked is None:
        return
    state = checkpoint["state_dict"]
    scoring = state[SCORING].clone()
    before: Precision = PRECISIONS[int(scoring[0])]
    if is_fitting(model):
        asked = model.model.precision  # float32 where the machine gains nothing from the one asked for
        of_processor = checkpoint.get("callbacks", {}).get(getattr(model.post_processor, "state_key", None), {})
        stale = [*of_processor.values(), *(state[name] for name in state if name.startswith(POST_PROCESSOR_PREFIX))]
        for statistic in stale if asked != before else ():
            if statistic.is_floating_point():
                statistic.fill_(torch.nan)
    else:
        tell_other(before, asked)
    scoring[0] = PRECISIONS.index(asked)
    state[SCORING] = scoring


def _upgraded(checkpoint: dict[str, Any], levels: int) -> dict[str, Any]:
    """Return an older file's content for :data:`KEY`; its exponents and precision move into the state dict."""
    # Lightning overwrites the hyperparameters with the arguments of load_from_checkpoint.
    network = checkpoint.get("stfpm_ext_network") or checkpoint.get("hyper_parameters", {})
    scoring = encode_scoring(network.get("level_weights"), network.get("precision", "float32"), True, levels)
    checkpoint["state_dict"].setdefault(SCORING, scoring)
    return {
        "version": VERSION,
        "network": network,
        "has_transform": checkpoint.get("stfpm_ext_transform", True),
        "teacher": checkpoint.get("stfpm_ext_teacher"),
        "fit": checkpoint.get("stfpm_ext_held_out"),
    }


def _check_settings(checkpoint: dict[str, Any], model: "StfpmExt") -> None:
    """Raise unless a resumed fit has the settings that it began with: students are taught and compared under them."""
    content, selection = checkpoint[KEY], model.student_selection
    fit, given = content["fit"] or {}, checkpoint.get("hyper_parameters", {})
    settings: list[tuple[str, Any, Any]] = [
        ("combine_at", content["network"].get("combine_at", model.model.combine_at), model.model.combine_at),
        ("hard_share", given.get("hard_share", 1.0), model.loss.hard_share),
    ]
    if fit:
        settings += [
            ("held_out_share", fit["share"], selection.share),
            ("selection", fit.get("selection", selection.selection), selection.selection),
            ("precise_bn", fit.get("precise_bn", model.precise_bn), model.precise_bn),  # absent from old files
        ]
    for argument, before, now in settings:
        if before != now:
            fail(ValueError, argument, f"{before} as in the checkpoint", now)
    for argument, default in (("ema_decay", None), ("lr_schedule", "constant")):  # removed in version 3
        if (before := given.get(argument, default)) != default:
            fail(ValueError, argument, f"{default}, with which alone this version goes on", before)


def leaves_teacher_out(checkpoint: dict[str, Any]) -> bool:
    """Tell whether a checkpoint names its teacher instead of holding it.

    Args:
        checkpoint (dict[str, Any]): The checkpoint, of any version.

    Returns:
        bool: Whether it does.
    """
    return bool(checkpoint.get(KEY, {}).get("teacher") or checkpoint.get("stfpm_ext_teacher"))


def _describe_tiler(tiler: Tiler | None) -> dict[str, Any] | None:
    """Describe anomalib's tiler by the arguments that make another one, in plain data."""
    if tiler is None:
        return None
    return {
        "tile_size": [tiler.tile_size_h, tiler.tile_size_w],
        "stride": [tiler.stride_h, tiler.stride_w],
        "remove_border_count": tiler.remove_border_count,
        "mode": ImageUpscaleMode(tiler.mode).value,
    }


def _restore_tiler(model: StfpmExtModel, wanted: dict[str, Any] | None, must_match: bool) -> None:
    """Tile images as in the checkpoint's training; threshold and range were set on such maps."""
    got = _describe_tiler(model.tiler)
    if wanted == got:
        return
    if must_match:
        fail(ValueError, "tiler", f"{wanted} as in the checkpoint", got)
    if got is not None:
        rank_zero_warn(f"tiler: the checkpoint's is in force, {wanted}, not {got}")
    model.tiler = None if wanted is None else Tiler(**{**wanted, "mode": ImageUpscaleMode(wanted["mode"])})


def _bring_back(state: dict[str, torch.Tensor], teacher: Teacher, named: dict[str, Any]) -> None:
    """Add the teacher's tensors to the state of a checkpoint that names it; raise if it names another teacher."""
    tensors = teacher.state_dict()
    if (got := checksum(tensors)) != named["sha256"]:
        wanted = (
            f"True or the file of the teacher that the checkpoint names and leaves out, {named['backbone']!r} "
            f"with layers {named['layers']} and sha256 {named['sha256']}"
        )
        fail(ValueError, "teacher_weights", wanted, "none" if teacher.is_random else f"one with sha256 {got}")
    state.update({TEACHER_PREFIX + name: tensor for name, tensor in tensors.items()})


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Compute the SHA-256 of the tensors' names, dtypes, shapes and values, which identifies a network.

    Args:
        tensors (Mapping[str, torch.Tensor]): The tensors by name, on any device and in any memory layout.

    Returns:
        str: The checksum, in hexadecimal.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not name.endswith("num_batches_tracked"):  # absent from old files, without effect
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
