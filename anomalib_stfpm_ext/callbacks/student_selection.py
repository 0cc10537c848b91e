# SPDX-License-Identifier: Apache-2.0

"""Student selection: good images that it never trains on say which epoch's student is kept."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, Trainer
from timm.utils import ModelEmaV3
from torch import nn

from ..errors import fail
from .hold_out import hold_out

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

CHECKPOINT_KEY = "stfpm_ext_held_out"
STUDENT_PREFIX = "model.student_model."  # of the student's tensors in a checkpoint's state_dict


class Measurement(NamedTuple):
    """Mean anomaly map of the held-out images under one student."""

    epoch: int
    step: int
    value: float


class StudentSelection:
    """Holds good training images out, measures students on them and keeps the best, as the paper's authors do.

    Two students are alive during a fit: the one in training and the best so far. One of them is in the network, the
    tensors of the other are here. With an exponential moving average there is a third, the averaged one, and it is the
    one that is measured and becomes the best.

    Args:
        student (nn.Module): The network.
        share (float): Share of the good training images that are held out, below 1; with 0 nothing is measured, and the
            averaged student counts as the best.
        seed (int): Says which ones.
        ema_decay (float | None): Decay of the average; ``None`` for no average.

    Attributes:
        history (list[Measurement]): What was measured, in this order.
        loader (DataLoader | None): This process's share of the held-out images, from :meth:`start` to :meth:`finish`.
    """

    def __init__(self, student: nn.Module, share: float, seed: int, ema_decay: float | None) -> None:
        self.student, self.share, self.seed, self.ema_decay = student, share, seed, ema_decay
        self.history: list[Measurement] = []
        self._average: ModelEmaV3 | None = None
        self._other: dict[str, torch.Tensor] = {}
        self._best_in_network = False
        self.loader: DataLoader[Any] | None = None
        self._num_images = 0
        self._world_size = 1

    @property
    def best(self) -> Measurement | None:
        """The lowest measurement, the earliest of equals; ``None`` before the first."""
        return min(self.history, key=lambda measurement: measurement.value, default=None)

    def start(self, trainer: Trainer, resumed: dict[str, Any] | None) -> None:
        """Take the held-out images out of the training, and go on from where the checkpoint left off, if any.

        Args:
            trainer (Trainer): Trainer at the start of its fit.
            resumed (dict[str, Any] | None): What :meth:`save` wrote; the network holds that checkpoint's best student.

        Raises:
            ValueError: If images cannot be held out, or are not those of the checkpoint.
        """
        self._world_size = trainer.world_size
        if trainer.strategy.restore_checkpoint_after_setup:  # those that shard the model
            wanted = "a strategy that has the whole student in each process, such as ddp (or 0 to hold nothing out)"
            argument = "held_out_share" if self.share else "ema_decay"
            fail(ValueError, argument, wanted, type(trainer.strategy).__qualname__)
        if resumed:
            self.seed = resumed["seed"]  # the same images as before
        if self.share:
            self._num_images, self.loader = hold_out(trainer, self.share, self.seed)
        current = self.student.state_dict()
        if self.ema_decay is not None:
            # Running statistics are averaged like the weights: a copy would be that of other, newer features. timm's
            # warm-up lets the decay grow from 0, so that the untrained student has no part in the average.
            self._average = ModelEmaV3(self.student, self.ema_decay, use_warmup=True)
            if resumed:
                self._average.module.load_state_dict(resumed["average"])
        if not resumed:
            self._other = {name: tensor.clone() for name, tensor in current.items()}
            return
        if resumed["images"] != self._num_images:
            wanted = f"{resumed['images']} held-out images as in the checkpoint"
            fail(ValueError, "held_out_share", wanted, self._num_images)
        self.history = [Measurement(*measurement) for measurement in resumed["history"]]
        self._other = {name: resumed["student"][name].to(tensor.device) for name, tensor in current.items()}
        self._best_in_network = True
        self.show(best=False)
        torch.set_rng_state(resumed["random_state"])  # so that the images come in the order of an unbroken run

    @torch.no_grad()
    def measure(self, trainer: Trainer, module: AnomalibModule) -> float:
        """Compute the mean anomaly map of all held-out images, and keep this student if it is the best so far.

        Every process measures its share of the images, and all get the same result. Nothing is computed where no step
        was made since the last time.

        Args:
            trainer (Trainer): Trainer in its fit.
            module (AnomalibModule): Model whose student is in training.

        Returns:
            float: The mean; where it is not finite, the student is not among those to choose from.
        """
        if self.history and self.history[-1].step == trainer.global_step:
            return self.history[-1].value
        with self.averaged():
            return self._measure(trainer, module)

    def _measure(self, trainer: Trainer, module: AnomalibModule) -> float:
        self._take_first_statistics()
        training, precision = module.model.training, trainer.precision_plugin
        module.model.eval()
        sum_and_count = torch.zeros(2, dtype=torch.float64)
        # The loader draws a seed for its workers, which must not change what the training draws.
        with torch.random.fork_rng(devices=[]), precision.val_step_context():
            for index, batch in enumerate(self.loader or ()):
                batch = trainer.strategy.batch_to_device(precision.convert_input(batch))
                if isinstance(module.pre_processor, Callback):
                    module.pre_processor.on_test_batch_start(trainer, module, batch, index)
                means = module.model(batch.image, module.cached_teacher).anomaly_map.mean((1, 2, 3))
                sum_and_count += torch.tensor([means.cpu().double().sum(), len(means)], dtype=torch.float64)
        module.model.train(training)
        if trainer.world_size > 1:
            sum_and_count = trainer.strategy.reduce(sum_and_count.to(module.device), reduce_op="sum")
        value = (sum_and_count[0] / sum_and_count[1]).item()

        if math.isfinite(value):
            if self.best is None or value < self.best.value:
                _copy(self.student.state_dict(), self._other)
            self.history.append(Measurement(trainer.current_epoch, trainer.global_step, value))
        return value

    def update_average(self, step: int) -> None:
        """Let the average, if there is one, follow the student in training.

        Args:
            step (int): Number of the training step that was made, from 1.
        """
        if self._average is not None:
            self._average.update(self.student, step)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the averaged student in the network in place of the one in training; without average, change nothing."""
        average = {} if self._average is None else self._average.module.state_dict()
        self._swap(average)
        try:
            yield
        finally:
            self._swap(average)

    @torch.no_grad()
    def show(self, best: bool) -> None:
        """Put the best student or the one in training into the network; keep the other.

        Args:
            best (bool): Which of the two. Before the first measurement, the best is the one that the fit began with.
        """
        if best == self._best_in_network:
            return
        if best and not self.share and self._average is not None:
            _copy(self._average.module.state_dict(), self._other)
        self._swap(self._other)
        self._best_in_network = best
        if best and not self.share:
            self._take_first_statistics()

    def finish(self) -> None:
        """Leave the best student in the network, and let go of the images."""
        self.show(best=True)
        self.loader = None

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put the best student into the checkpoint's state dict, and the one in training beside it.

        Args:
            checkpoint (dict[str, Any]): Lightning's checkpoint, which is changed.
        """
        average = None if self._average is None else self._average.module.state_dict()
        in_training: dict[str, torch.Tensor] = self._other
        if not self._best_in_network:
            in_training = self.student.state_dict()
            best = (average or in_training) if self.best is None else self._other
            checkpoint["state_dict"].update({STUDENT_PREFIX + name: tensor for name, tensor in best.items()})
        checkpoint[CHECKPOINT_KEY] = {
            "share": self.share,
            "seed": self.seed,
            "images": self._num_images,
            "epoch": self.best and self.best.epoch,
            "held_out_map": self.best and self.best.value,
            "history": [tuple(measurement) for measurement in self.history],
            "student": dict(in_training),
            "ema_decay": self.ema_decay,
            "average": average,
            "random_state": torch.get_rng_state(),
        }

    @torch.no_grad()
    def _swap(self, other: dict[str, torch.Tensor]) -> None:
        """Exchange tensors of the network with others."""
        network = self.student.state_dict()
        for name, tensor in other.items():
            shown = network[name].clone()
            network[name].copy_(tensor)
            tensor.copy_(shown)

    def _take_first_statistics(self) -> None:
        """Take the first process's running statistics, as DDP does before each step."""
        if self._world_size > 1:
            for buffer in self.student.buffers():
                torch.distributed.broadcast(buffer, 0)


def check_decay(decay: float | None) -> None:
    """Check the decay of the exponential moving average.

    Args:
        decay (float | None): The decay.

    Raises:
        TypeError: If it is neither a number nor ``None``.
        ValueError: If it is not in (0, 1).
    """
    wanted = "a decay above 0 and below 1, or None for no average"
    if decay is None:
        return
    if isinstance(decay, bool) or not isinstance(decay, int | float):
        fail(TypeError, "ema_decay", wanted, repr(decay))
    if not 0 < decay < 1:
        fail(ValueError, "ema_decay", wanted, decay)


def check_resumed(resumed: dict[str, Any], share: float, ema_decay: float | None) -> None:
    """Check that a fit goes on with the settings that it began with.

    Args:
        resumed (dict[str, Any]): What :meth:`StudentSelection.save` wrote.
        share (float): Share of held-out images.
        ema_decay (float | None): Decay of the average.

    Raises:
        ValueError: If one of them is another.
    """
    for argument, before, now in (
        ("held_out_share", resumed["share"], share),
        ("ema_decay", resumed.get("ema_decay"), ema_decay),
    ):
        if before != now:
            fail(ValueError, argument, f"{before} as in the checkpoint", now)


def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
