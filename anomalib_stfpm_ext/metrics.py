# SPDX-License-Identifier: Apache-2.0

"""Metrics of raw maps and scores, and the authors' own measure of regions."""

from collections.abc import Sequence

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO
from anomalib.utils.cv import connected_components_cpu
from torchmetrics.functional.classification import binary_auroc

METRICS = {
    "image_AUROC": "image AUROC",
    "pixel_AUROC": "pixel AUROC",
    "AUPRO": "AUPRO (0.3)",
    "rescaled_PRO": "PRO, rescaled",
}


def measure(batches: Sequence[ImageBatch]) -> dict[str, float | None]:
    """Compute the metrics of raw maps and scores.

    Args:
        batches (Sequence[ImageBatch]): All test images, with maps, scores, labels and, if there are any, masks.

    Returns:
        dict[str, float | None]: Each of ``METRICS``; without masks, ``None`` for those of pixels.

    Raises:
        FloatingPointError: If a score is not finite.
    """
    scores = torch.cat([batch.pred_score.flatten() for batch in batches])
    labels = torch.cat([batch.gt_label for batch in batches])
    if not scores.isfinite().all():
        msg = f"{(~scores.isfinite()).sum()} of {len(scores)} scores are not finite: the training has diverged"
        raise FloatingPointError(msg)
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    metrics["image_AUROC"] = _auroc(scores, labels)
    if all(batch.gt_mask is not None for batch in batches):
        maps = torch.cat([batch.anomaly_map for batch in batches])
        masks = torch.cat([batch.gt_mask for batch in batches])
        aupro = AUPRO(fields=["anomaly_map", "gt_mask"], fpr_limit=0.3)
        for batch in batches:
            aupro.update(batch)
        metrics["pixel_AUROC"] = _auroc(maps.flatten(), masks.flatten())
        metrics["AUPRO"] = float(aupro.compute())
        metrics["rescaled_PRO"] = rescaled_pro(maps.squeeze(1), masks)
    return metrics


def _auroc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    # torchmetrics takes scores above 1 for logits, and their sigmoid has ties. Powers of 2 divide without rounding.
    exponent = torch.frexp(scores.max()).exponent.clamp(min=0)
    return float(binary_auroc(torch.ldexp(scores, -exponent), labels.int()))


def rescaled_pro(maps: torch.Tensor, masks: torch.Tensor, fpr_limit: float = 0.3, steps: int = 4000) -> float | None:
    """Compute the per-region overlap as the paper's authors do, which is not the usual AUPRO.

    Both take the area under the mean overlap of the defective regions over the false positive rate, up to a limit.
    The usual one divides by the limit. The authors take thresholds at equal distances over the range of the maps, and
    then stretch both axes of what lies within the limit from 0 to 1: the overlap too, so that it is biased upward.

    Args:
        maps (torch.Tensor): Anomaly maps ``(N, H, W)``.
        masks (torch.Tensor): Masks ``(N, H, W)`` of 0 and 1.
        fpr_limit (float): Highest false positive rate. Defaults to ``0.3``.
        steps (int): Number of thresholds. Defaults to the authors' ``4000``.

    Returns:
        float | None: The area, or ``None`` where there are no two points within the limit to stretch between.
    """
    regions = connected_components_cpu(masks[:, None].float()).flatten().long()  # 0, the background, and 1 to R
    scores = maps.flatten().double()
    lowest, highest = scores.min(), scores.max()
    thresholds = highest - torch.arange(steps) * ((highest - lowest) / steps)

    background = scores[regions == 0].sort().values
    above = len(background) - torch.searchsorted(background, thresholds, right=True)
    fpr = above.double() / len(background)

    weights = 1 / regions.bincount().double()  # each region counts as much as any other
    defective, order = scores[regions > 0].sort(descending=True)
    covered = weights[regions[regions > 0][order]].cumsum(0) / regions.max()
    above = len(defective) - torch.searchsorted(defective.flip(0), thresholds, right=True)
    overlap = torch.cat([torch.zeros(1).double(), covered])[above]

    fpr, overlap = fpr[fpr <= fpr_limit], overlap[fpr <= fpr_limit]
    if fpr.max() == fpr.min() or overlap.max() == overlap.min():
        return None
    fpr, overlap = ((axis - axis.min()) / (axis.max() - axis.min()) for axis in (fpr, overlap))
    return float(torch.trapezoid(overlap, fpr))
