# SPDX-License-Identifier: Apache-2.0

"""Trained models at work: a checkpoint or an export in, verdicts on images out. Draws nothing."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.deploy import TorchInferencer
from anomalib.post_processing import PostProcessor

from .errors import fail
from .images import check_image
from .lightning_model import StfpmExt
from .weights import read_file


def load_model(checkpoint: str | Path, argument: str = "checkpoint", teacher_weights: Path | None = None) -> StfpmExt:
    """Load a trained model.

    Args:
        checkpoint (str | Path): Its checkpoint.
        argument (str): What the caller's errors call it. Defaults to ``"checkpoint"``.
        teacher_weights (Path | None): File of the teacher's weights, for a checkpoint that leaves them out. Defaults to
            ``None``.

    Returns:
        StfpmExt: The model, in evaluation mode.

    Raises:
        TypeError: If ``checkpoint`` is no path.
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no model of this kind.
    """
    load = partial(StfpmExt.load_from_checkpoint, teacher_weights=teacher_weights or False)
    model: StfpmExt = read_file(argument, checkpoint, "a checkpoint of StfpmExt", load)
    model.eval()
    return model


class Predictor:
    """Scores single images.

    Args:
        path (Path): A checkpoint of ``StfpmExt`` (``.ckpt``), with which scores are those of ``anomalib predict``, or
            an export of ``anomalib export --export_type torch`` (``.pt``), with which they are those of anomalib's
            ``TorchInferencer``.
        device (str): ``"cpu"``, ``"cuda"``, or ``"auto"`` for a GPU if there is one. Defaults to ``"auto"``.
        teacher_weights (Path | None): File of the teacher's weights, for a checkpoint that leaves them out. Defaults to
            ``None``.

    Attributes:
        threshold (float | None): Images with higher scores are defective; ``None`` where no validation has set one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no such model, or anomalib refuses to load it.
    """

    def __init__(
        self, path: Path, device: Literal["auto", "cpu", "cuda"] = "auto", teacher_weights: Path | None = None
    ) -> None:
        self._network: Callable[[torch.Tensor], InferenceBatch]
        if path.suffix == ".ckpt":
            model = load_model(path, "checkpoint", teacher_weights)
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            self._device = torch.device(device)
            model.to(self._device)
            # anomalib's predict, step by step. The model as a whole resizes as exported models do, without antialias.
            steps = [model.pre_processor and model.pre_processor.transform, model.model, model.post_processor]
            self._network = torch.nn.Sequential(*(step for step in steps if step is not None))
            post_processor = model.post_processor
        elif path.suffix in {".pt", ".pth"}:
            inferencer: TorchInferencer = read_file(
                "checkpoint", path, "an export of anomalib", lambda name: TorchInferencer(name, device)
            )
            self._network, self._device = inferencer.model, inferencer.device
            post_processor = inferencer.model.post_processor
        else:
            fail(ValueError, "checkpoint", "a checkpoint (.ckpt) or an export for torch (.pt)", path)
        self.threshold = _threshold(post_processor)

    @torch.inference_mode()
    def __call__(self, image: torch.Tensor) -> ImageBatch:
        """Score an image.

        Args:
            image (torch.Tensor): The image ``(3, H, W)`` as :func:`.images.read_image` reads it: floats of 0 to 1,
                neither 0 to 255 nor normalised, since the model normalises them itself.

        Returns:
            ImageBatch: The image with anomaly map, score and, if the model has a threshold, label and mask.

        Raises:
            TypeError: If the image is no tensor of floats.
            ValueError: If its shape or its range is another.
            FloatingPointError: If the score is not finite: the model is of no use then.
        """
        check_image(image)
        prediction = self._network(image[None].to(self._device))
        if not prediction.pred_score.isfinite().all():
            fail(FloatingPointError, "checkpoint", "one that gives finite scores", prediction.pred_score.item())
        return ImageBatch(image=image[None], **prediction._asdict())


def _threshold(post_processor: PostProcessor | None) -> float | None:
    if post_processor is None or not post_processor.enable_thresholding or post_processor.image_threshold.isnan():
        return None
    return float(post_processor.normalized_image_threshold)
