# SPDX-License-Identifier: Apache-2.0

"""Gradients of depthwise convolutions under bfloat16 autocast come near those of float32; nothing else changes."""

import pytest
import timm
import torch
from torch import nn

from anomalib_stfpm_ext import depthwise
from anomalib_stfpm_ext.depthwise import DepthwiseGradients

CONVOLUTIONS = {
    "stride": nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False),
    "5x5, with bias": nn.Conv2d(8, 16, 5, 1, 2, groups=8),
    "TensorFlow's padding": timm.layers.Conv2dSame(8, 8, 3, stride=2, groups=8),
    "groups, dilated": nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2),
}


@pytest.fixture
def calls(monkeypatch):
    calls = []
    original = depthwise._GroupedConvolution.apply

    def apply(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(depthwise._GroupedConvolution, "apply", apply)
    return calls


def gradients(convolution: nn.Conv2d, images: torch.Tensor) -> list[torch.Tensor]:
    images = images.clone().requires_grad_()
    result = convolution(images)
    weights = torch.linspace(-1, 1, result.numel()).view_as(result)
    return [result, *torch.autograd.grad((result.float() * weights).sum(), [images, *convolution.parameters()])]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_near_float32(name, calls):
    convolution, images = CONVOLUTIONS[name], torch.randn(2, 8, 15, 16)
    exact = gradients(convolution, images)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(convolution, images)
        with DepthwiseGradients():
            result = gradients(convolution, images)
    assert len(calls) == 1
    assert [each.dtype for each in result] == [each.dtype for each in plain]
    assert torch.equal(result[0], plain[0])
    for one, other in zip(result, exact, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.02, atol=0.02 * other.abs().max().item())


def test_all_else_is_torchs(calls):
    depthwise, dense = CONVOLUTIONS["stride"], nn.Conv2d(8, 8, 3)
    images = torch.randn(2, 8, 16, 16)
    with DepthwiseGradients():
        depthwise(images)
        with torch.autocast("cpu", torch.bfloat16):
            dense(images)
            nn.Conv2d(8, 8, 3, padding="same", groups=8)(images)
            with torch.no_grad():
                depthwise(images)
    assert not calls
