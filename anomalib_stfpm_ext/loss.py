# SPDX-License-Identifier: Apache-2.0

"""The training loss of STFPM."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F


class StfpmExtLoss(nn.Module):
    r"""Feature matching loss of the paper, averaged over the batch (arXiv 2103.04257, equations 1 to 3).

    With :math:`\hat{T}`, :math:`\hat{S}` the features after L2 normalisation over the channels,

    .. math:: L = \sum_l \frac{1}{B H_l W_l} \sum_{b, i, j} \lVert \hat{T}^l_{bij} - \hat{S}^l_{bij} \rVert_2^2

    The paper has a factor of 1/2 that its authors' code leaves out; this is the authors' code, for which their
    learning rate of 0.4 was chosen. anomalib's ``STFPMLoss`` has the 1/2 and adds the images up instead of averaging
    them: it is B / 2 times this loss, so there the step size depends on the batch size.

    Example:
        >>> import torch
        >>> from anomalib_stfpm_ext import StfpmExtLoss
        >>> teacher = {"layer1": torch.ones(4, 2, 8, 8)}
        >>> StfpmExtLoss()(teacher, {"layer1": -torch.ones(4, 2, 8, 8)})
        tensor(4.)
    """

    def forward(self, teacher: Mapping[str, torch.Tensor], student: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Compare two feature pyramids.

        Args:
            teacher (Mapping[str, torch.Tensor]): Features by level, each ``(B, C, H, W)``.
            student (Mapping[str, torch.Tensor]): Features of the same levels and shapes.

        Returns:
            torch.Tensor: The loss, a scalar between 0 and 4 times the number of levels.
        """
        level_losses = [
            (F.normalize(teacher[level]) - F.normalize(student[level])).square().sum(dim=1).mean() for level in teacher
        ]
        return torch.stack(level_losses).sum()
