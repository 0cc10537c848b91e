# SPDX-License-Identifier: Apache-2.0

"""Verdicts are anomalib's, bit for bit, and so are the states of post-processors."""

import math

import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor

from anomalib_stfpm_ext import StfpmExt
from anomalib_stfpm_ext.inference.post_processing import FewPassPostProcessor

STATE = {
    "image_min": 0.1,
    "image_max": 0.9,
    "pixel_min": 0.0,
    "pixel_max": 0.8,
    "_image_threshold": 0.4,
    "_pixel_threshold": 0.3,
}
CASES = {
    "plain": {},
    "no pixel threshold": {"_pixel_threshold": math.nan},
    "no threshold": {"_pixel_threshold": math.nan, "_image_threshold": math.nan},
    "no range": {"image_min": math.nan, "image_max": math.nan},
    "empty range": {"pixel_min": 0.3, "pixel_max": 0.3},
}


def equal(first, second) -> bool:
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and torch.equal(first, second)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "options",
    [{}, {"enable_normalization": False}, {"enable_thresholding": False}, {"image_sensitivity": 0.8}],
    ids=str,
)
def test_same_bits_as_anomalibs(case, options):
    processors = PostProcessor(**options), FewPassPostProcessor(**options)
    for name, value in (STATE | CASES[case]).items():
        for processor in processors:
            getattr(processor, name).fill_(value)
    generator = torch.Generator().manual_seed(0)
    amap, score = torch.rand(2, 1, 8, 8, generator=generator), torch.rand(2, 1, generator=generator)
    amap[0, 0, 0, :3] = torch.tensor([0.3, math.nan, -1.0])
    raw = amap.clone(), score.clone()
    expected, got = (processor(InferenceBatch(pred_score=score, anomaly_map=amap)) for processor in processors)
    nan = torch.nan_to_num
    for name in ("pred_score", "anomaly_map", "pred_label", "pred_mask"):
        one, other = getattr(expected, name), getattr(got, name)
        assert equal(one if one is None else nan(one, 7), other if other is None else nan(other, 7)), name
    batches = [ImageBatch(image=torch.zeros(2, 3, 8, 8), pred_score=score, anomaly_map=amap) for _ in processors]
    for processor, batch in zip(processors, batches, strict=True):
        processor.post_process_batch(batch)
    for name in ("pred_score", "anomaly_map"):
        assert equal(nan(getattr(batches[0], name), 7), nan(getattr(batches[1], name), 7)), name
    assert equal(amap.nan_to_num(7), raw[0].nan_to_num(7))  # what was given stays
    assert equal(score, raw[1])


def test_it_is_the_models_and_its_state_is_anomalibs():
    model = StfpmExt(teacher_weights=False, visualizer=False)
    assert type(model.post_processor) is FewPassPostProcessor
    anomalibs = PostProcessor()
    assert model.post_processor.state_key == anomalibs.state_key
    assert model.post_processor.checkpoint_config() == anomalibs.checkpoint_config()
    anomalibs.load_state_dict(model.post_processor.state_dict())
    given = PostProcessor()
    assert StfpmExt(teacher_weights=False, post_processor=given, visualizer=False).post_processor is given
