# SPDX-License-Identifier: Apache-2.0

"""The students of one fit: the one in training, the best so far, and the averaged one."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from timm.utils import ModelEmaV3
from torch import nn

from ..errors import fail
from .synthetic import TIE


class Measurement(NamedTuple):
    """What the held-out images say of one student.

    Attributes:
        epoch (int): Its epoch.
        step (int): Its training steps.
        value (float): Their mean anomaly map, in which all levels count the same.
        synthetic_auroc (float | None): How well the map with weighted levels finds synthetic anomalies in them.
        level_weights (tuple[float, ...] | None): How much each level should count; ``None`` for all the same.
    """

    epoch: int
    step: int
    value: float
    synthetic_auroc: float | None = None
    level_weights: tuple[float, ...] | None = None


def best_of(history: Iterable[Measurement]) -> Measurement | None:
    """Return the measurement of the best student.

    Without synthetic anomalies it is the one with the lowest mean map, as in the paper. Otherwise it is the one that
    finds most of them; among those that are level with it, again the one with the lowest map. Students that were given
    up do not come back, since they are gone.

    Args:
        history (Iterable[Measurement]): Measurements in their order.

    Returns:
        Measurement | None: The earliest of equals; ``None`` of none.
    """
    best, most = None, -math.inf
    for each in history:
        found = each.synthetic_auroc or 0.0
        most = max(most, found)
        best_is_level = best is not None and (best.synthetic_auroc or 0.0) >= most - TIE
        if best is None or not best_is_level or (found >= most - TIE and each.value < best.value):
            best = each
    return best


def check_strategy(trainer: Trainer, argument: str, otherwise: str) -> None:
    """Check that each process has the whole student.

    Args:
        trainer (Trainer): Trainer in a fit.
        argument (str): What asks for it.
        otherwise (str): What that argument may be where it is not so.

    Raises:
        ValueError: If the strategy shards the model.
    """
    if trainer.strategy.restore_checkpoint_after_setup:  # those that do
        wanted = f"a strategy that has the whole student in each process, such as ddp (or {otherwise})"
        fail(ValueError, argument, wanted, type(trainer.strategy).__qualname__)


class Students:
    """Two students are alive during a fit: the one in training and the best so far.

    One of them is in the network, the tensors of the other are here. With an exponential moving average there is a
    third, the averaged one, and it is the one that is measured and becomes the best.

    Args:
        network (nn.Module): The network, with the student in training.
        measured (bool): Whether students are measured; otherwise the averaged one counts as the best.
        ema_decay (float | None): Decay of the average; ``None`` for no average.
        synchronised (bool): Whether running statistics are those of the first of several processes.
        resumed (dict[str, Any] | None): What :meth:`state` returned, if the fit goes on from a checkpoint. The network
            holds that checkpoint's best student, and gets the one in training.

    Attributes:
        history (list[Measurement]): What was measured, in this order.
    """

    def __init__(
        self,
        network: nn.Module,
        measured: bool,
        ema_decay: float | None,
        synchronised: bool,
        resumed: dict[str, Any] | None = None,
    ) -> None:
        self._network, self._measured, self._synchronised = network, measured, synchronised
        self.history: list[Measurement] = []
        self._average: ModelEmaV3 | None = None
        self._average_in_network = False
        current = network.state_dict()
        if ema_decay is not None:
            # Running statistics are averaged like the weights: a copy would be that of other, newer features. timm's
            # warm-up lets the decay grow from 0, so that the untrained student has no part in the average.
            self._average = ModelEmaV3(network, ema_decay, use_warmup=True)
            if resumed:
                self._average.module.load_state_dict(resumed["average"])
        self._best_in_network = resumed is not None
        if resumed is None:
            self._other = {name: tensor.clone() for name, tensor in current.items()}
            return
        self.history = [Measurement(*measurement) for measurement in resumed["history"]]
        self._other = {name: resumed["student"][name].to(tensor.device) for name, tensor in current.items()}
        self.show(best=False)

    @property
    def best(self) -> Measurement | None:
        """The measurement of the best student, see :func:`best_of`; ``None`` before the first."""
        return best_of(self.history)

    def add(self, measurement: Measurement) -> None:
        """Note a measurement of the student in the network, and keep that student if it is the best so far."""
        self.history.append(measurement)
        if self.best is measurement:
            _copy(self._network.state_dict(), self._other)

    def update_average(self, step: int) -> None:
        """Let the average, if there is one, follow the student in training.

        Args:
            step (int): Number of the training step that was made, from 1.
        """
        if self._average is not None:
            self._average.update(self._network, step)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Have the student that is measured in the network: the averaged one, or without average the one in training.

        Of several processes, it has the first one's running statistics.
        """
        self.swap_average()
        try:
            self._take_first_statistics()
            yield
        finally:
            self.swap_average()

    def swap_average(self) -> None:
        """Exchange the averaged student, if there is one, with the one in training."""
        if self._average is not None:
            self._swap(self._average.module.state_dict())
            self._average_in_network = not self._average_in_network

    @torch.no_grad()
    def show(self, best: bool) -> None:
        """Put the best student or the one in training into the network; keep the other.

        Args:
            best (bool): Which of the two. Before the first measurement, the best is the one that the fit began with.
        """
        if self._average_in_network:  # an exception has ended a validation
            self.swap_average()
        if best == self._best_in_network:
            return
        if best and not self._measured and self._average is not None:
            _copy(self._average.module.state_dict(), self._other)
        self._swap(self._other)
        self._best_in_network = best
        if best and not self._measured:
            self._take_first_statistics()

    def state(self) -> dict[str, Any]:
        """Return what resuming needs: the history, the student in training, and the averaged one or ``None``."""
        return {
            "history": [tuple(measurement) for measurement in self.history],
            "student": dict(self._other if self._best_in_network else self._side(averaged=False)),
            "average": None if self._average is None else self._side(averaged=True),
        }

    def best_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the best student by name."""
        if self._best_in_network:
            return dict(self._network.state_dict())
        if self.best is not None:
            return self._other
        return self._side(averaged=self._average is not None)

    def _side(self, averaged: bool) -> dict[str, torch.Tensor]:
        """Return the averaged student or the one in training, whichever of the two is in the network."""
        in_network = averaged == self._average_in_network
        module = self._network if in_network or self._average is None else self._average.module
        return dict(module.state_dict())

    @torch.no_grad()
    def _swap(self, other: dict[str, torch.Tensor]) -> None:
        """Exchange tensors of the network with others."""
        network = self._network.state_dict()
        for name, tensor in other.items():
            shown = network[name].clone()
            network[name].copy_(tensor)
            tensor.copy_(shown)

    def _take_first_statistics(self) -> None:
        """Take the first process's running statistics, as DDP does before each step."""
        if self._synchronised:
            for buffer in self._network.buffers():
                torch.distributed.broadcast(buffer, 0)


def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
