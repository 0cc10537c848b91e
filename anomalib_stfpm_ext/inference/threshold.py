# SPDX-License-Identifier: Apache-2.0

"""The threshold of image scores: between the scores of validation images, not on one of them."""

import torch
from anomalib.metrics import F1AdaptiveThreshold
from torchmetrics.utilities.data import dim_zero_cat


class MiddleThreshold(F1AdaptiveThreshold):
    """anomalib's threshold, the one with the best F1 score, moved to the middle of the gap below it.

    The threshold of anomalib 2.7 is the score of an image, mostly of the defective one with the lowest score. Only
    images above the threshold count as defective, so this one is called good, however far it is from all good ones. A
    single defective image is never found. Any threshold within the gap has the F1 score that anomalib looks for. This
    class can go once anomalib calls images on the threshold defective.
    """

    def compute(self) -> torch.Tensor:
        """Compute the threshold.

        Returns:
            torch.Tensor: The threshold, a scalar. Without good images, NaN, since none can be found. Without defective
                images, the highest score, as in anomalib.
        """
        threshold: torch.Tensor = super().compute()
        scores, labels = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        if labels.all():
            return torch.full_like(threshold, torch.nan)
        below = scores[scores < threshold]
        return (threshold + below.max()) / 2 if len(below) and labels.any() else threshold
