# SPDX-License-Identifier: Apache-2.0

"""The threshold of the image scores, which no defective image of the validation lies on."""

import torch
from anomalib.metrics import F1AdaptiveThreshold
from torchmetrics.utilities.data import dim_zero_cat


class MiddleThreshold(F1AdaptiveThreshold):
    """anomalib's threshold, the one with the best F1 score, in the middle of the gap beneath it.

    That of anomalib 2.7 is the score of an image, in most cases of the defective one with the lowest score, and only
    images above it are defective: that one was called good, however far it was from all good ones. A single defective
    image was never found. Any threshold within the gap has the F1 score that anomalib looked for. Where a later
    anomalib calls images on the threshold defective, this goes.
    """

    def compute(self) -> torch.Tensor:
        """Compute the threshold.

        Returns:
            torch.Tensor: The threshold, a scalar. NaN without good images, since no threshold can be found then; their
                highest score without defective ones, as in anomalib.
        """
        threshold: torch.Tensor = super().compute()
        scores, labels = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        if labels.all():
            return torch.full_like(threshold, torch.nan)
        below = scores[scores < threshold]
        return (threshold + below.max()) / 2 if len(below) and labels.any() else threshold
