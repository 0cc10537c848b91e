# SPDX-License-Identifier: Apache-2.0

"""The inference copy of a network, with fewer steps: batch norms, sums and activations go into convolutions."""

import copy
import logging
import operator
from collections import Counter
from collections.abc import Mapping
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from timm.layers import Conv2dSame, pad_same
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .._compat.torch import convolve_packed, own_tensors, pack_convolution
from ..errors import fail
from .packing import why_not_packed
from .pooling import InferenceMaxPool2d, is_plain

logger = logging.getLogger(__name__)

# Large images would take long in double precision.
_PROBE_SIDE = 256
# Activations that oneDNN can apply to the result of a convolution: its name for each, and its parameters.
_ACTIVATIONS: dict[type, tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}


def fold(network: nn.Module, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> nn.Module | None:
    """Return the inference copy of a network, whose batch norms are folded into the convolutions before them.

    On a CPU, convolutions also add the shortcut and apply the activation that follow them, and keep their weights in
    oneDNN's layout.

    The order of modules, or a trace, tells which of them follow each other; both may be wrong. So the copy is used only
    if its features of an image, in double precision, equal the network's up to rounding. Where a faster copy cannot be
    made, the log says so once, with the reason.

    Args:
        network (nn.Module): The network, in evaluation mode, which returns a list of features.
        images (torch.Tensor): Images ``(B, C, H, W)``, on which the copy is tried.
        dtype (torch.dtype): Dtype of the copy's weights and features. Batch norms that remain keep theirs. Defaults to
            ``torch.float32``.

    Returns:
        nn.Module | None: The copy; where no copy is right, the network itself, or ``None`` if its dtype is not
            ``dtype``.
    """
    fallback = network if dtype == images.dtype else None
    try:
        exact = copy.deepcopy(network).cpu().double()
    except RuntimeError as error:  # a network that keeps results with gradients cannot be copied
        _tell("no inference copy is made, which is slower", error)
        return fallback
    channels, *size = images.shape[1:]
    try:
        probe = _make_probe(channels, *(min(side, _PROBE_SIDE) for side in size))
        expected = exact(probe)
    except Exception:  # the network wants images of one size
        probe = _make_probe(channels, *size)
        expected = exact(probe)
    on_cpu = images.device.type == "cpu"
    if on_cpu and (reason := why_not_packed()):
        _tell("convolutions rearrange their weights at every call, which is slower", reason)
    for simplify, without in _PACKED if on_cpu and not why_not_packed() else _MERGED:
        try:
            features = simplify(copy.deepcopy(exact)).forward(probe)
            if all(
                (one - other).abs().max() <= 1e-9 * other.abs().max()
                for one, other in zip(features, expected, strict=True)
            ):
                folded = _cast(simplify(copy.deepcopy(network)), dtype)
                folded.forward(images.to(dtype))
                return folded
            _tell(without, "the copy's features are not the network's")
        except Exception as error:  # modules cannot be traced, or read their convolutions' weights
            _tell(without, error)
    return fallback


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Make a network compute in a dtype; batch norms, whose variances may be tiny, only return results in it."""
    for module in network.modules():
        if not isinstance(module, nn.BatchNorm2d):
            for tensor in own_tensors([module]):
                if tensor.dtype == torch.float32:
                    tensor.data = tensor.data.to(dtype)
    return network


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _tell(consequence: str, reason: object) -> None:
    """Say once why inference takes a slower way; a new copy after each epoch fails for the same reason."""
    kind = f"{type(reason).__name__}: " if isinstance(reason, Exception) else ""
    _warn_once(f"Inference: {consequence}. {kind}{reason}".partition("\n")[0])


def _make_probe(*shape: int) -> torch.Tensor:
    return torch.randn(1, *shape, dtype=torch.float64, device="cpu", generator=torch.Generator("cpu").manual_seed(0))


def _merge_norms(network: nn.Module) -> nn.Module:
    """Merge each batch norm into the convolution before it."""
    for module in list(network.modules()):
        for (name, convolution), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                after = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]  # in timm's norms
                setattr(module, norm_name, nn.Sequential(*after) if after else nn.Identity())
    return network


def _pack(network: nn.Module) -> nn.Module:
    """Merge batch norms, and leave the convolutions to oneDNN."""
    network = _merge_norms(network)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            # Other convolutions of timm's compute their weights.
            if (
                isinstance(child, nn.Conv2d)
                and type(child) in (nn.Conv2d, Conv2dSame)
                and child.padding_mode == "zeros"
                and isinstance(child.padding, tuple)
            ):
                setattr(module, name, PackedConv2d(child))
            elif is_plain(child):
                setattr(module, name, InferenceMaxPool2d(child))
    return network


def _join_activations(network: nn.Module) -> nn.Module:
    """Make convolutions add the shortcut and apply the activation that follow, while their results are in the caches.

    Raises:
        Exception: Whatever a network raises that cannot be traced, since its flow depends on the images.
    """
    network = _pack(network)
    graph = _trace(network)
    modules = dict(network.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def joins(node: Any, next_node: fx.Node) -> bool:
        """Tell whether a node is a convolution, called once and for the next node alone."""
        return (
            isinstance(node, fx.Node)
            and node.op == "call_module"
            and isinstance(modules[str(node.target)], PackedConv2d)
            and calls[node.target] == 1
            and list(node.users) == [next_node]
        )

    def adds_nothing(node: Any) -> bool:
        """Tell whether a convolution is followed by neither a sum nor an activation yet."""
        return len(node.args) == 1 and modules[str(node.target)].activation is None

    for node in graph.nodes:
        module = modules[node.target] if node.op == "call_module" else None
        if isinstance(module, nn.Identity):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in (operator.add, operator.iadd, torch.add) and len(node.args) == 2 and not node.kwargs:
            for convolution, other in (node.args, node.args[::-1]):
                # One sum, before the activation: oneDNN knows no other order.
                if joins(convolution, node) and adds_nothing(convolution) and isinstance(other, fx.Node):
                    with graph.inserting_before(node):
                        joined = graph.call_module(convolution.target, (*convolution.args, other))
                    node.replace_all_uses_with(joined)
                    graph.erase_node(node)
                    graph.erase_node(convolution)
                    break
        elif (
            type(module) in _ACTIVATIONS
            and joins(node.args[0], node)
            and (len(node.args[0].args) == 1 or type(module) is nn.ReLU)  # after a sum, oneDNN has no other
        ):
            modules[node.args[0].target].activation = module
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    traced = fx.GraphModule(network, graph)
    traced.graph.owning_module = None  # otherwise only the garbage collector would free an outdated copy
    return traced


# The ways to make a copy, the fastest first, and what it means if one fails.
_PACKED = (
    (_join_activations, "sums and activations stay outside of the convolutions, which is slower"),
    (_pack, "no inference copy is made, which is slower"),
)
_MERGED = ((_merge_norms, "no inference copy is made, which is slower"),)


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Tracer of a network whose tensors have names."""

    names: Mapping[int, str]

    def create_arg(self, a: Any) -> Any:
        if not isinstance(a, torch.Tensor):
            return super().create_arg(a)
        if id(a) not in self.names:
            msg = "the network computes with a tensor that is neither weight nor buffer"
            raise ValueError(msg)
        return self.graph.get_attr(self.names[id(a)])


def _trace(network: nn.Module) -> fx.Graph:
    """Trace a network. torch's own tracer would also affect modules in other threads."""
    graph = fx.Graph()
    tracer = _Tracer(graph)
    tracer.names = {id(tensor): name for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    leaves = {name: module for name, module in network.named_modules() if not any(module.children())}

    def record(name: str, *arguments: fx.Proxy) -> fx.Proxy:
        return fx.Proxy(graph.call_module(name, tuple(argument.node for argument in arguments)), tracer)

    try:
        for name, leaf in leaves.items():
            leaf.forward = partial(record, name)
        graph.output([level.node for level in network(fx.Proxy(graph.placeholder("images"), tracer))])
    finally:
        for leaf in leaves.values():
            del leaf.forward
    return graph


class PackedConv2d(nn.Module):
    """A convolution that rearranges its weights once and not at every call, as inductor's freezing does.

    oneDNN chooses the layout for the shape of the first images. Other shapes give the same result, perhaps more slowly.
    In double precision, which only the check of the copy uses, torch computes the result.

    Attributes:
        pads_as_tensorflow (bool): Whether the result has the size of the features, divided by the stride: TensorFlow's
            "same" padding. oneDNN pads symmetrically only.
        activation (nn.Module | None): One of :data:`_ACTIVATIONS`, applied to the result.
    """

    weight: torch.Tensor

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.register_buffer("weight", convolution.weight.detach())
        self.bias, self.kernel_size = convolution.bias, convolution.kernel_size
        self.pads_as_tensorflow = isinstance(convolution, Conv2dSame)
        self.geometry: Any = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
        self.activation: nn.Module | None = None

    def forward(self, features: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """Compute ``activation(convolution(features) + other)``."""
        if self.pads_as_tensorflow:
            features = pad_same(features, self.kernel_size, *self.geometry[1:3])
        if self.weight.dtype == torch.float64:
            return self._forward_by_torch(features, other)
        if not self.weight.is_mkldnn:
            self.weight = pack_convolution(self.weight, self.geometry, features.shape)
        activation, scalars = _ACTIVATIONS.get(type(self.activation), (None, []))
        return convolve_packed(features, other, self.weight, self.bias, self.geometry, activation, scalars)

    def _forward_by_torch(self, features: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
        padding, stride, dilation, groups = self.geometry
        result = nn.functional.conv2d(features, self.weight, self.bias, stride, padding, dilation, groups)
        if other is not None:
            if other.shape != result.shape:
                fail(ValueError, "other", f"features {tuple(result.shape)}", tuple(other.shape))
            result = result + other
        return result if self.activation is None else self.activation(result)
