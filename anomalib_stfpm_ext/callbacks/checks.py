# SPDX-License-Identifier: Apache-2.0

"""Checks at the start of a fit, a validation, a test or a prediction, before any work is lost."""

import io
import math
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataset, PredictDataset
from anomalib.data.utils import ValSplitMode
from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.spec import transform_to_spec
from anomalib.utils.path import paths_to_strings
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torchvision.transforms.v2 import CenterCrop, Normalize, Resize

from .._compat.torch import is_compiled
from ..backbones import pretrained_config
from ..data.images import check_file, image_paths, passed_over
from ..data.nested import leaves
from ..data.transforms import parts, shows_all
from ..errors import fail
from ..selection.thresholds import take_back_useless, validation_labels

PAPER_STEPS = 700  # about: 100 epochs of a category of MVTec AD, of whose images a fifth is held out


class Checks(Callback):
    """Refuses what would end in a wrong verdict, and warns of what may."""

    def __init__(self) -> None:
        self._folders: set[Path] = set()  # already searched for pictures that are not read

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the files of a data module, which may be read much later.

        Raises:
            ValueError: If there are hidden files or folders among the images, a file does not hold one whole image, or
                there are no images to validate on.
        """
        del pl_module
        datamodule: Any = getattr(trainer, "datamodule", None)
        check_validation(trainer, stage)
        for subset in ("train_data", "val_data", "test_data"):
            check_files(getattr(datamodule, subset, None))
            self._tell_passed_over(getattr(datamodule, subset, None))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check trainer, images and teacher.

        Raises:
            TypeError: If a checkpoint could not hold an argument of the model.
            ValueError: If the trainer has been used up, a checkpoint cannot hold the transform, or the backbone takes
                images of another size.
        """
        model: Any = pl_module
        check_trainer(trainer, model)
        check_rivals(trainer, model)
        check_arguments(model)
        check_transform(model.pre_processor)
        check_image_size(model)
        check_normalisation(model)
        check_crop(model)
        check_teacher(model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many images are trained on, held out and validated on, and check how they are batched."""
        tell_counts(trainer, pl_module)
        check_collation(trainer.train_dataloader)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the images."""
        del trainer
        if batch_idx == 0:
            check_range(pl_module, batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the images."""
        del trainer, dataloader_idx
        if batch_idx == 0:
            check_range(pl_module, batch)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check teacher and student, unless the fit does."""
        check_collation(trainer.val_dataloaders)
        if trainer.state.fn != TrainerFn.FITTING:
            check_networks(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset a threshold that separates nothing, after the post-processor has set it and before it is kept."""
        if not trainer.sanity_checking:
            model: Any = pl_module
            take_back_useless(model)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check teacher, student and images."""
        check_networks(pl_module)
        check_collation(trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check teacher, student, images and threshold."""
        check_networks(pl_module)
        check_collation(trainer.predict_dataloaders)
        for dataset in map(_dataset, _as_list(trainer.predict_dataloaders)):
            self._tell_passed_over(dataset)
        check_threshold(pl_module)

    def _tell_passed_over(self, dataset: Any) -> None:
        folders = {Path(path).parent for path in image_paths(dataset)} - self._folders
        self._folders |= folders
        others = passed_over(path for folder in folders for path in folder.iterdir())
        if others:
            rank_zero_warn(f"data: not among the images: {others}")


def check_validation(trainer: Trainer, stage: str) -> None:
    """Raise where a data module lacks the images for a validation; anomalib would raise another error."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    validates = stage == TrainerFn.VALIDATING or (stage == TrainerFn.FITTING and trainer.limit_val_batches > 0)
    splits_none = getattr(datamodule, "val_split_mode", None) == ValSplitMode.NONE
    if validates and splits_none and not hasattr(datamodule, "val_data"):
        wanted = "images to validate on (or limit_val_batches=0 to train without a threshold)"
        fail(ValueError, "val_split_mode", wanted, "none")


def check_files(dataset: Any) -> None:
    """Raise where hidden files or folders count as images, or a file does not hold one whole image."""
    for path in map(Path, image_paths(dataset)):
        if path.name.startswith(".") or path.parent.name.startswith("."):
            fail(ValueError, "data", "images without hidden files and folders among them", path)
        check_file(path)


def check_teacher(model: Any) -> None:
    """Warn of a teacher without loaded weights."""
    if model.model.teacher_model.is_random:
        rank_zero_warn(
            "teacher_weights: wanted True, a file, or a checkpoint that brings them, got False and no checkpoint: "
            "the teacher is random, and so is what it finds."
        )


def check_networks(model: Any) -> None:
    """Warn of a random teacher, and of a student that has learned nothing."""
    check_teacher(model)
    model.model.warn_if_untrained()


def check_threshold(model: Any) -> None:
    """Warn of predictions without a threshold: anomalib labels them nevertheless."""
    processor = model.post_processor
    if getattr(processor, "enable_thresholding", False) and processor.image_threshold.isnan():
        rank_zero_warn(
            "post_processor: there is no threshold, since no validation has set one. The labels of these predictions "
            "mean nothing; validate the model with good and defective images first."
        )


def tell_counts(trainer: Trainer, model: Any) -> None:
    """Say how many images serve which purpose, and warn of a validation that cannot set a useful threshold."""
    judge = model.student_selection.judge
    training, held_out = _dataset(trainer.train_dataloader), _dataset(judge and judge.loader)
    counts = [f"{_length(training)} images to train on", f"{_length(held_out)} held out"]
    labels = validation_labels(trainer)
    if labels is not None:
        good, defective = labels.count(0), labels.count(1)
        counts.append(f"{good} good and {defective} defective ones to validate on")
        if not good or not defective:
            rank_zero_warn(
                f"validation: it has {good} good and {defective} defective images. A threshold needs some of both; "
                "anomalib then takes the highest score, or one below all."
            )
    rank_zero_info(f"Images: {', '.join(counts)}.")
    steps = trainer.estimated_stepping_batches
    if math.isfinite(steps) and not PAPER_STEPS / 3 <= steps <= 3 * PAPER_STEPS:
        rank_zero_info(
            f"max_steps: this training has {steps:,.0f} steps, the paper's some {PAPER_STEPS}, whatever the number of "
            f"images. max_steps={PAPER_STEPS} in place of max_epochs trains for as long."
        )


def _as_list(loaders: Any) -> list[Any]:
    return loaders if isinstance(loaders, list) else [loaders]


def _dataset(loader: Any) -> Any:
    return getattr(loader, "dataset", ())


def _length(dataset: Any) -> int | str:
    try:
        return len(dataset)
    except TypeError:
        return "an unknown number of"


def check_collation(loaders: Any) -> None:
    """Warn of loaders that stretch the images of a batch to the largest one; anomalib's data modules do not."""
    for loader in _as_list(loaders):
        several = getattr(loader, "batch_size", 1) != 1
        if several and any(_keeps_size(leaf.dataset) for leaf in leaves(_dataset(loader))):
            rank_zero_warn(
                "DataLoader: images of a batch that differ in size are stretched to the largest, so that a score "
                "depends on its neighbours. Give the data set augmentations=Resize(...), or use a data module."
            )


def _keeps_size(dataset: Any) -> bool:
    """Tell whether a data set is anomalib's and does not resize its images."""
    steps = parts(getattr(dataset, "augmentations", None))
    return isinstance(dataset, AnomalibDataset | PredictDataset) and not any(isinstance(step, Resize) for step in steps)


def check_trainer(trainer: Trainer, model: Any) -> None:
    """Raise unless the trainer is new, resumes a checkpoint, or goes on with the model that it has trained.

    Lightning keeps the progress and the loader of an earlier fit: another model would be trained on the earlier images
    from the earlier epoch on, or not at all.
    """
    same_model, model.last_trainer = model.last_trainer == id(trainer), id(trainer)
    if trainer.ckpt_path is None and trainer.global_step > 0 and (trainer.fit_loop.done or not same_model):
        wanted = "a new Engine (or Trainer) for each fit, or a checkpoint to go on from"
        fail(ValueError, "engine", wanted, f"one that has trained for {trainer.global_step} steps already")


def check_rivals(trainer: Trainer, model: Any) -> None:
    """Raise where something else changes the weights or their names, or keeps the student from learning.

    Averages are not needed: precise batch norm and the selection serve the same purpose.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging | ModelPruning):
            wanted = "none that averages, prunes or replaces weights, since the student that is kept would be another"
            fail(ValueError, "callbacks", wanted, type(callback).__qualname__)
    if any(map(is_compiled, model.modules())):
        fail(ValueError, "model", "compile_mode=... of StfpmExt for torch.compile", "a network compiled already")
    if not any(parameter.requires_grad for parameter in model.model.student_model.parameters()):
        fail(ValueError, "model", "a student to train (model.unfreeze())", "one that is frozen")
    networks = model.model.teacher_model, model.model.student_model
    if others := networks[0].state_dict().keys() ^ networks[1].state_dict().keys():
        wanted = "teacher and student as they were made, neither pruned nor parametrised, since checkpoints fit those"
        fail(ValueError, "model", wanted, f"{sorted(others)[:2]} and the like")


def check_arguments(model: Any) -> None:
    """Raise where an argument of the model has a type that a checkpoint cannot load."""
    for argument, value in paths_to_strings(dict(model.hparams)).items():  # as anomalib saves them
        file = io.BytesIO()
        try:
            torch.save(value, file)
            file.seek(0)
            with anomalib_safe_globals(model.checkpoint_safe_globals()):
                torch.load(file, weights_only=True)
        except Exception:  # picklers raise all sorts of them
            wanted = "a value that a checkpoint can hold: numbers, strings, paths, or lists and dictionaries of them"
            fail(TypeError, argument, wanted, repr(value))


def check_transform(pre_processor: Any) -> None:
    """Raise unless checkpoints can hold the transform of the images.

    Otherwise anomalib saves the checkpoint without the transform, and the model scores raw pixels once it is loaded.
    """
    if isinstance(pre_processor, PreProcessor) and pre_processor.checkpoint_config().get("transform") is None:
        try:
            transform_to_spec(pre_processor.transform)
        except ValueError as error:
            wanted = "transforms that a checkpoint can hold (random ones belong in train_augmentations of the data)"
            fail(ValueError, "pre_processor", wanted, error)


def check_image_size(model: Any) -> None:
    """Raise where the backbone takes images of one size, and the pre-processor makes others."""
    backbone = model.model.teacher_model.backbone
    config, size = pretrained_config(backbone), image_size(model.pre_processor)
    if config.fixed_input_size and size not in (None, config.input_size[1:]):
        fail(ValueError, "image_size", f"{config.input_size[1:]}, the one size of {backbone!r}", size)


def check_normalisation(model: Any) -> None:
    """Warn where images are not normalised as the teacher was trained."""
    if not isinstance(model.pre_processor, PreProcessor):
        return
    wanted, got = _of_teacher(model), _of_images(model)
    if got != wanted:
        rank_zero_warn(
            f"pre_processor: the teacher was trained on images with mean {wanted[0]} and standard deviation "
            f"{wanted[1]}, and these get {got or 'no normalisation'}. "
            "image_size=(height, width) changes the size alone."
        )


def check_range(model: Any, batch: Any) -> None:
    """Raise where images had values of 0 to 255, or were normalised, before the pre-processor normalised them.

    Predictors, exports and commands give the model images of 0 to 1. After a training on other values, it would find
    defects in all of them or in none. The bounds leave room for augmentations.
    """
    if not isinstance(model.pre_processor, PreProcessor) or _of_images(model) != _of_teacher(model):
        return
    mean, std = (batch.image.new_tensor(each)[:, None, None] for each in _of_teacher(model))
    low, high = (batch.image * std + mean).aminmax()
    if low < -1 or high > 2:
        wanted = "images of 0 to 1 from data sets, since the pre-processor normalises them"
        fail(ValueError, "data", wanted, f"values from {low:.3g} to {high:.3g}")


def _of_teacher(model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation with which the teacher's images were normalised."""
    config = pretrained_config(model.model.teacher_model.backbone)
    return tuple(config.mean), tuple(config.std)


def _of_images(model: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and standard deviation of a pre-processor's last normalisation, if it has one."""
    found = [part for part in parts(model.pre_processor.transform) if isinstance(part, Normalize)]
    return (tuple(found[-1].mean), tuple(found[-1].std)) if found else None


def check_crop(model: Any) -> None:
    """Warn where the pre-processor may cut parts of the images away."""
    if not shows_all(model.pre_processor):
        rank_zero_warn(
            "pre_processor: it does more than resize and normalise. What a crop cuts away is not looked at, and "
            "defects there are not found. Pictures show what is left."
        )


def image_size(pre_processor: Any) -> tuple[int, ...] | None:
    """Return the height and width that a pre-processor makes, or ``None`` where it does not say."""
    sized = [part for part in parts(getattr(pre_processor, "transform", None)) if isinstance(part, Resize | CenterCrop)]
    size = tuple(sized[-1].size) if sized and sized[-1].size is not None else ()
    return size if len(size) == 2 else None
