# SPDX-License-Identifier: Apache-2.0

"""StfpmExt, the model that anomalib trains, tests and exports."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _anomalib_stfpm_ext_autoload
import timm
import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torchvision.transforms.v2 import Compose, Normalize, Resize

from .loss import StfpmExtLoss
from .torch_model import StfpmExtModel


class StfpmExt(AnomalibModule):
    """Student-Teacher Feature Pyramid Matching, true to the paper (Wang et al., BMVC 2021, arXiv 2103.04257).

    A student learns, from good images only, to match the features of a frozen, pretrained teacher of the same
    architecture at several levels. Where the two differ, there is an anomaly.

    Args:
        backbone (str): timm's name of the network of teacher and student; any with a feature pyramid. Defaults to
            ``"resnet18.tv_in1k"``, torchvision's weights as in the paper.
        layers (Sequence[str]): Levels of the pyramid that are compared, by timm's names. Defaults to
            ``("layer1", "layer2", "layer3")``.
        teacher_weights (bool | Path): Local ``.pth`` or ``.safetensors`` file with the teacher's weights. ``True``:
            timm's pretrained ones, from its cache or the internet. ``False``: none, because a checkpoint brings them.
            Defaults to ``True``.
        lr (float): Learning rate of SGD. Defaults to ``0.4``, as in the paper.
        momentum (float): Momentum of SGD. Defaults to ``0.9``, as in the paper.
        weight_decay (float): Weight decay of SGD. Defaults to ``1e-4``, as in the paper.
        seed (int | None): Seed of Python's, NumPy's and torch's random numbers, set before the student is initialised:
            with it a training run can be repeated. It is here since anomalib's command line accepts
            ``--seed_everything`` and ignores it. Defaults to ``None``, which leaves them alone.
        pre_processor (PreProcessor | bool): Transforms the images. ``True``: resizes to 256x256 and normalises as
            the teacher was trained. Defaults to ``True``.
        post_processor (PostProcessor | bool): Normalises and thresholds maps and scores. ``True``: anomalib's
            default. Defaults to ``True``.
        evaluator (Evaluator | bool): Computes the metrics. ``True``: anomalib's default. Defaults to ``True``.
        visualizer (Visualizer | bool): Draws the results. ``True``: anomalib's default. Defaults to ``True``.

    Raises:
        ValueError: If the backbone or a layer does not exist, an optimiser setting is out of range, or the teacher's
            weights do not fit.
        FileNotFoundError: If the file of weights does not exist.
        RuntimeError: If timm's pretrained weights cannot be had.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib_stfpm_ext import StfpmExt
        >>> engine = Engine(max_epochs=100)
        >>> engine.train(StfpmExt(), datamodule=MVTecAD())  # doctest: +SKIP
    """

    def __init__(
        self,
        backbone: str = "resnet18.tv_in1k",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        teacher_weights: bool | Path = True,
        lr: float = 0.4,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        seed: int | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if seed is not None:
            seed_everything(seed, workers=True)
        model = StfpmExtModel(backbone, layers, teacher_weights)
        if pre_processor is True:
            config = timm.get_pretrained_cfg(backbone)
            pre_processor = self.configure_pre_processor(mean=config.mean, std=config.std)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.model = model
        self.loss = StfpmExtLoss()
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.configure_optimizers()  # so that a wrong setting is an error now and not after the data is loaded

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Compute the loss of a batch of good images.

        Args:
            batch (Batch): Images ``(B, 3, H, W)``.
            args: Unused.
            kwargs: Unused.

        Returns:
            STEP_OUTPUT: The loss.
        """
        del args, kwargs
        teacher, student = self.model(batch.image)
        loss = self.loss(teacher, student)
        self.log("train_loss", loss, on_epoch=True, prog_bar=True, batch_size=len(batch.image))
        return {"loss": loss}

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch.

        Args:
            batch (Batch): Images ``(B, 3, H, W)``.
            args: Unused.
            kwargs: Unused.

        Returns:
            STEP_OUTPUT: The batch with anomaly maps and scores.
        """
        del args, kwargs
        result: STEP_OUTPUT = batch.update(**self.model(batch.image)._asdict())
        return result

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Set up the paper's SGD for the student.

        Returns:
            torch.optim.Optimizer: SGD with the settings given to the model.
        """
        return torch.optim.SGD(
            self.model.student_model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> PreProcessor:
        """Resize and normalise images.

        Args:
            image_size (tuple[int, int] | None): Height and width. Defaults to the paper's ``(256, 256)``.
            mean (Sequence[float]): Mean of each channel. Defaults to ImageNet's.
            std (Sequence[float]): Standard deviation of each channel. Defaults to ImageNet's.

        Returns:
            PreProcessor: The pre-processor.
        """
        return PreProcessor(
            Compose([Resize(image_size or (256, 256), antialias=True), Normalize(mean=list(mean), std=list(std))])
        )

    def unfreeze(self) -> None:
        """Unfreeze the student; the teacher stays as it is."""
        super().unfreeze()
        self.model.teacher_model.freeze()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "StfpmExt":
        """Load a model from a Lightning checkpoint, teacher included: neither internet nor file of weights is needed.

        Args:
            checkpoint_path (str | Path): The checkpoint.
            args: As in ``AnomalibModule.load_from_checkpoint``.
            kwargs: Likewise.

        Returns:
            StfpmExt: The model.
        """
        kwargs.setdefault("teacher_weights", False)
        kwargs.setdefault("seed", None)  # of the training; the caller's random numbers are not ours
        model: StfpmExt = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return model

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments that Lightning's trainer must have.

        Returns:
            dict[str, Any]: No gradient clipping, and no validation before the training.
        """
        return {"gradient_clip_val": 0, "num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Learning type of the model.

        Returns:
            LearningType: It learns from good images only.
        """
        return LearningType.ONE_CLASS


_anomalib_stfpm_ext_autoload.publish(StfpmExt)
