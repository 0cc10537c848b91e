# SPDX-License-Identifier: Apache-2.0

"""Batches of images within a fit, as its validation gets them, without side effects on the fit."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer

if TYPE_CHECKING:
    from anomalib.data import Batch

    from ..lightning_model import StfpmExt


def evaluation_batches(trainer: Trainer, model: "StfpmExt", loader: Iterable[Any]) -> "Iterator[Batch]":
    """Iterate over batches, with the networks in evaluation mode and without gradients.

    Args:
        trainer (Trainer): Trainer in a fit.
        model (StfpmExt): The model.
        loader (Iterable): Yields this process's batches.

    Yields:
        Batch: Normalised images ``(B, 3, H, W)``, on the model's device.
    """
    training = model.model.training
    model.model.eval()
    try:
        # A loader draws a seed for its workers; the training's random numbers must not change.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for index, batch in enumerate(loader):
                batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                if isinstance(model.pre_processor, Callback):
                    model.pre_processor.on_validation_batch_start(trainer, model, batch, index)
                yield batch
    finally:
        model.model.train(training)
