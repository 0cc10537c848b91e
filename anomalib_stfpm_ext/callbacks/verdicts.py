# SPDX-License-Identifier: Apache-2.0

"""Threshold and range of scores, which are saved with the student that they were validated with."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from ..checkpoints import STUDENT_PREFIX, name_network
from ..torch_model import StfpmExtModel

PREFIX = "post_processor."  # of its tensors in a checkpoint's state_dict


class Verdicts:
    """Keeps a post-processor's threshold and range with the step of the student that they belong to.

    Args:
        post_processor (nn.Module | None): The post-processor, or ``None`` where there is none.
    """

    def __init__(self, post_processor: nn.Module | None) -> None:
        self._post_processor = post_processor
        self._tensors: dict[str, torch.Tensor] = {}
        self._step: int | None = None

    def keep(self, step: int | None) -> None:
        """Keep what the post-processor has now, if anything, for the student of a step."""
        state = {} if self._post_processor is None else self._post_processor.state_dict()
        if not all(tensor.isnan().all() for tensor in state.values()):
            self._step, self._tensors = step, {name: tensor.clone() for name, tensor in state.items()}

    def keep_none(self) -> None:
        """Keep nothing any more."""
        self._step, self._tensors = None, {}

    def belong_to(self, step: int | None) -> bool:
        """Tell whether what is kept belongs to the student of a step; without post-processor nothing is needed."""
        return self._post_processor is None or (step is not None and self._step == step)

    def of(self, step: int | None) -> dict[str, torch.Tensor]:
        """Return what belongs to the student of a step: what is kept, or NaN, which anomalib takes for no threshold."""
        if self._post_processor is None:
            return {}
        if self.belong_to(step):
            return self._tensors
        state: dict[str, torch.Tensor] = self._post_processor.state_dict()
        floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        return {name: torch.full_like(tensor, torch.nan) for name, tensor in floats.items()}

    def restore(self, step: int | None) -> None:
        """Give the post-processor what belongs to the student of a step."""
        if self._post_processor is not None:
            self._post_processor.load_state_dict(self.of(step), strict=False)

    def write(self, checkpoint: dict[str, Any], step: int | None) -> None:
        """Put what belongs to the student of a step into a checkpoint, which has present values.

        anomalib's post-processor is module and callback at once, and Lightning saves both.
        """
        tensors = {name: tensor.cpu() for name, tensor in self.of(step).items()}
        checkpoint["state_dict"].update({PREFIX + name: tensor for name, tensor in tensors.items()})
        states, key = checkpoint.get("callbacks", {}), getattr(self._post_processor, "state_key", None)
        if key in states:
            states[key] = {**states[key], **tensors}

    def complete_files(self, trainer: Trainer, model: StfpmExtModel, step: int | None) -> None:
        """Put what is kept into the checkpoints that hold a student, and were saved before it was validated.

        Args:
            trainer (Trainer): Trainer at the end of its fit.
            model (StfpmExtModel): The networks, with the student that is kept.
            step (int | None): Its step.
        """
        if not trainer.is_global_zero:
            return
        wanted = {STUDENT_PREFIX + name: tensor for name, tensor in model.student_model.state_dict().items()}
        for path in _saved_files(trainer):
            content = torch.load(
                path, map_location="cpu", weights_only=False
            )  # of this fit, with its callbacks' states
            state = content["state_dict"]
            if all(name in state and torch.equal(state[name], tensor.cpu()) for name, tensor in wanted.items()):
                self.write(content, step)
                name_network(content, model)
                unfinished = path.with_name(f".{path.name}.{os.getpid()}")
                torch.save(content, unfinished)
                unfinished.replace(path)


def _saved_files(trainer: Trainer) -> set[Path]:
    names: set[Any] = set()
    for callback in trainer.checkpoint_callbacks:
        names |= {getattr(callback, "best_model_path", ""), getattr(callback, "last_model_path", "")}
        names |= set(getattr(callback, "best_k_models", ()))
    return {Path(name) for name in names if name and Path(name).is_file()}
