# SPDX-License-Identifier: Apache-2.0

"""Trained models at work: a checkpoint or an export in, verdicts on images out."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.deploy import TorchInferencer
from anomalib.post_processing import PostProcessor

from .callbacks.checks import check_crop
from .data.images import check_image
from .errors import fail
from .lightning_model import StfpmExt
from .weights import read_file


def load_model(checkpoint: str | Path, argument: str = "checkpoint", teacher_weights: Path | None = None) -> StfpmExt:
    """Load a trained model.

    Args:
        checkpoint (str | Path): Its checkpoint.
        argument (str): The name of the argument for errors. Defaults to ``"checkpoint"``.
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
    check_crop(model)
    model.model.warn_if_untrained()
    return model


class Predictor:
    """Scores single images.

    Args:
        path (str | Path): A checkpoint of ``StfpmExt`` (``.ckpt``), or an export of
            ``anomalib export --export_type torch`` (``.pt``). The scores are those of ``anomalib predict``.
        device (str): ``"cpu"``, ``"cuda"``, or ``"auto"`` for a GPU if there is one. Defaults to ``"auto"``.
        teacher_weights (Path | None): File of the teacher's weights, for a checkpoint that leaves them out. Defaults to
            ``None``.
        sensitivity (float | None): Moves the threshold: above 0.5 more images are defective, below 0.5 fewer. Defaults
            to ``None``, the model's own.

    Attributes:
        pre_processor (PreProcessor | None): What the model does to an image first.
        threshold (float | None): Images with higher scores are defective; ``None`` where no validation has set one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no such model, anomalib refuses to load it, or ``sensitivity`` is not from 0 to 1 or has
            no threshold to move.
    """

    def __init__(
        self,
        path: str | Path,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        teacher_weights: Path | None = None,
        sensitivity: float | None = None,
    ) -> None:
        self._network: Callable[[torch.Tensor], InferenceBatch]
        path = Path(path)
        if path.suffix == ".ckpt":
            model = load_model(path, "checkpoint", teacher_weights)
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            self._device = torch.device(device)
            self._network = model.to(self._device)
            self.pre_processor, post_processor = model.pre_processor, model.post_processor
        elif path.suffix in {".pt", ".pth"}:
            inferencer: TorchInferencer = read_file(
                "checkpoint", path, "an export of anomalib", lambda name: TorchInferencer(name, device)
            )
            check_crop(inferencer.model)
            self._network, self._device = inferencer.model, inferencer.device
            self.pre_processor, post_processor = inferencer.model.pre_processor, inferencer.model.post_processor
        else:
            fail(ValueError, "checkpoint", "a checkpoint (.ckpt) or an export for torch (.pt)", path)
        if sensitivity is not None:
            _move_threshold(post_processor, sensitivity)
        self.threshold = _threshold(post_processor)

    @torch.inference_mode()
    def __call__(self, image: torch.Tensor) -> ImageBatch:
        """Score an image.

        Args:
            image (torch.Tensor): The image ``(3, H, W)`` as :func:`.data.images.read_image` reads it: floats of 0 to 1,
                neither 0 to 255 nor normalised, since the model normalises them itself.

        Returns:
            ImageBatch: The image with anomaly map, score and, if the model has a threshold, label and mask.

        Raises:
            TypeError: If the image is no tensor of floats.
            ValueError: If its shape or its range is wrong.
            FloatingPointError: If the score is not finite: such a model is useless.
        """
        check_image(image)
        prediction = self._network(image[None].to(self._device, torch.float32))
        if not prediction.pred_score.isfinite().all():
            fail(FloatingPointError, "checkpoint", "one that gives finite scores", prediction.pred_score.item())
        if self.threshold is None:  # anomalib would label every image good
            prediction = prediction._replace(pred_label=None, pred_mask=None)
        return ImageBatch(image=image[None], **prediction._asdict())


def _move_threshold(post_processor: PostProcessor | None, sensitivity: float) -> None:
    if not 0 <= sensitivity <= 1:
        fail(ValueError, "sensitivity", "a number from 0 to 1", sensitivity)
    if post_processor is None or _threshold(post_processor) is None:
        fail(ValueError, "sensitivity", "a model with a threshold, which a validation sets", "one without")
    post_processor.image_sensitivity = post_processor.pixel_sensitivity = sensitivity


def _threshold(post_processor: PostProcessor | None) -> float | None:
    if post_processor is None or not post_processor.enable_thresholding or post_processor.image_threshold.isnan():
        return None
    return float(post_processor.normalized_image_threshold)
