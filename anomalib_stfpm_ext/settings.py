# SPDX-License-Identifier: Apache-2.0

"""The arguments of StfpmExt and of its trainer: their checks and their defaults."""

import math
from collections.abc import Sequence
from decimal import Decimal
from numbers import Integral, Rational, Real
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from .callbacks.scoring_dtype import check_precision
from .errors import fail

MAX_EPOCHS = 100  # as in the paper


def check_settings(
    lr: Any, seed: Any, save_teacher: Any, precise_bn: Any, inference_precision: Any, image_size: Any, resizes: bool
) -> None:
    """Check the arguments that nothing else checks.

    Args:
        lr (Any): Should be a number of at least 0, or ``None``.
        seed (Any): Should be a whole number or ``None``.
        save_teacher (Any): Should be a bool.
        precise_bn (Any): Likewise.
        inference_precision (Any): Should be ``None`` or a precision.
        image_size (Any): Should be ``None`` unless images are resized by the model's own pre-processor.
        resizes (bool): Whether that pre-processor resizes them.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If one is out of range.
    """
    if lr is not None and (isinstance(lr, bool) or not isinstance(lr, Real)):
        fail(TypeError, "lr", "a number or None", repr(lr))
    if lr is not None and not 0 <= float(lr) < math.inf:
        fail(ValueError, "lr", "a finite number of at least 0", lr)
    if isinstance(seed, bool) or not isinstance(seed, Integral | None):
        fail(TypeError, "seed", "a whole number or None", repr(seed))
    for argument, flag in (("save_teacher", save_teacher), ("precise_bn", precise_bn)):
        if not isinstance(flag, bool):
            fail(TypeError, argument, "True or False", repr(flag))
    check_precision(inference_precision)
    if image_size is not None and not resizes:
        fail(ValueError, "image_size", "None where pre_processor is given, which resizes images itself", image_size)


def plain(value: Any) -> Any:
    """Convert the value of an argument to Python's own types, as far as it has a counterpart there.

    A checkpoint that holds NumPy's or OmegaConf's does not load.

    Args:
        value (Any): The value.

    Returns:
        Any: A number, string, list or tuple for those of other libraries; other values unchanged.
    """
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return value.tolist()
    if isinstance(value, str):
        return str.__str__(value)  # of enumerations, too
    if isinstance(value, Rational | Decimal) and not isinstance(value, Integral):
        return float(value)
    if isinstance(value, Sequence):
        return tuple(map(plain, value)) if isinstance(value, tuple) else list(map(plain, value))
    return value


def limit_epochs(trainer: Trainer) -> None:
    """Limit a fit without any limit to the paper's number of epochs.

    The model calls this when it is attached to its trainer. Only there does ``max_epochs`` still tell whether the user
    gave it: a moment later Lightning makes it 1000. In ``trainer_arguments`` it would override the user's value.

    Args:
        trainer (Trainer): The trainer.
    """
    has_time_limit = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    is_endless = trainer.max_epochs is None and trainer.max_steps == -1 and not has_time_limit
    if trainer.state.fn == TrainerFn.FITTING and is_endless:
        trainer.fit_loop.max_epochs = MAX_EPOCHS


def pass_over_single_image(trainer: Trainer, batch_idx: int) -> None:
    """Warn that the last image of an epoch is passed over, since its features of 1x1 have no variance.

    Args:
        trainer (Trainer): The trainer.
        batch_idx (int): The number of the batch.

    Raises:
        ValueError: If all batches have one image, or other processes would wait for this one.
    """
    if batch_idx == 0 or trainer.world_size > 1:
        wanted = "at least two images in each batch (another train_batch_size), or larger images"
        fail(ValueError, "train_batch_size", wanted, "one image, whose features at a level are of 1x1")
    rank_zero_warn("train_batch_size: the last image of each epoch is passed over, since features of 1x1 need two")
