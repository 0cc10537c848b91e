# SPDX-License-Identifier: Apache-2.0

"""timm's feature extractors: the names of their levels, and of their tensors in the files of whole networks."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

_TORCHVISION = "https://download.pytorch.org/models"


def create_extractor(backbone: str, indices: Sequence[int], pretrained: bool = False) -> Any:
    """Create timm's extractor, without the stages after the last level, which EfficientNet and MobileNetV3 keep.

    Nothing reads those, they take time, and their parameters without gradients stop distributed training.
    """
    extractor = timm.create_model(backbone, pretrained=pretrained, features_only=True, out_indices=tuple(indices))
    stages = [level["stage"] for level in extractor.feature_info.get_dicts() if "stage" in level]
    if stages and isinstance(getattr(extractor, "blocks", None), nn.Sequential):
        del extractor.blocks[max(stages) :]
    return extractor


def layer_indices(backbone: str, layers: Sequence[str]) -> tuple[int, ...]:
    """Return timm's indices of the layers, ascending."""
    if isinstance(layers, str) or not all(isinstance(layer, str) for layer in layers):
        msg = f"layers: wanted a list of names, got {layers!r}"
        raise TypeError(msg)
    known = _pyramid_layers(backbone)
    unknown = [layer for layer in layers if layer not in known]
    if unknown or not layers or len(set(layers)) < len(layers):
        msg = f"layers: wanted one or more of {known}, each once, for backbone {backbone!r}, got {list(layers)}"
        raise ValueError(msg)
    return tuple(sorted(known.index(layer) for layer in layers))


def _pyramid_layers(backbone: str) -> list[str]:
    """Return the names of the levels that a backbone has, from fine to coarse."""
    if not isinstance(backbone, str):
        msg = f"backbone: wanted the name of a timm model, got {type(backbone).__qualname__}"
        raise TypeError(msg)
    architecture, _, tag = backbone.partition(".")
    if not timm.is_model(architecture):
        similar = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        msg = f"backbone: timm has no model {backbone!r}" + (
            f"; similar names: {', '.join(similar)}" if similar else ""
        )
        raise ValueError(msg)
    if tag and not timm.is_model_pretrained(backbone):
        tags = timm.list_pretrained(f"{architecture}.*")
        msg = f"backbone: timm has no weights {tag!r} of {architecture!r}, only {', '.join(tags)}"
        raise ValueError(msg)
    try:
        with torch.device("meta"):
            info = timm.create_model(backbone, pretrained=False, features_only=True).feature_info
        strides = {level["reduction"] for level in info.info}
    except Exception as error:
        msg = f"backbone: timm offers no feature pyramid of {backbone!r}: {error}"
        raise ValueError(msg) from error
    if len(strides) < 2:
        msg = f"backbone: {backbone!r} has no feature pyramid, all its levels have stride {strides.pop()}"
        raise ValueError(msg)
    return [level["module"] for level in info.info]


def pretrained_name(backbone: str) -> str:
    """Say which pretrained weights a name stands for: without a tag, torchvision's where timm has them.

    Args:
        backbone (str): timm's name for the network, with or without a tag.

    Returns:
        str: The name with a tag; the same name where timm has no weights.
    """
    if "." in backbone:
        return backbone
    if timm.is_model_pretrained(f"{backbone}.tv_in1k"):
        return f"{backbone}.tv_in1k"
    config = timm.get_pretrained_cfg(backbone)
    return f"{backbone}.{config.tag}" if config is not None and config.tag else backbone


def pretrained_config(backbone: str) -> Any:
    """Return timm's notes on the pretrained weights: ``mean``, ``std``, ``input_size``, ``fixed_input_size``.

    Args:
        backbone (str): timm's name for the network, with or without a tag.

    Returns:
        Any: The notes; timm's defaults (ImageNet's statistics) for a network that a user has registered without any.
    """
    return timm.get_pretrained_cfg(pretrained_name(backbone)) or PretrainedCfg()


def torch_hub_file(name: str) -> Path | None:
    """Return the file where torch hub, and so torchvision, keeps weights of torchvision's that timm offers, too.

    Args:
        name (str): timm's name for the weights.

    Returns:
        Path | None: The file, which may not exist; ``None`` for other weights, which timm converts.
    """
    config = timm.get_pretrained_cfg(name)
    folder, _, file = (config.url if config and config.url else "").rpartition("/")
    return Path(torch.hub.get_dir(), "checkpoints", file) if folder == _TORCHVISION else None


def foreign_weights(weights: Mapping[str, Any], backbone: str) -> list[str]:
    """Name the weights of a file that belong to the backbone's own stages, but that the backbone does not have.

    The file of a deeper network of the same family has such weights.

    Args:
        weights (Mapping[str, Any]): The tensors of the file by name.
        backbone (str): timm's name for the network.

    Returns:
        list[str]: The names.
    """
    with torch.device("meta"):
        known = timm.create_model(backbone, pretrained=False).state_dict()
    classifier = pretrained_config(backbone).classifier or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    stages = {name.partition(".")[0] for name in known if not name.startswith(heads)}
    return [
        name for name in weights if name.endswith(".weight") and name not in known and name.partition(".")[0] in stages
    ]


def find_tensor(weights: Mapping[str, Any], name: str) -> torch.Tensor | None:
    """Find a tensor of timm's feature extractor in the state dict of a whole network."""
    found = (weights[candidate] for candidate in _names_in_network(name) if candidate in weights)
    return next((tensor for tensor in found if isinstance(tensor, torch.Tensor)), None)


def _names_in_network(name: str) -> Iterator[str]:
    yield name
    first, _, rest = name.partition(".")
    yield rest  # "model." and "body." of timm's FeatureGetterNet and FeatureHookNet
    yield f"{'.'.join(first.rsplit('_', 1))}.{rest}"  # "stages_0." of its FeatureListNet, for "stages.0."
