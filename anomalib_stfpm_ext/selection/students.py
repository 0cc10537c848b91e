# SPDX-License-Identifier: Apache-2.0

"""The students of one fit: the one in training and the one that is kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .record import STUDENT_PREFIX, Measurement, Record, best_of, forget_verdict

if TYPE_CHECKING:
    import torch

    from ..lightning_model import StfpmExt


class Students:
    """The two students of a fit. One is in the network; this class holds the record of the other.

    Args:
        model (StfpmExt): The model.
        before (Record | None): The student that the fit begins with. Defaults to ``None``, the one in the network.
        resumed (dict[str, Any] | None): What :meth:`state` returned, if the fit goes on from a checkpoint. The network
            holds the kept student, and receives the one in training. Defaults to ``None``.

    Attributes:
        history (list[Measurement]): All measurements, in order of time.
        kept (Record): The best student measured so far; before any measurement, the one that the fit began with.
    """

    def __init__(self, model: "StfpmExt", before: Record | None = None, resumed: dict[str, Any] | None = None) -> None:
        self._model = model
        self.history = [Measurement(*measurement) for measurement in resumed["history"]] if resumed else []
        self.kept = before or Record.take(model, best_of(self.history))
        self._training: Record | None = None  # while the other one is in the network
        if resumed:
            student = {STUDENT_PREFIX + name: tensor for name, tensor in resumed["student"].items()}
            self.kept._replace(tensors=self.kept.tensors | student).put(model)
            forget_verdict(model)

    @property
    def best(self) -> Measurement | None:
        """The measurement of the kept student; ``None`` before the first."""
        return self.kept.measurement

    def add(self, measurement: Measurement) -> bool:
        """Record a measurement of the student in training, and keep that student if it is the best so far.

        Args:
            measurement (Measurement): The measurement.

        Returns:
            bool: Whether it is the best so far.
        """
        self.history.append(measurement)
        is_best = best_of(self.history) is measurement
        if is_best:
            self.kept = Record.take(self._model, measurement)
        return is_best

    def take_again(self) -> None:
        """Copy the kept student from the network again, since its exponents, precision or threshold were set there."""
        self.kept = Record.take(self._model, self.kept.measurement)

    def show_kept(self) -> None:
        """Put the kept student into the network."""
        if self._training is None:
            self._training = Record.take(self._model)
            self.kept.put(self._model)

    @contextmanager
    def kept_in_network(self) -> Iterator[None]:
        """Put the kept student into the network for a while, and keep what is set on it there."""
        if self._training is not None:
            yield
            return
        self.show_kept()
        try:
            yield
            self.take_again()
        finally:
            training, self._training = self._training, None
            assert training is not None
            training.put(self._model)

    def to_save(self) -> "dict[str, torch.Tensor]":
        """Return the tensors, by name, that a checkpoint holds in place of the network's."""
        return self.kept.tensors if self._training is None and self.best else {}

    def state(self) -> dict[str, Any]:
        """Return what resuming needs beside the kept student."""
        training = self._training or Record.take(self._model)
        return {"history": [tuple(measurement) for measurement in self.history], "student": training.weights()}
