# SPDX-License-Identifier: Apache-2.0

"""Random calls of the scorer against the reference: shapes, strides, dtypes, options and values.

``make fuzz`` runs this file for ten minutes (STFPM_EXT_FUZZ_SECONDS); hypothesis prints the failing case and how to
repeat it, and the last line how many cases were tried.
"""

import os
import time

import numpy as np
import reference
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st

from anomalib_stfpm_ext import anomaly_map

FUZZ_SECONDS = float(os.environ.get("STFPM_EXT_FUZZ_SECONDS", "0"))
DTYPES = ("float32", "float64", "float16")
sizes = st.integers(1, 40)


@st.composite
def layouts(draw, shape, dtype):
    """Memory for an array of this shape: axes in any order, gaps between and around them, directions reversed."""
    order = draw(st.permutations(range(4)))
    steps = draw(st.tuples(*[st.integers(1, 3)] * 4))
    margins = draw(st.tuples(*[st.integers(0, 2)] * 4))
    memory = np.zeros([shape[axis] * steps[axis] + margins[axis] for axis in order], dtype)
    memory = memory.transpose(np.argsort(order))
    reverse = draw(st.tuples(*[st.sampled_from([1, -1])] * 4))
    window = tuple(
        slice(margin, margin + size * step, step) for margin, size, step in zip(margins, shape, steps, strict=True)
    )
    return memory[window][tuple(slice(None, None, direction) for direction in reverse)]


@st.composite
def calls(draw):
    """Arguments of one call."""
    dtype = draw(st.sampled_from(DTYPES))
    batch, image_size = draw(st.integers(0, 4)), draw(st.tuples(sizes, sizes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    # float16 knows no such numbers; elsewhere neither the squares nor the distances may over- or underflow
    scale = 1.0 if dtype == "float16" else 10.0 ** draw(st.integers(-18, 18))
    noise = 10.0 ** draw(st.integers(-6, 1))
    teacher, student = [], []
    for _ in range(draw(st.integers(1, 8))):
        shape = (batch, draw(st.integers(1, 70)), draw(sizes), draw(sizes))
        t = rng.standard_normal(shape)
        s = (t + noise * rng.standard_normal(shape)) * scale
        for values in (t, s):
            values[rng.random((*shape[:1], 1, *shape[2:])).repeat(shape[1], axis=1) < 0.05] = 0  # zero vectors
        for side, values in ((teacher, t), (student, s)):
            array = draw(layouts(shape, dtype))
            array[...] = values
            side.append(array)
    count = len(teacher)
    options = {
        "combine": draw(st.sampled_from(["product", "sum", "maximum"])),
        "weights": draw(st.none() | st.lists(st.floats(0, 2), min_size=count, max_size=count)),
        "combine_size": draw(st.none() | st.tuples(sizes, sizes)),
    }
    return teacher, student, image_size, options


def check(teacher, student, image_size, options):
    expected = reference.anomaly_map(teacher, student, image_size, **options) if len(teacher[0]) else None
    amap, score, level_maps = anomaly_map(teacher, student, image_size, level_maps=True, **options)
    again = anomaly_map(teacher, student, image_size, **options)
    np.testing.assert_array_equal(again[0], amap)
    if expected is None:
        assert amap.shape == (0, 1, *image_size)
        return
    if len(teacher[0]) > 1:
        alone = anomaly_map([level[-1:] for level in teacher], [level[-1:] for level in student], image_size, **options)
        np.testing.assert_array_equal(alone[0], amap[-1:])
    np.testing.assert_array_equal(score, amap.max(axis=(1, 2, 3)))
    # Interpolated distances keep the error of the distances (see test_any_likeness...) and float32's rounding.
    np.testing.assert_allclose(level_maps, expected[2], rtol=2e-5, atol=1e-9)
    # What they become is checked from our own level maps: powers and products magnify errors without bound.
    weights = np.reshape([1.0] * len(teacher) if options["weights"] is None else options["weights"], (-1, 1, 1))
    combined = {
        "product": lambda: np.prod(level_maps.astype(float) ** weights, axis=1, keepdims=True),
        "sum": lambda: np.sum(level_maps * weights, axis=1, keepdims=True),
        "maximum": lambda: np.max(level_maps * weights, axis=1, keepdims=True),
    }[options["combine"]]()
    if options["combine_size"]:
        combined = reference.upsample(combined[:, 0].astype(float), image_size)[:, None]
    np.testing.assert_allclose(amap, combined, rtol=1e-5, atol=1e-37)


@settings(max_examples=150, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_random_calls(call):
    check(*call)


def test_fuzz_for_as_long_as_asked(capsys):
    """Rounds of fresh random calls until the time is up; each round prints its seed if it fails."""
    tried, deadline = 0, time.monotonic() + FUZZ_SECONDS
    while time.monotonic() < deadline:
        round_seed = int.from_bytes(os.urandom(4), "little")

        @seed(round_seed)
        @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(calls())
        def one_round(call):
            nonlocal tried
            tried += 1
            note(f"seed of the round: {round_seed}")  # noqa: B023  # called in this iteration only
            check(*call)

        one_round()
    with capsys.disabled():
        print(f" {tried} random calls tried in {FUZZ_SECONDS:.0f} s" if FUZZ_SECONDS else "")
