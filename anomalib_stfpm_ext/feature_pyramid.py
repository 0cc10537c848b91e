# SPDX-License-Identifier: Apache-2.0

"""The network on either side of STFPM: a timm backbone that returns the features of named levels."""

import os
from array import array
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from timm.models import load_state_dict
from torch import nn
from typing_extensions import Self

from ._compat.torch import descendants, has_hooks, is_traced, is_transformed, own_tensors, versions
from .backbones import create_extractor, find_tensor, foreign_weights, layer_indices, pretrained_name, torch_hub_file
from .errors import fail
from .inference.folding import fold
from .ops import native
from .weights import load_tensors, read_file

WEIGHTS_VARIABLE = "STFPM_EXT_TEACHER_WEIGHTS"  # for programs that pass no arguments, like anomalib Studio

# Pixels of the images that a CPU takes through the network at a time. Activations of more would be new memory from the
# system in each layer, whose page faults cost up to half of the time.
CPU_PIXELS = 4 * 256 * 256


class InferenceCopy(NamedTuple):
    """A faster copy of a network.

    Attributes:
        network (nn.Module): The copy.
        dtype (torch.dtype): What it computes in, and the dtype of the images that it wants.
    """

    network: nn.Module
    dtype: torch.dtype


class FeaturePyramid(nn.Module):
    """Features of a timm backbone at several levels.

    Args:
        backbone (str): timm's name for the network, with or without a tag for its weights.
        layers (Sequence[str]): The levels, by the names that timm gives them (``feature_info``).

    Attributes:
        finest (str): The level with the largest features.

    Note:
        Inference runs a copy whose batch norms are folded into the convolutions: the same features up to rounding. It
        is made anew when modules or weights have changed, after gradients were needed, and after training mode. torch
        does not count changes of weights through ``tensor.data``, views of NumPy or DLPack, and collectives of
        ``torch.distributed``. On a CPU, a sample of the weights reveals these: all of a vector, and a value or two of
        each filter. Changes outside the sample, on a GPU, and of other attributes of a module, such as ``eps``, go
        unnoticed.

    Raises:
        ValueError: If timm does not know the backbone, if it has no feature pyramid, or if one of the layers is not
            part of it.

    Example:
        >>> import torch
        >>> from anomalib_stfpm_ext.feature_pyramid import FeaturePyramid
        >>> pyramid = FeaturePyramid("resnet18", ["layer1", "layer2"])
        >>> {name: tuple(features.shape) for name, features in pyramid(torch.zeros(1, 3, 64, 64)).items()}
        {'layer1': (1, 64, 16, 16), 'layer2': (1, 128, 8, 8)}
    """

    def __init__(self, backbone: str, layers: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.layers = list(layers)
        self.feature_extractor = create_extractor(backbone, layer_indices(backbone, layers))
        info = self.feature_extractor.feature_info
        self.finest = min(zip(info.reduction(), info.module_name(), strict=True))[1]
        # For inference: a copy (in a tuple, so that it is no part of the model), and the state that it was made from.
        self._folded: tuple[Any, ...] = ()
        self._folded_state: list[Any] | None = None
        self._folded_dtype = torch.float32
        self._versions: list[int] = []
        self._blocks = array("Q")
        self._sampled: object = None
        # Swin and similar networks return (B, H, W, C).
        self.channels_last_output = str(getattr(self.feature_extractor, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, images: torch.Tensor, copy: InferenceCopy | None = None) -> dict[str, torch.Tensor]:
        """Extract the features.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``.
            copy (InferenceCopy | None): What :meth:`inference_copy` has just returned. Defaults to ``None``, which
                calls it.

        Returns:
            dict[str, torch.Tensor]: Features ``(B, C, H_l, W_l)`` by level, in the order of ``layers``.
        """
        if not is_traced(images):  # the faster layout for convolutions; the scorer reads any
            images = images.contiguous(memory_format=torch.channels_last)
        copy = copy or self.inference_copy(images)
        if copy is None:
            return self._by_level(self.feature_extractor(images))
        # By forward, since a traced network that is called prints its errors.
        parts = [copy.network.forward(part.to(copy.dtype)) for part in self._parts(images)]
        return self._by_level(parts[0] if len(parts) == 1 else list(map(torch.cat, zip(*parts, strict=True))))

    def check_images(self, images: torch.Tensor) -> None:
        """Raise unless the network takes the images.

        Args:
            images (torch.Tensor): Normalised images, which should be ``(B, 3, H, W)``.

        Raises:
            ValueError: If they have another shape, another dtype without autocast, or are on another device.
        """
        weight, shape = next(self.parameters()), tuple(images.shape)
        is_cast = torch.is_autocast_enabled(weight.device.type)
        fits = images.device == weight.device and (images.dtype == weight.dtype or is_cast)
        if len(shape) != 4 or shape[1] != 3 or not fits:
            wanted = f"(B, 3, H, W) of {weight.dtype} on {weight.device}"
            fail(ValueError, "images", wanted, f"{shape} of {images.dtype} on {images.device}")

    def inference_copy(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> InferenceCopy | None:
        """Return the inference copy, up to date, if nothing but features is needed.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``, or others of their shape.
            dtype (torch.dtype): What to compute in, for a network of float32. Defaults to ``torch.float32``.

        Returns:
            InferenceCopy | None: The copy, in float32 where the network cannot compute in that dtype, which the log
                says. ``None`` for images or weights with NaN; with gradients (also forward-mode ones), autocast, hooks
                within the network, or modules in training mode; and where :func:`is_traced`, since compilers fold by
                themselves.
        """
        if is_traced(images) or is_transformed():
            return None
        modules = descendants(self.feature_extractor)
        tensors = own_tensors(modules)
        if torch.is_grad_enabled() and (images.requires_grad or any(tensor.requires_grad for tensor in tensors)):
            self._folded, self._folded_state = (), None  # a step may follow, and torch does not count all of them
            return None
        if torch.is_autocast_enabled(images.device.type) or any(
            module.training or has_hooks(module) for module in modules
        ):
            return None
        if images.dtype != tensors[0].dtype:  # torch will raise an error
            return None
        # oneDNN's fused activations turn NaN into 0, and so into a plausible score.
        if images.device.type == "cpu" and images.sum(dtype=torch.float32).isnan():
            return None
        if images.dtype != torch.float32:  # double precision stays what it is
            dtype = images.dtype
        state = [dtype, *map(id, modules), *map(id, tensors), *map(torch.Tensor.data_ptr, tensors)]
        if (
            not self._folded
            or state != self._folded_state
            or versions(tensors) != self._versions
            or self._sample(tensors) != self._sampled
        ):
            if any(map(torch.is_inference, tensors)):  # whose changes are not counted
                return None
            if any(tensor.isnan().any() for tensor in tensors):
                return None
            sample = self._parts(images)[0]
            network = fold(self.feature_extractor, sample, dtype)
            if network is None:
                rank_zero_warn(
                    f"inference_precision: {self.backbone!r} cannot compute in {dtype}, and goes on in float32."
                )
                network, dtype = fold(self.feature_extractor, sample, images.dtype), images.dtype
            # Kept with modules and tensors, so that no others get their addresses.
            self._folded = (network, modules, [tensor.detach() for tensor in tensors])
            self._folded_state, self._versions, self._folded_dtype = state, versions(tensors), dtype
            self._blocks = array("Q", chain.from_iterable(map(memory_of, tensors)))
            self._sampled = self._sample(tensors)
        return InferenceCopy(self._folded[0], self._folded_dtype)

    def _sample(self, tensors: Sequence[torch.Tensor]) -> object:
        """Hash a sample of the weights, found by :attr:`_blocks`; sum all of them without the compiled module."""
        if native.is_built:
            return native.fingerprint(self._blocks)
        return [tensor.sum(dtype=torch.float64).item() for tensor in tensors if memory_of(tensor)]

    @staticmethod
    def _parts(images: torch.Tensor) -> Sequence[torch.Tensor]:
        if images.device.type != "cpu":
            return [images]
        return torch.split(images, max(1, CPU_PIXELS // (images.shape[-2] * images.shape[-1])))

    def _by_level(self, features: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.channels_last_output:
            features = [level.permute(0, 3, 1, 2) for level in features]
        by_index = dict(zip(self.feature_extractor.feature_info.module_name(), features, strict=True))
        return {layer: by_index[layer] for layer in self.layers}

    def train(self, mode: bool = True) -> Self:
        """Enter training or evaluation mode; training gives up the copy for inference."""
        if mode:
            self._folded, self._folded_state = (), None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # An export is a pickle of the model, and needs no second copy of the network.
        return {**self.__dict__, "_folded": (), "_folded_state": None}


def memory_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the memory of a weight, whose rows are the filters of a convolution and the values of a vector.

    Args:
        tensor (torch.Tensor): The weight.

    Returns:
        tuple[int, ...]: Address, size in bytes and number of rows; nothing where there is no memory on the CPU.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.numel():
        return ()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size(), len(tensor) if tensor.ndim else 1


class Teacher(FeaturePyramid):
    """A pretrained feature pyramid that never changes: no gradients, always in evaluation mode.

    Args:
        backbone (str): As in :class:`FeaturePyramid`.
        layers (Sequence[str]): As in :class:`FeaturePyramid`.
        weights (str | Path | bool): A local ``.pth`` or ``.safetensors`` file with the backbone's weights. ``True``:
            the file that the environment variable ``STFPM_EXT_TEACHER_WEIGHTS`` names; otherwise timm's pretrained
            weights, from torch hub's cache, timm's cache or the internet. ``False``: none, when a checkpoint that holds
            the teacher is about to be loaded.

    Attributes:
        is_random (bool): Whether no weights have been loaded.

    Raises:
        FileNotFoundError: If the file of weights does not exist.
        ValueError: If it cannot be read, or lacks tensors of the backbone or has them in other shapes.
        RuntimeError: If timm's pretrained weights are not available.
    """

    def __init__(self, backbone: str, layers: Sequence[str], weights: str | Path | bool = True) -> None:
        super().__init__(backbone, layers)
        self.is_random = weights is False
        if weights is True:
            self._load_pretrained()
        elif weights is not False:
            self._load_file(weights, "teacher_weights")
        self.freeze()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.is_random = False

    def freeze(self) -> None:
        """Exclude the teacher from training."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in evaluation mode, whatever Lightning asks for."""
        return super().train(False)

    def forward(self, images: torch.Tensor, copy: InferenceCopy | None = None) -> dict[str, torch.Tensor]:
        """Extract the features without gradients; see :meth:`FeaturePyramid.forward`."""
        with torch.no_grad():
            return super().forward(images, copy)

    def _load_pretrained(self) -> None:
        """Load what the environment names, or timm's weights."""
        if named := os.environ.get(WEIGHTS_VARIABLE):
            rank_zero_info(f"teacher_weights: {named!r} is the teacher, as {WEIGHTS_VARIABLE} says.")
            self._load_file(named, WEIGHTS_VARIABLE)
            return
        name = pretrained_name(self.backbone)
        if name != self.backbone:
            rank_zero_info(f"teacher_weights: backbone {self.backbone!r} stands for the weights {name!r}.")
        hub_file = torch_hub_file(name)
        if hub_file is not None and hub_file.is_file():
            rank_zero_info(f"teacher_weights: {str(hub_file)!r} has them.")
            self._load_file(hub_file, "teacher_weights")
            return
        try:
            indices = self.feature_extractor.feature_info.out_indices
            pretrained = create_extractor(name, indices, pretrained=True)
        except Exception as error:
            msg = (
                f"teacher_weights: timm's pretrained weights of {name!r} cannot be had ({type(error).__name__}). "
                f"Without internet, name a local .pth or .safetensors file as teacher_weights or in the environment "
                f"variable {WEIGHTS_VARIABLE}"
                + (f", or copy one that was downloaded elsewhere to {str(hub_file)!r}." if hub_file else ".")
            )
            raise RuntimeError(msg) from error
        self.feature_extractor.load_state_dict(pretrained.state_dict())

    def _load_file(self, path: str | Path, argument: str) -> None:
        if isinstance(path, str | Path):
            path = Path(path).expanduser()
        file_weights = read_file(
            argument,
            path,
            "a file of weights (.pth or .safetensors)",
            partial(load_state_dict, use_ema=False, weights_only=True),
        )
        foreign = foreign_weights(file_weights, self.backbone)
        if foreign:
            wanted = f"weights of {self.backbone!r}"
            got = f"those of another network in {str(path)!r}: {foreign[0]} and {len(foreign) - 1} more are not its own"
            fail(ValueError, argument, wanted, got)
        names = self.feature_extractor.state_dict()
        load_tensors(
            self.feature_extractor,
            {name: tensor for name in names if (tensor := find_tensor(file_weights, name)) is not None},
            f"{argument}: {str(path)!r} does not fit {self.backbone!r}",
        )


class Student(FeaturePyramid):
    """An untrained feature pyramid, initialised as torchvision does.

    timm starts the last batch norm of every residual block at zero, torchvision (and so the paper) at one.
    """

    def __init__(self, backbone: str, layers: Sequence[str]) -> None:
        super().__init__(backbone, layers)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
                nn.init.ones_(module.weight)
