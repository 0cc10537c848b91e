# SPDX-License-Identifier: Apache-2.0

"""The record of a student: all that its verdicts depend on, moved as a whole."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from .synthetic import TIE

if TYPE_CHECKING:
    from ..lightning_model import StfpmExt

STUDENT_PREFIX = "model.student_model."  # of the student's tensors in the state dict of StfpmExt
SCORING = "model._extra_state"  # the exponents of its levels, the precision that it scores in, whether it is trained
POST_PROCESSOR_PREFIX = "post_processor."  # threshold and range


class Measurement(NamedTuple):
    """How one student does on the held-out images.

    Attributes:
        epoch (int): Its epoch.
        step (int): Its number of training steps.
        value (float): The mean anomaly map of the images, in which all levels count the same.
        synthetic_auroc (float | None): How well the map with weighted levels finds synthetic anomalies in them.
        level_weights (tuple[float, ...] | None): The exponent of each level's map; ``None`` for equal ones.
    """

    epoch: int
    step: int
    value: float
    synthetic_auroc: float | None = None
    level_weights: tuple[float, ...] | None = None


def best_of(history: Iterable[Measurement]) -> Measurement | None:
    """Return the measurement of the best student.

    Without synthetic anomalies, the best student has the lowest mean map, as in the paper. Otherwise it finds most of
    the anomalies; of students that tie, it has the lowest map. Students that were given up do not come back, since
    their weights are gone.

    Args:
        history (Iterable[Measurement]): Measurements, in order of time.

    Returns:
        Measurement | None: The best one, the earliest of equals; ``None`` without measurements.
    """
    best, most = None, -math.inf
    for each in history:
        found = each.synthetic_auroc or 0.0
        most = max(most, found)
        best_is_level = best is not None and (best.synthetic_auroc or 0.0) >= most - TIE
        if best is None or not best_is_level or (found >= most - TIE and each.value < best.value):
            best = each
    return best


class Record(NamedTuple):
    """A student outside of the network, with all that its verdicts depend on.

    Attributes:
        measurement (Measurement | None): Its measurement, if there is one.
        tensors (dict[str, torch.Tensor]): Its weights and statistics, the exponents of its levels, its precision,
            and threshold and range, by their names in the state dict of ``StfpmExt``.
    """

    measurement: Measurement | None
    tensors: dict[str, torch.Tensor]

    @classmethod
    def take(cls, model: "StfpmExt", measurement: Measurement | None = None) -> "Record":
        """Copy the student that is in the network.

        Args:
            model (StfpmExt): The model.
            measurement (Measurement | None): The measurement of that student. Defaults to ``None``.

        Returns:
            Record: The student.
        """
        prefixes = (STUDENT_PREFIX, SCORING, POST_PROCESSOR_PREFIX)
        state = model.state_dict()
        return cls(measurement, {name: state[name].clone() for name in state if name.startswith(prefixes)})

    @torch.no_grad()
    def put(self, model: "StfpmExt") -> None:
        """Put this student into the network.

        Args:
            model (StfpmExt): The model.
        """
        state = model.state_dict()
        for name, tensor in self.tensors.items():
            if name != SCORING:  # encoded from attributes: there is no tensor to copy into
                state[name].copy_(tensor)
        model.model.set_extra_state(self.tensors[SCORING])

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the student's network by their names within it."""
        return {
            name.removeprefix(STUDENT_PREFIX): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(STUDENT_PREFIX)
        }


@torch.no_grad()
def forget_verdict(model: "StfpmExt") -> None:
    """Reset exponents, threshold and range, which no longer fit after a training step.

    Args:
        model (StfpmExt): The model.
    """
    model.model.score_by(None, model.model.precision)
    for statistic in _statistics(model):
        statistic.fill_(torch.nan)


def has_verdict(model: "StfpmExt") -> bool:
    """Tell whether the student in the network has threshold and range, or its post-processor needs none.

    Args:
        model (StfpmExt): The model.

    Returns:
        bool: ``False`` where a validation has yet to set them.
    """
    processor = model.post_processor
    wants = any(getattr(processor, name, False) for name in ("enable_thresholding", "enable_normalization"))
    return not wants or not all(statistic.isnan().all() for statistic in _statistics(model))


def _statistics(model: "StfpmExt") -> list[torch.Tensor]:
    """Return what a validation sets; NaN is a value not set, as in anomalib."""
    processor = model.post_processor
    state = {} if processor is None else processor.state_dict()
    return [tensor for tensor in state.values() if tensor.is_floating_point()]
