# SPDX-License-Identifier: Apache-2.0

"""Reads and writes students of other programs; ``stfpm-ext convert`` is the command.

No code in a file is run. Readers return a :class:`StfpmExt`; :func:`save_checkpoint` writes it for
``StfpmExt.load_from_checkpoint`` and for ``--ckpt_path`` of anomalib's command line.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import torchvision
from lightning.pytorch.utilities import rank_zero_warn
from timm.models import load_state_dict
from torch import nn

from .checkpoints import leaves_teacher_out, load_content
from .errors import fail
from .files import whole_file
from .lightning_model import StfpmExt
from .weights import load_tensors, read_file

_AUTHORS_BACKBONE = "resnet18.tv_in1k"
_AUTHORS_LAYERS = ["layer1", "layer2", "layer3"]
# The authors' network is a sequence of torchvision's children, so that numbers stand for their names.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def read_authors_student(path: str | Path, teacher_weights: bool | Path = True, argument: str = "path") -> StfpmExt:
    """Read a student that the authors' code saved (``snapshots/<category>/best.pth.tar``).

    Its features are those of the authors' network, up to rounding. Its maps are an eighth of theirs, since they leave
    the 1/2 out of the distance at each of three levels. The file holds neither the teacher nor a threshold.

    Args:
        path (str | Path): The authors' file: a ``state_dict`` of ResNet18's children by number, after any one prefix.
        teacher_weights (bool | Path): Local file with torchvision's weights of ResNet18, or ``True`` for those
            from timm's cache or the internet. Defaults to ``True``.
        argument (str): The name of the path for errors. Defaults to ``"path"``.

    Returns:
        StfpmExt: ResNet18 with the layers that the authors compare, ``layer1`` to ``layer3``, and
            ``combine_at="finest"``, as in their code.

    Raises:
        TypeError: If ``path`` is no path.
        FileNotFoundError: If one of the files does not exist.
        ValueError: If one cannot be read, or holds another network; if ``teacher_weights`` is ``False``.
        RuntimeError: If timm's pretrained weights are not available.
    """
    if teacher_weights is False:
        msg = "teacher_weights: the authors' file holds the student only; wanted True or a file of weights, got False"
        raise ValueError(msg)
    weights = read_file(argument, path, "a file of the authors' code", partial(load_state_dict, weights_only=True))
    student = {name: tensor for name, tensor in _timm_names(weights) if not name.startswith("layer4.")}  # never used
    model = StfpmExt(_AUTHORS_BACKBONE, _AUTHORS_LAYERS, teacher_weights, combine_at="finest")
    load_tensors(
        model.model.student_model.feature_extractor,
        student,
        f"{argument}: {str(path)!r} holds no student of the authors' code",
    )
    model.model.is_trained = True
    return model


def read_anomalib_checkpoint(
    path: str | Path, backbone: str | None = None, layers: Sequence[str] | None = None, argument: str = "path"
) -> StfpmExt:
    """Read a checkpoint of anomalib's ``Stfpm``.

    The maps are those of anomalib. The transform of the images, and thresholds and normalisation of the predictions,
    are read too if the checkpoint holds them.

    Args:
        path (str | Path): The checkpoint.
        backbone (str | None): The backbone, for a checkpoint that does not name it. Defaults to ``None``.
        layers (Sequence[str] | None): The layers, likewise. Defaults to ``None``.
        argument (str): The name of the path for errors. Defaults to ``"path"``.

    Returns:
        StfpmExt: The model, teacher included.

    Raises:
        TypeError: If ``path`` is no path.
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If it cannot be read, holds another model, or contradicts ``backbone`` or ``layers``.
    """
    return _read_checkpoint(argument, path, backbone, layers)


def write_authors_student(
    model: StfpmExt | str | Path, path: str | Path, category: str = "", argument: str = "model"
) -> None:
    """Write a student so that the authors' code reads it.

    The file has a ``layer4`` because the authors' code insists on one; it computes and ignores it. Ours is freshly
    initialised as torchvision does, the same every time. The authors compare the student with torchvision's pretrained
    ResNet18, so one that learned from another teacher is useless there.

    Args:
        model (StfpmExt | str | Path): The model, or a checkpoint of it or of anomalib's ``Stfpm``.
        path (str | Path): The file to write. Its folder is made if need be.
        category (str): The category that the file names. Defaults to ``""``.
        argument (str): The name of the model for errors. Defaults to ``"model"``.

    Raises:
        TypeError: If ``model`` is neither model nor path, ``path`` is no path, or ``category`` is no string.
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If it cannot be read, the student is no ResNet18 with ``layer1`` to ``layer3``, or ``path`` is a
            folder.
    """
    if not isinstance(category, str):
        msg = f"category: wanted a name, got {type(category).__qualname__}"
        raise TypeError(msg)
    if not isinstance(model, StfpmExt):
        model = _read_checkpoint(argument, model)
    student = model.model.student_model
    if student.backbone.partition(".")[0] != "resnet18" or sorted(student.layers) != _AUTHORS_LAYERS:
        msg = (
            f"{argument}: the authors' code wants 'resnet18' with layers {_AUTHORS_LAYERS}, "
            f"got {student.backbone!r} with {student.layers}"
        )
        raise ValueError(msg)
    if model.model.level_weights is not None:
        rank_zero_warn(
            f"{argument}: the exponents of its levels, {model.model.level_weights}, are unknown to the authors' code, "
            "whose scores will differ. A training with selection='held_out_map' has none."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torchvision.models.resnet18(weights=None)
    network.load_state_dict(student.feature_extractor.state_dict(), strict=False)  # all but layer4 and classifier
    weights = nn.Sequential(*list(network.children())[:-2]).state_dict(prefix="model.")
    _save({"category": category, "state_dict": weights}, path)


def save_checkpoint(model: StfpmExt, path: str | Path) -> None:
    """Save a model as Lightning does, without a training.

    The checkpoint holds no state of an optimiser, so training cannot go on from it.

    Args:
        model (StfpmExt): The model.
        path (str | Path): The checkpoint to write. Its folder is made if need be.

    Raises:
        TypeError: If ``path`` is no path.
        ValueError: If it is a folder.
    """
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": model.state_dict(),
        model.CHECKPOINT_HYPER_PARAMS_KEY: dict(model.hparams),
    }
    model.on_save_checkpoint(checkpoint)
    _save(checkpoint, path)


def _save(content: dict[str, Any], path: str | Path) -> None:
    if not isinstance(path, str | Path):
        msg = f"path: wanted the path of a file to write, got {type(path).__qualname__}"
        raise TypeError(msg)
    if Path(path).is_dir():
        msg = f"path: wanted a file to write, got the folder {str(path)!r}"
        raise ValueError(msg)
    with whole_file(Path(path)) as unfinished:
        torch.save(content, unfinished)


def _timm_names(weights: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name the authors' tensors as timm does; a name that is not the authors' stays."""
    first = [match[1] for match in map(re.compile(r"(|.*\.)0\.weight").fullmatch, weights) if match]
    prefix = min(first, key=len, default="")  # longer ones are, say, model.5.0.downsample.
    for name, tensor in weights.items():
        child, _, rest = name.removeprefix(prefix).partition(".")
        yield f"{_CHILDREN[child]}.{rest}" if child in _CHILDREN else name, tensor


def _read_checkpoint(
    argument: str, path: str | Path, backbone: str | None = None, layers: Sequence[str] | None = None
) -> StfpmExt:
    content = read_file(argument, path, "a checkpoint of anomalib's Stfpm", load_content)
    if leaves_teacher_out(content):
        wanted = "a checkpoint with a teacher, or else the model that StfpmExt.load_from_checkpoint makes of it"
        fail(ValueError, argument, wanted, f"{str(path)!r}, saved with save_teacher=False")
    settings = content["hyper_parameters"]
    backbone = _agree("backbone", backbone, settings.get("backbone"), path)
    layers = _agree("layers", layers, settings.get("layers"), path)
    # anomalib feeds every backbone ImageNet's mean and standard deviation, whatever the teacher was trained with.
    model = StfpmExt(
        backbone,
        layers,
        teacher_weights=False,
        combine_at=settings.get("combine_at", "image"),  # of StfpmExt's own checkpoints
    )
    model.pre_processor = StfpmExt.configure_pre_processor()  # unless the checkpoint has another
    if model.model.teacher_model.channels_last_output:
        msg = (
            f"backbone: anomalib compares the (B, H, W, C) features of {backbone!r} as if they were (B, C, H, W); "
            "StfpmExt does not repeat that, so wanted a backbone with (B, C, H, W) features"
        )
        raise ValueError(msg)
    try:
        model.on_load_checkpoint(content)
    except Exception as error:
        msg = f"{argument}: the transform or the post-processing in {str(path)!r} cannot be restored: {error}"
        raise ValueError(msg) from error
    unset = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("post_processor.")}
    stages = len(getattr(model.model.teacher_model.feature_extractor, "blocks", ()))  # anomalib keeps later ones, too
    read = {name: tensor for name, tensor in content["state_dict"].items() if _stage(name) < stages}
    load_tensors(
        model,
        {**unset, **read},
        f"{argument}: {str(path)!r} does not fit {backbone!r} with layers {list(layers)}",
    )
    return model


def _stage(name: str) -> int:
    """Return the number of the stage among an EfficientNet's blocks that a tensor belongs to, -1 for others."""
    match = re.search(r"\.feature_extractor\.blocks\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _agree(argument: str, given: Any, stored: Any, path: str | Path) -> Any:
    """Return what the checkpoint says about itself, or else what the caller says."""
    given, stored = (list(value) if isinstance(value, tuple) else value for value in (given, stored))
    if given is None and stored is None:
        msg = f"{argument}: {str(path)!r} does not say, so wanted it as an argument, got None"
        raise ValueError(msg)
    if given is not None and stored is not None and given != stored:
        msg = f"{argument}: {str(path)!r} says {stored!r}, got {given!r}"
        raise ValueError(msg)
    return given if stored is None else stored
