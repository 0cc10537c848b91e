# SPDX-License-Identifier: Apache-2.0

"""The CUDA source of scorer and loss, built by the C++ compiler to run on host threads, against float64 references.

It shows that the kernels' indices, barriers, arithmetic and choice of launch are right: `make sanitize` runs it under
AddressSanitizer and ThreadSanitizer. It does not show that a GPU runs it: neither resources and alignment, nor the
device's memory model, nor speed (tests marked `gpu` and benchmarks/gpu_session.sh are for those).
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from helpers import make_features

from anomalib_stfpm_ext import anomaly_map
from anomalib_stfpm_ext.loss import formula
from anomalib_stfpm_ext.ops import native

FOLDER = Path(__file__).parent / "cuda_on_threads"
DTYPES = ["float32", "float64", "float16", "bfloat16"]
COMBINATIONS = ["product", "sum", "maximum"]
SCHEMES = {"clusters": {"processors": 1, "ptx_version": 90}, "grid": {"processors": 2, "ptx_version": 80}}


class Features(ctypes.Structure):
    """The struct of csrc/levels.h; so is the next one."""

    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4))


class Level(ctypes.Structure):
    """Features of both sides, their shape and weight."""

    _fields_ = (
        ("teacher", Features),
        ("student", Features),
        ("shape", ctypes.c_int64 * 3),
        ("weight", ctypes.c_double),
    )


class Params(ctypes.Structure):
    """AnomalyMapParams of csrc/anomaly_map.h."""

    _fields_ = (
        ("dtype", ctypes.c_int),
        ("combination", ctypes.c_int),
        ("num_levels", ctypes.c_int),
        ("levels", Level * 8),
        ("batch", ctypes.c_int64),
        ("size", ctypes.c_int64 * 2),
        ("combine_size", ctypes.c_int64 * 2),
        ("outputs", ctypes.c_void_p * 3),
    )


class MatchingParams(ctypes.Structure):
    """FeatureMatchingParams of csrc/feature_matching.h."""

    _fields_ = (
        ("dtype", ctypes.c_int),
        ("num_levels", ctypes.c_int),
        ("levels", Level * 8),
        ("batch", ctypes.c_int64),
        ("scalars", ctypes.c_void_p),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    path = tmp_path_factory.mktemp("cuda_on_threads") / "library.so"
    sanitizers = os.environ.get("STFPM_EXT_SANITIZE")
    subprocess.run(
        [
            compiler,
            *("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"),
            *([f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"] if sanitizers else []),
            f"-I{FOLDER}",
            "-DSTFPM_EXT_CUDA_THREADS=64",
            '-DSTFPM_EXT_CUDA_ARCHITECTURES="80, 90"',
            FOLDER / "library.cpp",
            *("-o", path),
            "-lpthread",
        ],
        check=True,
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},  # a sanitizer's, not for it
    )
    return ctypes.CDLL(path)


def score(
    library,
    teacher,
    student,
    image_size,
    *,
    weights=None,
    combine="product",
    combine_size=None,
    level_maps=False,
    device=0,
    processors=2,
    blocks_per_processor=2,
    ptx_version=90,
    has_image=1,
):
    """Call the library as bindings.cpp calls the CUDA scorer, on tensors in host memory."""
    batch, dtype = len(teacher[0]), str(teacher[0].dtype).removeprefix("torch.")
    output_dtype = torch.float64 if dtype == "float64" else torch.float32
    combine_size = combine_size or image_size
    shapes = [(batch, 1, *image_size), (batch,)] + [(batch, len(teacher), *combine_size)] * level_maps
    outputs = [torch.full(shape, -7.0, dtype=output_dtype) for shape in shapes]
    positions = sum(level.shape[2] * level.shape[3] for level in teacher)
    positions += np.prod(combine_size) * (combine_size != image_size)
    scratch = torch.full((batch * positions,), float("nan"), dtype=output_dtype)
    params = Params(DTYPES.index(dtype), COMBINATIONS.index(combine), len(teacher), batch=batch)
    params.size[:] = image_size
    params.combine_size[:] = combine_size
    fill_levels(params, teacher, student)
    for index in range(len(teacher)):
        params.levels[index].weight = 1.0 if weights is None else weights[index]
    for index, output in enumerate(outputs):
        params.outputs[index] = output.data_ptr()
    address = ctypes.c_void_p(scratch.data_ptr())
    made_up = (device, processors, blocks_per_processor, ptx_version, has_image)
    call(library.anomaly_map_on_threads, params, address, *made_up)
    return outputs


def fill(features, tensor):
    features.data = tensor.data_ptr()
    features.strides[:] = tensor.stride()


def fill_levels(params, teacher, student):
    for level, t, s in zip(params.levels, teacher, student, strict=False):
        fill(level.teacher, t)
        fill(level.student, s)
        level.shape[:] = t.shape[1:]


def call(function, params, *arguments):
    error = ctypes.create_string_buffer(500)
    if function(ctypes.byref(params), *arguments, error, len(error)):
        raise RuntimeError(error.value.decode())


def match(library, teacher, student, upstream=1.0, *, device=0, processors=2, blocks_per_processor=2, has_image=1):
    """Loss and gradients, as bindings.cpp calls them on CUDA."""
    batch, dtype = len(teacher[0]), str(teacher[0].dtype).removeprefix("torch.")
    options = {"dtype": torch.float64 if dtype == "float64" else torch.float32}
    loss, upstream = torch.tensor(float("nan"), **options), torch.tensor(upstream, **options)
    positions = [batch * level[0, 0].numel() for level in teacher]
    scalars = torch.full((3, sum(positions)), float("nan"), **options)
    partial_sums = torch.full((native.most_partial_sums,), float("nan"), dtype=torch.float64)
    gradients = [torch.full_like(level, float("nan")) for level in student]
    params = MatchingParams(DTYPES.index(dtype), len(teacher), batch=batch, scalars=scalars.data_ptr())
    fill_levels(params, teacher, student)
    targets = (Features * len(gradients))()
    for target, gradient in zip(targets, gradients, strict=True):
        fill(target, gradient)
    made_up = (device, processors, blocks_per_processor, has_image)
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (loss, partial_sums, upstream)]
    call(library.feature_matching_on_threads, params, *addresses[:2], *made_up)
    means = torch.stack([values.mean() for values in scalars[2].split(positions)])
    torch.testing.assert_close(loss, means.sum(), rtol=1e-12 if dtype == "float64" else 1e-6, atol=0, equal_nan=True)
    call(library.feature_matching_backward_on_threads, params, addresses[2], targets, *made_up)
    return loss, gradients


def check_match(result, teacher, student, upstream=1.0):
    """Against the formula in float64; narrower gradients have their own rounding."""
    loss, gradients = result
    levels = [level.double().requires_grad_() for level in student]
    expected = formula([level.double() for level in teacher], levels)
    tolerance = 1e-12 if loss.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=tolerance, atol=0)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected * upstream, levels), strict=True):
        largest = wanted.abs().max().item()
        rounding = max(torch.finfo(gradient.dtype).eps, tolerance)
        torch.testing.assert_close(
            gradient.double(),
            wanted,
            rtol=rounding,
            atol=2 * tolerance * largest + 1e-7 * (gradient.dtype == torch.float16),
        )


def tensors(sides, dtype="float32", memory_format=torch.contiguous_format):
    dtype = getattr(torch, dtype)
    return [[torch.from_numpy(level).to(dtype).contiguous(memory_format=memory_format) for level in s] for s in sides]


def check(outputs, teacher, student, image_size, tolerance=1e-5, **options):
    expected = reference.anomaly_map(
        [level.double().numpy() for level in teacher],
        [level.double().numpy() for level in student],
        image_size,
        **options,
    )
    for output, wanted in zip(outputs, expected, strict=False):
        np.testing.assert_allclose(output.numpy(), wanted, rtol=tolerance, atol=1e-30)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_layouts_and_ways_to_launch(library, dtype, layout, scheme):
    """Levels that 16-byte loads reach, and one that they do not; columns beyond one block's."""
    sides = make_features([(24, 4), (40, 8)], 2, (64, 72))
    odd = make_features([(7, 11)], 2, (64, 72), seed=1)
    teacher, student = tensors([a + b for a, b in zip(sides, odd, strict=True)], dtype, layout)
    outputs = score(library, teacher, student, (64, 72), **SCHEMES[scheme])
    check(outputs, teacher, student, (64, 72), 1e-12 if dtype == "float64" else 1e-5)
    again = score(library, teacher, student, (64, 72), **SCHEMES["grid"])
    assert all(torch.equal(*pair) for pair in zip(outputs, again, strict=True))  # whatever blocks share the work


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("image_size", [(1, 1), (3, 131), (40, 9)], ids=str)
def test_levels_of_any_size(library, image_size, scheme):
    rng = np.random.default_rng(0)
    shapes = [(1, 1, 1, 1), (1, 3, 16, 16), (1, 17, 40, 9), (1, 5, 1, 30), (1, 2, 30, 1), (1, 9, 64, 33)]
    teacher, student = tensors([[rng.standard_normal(shape) for shape in shapes] for _ in "ts"])
    check(score(library, teacher, student, image_size, **SCHEMES[scheme]), teacher, student, image_size)


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("weights", [None, (0.5, 0, 2)], ids=str)
@pytest.mark.parametrize("combine_size", [None, (9, 70)], ids=str)
def test_combinations_weights_and_level_maps(library, combine, weights, combine_size):
    teacher, student = tensors(make_features([(8, 4), (12, 8), (20, 16)], 3, (32, 48)))
    options = {"weights": weights, "combine": combine, "combine_size": combine_size}
    outputs = score(library, teacher, student, (32, 48), level_maps=True, **options)
    check(outputs, teacher, student, (32, 48), 2e-5, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_combined_at_another_size(library, dtype, scheme):
    teacher, student = tensors(make_features([(8, 4), (12, 8)], 3, (32, 48)), dtype)
    outputs = score(library, teacher, student, (32, 48), combine_size=(8, 12), **SCHEMES[scheme])
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    check(outputs, teacher, student, (32, 48), tolerance, combine_size=(8, 12))


def lay_out(level, layout):
    """The same values in another memory layout; the first image for both where it is expanded."""
    if layout == "slice":
        padded = torch.zeros(level.shape[0] + 1, level.shape[1] + 1, level.shape[2] + 3, level.shape[3] + 3)
        padded[1:, 1:, 2:-1, 3:] = level
        return padded[1:, 1:, 2:-1, 3:]
    if layout == "gaps":  # between rows, so that aligned 16-byte loads of a channel would reach into the next row
        padded = torch.zeros(*level.shape[:3], level.shape[3] + 2)
        padded[..., :-2] = level
        return padded[..., :-2]
    if layout == "transposed":
        return level.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return level[:1].expand(2, -1, -1, -1)
    if layout == "mixed":
        return level.contiguous(memory_format=torch.channels_last)
    return torch.zeros(level.numel() + 1)[1:].view(level.shape).copy_(level)


@pytest.mark.parametrize("layout", ["slice", "gaps", "transposed", "expanded", "mixed", "unaligned"])
def test_any_memory_layout(library, layout):
    teacher, student = tensors(make_features([(16, 4)], 2, (48, 72)))
    teacher = [lay_out(teacher[0], layout)]
    check(score(library, teacher, student, (48, 72)), teacher, student, (48, 72))


def test_any_likeness_and_the_cpu_scorer(library):
    for noise in (3, 3e-2, 1e-6):
        teacher, student = tensors(make_features([(70, 4)], 1, (64, 48), noise))
        distance = reference.distance(teacher[0].double().numpy(), student[0].double().numpy())
        result = score(library, teacher, student, distance.shape[1:])[0][:, 0].numpy()
        error = np.abs(result - distance)
        assert (error <= np.where(distance >= 1e-4, 1e-5 * distance, 1e-9)).all()
        ours = score(library, teacher, student, (64, 48))[0]
        torch.testing.assert_close(ours, anomaly_map(teacher, student, (64, 48))[0], rtol=1e-6, atol=1e-14)


def test_nan_reaches_map_and_score(library):
    teacher, student = tensors(make_features([(6, 1), (5, 4)], 3, (16, 16)))
    teacher[0][1, 3, 4, 11] = float("nan")
    amap, scores = score(library, teacher, student, (24, 19))
    expected = anomaly_map(teacher, student, (24, 19))
    assert torch.equal(amap.isnan(), expected[0].isnan())
    assert scores.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(scores, expected[1], equal_nan=True)


def test_few_and_many_processors(library):
    """More than there are images: all blocks share them. Many fewer: clusters come one after the other."""
    teacher, student = tensors(make_features([(8, 4)], 5, (32, 32)))
    expected = score(library, teacher, student, (32, 32), ptx_version=80)
    for processors in (1, 7):
        outputs = score(library, teacher, student, (32, 32), processors=processors)
        assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


def test_fewer_blocks_at_once_than_the_launch_bounds_say(library):
    """As on a device that is shared: the launch is tried with fewer, down to one; where none runs, that is an error."""
    teacher, student = tensors(make_features([(8, 4)], 2, (32, 32)))
    expected = score(library, teacher, student, (32, 32), ptx_version=80)
    outputs = score(library, teacher, student, (32, 32), ptx_version=80, blocks_per_processor=1)
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
    check_match(match(library, teacher, student, blocks_per_processor=1), teacher, student)
    for ptx_version in (80, 90):
        with pytest.raises(RuntimeError, match="CUDA: launch: too many blocks in cooperative launch"):
            score(library, teacher, student, (32, 32), ptx_version=ptx_version, blocks_per_processor=0)


def test_errors(library):
    teacher, student = tensors(make_features([(8, 4)], 1, (8, 8)))
    with pytest.raises(RuntimeError, match=r"compute capability 7[.]0, and this build holds CUDA code for 80, 90 only"):
        score(library, teacher, student, (8, 8), ptx_version=70, has_image=0)
    with pytest.raises(RuntimeError, match="CUDA: device 5: invalid device"):
        score(library, teacher, student, (8, 8), device=5)
    score(library, teacher, student, (8, 8), device=1)  # not the current one, which stays so: the library checks that
    empty = [torch.zeros(0, 8, 2, 2)]
    assert [tuple(output.shape) for output in score(library, empty, empty, (8, 8))] == [(0, 1, 8, 8), (0,)]


def test_question_whether_a_device_runs_the_kernels(library):
    def ask(device, ptx_version, has_image):
        error = ctypes.create_string_buffer(500)
        return library.try_on_threads(device, ptx_version, has_image, error, len(error)) and error.value.decode()

    assert ask(0, 90, 1) == ask(1, 80, 1) == 0
    assert "device 0 has compute capability 8.0, and this build holds CUDA code for 80, 90 only" in ask(0, 80, 0)
    assert ask(5, 90, 1) == "CUDA: device 5: invalid device"


def test_more_than_indices_reach(library):
    """Refused before anything is read or written."""
    made_up, vast = (0, 2, 2, 90, 1), (1 << 15, (1 << 15) + 1)
    many, large = torch.zeros(1).expand(1 << 25, 1, 8, 8), torch.zeros(1).expand(1, 1, *vast)
    area = r": wanted height x width of at most 1073741824 on CUDA, got 32768 x 32769"
    for level, size, combine_size, error in (
        (large, (8, 8), (8, 8), r"teacher\[0\]" + area),
        (large[..., :8, :8], vast, (8, 8), "image_size" + area),
        (large[..., :8, :8], (8, 8), vast, "combine_size" + area),
        (many, (64, 8), (8, 8), "teacher: wanted a batch of at most 16777216 on CUDA, got 33554432"),
    ):
        params = Params(0, 0, 1, batch=len(level))
        params.size[:], params.combine_size[:] = size, combine_size
        fill_levels(params, [level], [level])
        with pytest.raises(RuntimeError, match=error):
            call(library.anomaly_map_on_threads, params, None, *made_up)
    params = MatchingParams(0, 1, batch=1)
    fill_levels(params, [large], [large])
    with pytest.raises(RuntimeError, match=r"teacher\[0\]" + area):
        call(library.feature_matching_on_threads, params, None, None, *made_up[:3], 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients(library, dtype, layout):
    """Levels that 16-byte loads reach, and one that they do not."""
    sides = make_features([(24, 4), (40, 8)], 2, (64, 72))
    odd = make_features([(7, 11)], 2, (64, 72), seed=1)
    teacher, student = tensors([a + b for a, b in zip(sides, odd, strict=True)], dtype, layout)
    for upstream in (1.0, -70.0):
        result = match(library, teacher, student, upstream)
        check_match(result, teacher, student, upstream)
    again = match(library, teacher, student, upstream)
    assert all(torch.equal(*pair) for pair in zip([again[0], *again[1]], [result[0], *result[1]], strict=True))


def test_loss_of_levels_of_any_size(library):
    rng = np.random.default_rng(0)
    shapes = [(2, 1, 1, 1), (2, 3, 16, 16), (2, 17, 40, 9), (2, 5, 1, 30), (2, 2, 30, 1), (2, 9, 64, 33)]
    for layout in (torch.contiguous_format, torch.channels_last):
        teacher, student = tensors([[rng.standard_normal(shape) for shape in shapes] for _ in "ts"], "float32", layout)
        check_match(match(library, teacher, student), teacher, student)


@pytest.mark.parametrize("layout", ["slice", "transposed", "expanded", "mixed", "unaligned"])
def test_loss_of_any_memory_layout(library, layout):
    teacher, student = tensors(make_features([(16, 4)], 2, (48, 64)))
    laid_out = lay_out(student[0], layout)
    check_match(match(library, teacher, [laid_out]), teacher, [laid_out])
    laid_out = lay_out(teacher[0], layout)
    check_match(match(library, [laid_out], student), [laid_out], student)


def test_loss_of_zero_vectors_and_few_and_many_processors(library):
    teacher, student = tensors(make_features([(8, 4)], 3, (32, 32)))
    student[0][0, :, :2] = 0
    teacher[0][0, :, 1:3] = 0
    expected = match(library, teacher, student)
    check_match(expected, teacher, student)
    for processors in (1, 7):
        loss, gradients = match(library, teacher, student, processors=processors)
        assert loss.item() == pytest.approx(expected[0].item(), rel=1e-7)
        assert torch.equal(gradients[0], expected[1][0])


def test_loss_errors(library):
    teacher, student = tensors(make_features([(8, 4)], 1, (8, 8)))
    with pytest.raises(RuntimeError, match=r"compute capability 8[.]0, and this build holds CUDA code for 80, 90 only"):
        match(library, teacher, student, has_image=0)
    with pytest.raises(RuntimeError, match="CUDA: device 5: invalid device"):
        match(library, teacher, student, device=5)
    match(library, teacher, student, device=1)  # not the current one, which stays so: the library checks that
