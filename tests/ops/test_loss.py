# SPDX-License-Identifier: Apache-2.0

"""The fused loss against the float64 reference, its formula in torch operations, and anomalib's."""

import math
from functools import partial

import numpy as np
import pytest
import reference
import torch
from anomalib.models.image.stfpm.loss import STFPMLoss
from helpers import PYRAMIDS, make_features
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp
from torch.profiler import ProfilerActivity, profile

from anomalib_stfpm_ext import StfpmExtLoss, anomaly_map
from anomalib_stfpm_ext.loss import formula
from anomalib_stfpm_ext.ops import native

OPERATOR = torch.ops.anomalib_stfpm_ext.feature_matching_loss.default
BACKWARD = torch.ops.anomalib_stfpm_ext.feature_matching_loss_backward.default
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]


def pyramids(pyramid, batch, image_size, dtype=torch.float32, memory_format=torch.contiguous_format, noise=0.1):
    """Teacher and student, who takes gradients."""
    teacher, student = (
        [torch.from_numpy(level).to(dtype).contiguous(memory_format=memory_format) for level in side]
        for side in make_features(pyramid, batch, image_size, noise)
    )
    return teacher, [level.requires_grad_() for level in student]


def exact(teacher, student, upstream=1.0, hard_share=1.0):
    """Loss and gradients by the formula in float64."""
    student = [level.detach().double().requires_grad_() for level in student]
    loss = formula([level.detach().double() for level in teacher], student, hard_share)
    return loss.detach(), torch.autograd.grad(loss * upstream, student)


def fused(teacher, student, upstream=1.0, hard_share=1.0):
    loss = StfpmExtLoss(hard_share)(teacher, student)
    return loss.detach(), torch.autograd.grad(loss * upstream, student)


def assert_gradients_close(gradients, expected, student, upstream=1.0, hard_share=1.0):
    """As near as float32 scalars allow, and for narrower gradients their own rounding."""
    for gradient, wanted, level in zip(gradients, expected, student, strict=True):
        assert gradient.dtype == level.dtype
        own = torch.finfo(gradient.dtype)
        scalars = own if gradient.dtype == torch.float64 else torch.finfo(torch.float32)
        # The gradient is the difference, small for a student like the teacher, of two vectors of this length.
        length = 2 / level.detach().double().norm(dim=1, keepdim=True).clamp_min(1e-12) * abs(upstream)
        length /= max(hard_share * wanted[:, 0].numel(), 1)
        allowed = 4 * scalars.eps * length + own.eps * wanted.abs() + own.smallest_normal * own.eps
        assert ((gradient.double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("batch", [1, 4])
def test_formula_and_relation_to_anomalib(batch):
    teacher, student = make_features(PYRAMIDS["resnet18"], batch, (64, 96))
    expected = sum(2 * reference.distance(t, s).mean() for t, s in zip(teacher, student, strict=True))
    tensors = [dict(enumerate(map(torch.from_numpy, side))) for side in (teacher, student)]
    loss = StfpmExtLoss()(*tensors)
    assert loss.item() == pytest.approx(expected, rel=1e-7)
    assert formula(*(list(side.values()) for side in tensors)).item() == pytest.approx(expected, rel=1e-5)
    assert STFPMLoss()(*tensors).item() == pytest.approx(loss.item() * batch / 2, rel=1e-5)


@pytest.mark.parametrize("hard_share", [0.7, 0.1, 0.004, 1e-9])
def test_hardest_positions(hard_share):
    """Those of the batch, at least one at each level."""
    teacher, student = make_features(PYRAMIDS["resnet18"], 3, (64, 96))
    expected = 0
    for t, s in zip(teacher, student, strict=True):
        distances = np.sort(2 * reference.distance(t, s), axis=None)[::-1]
        expected += distances[: math.ceil(hard_share * len(distances))].mean()
    tensors = [list(map(torch.from_numpy, side)) for side in (teacher, student)]
    assert StfpmExtLoss(hard_share)(*tensors).item() == pytest.approx(expected, rel=1e-6)
    assert formula(*tensors, hard_share).item() == pytest.approx(expected, rel=1e-5)


def test_positions_as_hard_as_the_last_one_count():
    """Half of the positions are equal: they all count or none, whatever their order."""
    teacher = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(2, 2, 4, 4)
    student = teacher.clone()
    student[:, :, :2] *= -1  # 4
    student[0, :, 2] = 1  # 2 - sqrt(2)
    for share, expected in [(0.01, 4), (0.5, 4), (0.51, (16 * 4 + 4 * (2 - 2**0.5)) / 20), (0.8, 2 + (2 - 2**0.5) / 8)]:
        loss, gradients = fused([teacher], [student.requires_grad_()], hard_share=share)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        wanted = exact([teacher], [student], hard_share=share)
        assert_gradients_close(gradients, wanted[1], [student], hard_share=share)
    assert not gradients[0][1, :, 3].any()


def test_not_a_number_is_the_hardest():
    teacher, student = pyramids([(5, 4)], 2, (16, 24))
    student[0].data[1, 2, 3, 4] = torch.nan
    for loss, gradients in (pick(teacher, student, hard_share=0.1) for pick in (fused, exact)):
        assert loss.isnan()
        assert gradients[0][1, :, 3, 4].isnan().all()


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan, math.inf])
def test_share_out_of_range(share):
    with pytest.raises(ValueError, match=r"hard_share: wanted a number above 0 and of at most 1, got"):
        StfpmExtLoss(share)
    with pytest.raises(ValueError, match=r"hard_share: wanted a number above 0 and of at most 1, got"):
        OPERATOR([LEVEL], [LEVEL], share)


@pytest.mark.parametrize("share", ["0.1", None, True])
def test_share_of_another_type(share):
    with pytest.raises(TypeError, match="hard_share: wanted a number, got"):
        StfpmExtLoss(share)


@pytest.mark.parametrize("hard_share", [1, 0.3])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_gradcheck(memory_format, hard_share):
    """Three levels of odd sizes, and a position where the teacher is zero."""
    teacher, student = pyramids([(3, 4), (17, 7), (33, 30)], 2, (21, 27), torch.float64, memory_format)
    teacher[0][0, :, 2, 3] = 0
    assert gradcheck(lambda *levels: StfpmExtLoss(hard_share)(teacher, levels), student)
    with pytest.raises(NotImplementedError, match=r"no second derivative: differentiate anomalib_stfpm_ext.loss.form"):
        gradgradcheck(lambda *levels: StfpmExtLoss()(teacher, levels), student)


@pytest.mark.parametrize(("upstream", "hard_share"), [(1.0, 1.0), (-3e4, 1.0), (1.0, 0.05)])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_formula(dtype, memory_format, upstream, hard_share):
    """More positions than a task has, fewer than a vector; channels that no vector divides."""
    teacher, student = pyramids([(64, 2), (37, 7), (5, 64)], 3, (61, 50), dtype, memory_format)
    loss, gradients = fused(teacher, student, upstream, hard_share)
    expected, expected_gradients = exact(teacher, student, upstream, hard_share)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-7 if hard_share == 1 else 3e-7  # torch's sum
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    assert_gradients_close(gradients, expected_gradients, student, upstream, hard_share)
    assert [gradient.stride() for gradient in gradients] == [level.stride() for level in student]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    """Under autocast features are narrow; loss and gradients are those of the formula for the same features."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    networks = [torch.nn.Conv2d(3, 24, 3).to(memory_format=torch.channels_last) for _ in "ts"]

    def train(loss_function):
        networks[1].zero_grad()
        with torch.autocast("cpu", dtype):
            with torch.no_grad():
                teacher = {"level": networks[0](images)}
            student = {"level": networks[1](images)}
            assert teacher["level"].dtype == student["level"].dtype == dtype
            loss = loss_function(teacher, student)
        loss.backward()
        return loss, networks[1].weight.grad.clone()

    for share in (1, 0.1):
        loss, gradient = train(StfpmExtLoss(share))
        assert loss.dtype == torch.float32
        expected, expected_gradient = train(lambda *sides: formula(*(list(side.values()) for side in sides), share))  # noqa: B023
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        tolerance = 10 * torch.finfo(dtype).eps
        assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm()


@pytest.mark.parametrize(
    ("of_teacher", "of_student"),
    [
        (1, 1e-18),
        (1, 1e-13),
        (1e-13, 1e-13),
        (1, 1e-11),
        (1, 1e15),
        (1, 1e30),
        (1e-18, 1),
        (1e30, 1),
        (1e-18, 1e-18),
        (1e18, 1e18),
        (1e-11, 1e25),
    ],
)
def test_tiny_and_huge_norms(of_teacher, of_student):
    teacher, student = pyramids([(40, 4)], 1, (32, 32))
    teacher = [level * of_teacher for level in teacher]
    student = [(level.detach() * of_student).requires_grad_() for level in student]
    upstream = max(of_student, 1.0)  # otherwise float32 does not hold the gradient
    loss, gradients = fused(teacher, student, upstream)
    expected, expected_gradients = exact(teacher, student, upstream)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-12)
    assert_gradients_close(gradients, expected_gradients, student, upstream)


def test_opposite_equal_and_zero_vectors():
    ones, zeros = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    for teacher, student, value in [(ones, -ones, 4), (ones, ones, 0), (ones, zeros, 1), (zeros, zeros, 0)]:
        for memory_format in FORMATS:
            levels = [student.clone(memory_format=memory_format).requires_grad_()]
            loss, gradients = fused([teacher], levels)
            assert loss.item() == pytest.approx(value, rel=1e-7)
            expected = exact([teacher], levels)[1]
            torch.testing.assert_close(gradients[0].double(), expected[0], rtol=1e-6, atol=1e-7)
    assert not fused([ones], [ones.clone().requires_grad_()])[1][0].any()  # not nearly, exactly


def layouts(features):
    """The same values in every kind of memory layout."""
    batch, channels, height, width = features.shape
    padded = torch.zeros(batch + 2, channels + 1, height + 3, width + 4, dtype=features.dtype)
    padded[1:-1, 1:, 2:-1, 3:-1] = features
    return {
        "nchw": features.contiguous(),
        "channels_last": features.contiguous(memory_format=torch.channels_last),
        "slice": padded[1:-1, 1:, 2:-1, 3:-1],
        "transposed": features.transpose(2, 3).contiguous().transpose(2, 3),
        "batch_last": features.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "expanded": features[:1].expand(batch, -1, -1, -1),
    }


@pytest.mark.parametrize("student_layout", list(layouts(torch.zeros(1, 1, 1, 1))))
@pytest.mark.parametrize("teacher_layout", list(layouts(torch.zeros(1, 1, 1, 1))))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_memory_layout(dtype, teacher_layout, student_layout):
    teacher, student = pyramids([(37, 4), (18, 7)], 3, (45, 61), dtype)
    teacher = [layouts(level)[teacher_layout] for level in teacher]
    student = [layouts(level.detach())[student_layout].requires_grad_() for level in student]
    loss, gradients = fused(teacher, student)
    expected, expected_gradients = exact(teacher, student)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-7, atol=0)
    assert_gradients_close(gradients, expected_gradients, student)


def test_every_half_is_written_rightly():
    """Gradients of all magnitudes, subnormal ones and infinity too, next to torch's rounding of them."""
    rng = np.random.default_rng(0)
    teacher = torch.from_numpy(rng.standard_normal((1, 2, 64, 64)))
    student = torch.from_numpy(rng.standard_normal((1, 2, 64, 64)))
    for dtype in (torch.float16, torch.bfloat16):
        t, s = teacher.to(dtype), student.to(dtype).requires_grad_()
        for upstream in 10.0 ** torch.arange(-6, 12):
            gradient = fused([t], [s], upstream)[1][0]
            single = fused([t.float()], [s.detach().float().requires_grad_()], upstream)[1][0]
            assert torch.equal(gradient, single.to(dtype))
    nan = torch.full((1, 2, 4, 4), torch.nan, dtype=dtype, requires_grad=True)
    assert fused([torch.ones_like(nan.detach())], [nan])[1][0].isnan().all()


@pytest.mark.parametrize("hard_share", [1, 0.1])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_same_bits_for_any_number_of_threads(memory_format, hard_share):
    teacher, student = pyramids(PYRAMIDS["resnet18"], 3, (200, 312), memory_format=memory_format)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            loss, gradients = fused(teacher, student, hard_share=hard_share)
            results.append([loss, *gradients])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


ISA_SCRIPT = """
import torch
from anomalib_stfpm_ext import StfpmExtLoss, anomaly_map
from anomalib_stfpm_ext.ops import native
torch.manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        teacher, student = (
            [torch.randn(2, 67, 13, 9).to(dtype).contiguous(memory_format=memory_format)] for _ in "ts"
        )
        loss = StfpmExtLoss()(teacher, [student[0].requires_grad_()])
        loss.backward()
        print(native.selected_isa(), loss.item().hex(), student[0].grad.double().numpy().tobytes().hex())
"""


def test_instruction_sets_agree_to_the_bit(python):
    outputs = {isa: python(ISA_SCRIPT, STFPM_EXT_ISA=isa).stdout for isa in native.available_isas}
    assert all(isa in output for isa, output in outputs.items())
    assert len({output.replace(isa, "") for isa, output in outputs.items()}) == 1


def test_keeps_three_numbers_for_each_position_and_never_waits():
    """What a step allocates, and which operators it runs: no copy of a feature, none that reads a value back."""
    teacher, student = pyramids([(64, 4)], 2, (128, 128), memory_format=torch.channels_last)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = StfpmExtLoss()(teacher, student)
    own = [tensor for tensor in kept if tensor.data_ptr() not in {level.data_ptr() for level in teacher + student}]
    assert [tensor.shape for tensor in own] == [(3, 2 * 32 * 32)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss.backward()
    events = profiler.events()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in events)
    assert allocated <= student[0].nbytes + 4  # the upstream gradient
    assert not {"aten::item", "aten::_local_scalar_dense", "aten::clone"} & {event.name for event in events}


def test_operators_as_torch_wants_them():
    for memory_format in FORMATS:
        teacher, student = pyramids([(5, 4), (6, 8)], 2, (16, 24), memory_format=memory_format)
        torch.library.opcheck(OPERATOR, (teacher, student))
        torch.library.opcheck(OPERATOR, (teacher, student, 0.1))
        loss, scalars = OPERATOR(teacher, [level.detach() for level in student])
        torch.library.opcheck(
            BACKWARD, (torch.ones_like(loss), teacher, [level.detach() for level in student], scalars)
        )


def test_compiled_training_step():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    frozen, network = (torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last) for _ in "ts")
    loss = StfpmExtLoss()

    def step(images):
        with torch.no_grad():
            teacher = {"a": frozen(images), "b": frozen(images[..., ::2])}
        return loss(teacher, {"a": network(images), "b": network(images[..., ::2])})

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        network.zero_grad()
        value = run(images)
        value.backward()
        results.append([value.detach(), network.weight.grad.clone()])
    torch.testing.assert_close(*results)


def test_teacher_that_requires_gradients_and_second_derivatives_by_the_formula():
    teacher, student = pyramids([(5, 4), (6, 8)], 2, (16, 24), torch.float64)
    teacher = [level.requires_grad_() for level in teacher]
    assert gradcheck(lambda *levels: StfpmExtLoss()(levels[:2], levels[2:]), (*teacher, *student))
    assert gradgradcheck(lambda *levels: formula(teacher, levels), student)
    with torch.no_grad():  # fused
        assert StfpmExtLoss()(teacher, student).item() == pytest.approx(formula(teacher, student).item(), rel=1e-12)


def test_torch_func_and_forward_mode_by_the_formula():
    teacher, student = pyramids([(5, 4)], 2, (16, 24), torch.float64)
    student, tangent = student[0].detach(), torch.ones_like(student[0])

    def ours(level):
        return StfpmExtLoss()(teacher, [level])

    def wanted(level):
        return formula(teacher, [level])

    torch.testing.assert_close(jvp(ours, (student,), (tangent,)), jvp(wanted, (student,), (tangent,)))
    torch.testing.assert_close(grad(ours)(student), grad(wanted)(student))
    score = partial(anomaly_map, teacher, image_size=(16, 24))
    slope = jvp(lambda level: score([level])[0].sum(), (student,), (tangent,))[1]
    gradient = torch.autograd.grad(score([student.requires_grad_()])[0].sum(), student)[0]
    torch.testing.assert_close(slope, gradient.sum())


def test_devices_without_a_kernel_take_the_formula():
    teacher, student = ([level.to("meta") for level in side] for side in pyramids([(5, 4)], 2, (16, 24)))
    assert StfpmExtLoss()(teacher, student).device.type == "meta"


def test_no_gradient_from_upstream():
    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            ctx.set_materialize_grads(False)
            return value + 1

        @staticmethod
        def backward(_ctx, _upstream):
            return None

    teacher, student = pyramids([(5, 4)], 2, (16, 24))
    (Constant.apply(StfpmExtLoss()(teacher, student)) + student[0].sum()).backward()
    assert torch.equal(student[0].grad, torch.ones_like(student[0]))


def test_empty_batch_and_no_gradients():
    empty = [torch.zeros(0, 3, 4, 4)]
    student = [torch.zeros(0, 3, 4, 4, requires_grad=True)]
    loss, gradients = fused(empty, student)
    assert loss.isnan()
    assert formula(empty, student).isnan()
    assert gradients[0].shape == (0, 3, 4, 4)
    assert not StfpmExtLoss()([torch.ones(1, 2, 3, 4)], [torch.ones(1, 2, 3, 4)]).requires_grad


LEVEL = torch.ones(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("teacher", "student", "error", "message"),
    [
        ({}, {}, ValueError, "teacher: wanted 1 to 8 levels, got 0"),
        ({"a": LEVEL}, {"b": LEVEL}, ValueError, r"student: wanted the teacher's levels \['a'\] in this order"),
        ([LEVEL], [], ValueError, "student: wanted as many levels as the teacher, 1, got 0"),
        (LEVEL, LEVEL, TypeError, "teacher: wanted a sequence of features, or both sides as mappings, got torch.Tens"),
        ({"a": 1}, {"a": LEVEL}, TypeError, r"teacher\['a'\]: wanted torch.Tensor, got builtins.int"),
        ({"a": LEVEL}, {"a": None}, TypeError, r"student\['a'\]: wanted torch.Tensor, got builtins.NoneType"),
        ({"a": LEVEL.int()}, {"a": LEVEL}, TypeError, r"teacher\['a'\]: wanted dtype float32 or .*, got int32"),
        ({"a": LEVEL}, {"a": LEVEL.half()}, TypeError, r"student\['a'\]: wanted dtype torch.float32 .* torch.float16"),
        ({"a": LEVEL}, {"a": LEVEL[:, :1]}, ValueError, r"student\['a'\]: wanted the teacher's shape \(2, 3, 4, 5\)"),
        ({"a": LEVEL[0]}, {"a": LEVEL[0]}, ValueError, r"teacher\['a'\]: wanted shape \(B, C, H, W\), got \(3, 4, 5\)"),
        ({"a": LEVEL}, {"a": LEVEL.to("meta")}, ValueError, r"student\['a'\]: wanted device cpu .*, got meta"),
    ],
)  # fmt: skip
def test_bad_input_is_named(teacher, student, error, message):
    with pytest.raises(error, match=message):
        StfpmExtLoss()(teacher, student)


def test_backward_operator_checks_what_it_gets():
    student = [LEVEL + 1]
    _, scalars = OPERATOR([LEVEL], student)
    upstream = torch.ones(())
    for arguments, message in [
        ((upstream.double(), [LEVEL], student, scalars), "upstream: wanted torch.float32 on cpu, got torch.float64 on"),
        ((upstream[None], [LEVEL], student, scalars), r"upstream: wanted shape \(\), contiguous, got \(1,\)"),
        ((upstream, [LEVEL], student, scalars[:, 1:]), r"scalars: wanted shape \(3, 40\), contiguous, got \(3, 39\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            BACKWARD(*arguments)
