# SPDX-License-Identifier: Apache-2.0

"""Exports that may run in float16, which holds nothing below 6e-8: scores, as products, may be smaller."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from anomalib.post_processing import PostProcessor

from ..inference.post_processing import FewPassPostProcessor
from ..torch_model import StfpmExtModel


def largest_score(post_processor: PostProcessor | None) -> float | None:
    """Return the score by which an export's results are divided, if its post-processor divides them.

    Args:
        post_processor (PostProcessor | None): The model's.

    Returns:
        float | None: The largest value of the maps on the validation images, or ``None`` where results stay raw.
    """
    if post_processor is None or type(post_processor) not in (PostProcessor, FewPassPostProcessor):
        return None
    if not post_processor.enable_normalization:
        return None
    largest = float(torch.maximum(post_processor.image_max, post_processor.pixel_max))
    return largest if 0 < largest < math.inf else None


@contextmanager
def float16_range(model: StfpmExtModel, post_processor: PostProcessor | None) -> Iterator[None]:
    """Scale distances, and the post-processor's statistics with them, so that the largest score is 1.

    Normalised results stay the same.

    Args:
        model (StfpmExtModel): The model.
        post_processor (PostProcessor | None): Its post-processor; where it leaves results raw, nothing is scaled.

    Yields:
        None: While it holds.
    """
    largest = largest_score(post_processor)
    if largest is None or post_processor is None:
        yield
        return
    before = {name: statistic.clone() for name, statistic in post_processor.named_buffers(recurse=False)}
    # A score is the product of all levels' distances.
    model.gain = largest ** (-1 / sum(model.level_weights or (1,) * len(model.teacher_model.layers)))
    try:
        for statistic in post_processor.buffers(recurse=False):
            statistic.div_(largest)
        yield
    finally:
        model.gain = 1.0
        for name, statistic in post_processor.named_buffers(recurse=False):
            statistic.copy_(before[name])
