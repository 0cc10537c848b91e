# SPDX-License-Identifier: Apache-2.0

"""Max pooling in the inference copy gives torch's maxima, bit for bit."""

import math
import os

import pytest
import torch
from torch import nn

from anomalib_stfpm_ext.inference.pooling import InferenceMaxPool2d, is_plain

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 64, 32, 33), (3, 1, 3, 3), (0, 4, 8, 8)], ids=str)
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 1, 2), (3, 3, 0)], ids=str)
@torch.no_grad()
def test_same_bits_as_torch(dtype, shape, window):
    if min(shape[2:]) < window[0]:
        pytest.skip("smaller than the window")
    pooling, features = nn.MaxPool2d(*window), torch.randn(shape).to(dtype)
    features.flatten()[::7] = -math.inf
    features = features.contiguous(memory_format=torch.channels_last)
    result = InferenceMaxPool2d(pooling)(features)
    assert torch.equal(result, pooling(features))
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(InferenceMaxPool2d(pooling)(features.contiguous()), result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nan", [math.nan, -math.nan], ids=["positive", "negative"])
@torch.no_grad()
def test_nan_stays(dtype, nan):
    pooling = nn.MaxPool2d(3, 2, 1)
    for place in range(25):
        features = torch.randn(1, 8, 5, 5).to(dtype).contiguous(memory_format=torch.channels_last)
        features[0, 3].view(-1)[place] = nan
        assert torch.equal(InferenceMaxPool2d(pooling)(features).isnan(), pooling(features).isnan())
        assert pooling(features).isnan().any()


@torch.no_grad()
def test_several_threads():
    features = torch.randn(4, 64, 128, 128).contiguous(memory_format=torch.channels_last)
    pooling, threads = nn.MaxPool2d(3, 2, 1), torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(InferenceMaxPool2d(pooling)(features), pooling(features))
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "module",
    [
        nn.MaxPool2d((3, 2)),
        nn.MaxPool2d(3, padding=(1, 0)),
        nn.MaxPool2d(3, dilation=2),
        nn.MaxPool2d(3, return_indices=True),
        nn.MaxPool2d(3, ceil_mode=True),
        nn.AvgPool2d(3),
    ],
    ids=repr,
)
def test_others_are_left_to_torch(module):
    assert not is_plain(module)
    assert is_plain(nn.MaxPool2d(3, 2, 1))


@pytest.mark.skipif("STFPM_EXT_SANITIZE" in os.environ, reason="a sanitizer's shadow is beyond any limit")
def test_no_memory_for_the_threads_is_an_error_and_not_the_end(python):
    """What several threads need is asked for where there is a caller to tell: on one of them, nobody can catch."""
    python(
        """
import resource
import torch
from anomalib_stfpm_ext.inference.pooling import InferenceMaxPool2d
torch.set_num_threads(4)
pool = InferenceMaxPool2d(torch.nn.MaxPool2d(3, 2, 1))
few, many = (torch.zeros(1, 3, width, 64, dtype=torch.bfloat16).permute(0, 3, 1, 2) for width in (1 << 12, 1 << 18))
pool(few)  # the threads are there
used = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize:")).split()[1])
maxima = many.nbytes // 3
resource.setrlimit(resource.RLIMIT_AS, (used + maxima + (16 << 20), resource.RLIM_INFINITY))
try:
    pool(many)
except MemoryError:
    raise SystemExit(0)
raise SystemExit("no error")
"""
    )
