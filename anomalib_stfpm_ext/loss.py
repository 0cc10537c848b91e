# SPDX-License-Identifier: Apache-2.0

"""The training loss of STFPM."""

from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import nn

from ._compat.torch import is_transformed
from .errors import fail
from .ops import feature_matching  # noqa: F401  # defines the operator
from .ops.anomaly_map import has_kernel
from .ops.arguments import check_features, pair_levels
from .ops.reference import mean_of_hardest, squared_distance


def formula(teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor], hard_share: float = 1.0) -> torch.Tensor:
    """State the loss in torch operations: on any device, differentiable as often as you like, on both sides.

    Args:
        teacher (Sequence[torch.Tensor]): Features of each level ``(B, C, H, W)``.
        student (Sequence[torch.Tensor]): Features of the same levels and shapes.
        hard_share (float): The share of each level's positions that count. Defaults to 1.

    Returns:
        torch.Tensor: The loss, a scalar.
    """
    values = [squared_distance(t, s) for t, s in zip(teacher, student, strict=True)]
    if hard_share == 1 or len(teacher[0]) == 0:
        return torch.stack([level.mean() for level in values]).sum()
    return torch.stack([mean_of_hardest(level, hard_share) for level in values]).sum()


class StfpmExtLoss(nn.Module):
    r"""Feature matching loss of the paper, averaged over the batch (arXiv 2103.04257, equations 1 to 3).

    With :math:`\hat{T}`, :math:`\hat{S}` the features after L2 normalisation over the channels,

    .. math:: L = \sum_l \frac{1}{B H_l W_l} \sum_{b, i, j} \lVert \hat{T}^l_{bij} - \hat{S}^l_{bij} \rVert_2^2

    The paper has a factor of 1/2 that its authors' code leaves out; this is the authors' code, for which their
    learning rate of 0.4 was chosen. anomalib's ``STFPMLoss`` has the 1/2 and adds the images up instead of averaging
    them: it is B / 2 times this loss, so there the step size depends on the batch size.

    With a ``hard_share`` below 1, the mean of each level is over the hardest positions alone, as in EfficientAD's hard
    feature loss (Batzner et al., WACV 2024): those of the batch whose distances are the largest. In several processes,
    and where gradients are accumulated, that is the batch of one process and one step.

    Args:
        hard_share (float): The share of each level's positions that count, above 0. Positions as hard as the last of
            them count too. Defaults to 1, the paper's.

    Raises:
        TypeError: If ``hard_share`` is no number.
        ValueError: If ``hard_share`` is out of range.

    Note:
        One pass over the features gives the loss, another its gradient; what is kept between them is three numbers for
        each position. :func:`formula` takes over, slower, where the teacher requires gradients, under ``torch.func``
        and forward-mode differentiation, on devices other than the CPU and CUDA, and on CUDA where the build has no
        code that runs on the device. The gradient of the fused loss cannot be differentiated again: that is a
        ``NotImplementedError``.

    Example:
        >>> import torch
        >>> from anomalib_stfpm_ext import StfpmExtLoss
        >>> teacher = {"layer1": torch.ones(4, 2, 8, 8)}
        >>> StfpmExtLoss()(teacher, {"layer1": -torch.ones(4, 2, 8, 8)})
        tensor(4.)
    """

    def __init__(self, hard_share: float = 1.0) -> None:
        super().__init__()
        if isinstance(hard_share, bool) or not isinstance(hard_share, Real):
            fail(TypeError, "hard_share", "a number", repr(hard_share))
        if not 0 < hard_share <= 1:
            fail(ValueError, "hard_share", "a number above 0 and of at most 1", hard_share)
        self.hard_share: float = float(hard_share)

    def forward(
        self,
        teacher: Mapping[str, torch.Tensor] | Sequence[torch.Tensor],
        student: Mapping[str, torch.Tensor] | Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Compare two feature pyramids.

        Args:
            teacher (Mapping[str, torch.Tensor] | Sequence[torch.Tensor]): Features of 1 to 8 levels, each
                ``(B, C, H, W)``, in any memory layout; all of one dtype (float32, float64, float16 or bfloat16) and on
                one device.
            student (Mapping[str, torch.Tensor] | Sequence[torch.Tensor]): Features of the same levels in the same
                order, of the same shapes.

        Returns:
            torch.Tensor: The loss, a scalar between 0 and 4 times the number of levels: float64 for float64 features,
                otherwise float32.

        Raises:
            TypeError: If an argument is of the wrong kind, or the dtypes are mixed or not supported.
            ValueError: If shapes, devices or level names do not fit.
            RuntimeError: If CUDA fails.
        """
        names, teacher_levels, student_levels = pair_levels(teacher, student)
        try:
            differentiable = torch.is_grad_enabled() and any(level.requires_grad for level in teacher_levels)
            if differentiable or is_transformed() or not has_kernel(teacher_levels[0].device):
                check_features(teacher_levels, student_levels, torch.Tensor)
                return formula(teacher_levels, student_levels, self.hard_share)
            loss: torch.Tensor = torch.ops.anomalib_stfpm_ext.feature_matching_loss.default(
                teacher_levels, student_levels, self.hard_share
            )[0]
        except Exception:
            check_features(teacher_levels, student_levels, torch.Tensor, names)  # names what it complains of
            raise
        return loss
