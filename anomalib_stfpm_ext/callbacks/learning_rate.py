# SPDX-License-Identifier: Apache-2.0

"""The learning rate where the user gives none, chosen once the number of held-out images is known."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from ..choices import PAPERS_RATE, Selection
from ..selection.synthetic import FEWEST_IMAGES

NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm)
LARGE_RATE = 1.6


def default_rate(student: nn.Module, selection: Selection, precise_bn: bool, held_out: float) -> tuple[float, str]:
    """Choose four times the paper's learning rate where that is known to work well, else the paper's.

    Batch norm cancels the scale of the weights before it. Too large a step only increases that scale, so that the next
    steps are relatively smaller (Arora et al., arXiv 1812.03981). Students without batch norm diverge. Running
    statistics lag behind large steps; precise ones do not. Where all levels count the same, the larger rate is better
    on some data and worse on other data.

    Args:
        student (nn.Module): The student.
        selection (Selection): See :class:`.StfpmExt`.
        precise_bn (bool): Likewise.
        held_out (float): Number of held-out images; infinity where there are some and their number is not yet known.

    Returns:
        tuple[float, str]: The learning rate, and the reason.
    """
    norms = [module for module in student.modules() if isinstance(module, NORMS)]
    if not norms or not all(isinstance(norm, nn.BatchNorm2d) for norm in norms):
        return PAPERS_RATE, "the student has other normalisation than batch norm, or none"
    if not precise_bn:
        return PAPERS_RATE, "precise_bn is off"
    if selection != "synthetic":
        return PAPERS_RATE, f"selection is {selection}"
    if held_out < FEWEST_IMAGES:
        return PAPERS_RATE, f"{held_out} images are held out, and exponents of the levels need {FEWEST_IMAGES}"
    return LARGE_RATE, "the student has precise batch norm, and its levels get exponents"


class LearningRate(Callback):
    """Chooses the learning rate at the start of a fit, unless the user, a finder or a checkpoint has set it.

    It runs after :class:`.StudentSelection`, which holds images out.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the rate for the number of held-out images, and say why."""
        model: Any = pl_module
        selection, before = model.student_selection, model.lr
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        is_ours = before == model.default_lr and any(group["lr"] == before for group in groups)
        if not is_ours or trainer.ckpt_path is not None:
            return
        held_out = selection.judge.num_images if selection.judge else 0
        rate, reason = default_rate(model.model.student_model, selection.selection, model.precise_bn, held_out)
        if rate != before and trainer.lr_scheduler_configs:
            rank_zero_warn(f"lr: wanted {rate}, since {reason}, got a schedule that begins with {before}. Give lr.")
            return
        for group in groups:
            group["lr"] = rate if group["lr"] == before else group["lr"]
        model.lr = model.default_lr = rate
        rank_zero_info(f"lr: {rate}, since {reason}.")
