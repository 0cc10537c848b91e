# SPDX-License-Identifier: Apache-2.0

"""Scorer and loss on a CUDA device; and, wherever there is an nvcc, what its compiler says of registers and memory.

Needs no anomalib: benchmarks/gpu_session.sh runs it on machines that have torch alone.
"""

import functools
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from helpers import PYRAMIDS, make_features

from anomalib_stfpm_ext import StfpmExtLoss, anomaly_map
from anomalib_stfpm_ext.loss import formula
from anomalib_stfpm_ext.ops import native

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHITECTURES = (80, 90, 120)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def on_gpu(test):
    """Mark a test that needs a CUDA device and a build with CUDA."""
    test = pytest.mark.skipif(not native.cuda_architectures, reason="a build without CUDA")(test)
    test = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test)
    return pytest.mark.gpu(test)


def features(pyramid, batch, image_size, dtype="float32", memory_format=torch.contiguous_format, noise=0.1):
    sides = make_features(pyramid, batch, image_size, noise)
    dtype = getattr(torch, dtype)
    return [
        [torch.from_numpy(level).to("cuda", dtype, memory_format=memory_format) for level in side] for side in sides
    ]


def check(result, teacher, student, image_size, tolerance=1e-5, **options):
    sides = [[level.double().cpu().numpy() for level in side] for side in (teacher, student)]
    for output, wanted in zip(result, reference.anomaly_map(*sides, image_size, **options), strict=False):
        np.testing.assert_allclose(output.cpu().numpy(), wanted, rtol=tolerance, atol=1e-30)


@on_gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 32])  # on an H100, blocks meet in one grid, and in a cluster for each image
def test_equals_reference(batch, dtype, layout):
    for backbone, image_size in (("resnet18", (256, 256)), ("tf_efficientnet_lite0", (97, 130))):
        teacher, student = features(PYRAMIDS[backbone], batch, image_size, dtype, layout)
        result = anomaly_map(teacher, student, image_size)
        assert result[0].is_cuda
        check(result, teacher, student, image_size, 1e-12 if dtype == "float64" else 1e-5)
        again = anomaly_map(teacher, student, image_size)
        assert all(torch.equal(*pair) for pair in zip(result, again, strict=True))


@on_gpu
@pytest.mark.parametrize("combine", ["product", "sum", "maximum"])
@pytest.mark.parametrize("weights", [None, (0.5, 0, 2)], ids=str)
@pytest.mark.parametrize("combine_size", [None, (15, 23)], ids=str)
def test_options_and_memory_of_the_caller(combine, weights, combine_size):
    teacher, student = features(PYRAMIDS["resnet18"], 2, (60, 90))
    options = {"weights": weights, "combine": combine, "combine_size": combine_size}
    expected = anomaly_map(teacher, student, (60, 90), level_maps=True, **options)
    check(expected, teacher, student, (60, 90), 2e-5, **options)
    out = [torch.full_like(output, torch.nan) for output in expected]
    anomaly_map(teacher, student, (60, 90), level_maps=True, out=out, **options)
    assert all(torch.equal(*pair) for pair in zip(out, expected, strict=True))


@on_gpu
def test_any_memory_layout():
    teacher, student = features([(16, 4)], 2, (48, 64))
    padded = torch.zeros(3, 17, 15, 19, device="cuda")
    padded[1:, 1:, 2:-1, 3:] = teacher[0]
    expected = anomaly_map(teacher, student, (48, 64))
    for level in (
        padded[1:, 1:, 2:-1, 3:],
        teacher[0].transpose(2, 3).contiguous().transpose(2, 3),
        teacher[0].contiguous(memory_format=torch.channels_last),
        torch.zeros(teacher[0].numel() + 1, device="cuda")[1:].view(teacher[0].shape).copy_(teacher[0]),
    ):
        torch.testing.assert_close(anomaly_map([level], student, (48, 64)), expected, rtol=1e-6, atol=1e-12)


@on_gpu
def test_another_stream_a_graph_and_the_operator():
    teacher, student = features(PYRAMIDS["resnet18"], 4, (128, 128))
    expected = anomaly_map(teacher, student, (128, 128))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = anomaly_map(teacher, student, (128, 128))
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(on_stream[0], expected[0])

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = anomaly_map(teacher, student, (128, 128))
    teacher[0].mul_(-1)
    graph.replay()
    torch.cuda.synchronize()
    after = anomaly_map(teacher, student, (128, 128))
    assert torch.equal(captured[0], after[0])
    assert not torch.equal(captured[0], expected[0])
    torch.library.opcheck(torch.ops.anomalib_stfpm_ext.anomaly_map.default, (teacher, student, 128, 128))


@on_gpu
def test_first_call_of_a_process_is_captured():
    """Then the module is loaded while a stream is captured."""
    script = """
import torch
from anomalib_stfpm_ext import anomaly_map
features = [torch.randn(2, 8, 4, 4, device="cuda") for _ in range(2)]
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    amap, score = anomaly_map(features[:1], features[1:], (8, 8))
graph.replay()
assert torch.equal(amap, anomaly_map(features[:1], features[1:], (8, 8))[0])
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")


@on_gpu
def test_many_images():
    """Enough for clusters to fill a device, and some more; small ones, since sanitizers are slow."""
    count = torch.cuda.get_device_properties(0).multi_processor_count // 4
    teacher, student = features([(8, 4), (12, 8)], count + 3, (16, 24))
    for batch in (1, count // 2, count, count + 3):
        some = [[level[:batch] for level in side] for side in (teacher, student)]
        check(anomaly_map(*some, (16, 24)), *some, (16, 24))


@on_gpu
@pytest.mark.parametrize("batch", [1, 32])
def test_exactly_one_launch(batch):
    teacher, student = features(PYRAMIDS["resnet18"], batch, (256, 256))
    out = anomaly_map(teacher, student, (256, 256))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        anomaly_map(teacher, student, (256, 256), out=out)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels
    assert "anomaly_map_kernel" in kernels[0]


@on_gpu
def test_equal_vectors_are_at_distance_zero():
    teacher, _ = features(PYRAMIDS["resnet18"], 2, (128, 128))
    assert anomaly_map(teacher, teacher, (128, 128), combine="sum")[0].max() == 0


@on_gpu
def test_nan_and_empty_batch():
    teacher, student = features([(6, 1), (5, 4)], 3, (16, 16))
    teacher[0][1, 3, 4, 11] = torch.nan
    amap, score = anomaly_map(teacher, student, (24, 19))
    on_cpu = anomaly_map([level.cpu() for level in teacher], [level.cpu() for level in student], (24, 19))
    assert torch.equal(amap.isnan().cpu(), on_cpu[0].isnan())
    assert score.isnan().tolist() == [False, True, False]
    empty = [torch.zeros(0, 8, 2, 2, device="cuda")]
    assert anomaly_map(empty, empty, (8, 8))[0].shape == (0, 1, 8, 8)


@on_gpu
def test_tensors_on_different_devices():
    teacher, student = features([(6, 4)], 1, (16, 16))
    with pytest.raises(ValueError, match=r"student\[0\]: wanted device cuda:0 like the first level, got cpu"):
        anomaly_map(teacher, [level.cpu() for level in student], (16, 16))


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
def test_device_other_than_the_current_one():
    teacher, student = features([(6, 4)], 1, (16, 16))
    others = [[level.to("cuda:1") for level in side] for side in (teacher, student)]
    assert torch.equal(anomaly_map(*others, (16, 16))[0].cpu(), anomaly_map(teacher, student, (16, 16))[0].cpu())
    assert torch.cuda.current_device() == 0


@on_gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("hard_share", [1, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_loss_and_gradients_equal_the_formula(dtype, hard_share, layout):
    for pyramid in (PYRAMIDS["resnet18"], PYRAMIDS["tf_efficientnet_lite0"], [(7, 11)]):
        teacher, student = features(pyramid, 3, (97, 130), dtype, layout)
        results = []
        for loss, kind in (
            (StfpmExtLoss(hard_share), student[0].dtype),
            (StfpmExtLoss(hard_share), student[0].dtype),
            (functools.partial(formula, hard_share=hard_share), torch.float64),
        ):
            levels = [level.to(kind).requires_grad_() for level in student]
            value = loss([level.to(kind) for level in teacher], levels)
            results.append([value.detach(), *torch.autograd.grad(value * 1000, levels)])
        assert all(torch.equal(*pair) for pair in zip(*results[:2], strict=True))
        tolerance = 1e-12 if dtype == "float64" else 1e-6
        torch.testing.assert_close(results[0][0].double(), results[2][0], rtol=tolerance, atol=0)
        for gradient, wanted, level in zip(results[0][1:], results[2][1:], student, strict=True):
            assert gradient.stride() == level.stride()
            rounding = max(torch.finfo(gradient.dtype).eps, tolerance)
            largest = wanted.abs().max().item()
            torch.testing.assert_close(gradient.double(), wanted, rtol=rounding, atol=2 * tolerance * largest + 1e-7)


@on_gpu
def test_loss_is_two_launches_and_waits_for_nothing():
    teacher, student = features(PYRAMIDS["resnet18"], 4, (128, 128), memory_format=torch.channels_last)
    student = [level.requires_grad_() for level in student]
    expected = torch.autograd.grad(StfpmExtLoss()(teacher, student), student)
    upstream = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            gradients = torch.autograd.grad(StfpmExtLoss()(teacher, student), student, upstream)
        torch.autograd.grad(StfpmExtLoss(0.1)(teacher, student), student, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 2, kernels
    assert "feature_matching_kernel" in kernels[0]
    assert "feature_matching_backward_kernel" in kernels[1]
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(StfpmExtLoss()(teacher, student), student, upstream)
    upstream.fill_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, 2 * b) for a, b in zip(captured, expected, strict=True))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compile a source for some architectures, once; return the object and the compiler's report."""

    @functools.cache
    def compile_source(source, architectures=ARCHITECTURES):
        path = tmp_path_factory.mktemp("compiled") / "source.o"
        targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
        command = ["nvcc", "-std=c++17", "-O3", "--threads=2", "--fmad=false", "-Xptxas=-v", *targets]
        command += ['-DSTFPM_EXT_CUDA_ARCHITECTURES=""', "-c", SOURCES / source, "-o", path]
        return path, subprocess.run(command, check=True, capture_output=True, text=True).stderr

    return compile_source


def find_cuobjdump():
    """The toolkit's, or the one that triton brings."""
    triton = importlib.util.find_spec("triton")
    folders = [f"{folder}/backends/nvidia/bin" for folder in (triton and triton.submodule_search_locations) or ()]
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ["PATH"], *folders]))


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(("source", "count"), [("anomaly_map_cuda.cu", 16), ("feature_matching_cuda.cu", 8)])
def test_compiler_reports_neither_spills_nor_local_memory(compiled, source, count):
    """`count`: of kernels, for all dtypes and combinations, or dtypes and directions."""
    _, report = compiled(source)
    kernels = re.findall(r"Compiling entry function '\w*_kernel\w*' for 'sm_(\d+)'", report)
    assert len(kernels) == len(ARCHITECTURES) * count, report
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(memory) >= len(kernels)
    assert set(memory) == {("0", "0", "0")}, report
    assert max(int(count) for count in re.findall(r"Used (\d+) registers", report)) <= 128


@needs_nvcc
@pytest.mark.skipif(find_cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize(
    ("source", "count", "architectures"),
    [
        ("feature_matching_cuda.cu", 2, (90,)),  # both sources have their loads from dot_products.cuh
        pytest.param("feature_matching_cuda.cu", 2, ARCHITECTURES, marks=pytest.mark.slow),
        pytest.param("anomaly_map_cuda.cu", 4, ARCHITECTURES, marks=pytest.mark.slow),
    ],
)
def test_loads_of_four_channels_are_issued_together(compiled, source, count, architectures):
    """Of both sides, in NCHW and in channels_last: 8 loads of 16 bytes without a branch or arithmetic between them."""
    command = [find_cuobjdump(), "-sass", compiled(source, architectures)[0]]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kernels = re.findall(r"Function : \w*_kernelIf\w*\n(.*?)(?=\n\s*Function :|\Z)", listing, re.DOTALL)
    assert len(kernels) == len(architectures) * count
    for kernel in kernels:
        instructions = re.findall(r"(LDG\S*[.]128|BRA|F2F|DFMA|FFMA)", kernel)
        runs = [len(list(run)) for name, run in itertools.groupby(instructions, lambda name: name[:3]) if name == "LDG"]
        assert sum(run >= 8 for run in runs) >= 2, runs
