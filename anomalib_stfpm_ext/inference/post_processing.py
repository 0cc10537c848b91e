# SPDX-License-Identifier: Apache-2.0

"""The post-processor of the model: anomalib's verdicts, in fewer passes over the map."""

import math
from typing import Any, NamedTuple

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor

from .._compat.anomalib import replace_image_threshold
from .._compat.torch import is_traced
from .threshold import MiddleThreshold


class FewPassPostProcessor(PostProcessor):
    """anomalib's post-processor in fewer passes, with the same results bit for bit.

    anomalib 2.7 makes ten passes over the map, since its formula also serves exporters and scores without a threshold.
    On a CPU, with range and threshold, two passes suffice; anomalib's formula serves the rest.
    """

    @property
    def state_key(self) -> str:
        """Name of its state in checkpoints, under which anomalib's post-processor and this one read each other's.

        Returns:
            str: The name of anomalib's.
        """
        return str(PostProcessor.__qualname__)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalise scores and maps, and compare them with the thresholds.

        Args:
            predictions (InferenceBatch): Raw maps ``(B, 1, H, W)`` and scores ``(B, 1)``.

        Returns:
            InferenceBatch: Maps and scores of 0 to 1, with labels and masks.
        """
        limits = self._limits(predictions)
        if limits is None or not self.enable_thresholding:
            return super().forward(predictions)
        score, amap = limits.image.apply(predictions.pred_score), limits.pixel.apply(predictions.anomaly_map)
        return InferenceBatch(
            pred_score=score,
            anomaly_map=amap,
            pred_label=score > self.normalized_image_threshold,
            pred_mask=amap > self.normalized_pixel_threshold,
        )

    def normalize_batch(self, batch: Batch) -> None:
        """Normalise scores and maps.

        Args:
            batch (Batch): Raw predictions, which are replaced.
        """
        limits = self._limits(batch)
        if limits is None:
            super().normalize_batch(batch)
        else:
            batch.anomaly_map = limits.pixel.apply(batch.anomaly_map)
            batch.pred_score = limits.image.apply(batch.pred_score)

    def _limits(self, predictions: Batch | InferenceBatch) -> "_Both | None":
        """Return range and threshold of scores and maps; ``None`` where anomalib's own formula has to serve."""
        score, amap = predictions.pred_score, predictions.anomaly_map
        if (
            score is None
            or amap is None
            or not self.enable_normalization
            or is_traced(amap)
            or amap.device.type != "cpu"
        ):
            return None
        both = _Both(
            _Limits(self.image_min.item(), self.image_max.item(), self.image_threshold.item()),
            _Limits(self.pixel_min.item(), self.pixel_max.item(), self.pixel_threshold.item()),
        )
        return both if all(limits.are_plain() for limits in both) else None


def use_middle_threshold(post_processor: Any) -> None:
    """Make anomalib's post-processor set the threshold of image scores as :class:`.MiddleThreshold` does.

    Args:
        post_processor (Any): The post-processor; any other object, or one with a threshold of its own, stays as it is.
    """
    replace_image_threshold(post_processor, F1AdaptiveThreshold, MiddleThreshold)


class _Limits(NamedTuple):
    low: float
    high: float
    threshold: float

    def are_plain(self) -> bool:
        """Tell whether there is a range that is not empty, and a threshold."""
        return self.low < self.high and not math.isnan(self.threshold)  # no comparison holds for NaN

    def apply(self, raw: torch.Tensor) -> torch.Tensor:
        return (raw - self.threshold).div_(self.high - self.low).add_(0.5).clamp_(0, 1)


class _Both(NamedTuple):
    image: _Limits
    pixel: _Limits
