# SPDX-License-Identifier: Apache-2.0

"""Threshold and range of the student in the network: the validation sets them, and useless ones are taken back."""

import math
from itertools import islice
from typing import TYPE_CHECKING, Any

from anomalib.data import AnomalibDataset
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn

from ..data.nested import leaves
from .batches import evaluation_batches

if TYPE_CHECKING:
    from ..lightning_model import StfpmExt


def set_verdict(trainer: Trainer, model: "StfpmExt") -> None:
    """Set threshold and range by the validation images of a fit, as its validation does.

    Lightning's own loop would also feed loggers, metrics and early stopping, as if the student in training were
    validated once more.

    Args:
        trainer (Trainer): Trainer in a fit.
        model (StfpmExt): The model. Without a validation, or a post-processor that follows one, nothing is set.
    """
    processor = model.post_processor
    if not (trainer.enable_validation and isinstance(processor, Callback)):
        return
    if trainer.val_dataloaders is None:  # no epoch has ended with a validation yet
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loaders = CombinedLoader(trainer.val_dataloaders, "sequential").flattened
    processor.on_validation_epoch_start(trainer, model)
    for loader, number in zip(loaders, trainer.num_val_batches, strict=True):
        batches = islice(loader, None if math.isinf(number) else int(number))
        for index, batch in enumerate(evaluation_batches(trainer, model, batches)):
            processor.on_validation_batch_end(trainer, model, model.score(batch), batch, index)
    processor.on_validation_epoch_end(trainer, model)
    take_back_useless(model)


def take_back_useless(model: "StfpmExt") -> None:
    """Take threshold and range back, and say why, where they would call all images defective, or none.

    anomalib sets them from any validation. A single score gives an empty range. Defective images alone give a threshold
    below all scores.

    Args:
        model (StfpmExt): The model that was validated.
    """
    processor = model.post_processor
    if not isinstance(processor, PostProcessor):
        return
    # That of the images alone, which MiddleThreshold leaves open: anomalib would take that of the pixels instead.
    no_good = processor.enable_thresholding and processor.state_dict()["_image_threshold"].isnan()
    if no_good or (processor.enable_normalization and processor.image_max <= processor.image_min):
        for statistic in processor.buffers(recurse=False):
            statistic.fill_(math.nan)
        reason = "no image that is known to be good" if no_good else "a single score"
        rank_zero_warn(
            f"post_processor: no threshold is set, since the validation has {reason}: by its threshold, all images "
            "would be defective, or none. Validate with several good images, and some defective ones."
        )


def validation_labels(trainer: Trainer) -> list[int] | None:
    """Return the labels of the data module's validation images.

    Args:
        trainer (Trainer): The trainer.

    Returns:
        list[int] | None: 0 is good, 1 is defective, of those that ``limit_val_batches`` leaves; ``None`` where they
            are not known, or nothing is validated.
    """
    data: Any = getattr(getattr(trainer, "datamodule", None), "val_data", None)
    found = list(leaves(data))
    if not trainer.enable_validation or not all(isinstance(leaf.dataset, AnomalibDataset) for leaf in found):
        return None
    labels = [label for leaf in found for label in leaf.dataset.samples.label_index.iloc[leaf.indices]]
    size = getattr(trainer.datamodule, "eval_batch_size", len(labels) or 1)  # type: ignore[attr-defined]
    limit = trainer.limit_val_batches
    batches = limit if isinstance(limit, int) else int(limit * math.ceil(len(labels) / size))
    return labels[: batches * size]
