# SPDX-License-Identifier: Apache-2.0

"""What Lightning has no public name for: a model's trainer, a loop's loaders, and settings that a trainer is made with.

A loop is ``trainer.fit_loop``, ``trainer.test_loop`` or the like.
"""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.trainer.states import TrainerFn


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the trainer that a model is attached to.

    Lightning raises where there is none, and has no public question for it.

    Args:
        module (LightningModule): The model.

    Returns:
        Trainer | None: The trainer, if there is one.
    """
    return module._trainer


def is_fitting(module: LightningModule) -> bool:
    """Tell whether a trainer fits a model.

    Args:
        module (LightningModule): The model.

    Returns:
        bool: Whether one does.
    """
    trainer = trainer_of(module)
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def get_data(loop: Any) -> Any:
    """Return what a loop's loader comes from.

    Lightning has no public way to it, nor to the loader that was given to ``fit``.

    Args:
        loop (Any): The loop.

    Returns:
        Any: A data module, a model with hooks for loaders, or the loader itself.
    """
    return loop._data_source.instance


def get_loader(loop: Any) -> Any:
    """Return the loader that a loop would get, made anew where a data module or a model makes it.

    Args:
        loop (Any): The loop.

    Returns:
        Any: The loader, or several in a list, a dict or a ``CombinedLoader``.
    """
    return loop._data_source.dataloader()


def replace_loader(loop: Any, loader: Any) -> None:
    """Have a loop take another loader, also where it has one already: a learning rate finder leaves its own behind.

    Args:
        loop (Any): The loop, before its first batch.
        loader (Any): The loader.
    """
    loop._data_source.instance = loader
    loop._combined_loader = None


def intercept_loaders(loop: Any, change: Callable[[Any], Any]) -> None:
    """Have all loaders of a loop changed, whenever it asks for one, until :func:`release_loaders`.

    Args:
        loop (Any): The loop.
        change (Callable[[Any], Any]): Takes what :func:`get_loader` would return, and returns what it is to return.
    """
    source = loop._data_source
    source.dataloader = lambda: change(type(source).dataloader(source))


def release_loaders(loop: Any) -> None:
    """Let a loop have its loaders as they are again.

    Args:
        loop (Any): The loop.
    """
    vars(loop._data_source).pop("dataloader", None)


def uses_distributed_sampler(trainer: Trainer) -> bool:
    """Return ``use_distributed_sampler``, as the user gave it to the trainer.

    The trainer keeps it in a private object alone.

    Args:
        trainer (Trainer): The trainer.

    Returns:
        bool: Whether Lightning may replace samplers.
    """
    return trainer._accelerator_connector.use_distributed_sampler


def replace_layer_sync(trainer: Trainer, kind: type, replacement: LayerSync) -> None:
    """Replace the strategy's synchronisation of batch norms.

    Lightning takes one only from the constructor of the trainer, which is the user's.

    Args:
        trainer (Trainer): Trainer in its set-up.
        kind (type): Class of the synchronisation to be replaced; another one stays, and so does none.
        replacement (LayerSync): The new one.
    """
    strategy: Any = trainer.strategy
    if isinstance(getattr(strategy, "_layer_sync", None), kind):
        strategy._layer_sync = replacement
