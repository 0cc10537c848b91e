# SPDX-License-Identifier: Apache-2.0

"""The choice of the student: good images that it never trains on say which epoch's student is kept."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import LabelName, ValSplitMode
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, Trainer
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from .scorer import fail

CHECKPOINT_KEY = "stfpm_ext_held_out"
STUDENT_PREFIX = "model.student_model."  # of the student's tensors in a checkpoint's state_dict


class Measurement(NamedTuple):
    """Mean anomaly map of the held-out images under one student."""

    epoch: int
    step: int
    value: float


class StudentChoice:
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
            self._hold_out(trainer)
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

    def _hold_out(self, trainer: Trainer) -> None:
        """Make the loader of held-out images; unless the data module holds some out, leave the others to the training.

        Neither the user's data module nor data set is changed.
        """
        source = trainer.fit_loop._data_source  # Lightning has no public way to a loader that was given to fit()
        datamodule: Any = source.instance
        if getattr(datamodule, "val_split_mode", None) == ValSplitMode.FROM_TRAIN:
            loader = datamodule.val_dataloader()
            dataset, held_out = loader.dataset, _good_images(loader.dataset)
            if not len(held_out):
                wanted = "good images in the data module's split, as val_split_mode is from_train"
                fail(ValueError, "held_out_share", wanted, f"none of {len(dataset)}")
        else:
            reload: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
            if source.is_module() and reload:
                wanted = "a data set that stays the same (or 0 to hold nothing out)"
                fail(ValueError, "held_out_share", wanted, f"reload_dataloaders_every_n_epochs={reload}")
            if not len(getattr(datamodule, "train_data", (True,))):  # of which torch makes no loader
                fail(ValueError, "held_out_share", "a data module with good training images", "one without images")
            loader = _check_splittable(source.dataloader())
            good = _good_images(loader.dataset)
            held_out = split(len(good), self.share, self.seed)
            dataset, held_out = loader.dataset, good[held_out]
            training = np.setdiff1d(np.arange(len(dataset)), held_out)
            source.instance = same_loader(
                loader,
                Subset(dataset, training.tolist()),
                shuffle=isinstance(loader.sampler, RandomSampler),
                drop_last=loader.drop_last,
                generator=loader.generator or getattr(loader.sampler, "generator", None),
            )
            if not len(source.instance):
                wanted = f"a share that leaves a batch of {loader.batch_size} images to train on"
                fail(ValueError, "held_out_share", wanted, f"{len(training)} images, and drop_last=True")
            trainer.fit_loop._combined_loader = None  # of all images, which a learning rate finder may have left
            if isinstance(datamodule, AnomalibDataModule):
                dataset = copy.copy(dataset)
                dataset.augmentations = datamodule.test_data.augmentations
        self._num_images = len(held_out)
        share_of_process = held_out[trainer.global_rank :: trainer.world_size].tolist()
        self.loader = same_loader(loader, Subset(dataset, share_of_process))


def check_share(share: float) -> None:
    """Check the share of held-out images.

    Args:
        share (float): The share.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not in [0, 1).
    """
    wanted = "a share of the good training images of at least 0 (holds none out) and less than 1"
    if isinstance(share, bool) or not isinstance(share, int | float):
        fail(TypeError, "held_out_share", wanted, repr(share))
    if not 0 <= share < 1:
        fail(ValueError, "held_out_share", wanted, share)


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
        resumed (dict[str, Any]): What :meth:`StudentChoice.save` wrote.
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


def split(num_images: int, share: float, seed: int) -> "np.ndarray[Any, Any]":
    """Say which of the good training images are held out.

    It is the authors' split: theirs comes from scikit-learn's ``train_test_split(test_size=share, random_state=seed)``.

    Args:
        num_images (int): Number of good training images.
        share (float): Share of them to hold out, rounded up to whole images.
        seed (int): Seed of the permutation; the global random numbers are neither used nor changed.

    Returns:
        np.ndarray: Indices of the held-out images.

    Raises:
        ValueError: If no image is left on one of the sides.
    """
    num_held_out = math.ceil(share * num_images)
    if not 0 < num_held_out < num_images:
        wanted = "a share that leaves good images both to hold out and to train on"
        fail(ValueError, "held_out_share", wanted, f"{share} of {num_images} good training images")
    return np.random.RandomState(seed).permutation(num_images)[:num_held_out]


def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)


def _good_images(dataset: Any) -> "np.ndarray[Any, Any]":
    """Return the indices of the good images; in a data set without anomalib's labels, all are."""
    if isinstance(dataset, Subset):
        return np.flatnonzero(np.isin(dataset.indices, _good_images(dataset.dataset)))
    if isinstance(dataset, ConcatDataset):
        starts = zip(dataset.datasets, [0, *dataset.cumulative_sizes], strict=False)
        return np.concatenate([start + _good_images(part) for part, start in starts])
    if isinstance(dataset, AnomalibDataset):
        return np.flatnonzero(dataset.samples.label_index == LabelName.NORMAL)
    return np.arange(len(dataset))


def _check_splittable(loader: Any) -> Any:
    """Return the loader if its images can be split, and :func:`same_loader` can make another of it; otherwise raise."""
    dataset: Any = getattr(loader, "dataset", None)
    sampler: Any = getattr(loader, "sampler", None)
    got = None
    if type(loader) is not DataLoader:
        got = type(loader).__qualname__
    elif isinstance(dataset, IterableDataset):
        got = f"the iterable {type(dataset).__qualname__}"
    elif loader.batch_size is None:
        got = "a DataLoader with a batch_sampler or without batches"
    elif type(sampler) not in (RandomSampler, SequentialSampler) or getattr(sampler, "replacement", False):
        got = f"a DataLoader with {type(sampler).__qualname__} as sampler"
    elif len(sampler) != len(dataset):
        got = f"a sampler of {len(sampler)} of {len(dataset)} images"
    if got:
        wanted = "training images in one DataLoader, all in each epoch, that can be split (or 0 to hold nothing out)"
        fail(ValueError, "held_out_share", wanted, got)
    return loader


def same_loader(loader: DataLoader[Any], dataset: Dataset[Any], **settings: Any) -> DataLoader[Any]:
    """Make a loader of other images.

    Args:
        loader (DataLoader): A loader with a batch size.
        dataset (Dataset): The images.
        settings (Any): What becomes different, and the sampler's settings; the rest is the given loader's.

    Returns:
        DataLoader: The loader.
    """
    same = ["batch_size", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "in_order"]
    same += ["multiprocessing_context", "prefetch_factor", "persistent_workers"]
    return DataLoader(dataset, **{name: getattr(loader, name) for name in same}, **settings)
