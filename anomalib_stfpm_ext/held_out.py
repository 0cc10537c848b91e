# SPDX-License-Identifier: Apache-2.0

"""The choice of the student: good images that it never trains on say which epoch's student is kept."""

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import LabelName, ValSplitMode
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset

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
    tensors of the other are here.

    Args:
        student (nn.Module): The network.
        share (float): Share of the good training images that are held out, above 0 and below 1.
        seed (int): Says which ones.

    Attributes:
        history (list[Measurement]): What was measured, in this order.
    """

    def __init__(self, student: nn.Module, share: float, seed: int) -> None:
        self.student, self.share, self.seed = student, share, seed
        self.history: list[Measurement] = []
        self._other: dict[str, torch.Tensor] = {}
        self._best_in_network = False
        self._loader: DataLoader[Any] | None = None
        self._num_images = 0

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
        if trainer.strategy.restore_checkpoint_after_setup:  # those that shard the model
            wanted = "a strategy that has the whole student in each process, such as ddp (or 0 to hold nothing out)"
            fail(ValueError, "held_out_share", wanted, type(trainer.strategy).__qualname__)
        if resumed:
            if resumed["share"] != self.share:
                fail(ValueError, "held_out_share", f"{resumed['share']} as in the checkpoint", self.share)
            self.seed = resumed["seed"]  # the same images as before
        self._hold_out(trainer)
        current = self.student.state_dict()
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
        if trainer.world_size > 1:  # the first process's running statistics, as DDP takes them before each step
            for buffer in self.student.buffers():
                torch.distributed.broadcast(buffer, 0)
        training, precision = module.model.training, trainer.precision_plugin
        module.model.eval()
        sum_and_count = torch.zeros(2, dtype=torch.float64)
        # The loader draws a seed for its workers, which must not change what the training draws.
        with torch.random.fork_rng(devices=[]), precision.val_step_context():
            for index, batch in enumerate(self._loader or ()):
                batch = trainer.strategy.batch_to_device(precision.convert_input(batch))
                if isinstance(module.pre_processor, Callback):
                    module.pre_processor.on_test_batch_start(trainer, module, batch, index)
                means = module.model(batch.image).anomaly_map.mean((1, 2, 3))
                sum_and_count += torch.tensor([means.cpu().double().sum(), len(means)], dtype=torch.float64)
        module.model.train(training)
        if trainer.world_size > 1:
            sum_and_count = trainer.strategy.reduce(sum_and_count.to(module.device), reduce_op="sum")
        value = (sum_and_count[0] / sum_and_count[1]).item()

        if math.isfinite(value):
            if self.best is None or value < self.best.value:
                for name, tensor in self.student.state_dict().items():
                    self._other[name].copy_(tensor)
            self.history.append(Measurement(trainer.current_epoch, trainer.global_step, value))
        return value

    @torch.no_grad()
    def show(self, best: bool) -> None:
        """Put the best student or the one in training into the network; keep the other.

        Args:
            best (bool): Which of the two. Before the first measurement, the best is the one that the fit began with.
        """
        if best != self._best_in_network:
            for name, tensor in self.student.state_dict().items():
                shown = tensor.clone()
                tensor.copy_(self._other[name])
                self._other[name].copy_(shown)
            self._best_in_network = best

    def finish(self) -> None:
        """Leave the best student in the network, and let go of the images."""
        self.show(best=True)
        self._loader = None

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put the best student into the checkpoint's state dict, and the one in training beside it.

        Args:
            checkpoint (dict[str, Any]): Lightning's checkpoint, which is changed.
        """
        state = checkpoint["state_dict"]
        in_training: dict[str, torch.Tensor] = self._other
        if not self._best_in_network:
            in_training = self.student.state_dict()
            if self.best is not None:
                state.update({STUDENT_PREFIX + name: tensor for name, tensor in self._other.items()})
        checkpoint[CHECKPOINT_KEY] = {
            "share": self.share,
            "seed": self.seed,
            "images": self._num_images,
            "epoch": self.best and self.best.epoch,
            "held_out_map": self.best and self.best.value,
            "history": [tuple(measurement) for measurement in self.history],
            "student": dict(in_training),
            "random_state": torch.get_rng_state(),
        }

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
            loader = _check_loader(source.dataloader())
            good = _good_images(loader.dataset)
            held_out = split(len(good), self.share, self.seed)
            dataset, held_out = loader.dataset, good[held_out]
            training = np.setdiff1d(np.arange(len(dataset)), held_out)
            source.instance = same_loader(
                loader,
                Subset(dataset, training.tolist()),
                shuffle=isinstance(loader.sampler, RandomSampler),
                drop_last=loader.drop_last,
                generator=loader.generator,
            )
            trainer.fit_loop._combined_loader = None  # of all images, which a learning rate finder may have left
            if isinstance(datamodule, AnomalibDataModule):
                dataset = copy.copy(dataset)
                dataset.augmentations = datamodule.test_data.augmentations
        self._num_images = len(held_out)
        share_of_process = held_out[trainer.global_rank :: trainer.world_size].tolist()
        self._loader = same_loader(loader, Subset(dataset, share_of_process))


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


def _good_images(dataset: Any) -> "np.ndarray[Any, Any]":
    """Return the indices of the good images; in a data set without anomalib's labels, all are."""
    if isinstance(dataset, AnomalibDataset):
        return np.flatnonzero(dataset.samples.label_index == LabelName.NORMAL)
    return np.arange(len(dataset))


def _check_loader(loader: Any) -> Any:
    """Return the loader if its images can be split, otherwise raise."""
    wanted = "training images in one DataLoader, all in each epoch, that can be split (or 0 to hold nothing out)"
    if type(loader) is not DataLoader:
        fail(ValueError, "held_out_share", wanted, type(loader).__qualname__)
    dataset: Any = loader.dataset
    sampler: Any = loader.sampler
    if isinstance(dataset, IterableDataset):
        fail(ValueError, "held_out_share", wanted, f"the iterable {type(dataset).__qualname__}")
    if loader.batch_size is None:
        fail(ValueError, "held_out_share", wanted, "a DataLoader with a batch_sampler or without batches")
    if type(sampler) not in (RandomSampler, SequentialSampler) or getattr(sampler, "replacement", False):
        fail(ValueError, "held_out_share", wanted, f"a DataLoader with {type(sampler).__qualname__} as sampler")
    if len(sampler) != len(dataset):
        fail(ValueError, "held_out_share", wanted, f"a sampler of {len(sampler)} of {len(dataset)} images")
    return loader


def same_loader(loader: DataLoader[Any], dataset: Dataset[Any], **settings: Any) -> DataLoader[Any]:
    """Return a loader of other images with these settings, and those of the given loader for the rest."""
    same = ["batch_size", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "in_order"]
    same += ["multiprocessing_context", "prefetch_factor", "persistent_workers"]
    return DataLoader(dataset, **{name: getattr(loader, name) for name in same}, **settings)
