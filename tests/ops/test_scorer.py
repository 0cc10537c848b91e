# SPDX-License-Identifier: Apache-2.0

"""The scorer against the float64 reference and anomalib, and its answers to bad input."""

import sys

import numpy as np
import processor
import pytest
import reference
import torch
from anomalib.models.image.stfpm.anomaly_map import AnomalyMapGenerator
from helpers import PYRAMIDS, make_features
from torch._subclasses.fake_tensor import FakeTensorMode

from anomalib_stfpm_ext import anomaly_map
from anomalib_stfpm_ext.ops import anomaly_map as map_operators
from anomalib_stfpm_ext.ops import arguments, feature_matching, native


def assert_close(result, expected, rtol, what="map"):
    np.testing.assert_allclose(np.asarray(result), expected, rtol=rtol, atol=1e-30, err_msg=what)


@pytest.mark.parametrize("image_size", [(256, 256), (97, 130), (64, 200)], ids=str)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("backbone", PYRAMIDS)
def test_equals_reference_and_anomalib(backbone, batch, image_size):
    if backbone == "wide_resnet50_2" and image_size == (256, 256):
        batch = min(batch, 2)  # the reference needs gigabytes otherwise
    teacher, student = make_features(PYRAMIDS[backbone], batch, image_size)
    # float32 rounds the interpolation and the product of the levels; the distances themselves are good to 1e-7.
    expected_map, expected_score, _ = reference.anomaly_map(teacher, student, image_size)
    amap, score = anomaly_map(teacher, student, image_size)
    assert amap.shape == (batch, 1, *image_size)
    assert score.shape == (batch,)
    assert_close(amap, expected_map, 1e-5)
    assert_close(score, expected_score, 1e-5, "score")

    tensors = [dict(enumerate(map(torch.from_numpy, side))) for side in (teacher, student)]
    torch_map, torch_score = anomaly_map(*tensors, image_size)
    np.testing.assert_array_equal(torch_map, amap)
    np.testing.assert_array_equal(torch_score, score)
    theirs = AnomalyMapGenerator()(teacher_features=tensors[0], student_features=tensors[1], image_size=image_size)
    torch.testing.assert_close(torch_map, theirs, rtol=1e-4, atol=0)  # theirs has the larger error


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("noise", [3, 0.3, 3e-2, 1e-6])
def test_any_likeness_of_teacher_and_student(dtype, noise):
    teacher, student = make_features([(70, 4)], 2, (64, 48), noise, dtype)
    expected = reference.distance(teacher[0], student[0])
    result = anomaly_map(teacher, student, expected.shape[1:])[0][:, 0]
    assert result.dtype == (np.float64 if dtype == "float64" else np.float32)
    error = np.abs(result - expected)
    large = expected >= 1e-4
    assert (error[large] <= 1e-5 * expected[large]).all()
    assert (error[~large] <= 1e-9).all()


def test_opposite_equal_and_zero_vectors():
    ones, zeros = np.ones((1, 3, 2, 2), np.float32), np.zeros((1, 3, 2, 2), np.float32)
    distances = [
        anomaly_map([t], [s], (2, 2))[1] for t, s in [(ones, -ones), (ones, ones), (ones, zeros), (zeros, zeros)]
    ]
    np.testing.assert_allclose(np.concatenate(distances), [2, 0, 0.5, 0], rtol=1e-7)


@pytest.mark.parametrize("scale", [1e-18, 1e-11, 1e18, 1e30])
def test_tiny_and_huge_norms(scale):
    teacher, student = make_features([(40, 4)], 1, (32, 32))
    student = [(level * scale).astype(np.float32) for level in student]
    expected = reference.anomaly_map(teacher, student, (32, 32))[0]
    assert_close(anomaly_map(teacher, student, (32, 32))[0], expected, 1e-5)


@pytest.mark.parametrize("image_size", [(1, 1), (3, 50), (16, 16), (40, 9)], ids=str)
def test_levels_of_any_size(image_size):
    """Smaller than the image, larger, equal, of one row or one column; eight of them."""
    rng = np.random.default_rng(0)
    shapes = [(2, c, h, w) for c, h, w in [(1, 1, 1), (3, 16, 16), (17, 40, 9), (5, 1, 30), (2, 30, 1), (9, 64, 33)]]
    teacher = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    student = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    for levels in (slice(0, 1), slice(1, 2), slice(None)):
        expected = reference.anomaly_map(teacher[levels], student[levels], image_size)
        result = anomaly_map(teacher[levels], student[levels], image_size)
        assert_close(result[0], expected[0], 1e-5)
        assert_close(result[1], expected[1], 1e-5, "score")


def layouts(features):
    """The same values in every kind of memory layout that torch knows."""
    batch, channels, height, width = features.shape
    padded = torch.zeros(batch + 2, channels + 1, height + 3, width + 4, dtype=features.dtype)
    padded[1:-1, 1:, 2:-1, 3:-1] = features
    strided = torch.zeros(batch, channels, height * 2, width * 3, dtype=features.dtype)
    strided[:, :, ::2, ::3] = features
    return {
        "nchw": features,
        "channels_last": features.contiguous(memory_format=torch.channels_last),
        "slice": padded[1:-1, 1:, 2:-1, 3:-1],
        "steps": strided[:, :, ::2, ::3],
        "transposed": features.transpose(2, 3).contiguous().transpose(2, 3),
        "batch_last": features.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1, 1, 1))))
def test_layouts_and_dtypes(layout, dtype):
    teacher, student = (
        [torch.from_numpy(level).to(dtype) for level in side] for side in make_features([(37, 4), (18, 7)], 3, (45, 61))
    )
    expected = reference.anomaly_map(
        [t.double().numpy() for t in teacher], [s.double().numpy() for s in student], (45, 61)
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    teacher_laid_out = [layouts(level)[layout] for level in teacher]
    for student_laid_out in ([layouts(level)[layout] for level in student], student):  # alike, and mixed
        amap, score = anomaly_map(teacher_laid_out, student_laid_out, (45, 61))
        assert amap.dtype == score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(amap, expected[0], tolerance)
        assert_close(score, expected[1], tolerance, "score")


def test_expanded_negative_and_unaligned_strides():
    teacher, student = make_features([(8, 4)], 1, (32, 32))
    expected = anomaly_map(teacher, student, (32, 32))[0]
    expanded = [torch.from_numpy(level).expand(3, -1, -1, -1) for level in teacher]
    result = anomaly_map(expanded, [torch.from_numpy(level).expand(3, -1, -1, -1) for level in student], (32, 32))[0]
    np.testing.assert_array_equal(result, np.repeat(expected, 3, axis=0))

    flipped = [level[:, :, ::-1, ::-1] for level in teacher]
    result = anomaly_map(flipped, [level[:, :, ::-1, ::-1] for level in student], (32, 32))[0]
    np.testing.assert_allclose(result, expected[:, :, ::-1, ::-1], rtol=1e-5)

    raw = np.zeros(teacher[0].nbytes + 1, np.uint8)[1:].view(np.float32).reshape(teacher[0].shape)
    raw[...] = teacher[0]
    np.testing.assert_array_equal(anomaly_map([raw], student, (32, 32))[0], expected)
    record = np.zeros(teacher[0].shape, [("value", np.float32), ("other", np.uint8)])
    record["value"] = teacher[0]
    np.testing.assert_array_equal(anomaly_map([record["value"]], student, (32, 32))[0], expected)


def test_every_half_is_read_exactly():
    """All 65536 of them as one-channel features: the distance to 1 is 0, 1/2 or 2, NaN where the half is no number."""
    bits = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(1, 1, 256, 256)
    two = np.stack([bits, np.full_like(bits, 0.25)], axis=1)[:, :, 0]
    ones = np.ones_like(two)
    with np.errstate(invalid="ignore"):
        expected = reference.distance(two, ones)
    expected[~np.isfinite(two[:, 0].astype(float))] = np.nan
    result = anomaly_map([two], [ones], (256, 256))[0][:, 0]
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-12)


def test_empty_batch():
    empty = [torch.zeros(0, 4, 8, 8)]
    amap, score = anomaly_map(empty, empty, (16, 16))
    assert amap.shape == (0, 1, 16, 16)
    assert score.shape == (0,)


@pytest.mark.parametrize("image_size", [(16, 16), (24, 19), (5, 5)], ids=str)
def test_nan_reaches_the_pixels_that_torch_says(image_size):
    teacher, student = (
        [torch.from_numpy(level) for level in side] for side in make_features([(6, 1), (5, 4)], 3, (16, 16))
    )
    teacher[0][1, 3, 4, 11] = float("nan")
    student[1][1, 0, 2, 0] = float("nan")
    amap, score = anomaly_map(teacher, student, image_size)
    theirs = AnomalyMapGenerator()(
        teacher_features=dict(enumerate(teacher)), student_features=dict(enumerate(student)), image_size=image_size
    )
    assert torch.equal(amap.isnan(), theirs.isnan())
    assert score.isnan().tolist() == theirs.isnan().any(dim=-1).any(dim=-1).flatten().tolist()


def test_same_bits_for_any_threads_and_batch():
    teacher, student = (
        [torch.from_numpy(level) for level in side] for side in make_features(PYRAMIDS["resnet18"], 4, (200, 120))
    )
    whole, scores = anomaly_map(teacher, student, (200, 120))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            again = anomaly_map(teacher, student, (200, 120))
            assert torch.equal(again[0], whole)
            assert torch.equal(again[1], scores)
    finally:
        torch.set_num_threads(threads)
    for image in range(4):
        alone, _ = anomaly_map(
            [t[image : image + 1] for t in teacher], [s[image : image + 1] for s in student], (200, 120)
        )
        assert torch.equal(alone[0], whole[image])


ISA_SCRIPT = """
import sys
import numpy as np
from anomalib_stfpm_ext import anomaly_map
from anomalib_stfpm_ext.ops import native
assert "torch" not in sys.modules
rng = np.random.default_rng(0)
outputs = [native.selected_isa().encode()]
for dtype in ("float32", "float16"):
    t, s = (rng.standard_normal((2, 37, 19, 23)).astype(dtype) for _ in "ts")
    for layout in ((0, 1, 2, 3), (0, 2, 3, 1)):
        t_in = t.transpose(layout).copy().transpose(np.argsort(layout))
        s_in = s.transpose(layout).copy().transpose(np.argsort(layout))
        outputs.append(anomaly_map([t_in], [s_in], (50, 60))[0].tobytes())
assert "torch" not in sys.modules
print(b"".join(outputs).hex())
"""


def test_instruction_sets_agree_to_the_bit_and_numpy_needs_no_torch(python):
    outputs = {}
    for isa in native.available_isas:
        output = bytes.fromhex(python(ISA_SCRIPT, STFPM_EXT_ISA=isa).stdout)
        assert output.startswith(isa.encode())
        outputs[isa] = output.removeprefix(isa.encode())
    assert len(set(outputs.values())) == 1, list(outputs)


def test_the_best_instruction_set_is_picked(python):
    script = "from anomalib_stfpm_ext.ops import native; print(native.selected_isa())"
    assert python(script, STFPM_EXT_ISA="").stdout.strip() == processor.best_isa()


def test_unknown_instruction_set_is_refused(python):
    result = python(ISA_SCRIPT, check=False, STFPM_EXT_ISA="mmx")
    assert "STFPM_EXT_ISA is 'mmx', but this machine runs:" in result.stderr


@pytest.mark.parametrize("weight", [0, 1e-50, 0.01, 0.37, 1.47, 3, 50, 1e50])
def test_weighted_products_are_those_of_float64(weight):
    angles = np.concatenate([[0, 1e-30, 2e-22, 1e-19, np.nan], np.geomspace(1e-12, np.pi, 8187)])
    teacher = np.stack([np.ones_like(angles), np.zeros_like(angles)])[None, :, None].astype(np.float32)
    student = np.stack([np.cos(angles), np.sin(angles)])[None, :, None].astype(np.float32)
    amap, _, levels = anomaly_map([teacher], [student], (1, len(angles)), weights=[weight], level_maps=True)
    assert len(np.unique(levels)) > 4000
    with np.errstate(over="ignore"):
        expected = (levels.astype(np.float64) ** weight).astype(np.float32)
    # An error of the base, which float32 has anyway, counts as often as the weight says. 1.5e-45: the smallest float32.
    np.testing.assert_allclose(amap, expected, rtol=1.6e-7 + 7e-8 * min(weight, 50), atol=1.5e-45)


@pytest.mark.parametrize("combine", ["product", "sum", "maximum"])
@pytest.mark.parametrize("weights", [None, (0.5, 0, 2)], ids=str)
@pytest.mark.parametrize("combine_size", [None, (15, 23), (70, 40)], ids=str)
def test_combinations_weights_and_level_maps(combine, weights, combine_size):
    teacher, student = make_features(PYRAMIDS["resnet18"], 2, (60, 90))
    expected = reference.anomaly_map(teacher, student, (60, 90), weights, combine, combine_size)
    options = {"weights": weights, "combine": combine, "combine_size": combine_size, "level_maps": True}
    tensors = [[torch.from_numpy(level) for level in side] for side in (teacher, student)]
    for result in (
        anomaly_map(teacher, student, (60, 90), **options),
        anomaly_map(*tensors, (60, 90), **options),
        anomaly_map(*[[level.clone().requires_grad_() for level in side] for side in tensors], (60, 90), **options),
    ):
        for name, ours, theirs in zip(("map", "score", "level maps"), result, expected, strict=True):
            assert_close(ours if isinstance(ours, np.ndarray) else ours.detach(), theirs, 2e-5, name)
    named = [dict(zip("abc", side, strict=True)) for side in (teacher, student)]
    options |= {"weights": weights and dict(zip("abc", weights, strict=True)), "level_maps": False}
    by_name = anomaly_map(*named, (60, 90), **options)
    assert_close(by_name[0], expected[0], 2e-5)
    assert len(by_name) == 2


@pytest.mark.parametrize("options", [{}, {"level_maps": True}, {"level_maps": True, "combine_size": (9, 70)}], ids=str)
def test_memory_of_the_caller(options):
    teacher, student = make_features([(12, 4), (20, 8)], 2, (64, 64))
    expected = anomaly_map(teacher, student, (50, 40), **options)
    out = [np.full_like(array, np.nan) for array in expected]
    for ours, theirs in zip(anomaly_map(teacher, student, (50, 40), **options, out=out), out, strict=True):
        assert ours is theirs
    tensors = [[torch.from_numpy(level) for level in side] for side in (teacher, student)]
    torch_out = [torch.full_like(torch.from_numpy(array), torch.nan) for array in expected]
    anomaly_map(*tensors, (50, 40), **options, out=torch_out)
    for array, tensor, wanted in zip(out, torch_out, expected, strict=True):
        np.testing.assert_array_equal(array, wanted)
        np.testing.assert_array_equal(tensor, wanted)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_memory_that_will_not_do(kind):
    features = np.ones((1, 2, 4, 4), np.float32)
    amap, score, level_maps = (kind(np.empty(shape, np.float32)) for shape in ((1, 1, 4, 4), 1, (1, 1, 4, 4)))
    both = kind(np.empty(17, np.float32))
    teacher, student = kind(features), kind(features.copy())
    inside = teacher.reshape(-1)[:16].reshape(1, 1, 4, 4)
    other = {"numpy.ndarray": torch, "torch.Tensor": np}[name := f"{type(amap).__module__}.{type(amap).__name__}"]
    for out, error, message in (
        ([amap], ValueError, "out: wanted a sequence of 2, got 1"),
        ([amap, score, level_maps], ValueError, "out: wanted a sequence of 2, got 3"),
        (amap, ValueError, f"out: wanted a sequence of 2, got {name}"),
        ({0: amap, 1: score}, ValueError, "out: wanted a sequence of 2, got builtins.dict"),
        (1, ValueError, "out: wanted a sequence of 2, got builtins.int"),
        ([amap, kind(np.empty(1))], TypeError, r"out\[1\]: wanted dtype float32, got float64"),
        ([amap, other.ones(1)], TypeError, rf"out\[1\]: wanted {name}, got"),
        ([None, score], TypeError, rf"out\[0\]: wanted {name}, got builtins.NoneType"),
        ([amap[:, :, :3], score], ValueError, r"out\[0\]: wanted shape \(1, 1, 4, 4\), got \(1, 1, 3, 4\)"),
        ([amap[0], score], ValueError, r"out\[0\]: wanted shape \(1, 1, 4, 4\), got \(1, 4, 4\)"),
        ([amap.swapaxes(2, 3), score], ValueError, r"out\[0\]: wanted contiguous memory"),
        ([inside, score], ValueError, r"out\[0\]: wanted memory of its own"),
        ([both[:16].reshape(1, 1, 4, 4), both[15:16]], ValueError, r"out\[1\]: wanted memory of its own"),
    ):
        with pytest.raises(error, match=message):
            anomaly_map([teacher], [student], (4, 4), out=out)
    with pytest.raises(ValueError, match=r"out\[0\]: wanted shape \(1, 1, 8, 4\), got \(1, 1, 4, 4\)"):
        anomaly_map([teacher], [student], (8, 4), out=[amap, score])
    for size in (4, (4.0, 4), "44"):
        with pytest.raises(TypeError, match="image_size: wanted two whole numbers"):
            anomaly_map([teacher], [student], size, out=[amap, score])


def test_memory_that_nobody_may_write_to():
    features, amap, score = np.ones((1, 2, 4, 4), np.float32), np.empty((1, 1, 4, 4), np.float32), np.empty(1, "f4")
    amap.flags.writeable = False
    with pytest.raises(ValueError, match=r"out\[0\]: wanted memory that can be written to"):
        anomaly_map([features], [features.copy()], (4, 4), out=[amap, score])
    tensor = torch.from_numpy(features)
    with pytest.raises(ValueError, match="out: wanted None where gradients are required"):
        anomaly_map([tensor], [tensor.clone().requires_grad_()], (4, 4), out=[torch.empty(1, 1, 4, 4), torch.empty(1)])


class DlpackOnly:
    """An array of some other library."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **arguments):
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_anything_with_dlpack_or_the_buffer_protocol():
    teacher, student = make_features([(8, 4)], 1, (32, 32))
    expected = anomaly_map(teacher, student, (32, 32))[0]
    for wrap in (DlpackOnly, memoryview):
        result = anomaly_map([wrap(level) for level in teacher], [wrap(level) for level in student], (32, 32))[0]
        np.testing.assert_array_equal(result, expected)


def test_torch_operators_and_their_formula():
    teacher, student = (
        [torch.from_numpy(level) for level in side] for side in make_features([(12, 4), (20, 8)], 2, (64, 64))
    )
    options = {"weights": [0.5, 2.0], "combine": "sum", "level_maps": True}
    for keywords in ({}, options, {**options, "combine_size": (16, 20)}):
        torch.library.opcheck(torch.ops.anomalib_stfpm_ext.anomaly_map.default, (teacher, student, 64, 64), keywords)
    out = {"amap": torch.empty(2, 1, 64, 64), "score": torch.empty(2), "level_maps": torch.empty(2, 2, 64, 64)}
    torch.library.opcheck(torch.ops.anomalib_stfpm_ext.anomaly_map_out.default, (teacher, student), out)
    meta = [[level.to("meta") for level in side] for side in (teacher, student)]
    assert [tuple(tensor.shape) for tensor in anomaly_map(*meta, (64, 64))] == [(2, 1, 64, 64), (2,)]

    amap, score = anomaly_map(teacher, student, (64, 64))
    for level in student:
        level.requires_grad_()
    formula_map, formula_score = anomaly_map(teacher, student, (64, 64))
    torch.testing.assert_close(formula_map, amap, rtol=1e-4, atol=0)
    torch.testing.assert_close(formula_score, score, rtol=1e-4, atol=0)
    formula_score.sum().backward()
    assert all(level.grad.abs().sum() > 0 for level in student)


def test_cuda_tensors_on_a_build_without_cuda(monkeypatch):
    """A fake tensor stands for the one on the GPU: the check must come before anything is read."""
    monkeypatch.setattr(native, "cuda_architectures", "")
    with FakeTensorMode(allow_non_fake_inputs=True):
        features = [torch.empty(1, 2, 4, 4, device="cuda")]
        with pytest.raises(ValueError, match=r"teacher\[0\]: wanted features on the CPU, since this build has no CUDA"):
            map_operators._fused(features, features, 8, 8)
        with pytest.raises(ValueError, match=r"teacher\[0\]: wanted features on the CPU, since this build has no CUDA"):
            feature_matching._fused(features, features)


def level(*shape, dtype=np.float32):
    return np.ones(shape or (1, 2, 4, 4), dtype)


@pytest.mark.parametrize(
    ("teacher", "student", "image_size", "error", "message"),
    [
        (
            [level()],
            [level(2, 2, 4, 4)],
            (8, 8),
            ValueError,
            r"student\[0\]: wanted the teacher's shape \(1, 2, 4, 4\)",
        ),
        ([level()], [level(1, 3, 4, 4)], (8, 8), ValueError, r"student\[0\].*got \(1, 3, 4, 4\)"),
        ([level()], [level(1, 2, 4, 5)], (8, 8), ValueError, r"student\[0\].*got \(1, 2, 4, 5\)"),
        ([level(), level(2, 2, 4, 4)], [level(), level(2, 2, 4, 4)], (8, 8), ValueError, r"teacher\[1\].*batch of 1"),
        ([level(2, 4, 4)], [level(2, 4, 4)], (8, 8), ValueError, r"teacher\[0\]: wanted shape \(B, C, H, W\)"),
        ([level(1, 0, 4, 4)], [level(1, 0, 4, 4)], (8, 8), ValueError, r"teacher\[0\]: wanted 1 to 2.*channels"),
        ([level(1, 2, 0, 4)], [level(1, 2, 0, 4)], (8, 8), ValueError, r"teacher\[0\]: wanted 1 to 2.*rows"),
        ([], [], (8, 8), ValueError, "teacher: wanted 1 to 8 levels, got 0"),
        ([level()] * 9, [level()] * 9, (8, 8), ValueError, "teacher: wanted 1 to 8 levels, got 9"),
        ([level()] * 2, [level()], (8, 8), ValueError, "student: wanted as many levels as the teacher, 2, got 1"),
        ({"a": level()}, {"b": level()}, (8, 8), ValueError, r"student: wanted the teacher's levels \['a'\]"),
        ({"a": level()}, {"a": level(1, 9, 4, 4)}, (8, 8), ValueError, r"student\['a'\]"),
        ({"a": level()}, [level()], (8, 8), TypeError, "teacher: wanted a sequence of features, or both sides as mapp"),
        (level(), level(), (8, 8), TypeError, "teacher: wanted a sequence of features"),
        ([level()], [torch.ones(1, 2, 4, 4)], (8, 8), TypeError, r"teacher\[0\]: wanted torch.Tensor, got numpy"),
        ([[[1.0]]], [[[1.0]]], (8, 8), TypeError, r"teacher\[0\]: wanted numpy.ndarray, got builtins.list"),
        ([level(dtype=np.int64)], [level(dtype=np.int64)], (8, 8), TypeError, r"teacher\[0\].*float32 or.*got int64"),
        ([level(dtype=complex)], [level(dtype=complex)], (8, 8), TypeError, r"teacher\[0\].*got complex128"),
        ([level(dtype=">f4")], [level(dtype=">f4")], (8, 8), TypeError, r"teacher\[0\].*got >f4"),
        (
            [level()],
            [level(dtype=np.float64)],
            (8, 8),
            TypeError,
            r"student\[0\]: wanted dtype .*float32 like the first level, got float64",
        ),
        ([level()], [level()], (0, 8), ValueError, r"image_size: wanted .* of 1 to .*, got \(0, 8\)"),
        ([level()], [level()], (2**31, 8), ValueError, r"image_size: wanted .* of 1 to .*, got \(2147483648, 8\)"),
        ([level()], [level()], (2**64, 8), ValueError, r"image_size: wanted .* of 1 to "),
        ([level()], [level()], (2**30, 2**30), ValueError, r"image_size: wanted at most 2\*\*40 pixels, got \(1073"),
        ([level()], [level()], (8, -1), ValueError, r"image_size.*got \(8, -1\)"),
        ([level()], [level()], 8, TypeError, "image_size: wanted two whole numbers"),
        ([level()], [level()], (8, 8.5), TypeError, "image_size: wanted two whole numbers"),
        ([level()], [level()], (8, 8, 8), TypeError, "image_size: wanted two whole numbers"),
    ],
)
def test_bad_input(teacher, student, image_size, error, message):
    with pytest.raises(error, match=message):
        anomaly_map(teacher, student, image_size)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"combine": "mean"}, ValueError, "combine: wanted 'product' or 'sum' or 'maximum', got 'mean'"),
        ({"weights": [1, 2]}, ValueError, r"weights: wanted 1 finite numbers of at least 0, got \[1.0, 2.0\]"),
        ({"weights": []}, ValueError, r"weights: wanted 1 finite numbers of at least 0, got \[\]"),
        ({"weights": [-1]}, ValueError, "weights: wanted 1 finite numbers of at least 0"),
        ({"weights": [float("nan")]}, ValueError, "weights: wanted 1 finite"),
        ({"weights": ["a"]}, TypeError, "weights: wanted a number for each level"),
        ({"weights": 1}, TypeError, "weights: wanted a number for each level"),
        ({"combine_size": 8}, TypeError, "combine_size: wanted two whole numbers"),
        ({"combine_size": (0, 8)}, ValueError, r"combine_size: wanted .* of 1 to .*, got \(0, 8\)"),
        ({"weights": {"other": 1}}, ValueError, r"weights: wanted the levels \[0\] in this order, got \['other'\]"),
    ],
)
@pytest.mark.parametrize("caller", ["numpy", "torch", "gradients", "out", "eager compiler"])
def test_bad_options(options, error, message, caller):
    teacher, score = level() if caller == "numpy" else torch.from_numpy(level()), anomaly_map
    if caller == "gradients":
        teacher.requires_grad_()
    elif caller == "out":
        options = options | {"out": (torch.empty(1, 1, 8, 8), torch.empty(1))}
    elif caller == "eager compiler":
        torch.compiler.reset()
        score = torch.compile(anomaly_map, backend="eager")
    with pytest.raises(error, match=message):
        score([teacher], [teacher * 1], (8, 8), **options)


@pytest.mark.parametrize(
    "options", [{"weights": [1, 2]}, {"weights": []}, {"weights": [-1]}, {"combine": "mean"}], ids=str
)
def test_bad_options_of_the_operators(options):
    operators, levels = torch.ops.anomalib_stfpm_ext, [torch.ones(1, 2, 4, 4)]
    with pytest.raises(ValueError, match=next(iter(options))):
        operators.anomaly_map(levels, levels, 8, 8, **options)
    with pytest.raises(ValueError, match=next(iter(options))):
        operators.anomaly_map_out(levels, levels, amap=torch.empty(1, 1, 8, 8), score=torch.empty(1), **options)
    for size in ((0, 8), (2**31, 8), (2**30, 2**30)):
        with pytest.raises(ValueError, match="combine_size"):
            operators.anomaly_map(levels, levels, 8, 8, combine_size=size)


def checks_of(call):
    """Which checks of ops/arguments.py a call runs, each by what it is about."""
    found = []

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename == arguments.__file__ and "check_" in code.co_name:
            found.append((code.co_name, frame.f_locals.get("argument")))

    call()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@torch.no_grad()
def test_everything_is_checked_once():
    arrays = make_features([(12, 4), (20, 8)], 1, (32, 32))
    tensors = [[torch.from_numpy(side) for side in level] for level in arrays]
    options = {"weights": [1, 2], "combine": "sum", "combine_size": (16, 16), "level_maps": True}
    out = [torch.empty(1, 1, 32, 32), torch.empty(1), torch.empty(1, 2, 16, 16)]
    operators = torch.ops.anomalib_stfpm_ext
    by_name = dict(zip(("amap", "score", "level_maps"), out, strict=True))
    without = {name: value for name, value in options.items() if name != "level_maps"}
    calls = {
        "numpy": lambda: anomaly_map(*arrays, (32, 32), **options),
        "numpy, out": lambda: anomaly_map(*arrays, (32, 32), **options, out=[tensor.numpy() for tensor in out]),
        "torch": lambda: anomaly_map(*tensors, (32, 32), **options),
        "torch, out": lambda: anomaly_map(*tensors, (32, 32), **options, out=out),
        "operator": lambda: operators.anomaly_map(*tensors, 32, 32, **options),
        "operator, out": lambda: operators.anomaly_map_out(*tensors, **without, **by_name),
    }
    for name, call in calls.items():
        found = checks_of(call)
        assert len(found) == len(set(found)), name
        assert {("check_features", None), ("_check_size", "image_size"), ("_check_size", "combine_size")} < {*found}
        assert ("check_options", None) in found
        assert (("_check_outputs", None) in found) == name.endswith("out")
    for level in tensors[0]:
        level.requires_grad_()
    with torch.enable_grad():
        found = checks_of(calls["torch"])
    assert len(found) == len(set(found)) == 5  # all of them, and check_call


@torch.no_grad()
def test_memory_of_the_caller_when_compiled():
    teacher, student = ([torch.from_numpy(level) for level in side] for side in make_features([(4, 4)], 2, (16, 16)))
    out = [torch.empty(2, 1, 16, 16), torch.empty(2)]
    torch.compiler.reset()
    compiled = torch.compile(anomaly_map, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(teacher, student, (16, 16), weights=(2.0,), out=out)
    assert all(map(torch.equal, out, anomaly_map(teacher, student, (16, 16), weights=(2.0,))))


@pytest.mark.parametrize(
    ("student", "error", "message"),
    [
        (torch.ones(1, 2, 4, 4, device="meta"), ValueError, r"student\[0\]: wanted device cpu.*got meta"),
        (
            torch.ones(1, 2, 4, 4).half(),
            TypeError,
            r"student\[0\]: wanted dtype .*float32 like the first level, got .*float16",
        ),
        (
            torch.ones(1, 2, 4, 4).int(),
            TypeError,
            r"student\[0\]: wanted dtype .*float32 like the first level, got .*int32",
        ),
        (torch.ones(1, 2, 4, 4).to_sparse(), TypeError, r"student\[0\]: wanted a strided tensor"),
        (torch.ones(1, 2, 4, 5), ValueError, r"student\[0\]: wanted the teacher's shape"),
        (torch.ones(2, 2, 4, 4), ValueError, r"student\[0\]: wanted the teacher's shape"),
    ],
)
def test_bad_tensors_whether_called_as_function_or_operator(student, error, message):
    with pytest.raises(error, match=message):
        anomaly_map([torch.ones(1, 2, 4, 4)], [student], (8, 8))
    teacher = torch.ones(1, 2, 4, 4, requires_grad=True)  # scored by the formula, whose operations would broadcast
    with pytest.raises(error, match=message):
        anomaly_map([teacher], [student], (8, 8))
    with pytest.raises((error, RuntimeError, NotImplementedError)):
        torch.ops.anomalib_stfpm_ext.anomaly_map([torch.ones(1, 2, 4, 4)], [student], 8, 8)
    with pytest.raises(ValueError, match="image_size"):
        torch.ops.anomalib_stfpm_ext.anomaly_map([torch.ones(1, 2, 4, 4)], [torch.ones(1, 2, 4, 4)], 0, 8)


@pytest.mark.parametrize("place", ["teacher", "student", "out"])
def test_masks_are_refused(place):
    """Features under a mask would count like others."""
    arguments = {"teacher": [np.ones((1, 2, 4, 4), "f4")], "student": [np.ones((1, 2, 4, 4), "f4")]}
    arguments["out"] = [np.empty((1, 1, 8, 8), "f4"), np.empty(1, "f4")]
    arguments[place][0] = np.ma.masked_less(arguments[place][0], 0)
    with pytest.raises(TypeError, match=f"{place}: wanted arrays without a mask"):
        anomaly_map(**arguments, image_size=(8, 8))
