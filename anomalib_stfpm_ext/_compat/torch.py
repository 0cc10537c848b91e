# SPDX-License-Identifier: Apache-2.0

"""What torch has no public name for, or none as fast."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_transformed() -> bool:
    """Tell whether ``torch.func`` or forward-mode differentiation is at work, which must see torch's own operations.

    torch has no public question for either.

    Returns:
        bool: Whether one of them is; ``False`` while ``torch.compile`` follows, to which the question means nothing.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_dispatched() -> bool:
    """Tell whether a ``TorchDispatchMode`` follows the operators, as in ``torch.export`` and fake tensors.

    torch has no public question for it.

    Returns:
        bool: Whether one does.
    """
    return bool(is_in_torch_dispatch_mode())


def is_tracing() -> bool:
    """Tell whether TorchScript records what is computed, which torch's older ONNX exporter has it do, too.

    ``torch.jit.is_tracing`` takes four times as long, and each call of the scorer asks.

    Returns:
        bool: Whether it does.
    """
    return torch._C._get_tracing_state() is not None


def is_traced(images: torch.Tensor) -> bool:
    """Tell whether a compiler, an exporter or a tracer follows what is computed.

    Args:
        images (torch.Tensor): The images.

    Returns:
        bool: Whether one does, or nothing is computed at all.
    """
    return torch.compiler.is_compiling() or images.is_meta or is_tracing() or is_dispatched()


def current_stream(device: torch.device) -> int:
    """Return torch's current stream on a CUDA device, as kernels take it.

    ``torch.cuda.current_stream`` makes a Python object first, which takes longer than the rest of the call.

    Args:
        device (torch.device): The device, with its index.

    Returns:
        int: The address of the ``cudaStream_t``.
    """
    return int(torch._C._cuda_getCurrentRawStream(device.index))


def versions(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return how many times torch has changed each tensor in place.

    torch documents the counter for authors of autograd functions, but gives it no public name.

    Args:
        tensors (Iterable[torch.Tensor]): The tensors, not of inference mode.

    Returns:
        list[int]: The counts.
    """
    return [tensor._version for tensor in tensors]


def own_tensors(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Return the parameters and buffers of modules, without those of their children.

    ``parameters(recurse=False)`` and ``buffers(recurse=False)`` take ten times as long, and each inference asks.

    Args:
        modules (Iterable[nn.Module]): The modules.

    Returns:
        list[torch.Tensor]: Their parameters and buffers.
    """
    return [
        tensor
        for module in modules
        for tensors in (module._parameters, module._buffers)
        for tensor in tensors.values()
        if tensor is not None
    ]


def descendants(module: nn.Module) -> list[nn.Module]:
    """Return a module and all within it, each once.

    ``modules()`` takes four times as long, and each inference asks.

    Args:
        module (nn.Module): The module.

    Returns:
        list[nn.Module]: The modules.
    """
    found = {module: None}  # keeps the order
    for each in (stack := [module]):  # which grows meanwhile
        for child in each._modules.values():
            if child is not None and child not in found:
                found[child] = None
                stack.append(child)
    return stack


def has_hooks(module: nn.Module) -> bool:
    """Tell whether hooks follow a module's forward pass.

    torch lets hooks be registered and removed, but not counted.

    Args:
        module (nn.Module): The module.

    Returns:
        bool: Whether there are any.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is what ``torch.compile`` makes of another one.

    Its public class is in ``torch._dynamo``, whose import takes seconds.

    Args:
        module (nn.Module): The module.

    Returns:
        bool: Whether it is.
    """
    return hasattr(module, "_orig_mod")


def register_once(name: str, register: Callable[[Any], None]) -> None:
    """Register operators in this process once, however often the module that has them is imported.

    torch refuses a second registration, and forgets the first one with its library. So the namespace of the operators,
    which lives as long as torch, holds the library.

    Args:
        name (str): One of the operators.
        register (Callable[[torch.library.Library], None]): Registers them.
    """
    operators: Any = torch.ops.anomalib_stfpm_ext
    if not hasattr(operators, name):
        library = torch.library.Library("anomalib_stfpm_ext", "FRAGMENT")  # type: ignore[no-untyped-call]
        register(library)
        setattr(operators, f"library_of_{name}", library)


def register_namedtuple(kind: type, name: str) -> None:
    """Let ``torch.export.save`` write programs that return a named tuple.

    ``torch.export`` has a public registration for data classes only.

    Args:
        kind (type): The class.
        name (str): Its name in files.
    """
    if kind not in _pytree.SUPPORTED_SERIALIZED_TYPES:
        _pytree._register_namedtuple(kind, serialized_type_name=name)


def lacks_packed_convolution() -> str | None:
    """Say what this torch lacks of :func:`pack_convolution` and :func:`convolve_packed`.

    Returns:
        str | None: The operator's name, or ``None`` if nothing is missing.
    """
    if not hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight"):
        return "mkldnn_reorder_conv2d_weight"
    return None if hasattr(torch.ops.mkldnn, "_convolution_pointwise") else "mkldnn._convolution_pointwise"


def pack_convolution(weight: torch.Tensor, geometry: Sequence[Any], images: torch.Size) -> torch.Tensor:
    """Arrange a convolution's weight as oneDNN wants it.

    Only torch's own compiler, inductor, has a use for the operator.

    Args:
        weight (torch.Tensor): Weight ``(O, I, H, W)``, float32 on the CPU.
        geometry (Sequence): Padding, stride, dilation and groups of the convolution.
        images (torch.Size): Shape of the features for which the layout is chosen; others get the same result.

    Returns:
        torch.Tensor: The weight, opaque to all but :func:`convolve_packed`.
    """
    pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    packed: torch.Tensor = pack(weight.to_mkldnn(), *geometry, images)
    return packed


def convolve_packed(
    features: torch.Tensor,
    other: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Sequence[Any],
    activation: str | None,
    scalars: Sequence[float],
) -> torch.Tensor:
    """Compute ``activation(convolution(features) + other)`` in one pass.

    Only inductor has a use for the operator.

    Args:
        features (torch.Tensor): Features ``(B, C, H, W)``, float32 on the CPU.
        other (torch.Tensor | None): What is added, of the result's shape.
        weight (torch.Tensor): As :func:`pack_convolution` returns it.
        bias (torch.Tensor | None): The bias.
        geometry (Sequence): Padding, stride, dilation and groups of the convolution.
        activation (str | None): oneDNN's name of the activation; after a sum it has no other than ``"relu"``.
        scalars (Sequence[float]): Numbers of the activation.

    Returns:
        torch.Tensor: The result.
    """
    convolve, weights = torch.ops.mkldnn._convolution_pointwise, (weight, bias, *geometry)
    result: torch.Tensor
    if other is None:
        result = convolve(features, *weights, activation or "none", scalars, "")
    else:
        result = convolve.binary(features, other, *weights, "add", 1.0, activation, scalars, "")
    return result


def has_tiles(precision: str) -> bool:
    """Tell whether an x86-64 CPU multiplies matrices in tiles (AMX) of a reduced precision.

    Of torch's releases, only the newest have a public name for it.

    Args:
        precision (str): ``"bfloat16"`` or ``"float16"``.

    Returns:
        bool: Whether it does.
    """
    has: Any = getattr(
        torch.cpu, {"bfloat16": "_is_amx_tile_supported", "float16": "_is_amx_fp16_supported"}[precision]
    )
    return bool(has())
