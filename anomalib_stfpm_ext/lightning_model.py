# SPDX-License-Identifier: Apache-2.0

"""StfpmExt, the model that anomalib trains, tests and exports."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import _anomalib_stfpm_ext_autoload
import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.v2 import Compose, Normalize, Resize
from typing_extensions import override

from . import checkpoints
from ._compat.anomalib import resize_as
from ._compat.lightning import is_fitting
from .backbones import pretrained_config
from .callbacks import (
    AllocatorTuning,
    Checks,
    DistributedSetup,
    FiniteLoss,
    ImageReading,
    LearningRate,
    PreciseBatchNorm,
    ScoringDtype,
    StudentSelection,
    TeacherCache,
    UnchangedStudent,
)
from .callbacks.learning_rate import default_rate
from .callbacks.scoring_dtype import asked_precision
from .choices import CacheLocation, CompileMode, InferencePrecision, Selection
from .depthwise import DepthwiseGradients
from .exports import ExactExports
from .inference.post_processing import FewPassPostProcessor, use_middle_threshold
from .loss import StfpmExtLoss
from .settings import check_settings, limit_epochs, pass_over_single_image, plain
from .torch_model import StfpmExtModel
from .visualizer import BackgroundImageVisualizer
from .weights import read_file

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # as in the paper


class StfpmExt(ExactExports, AnomalibModule):
    """Student-Teacher Feature Pyramid Matching (Wang et al., BMVC 2021, arXiv 2103.04257).

    A student learns, from good images only, to match the features of a frozen, pretrained teacher of the same
    architecture at several levels. An anomaly is where the two differ. See docs/training.md.

    Args:
        backbone (str): timm's name for the network. Defaults to ``"resnet18.tv_in1k"``, torchvision's as in the paper.
        layers (Sequence[str]): Levels to compare, by timm's names. Defaults to ``("layer1", "layer2", "layer3")``.
        teacher_weights (bool | Path): Local ``.pth`` or ``.safetensors`` file with the teacher's weights. ``True``:
            the file that the environment variable ``STFPM_EXT_TEACHER_WEIGHTS`` names; otherwise timm's pretrained
            weights, from torch hub's cache, timm's cache or the internet. ``False``: none; a checkpoint brings them.
        combine_at (str): Where the levels' maps are multiplied: ``"image"``, at the image's size as in the paper, or
            ``"finest"``, at the finest level's, as in the authors' code. Defaults to ``"image"``.
        lr (float | None): Learning rate of SGD. Defaults to ``None``: the start of a fit chooses 1.6, or the paper's
            0.4 where the student has another normalisation than batch norm, or none, ``precise_bn`` is off, or the
            levels get no exponents (see ``selection``).
        held_out_share (float): Share of the good training images that the student never trains on. They choose the
            student that is kept, saved and tested. ``0`` keeps the last one. Defaults to the authors' ``0.2``.
        seed (int | None): Seed of all random numbers, and of the choice of held-out images. Defaults to ``None``, which
            leaves the random numbers alone and holds out the images of seed 0, as the authors do.
        save_teacher (bool): Whether checkpoints hold the teacher, half of the model, or only name it. The second kind
            loads with the same ``teacher_weights``. Exports always hold the teacher. Defaults to ``True``.
        teacher_cache (Literal["auto", "memory", "disk"] | None): Where the teacher's features are kept, so that epochs
            after the first run without a teacher. ``"auto"``: in memory, on a CPU, if images are not augmented and a
            quarter of the free memory suffices. Defaults to ``"auto"``.
        compile_mode (Literal["default", "reduce-overhead", "max-autotune"] | None): Mode in which ``torch.compile``
            compiles inference, once for each size of images. Defaults to ``None``, which compiles nothing.
        inference_precision (Literal["float32", "bfloat16", "float16", "auto"] | None): Precision of both networks in
            validation, test and prediction. ``"auto"``: the fastest that hardly changes the scores of held-out images.
            Defaults to ``None``: the checkpoint's, the trainer's, or float32.
        selection (Literal["held_out_map", "synthetic"]): How held-out images choose the student: by their mean anomaly
            map, as in the paper, or by how well the scores separate them from copies with synthetic anomalies, which
            also gives the levels' maps exponents. Fewer than 20 use the first. Defaults to ``"synthetic"``.
        precise_bn (bool): Whether a student is measured, validated and saved with the batch norm statistics of its own
            features, not with running averages as in the paper. Defaults to ``True``.
        hard_share (float): Share of positions, the hardest, that the loss counts. Defaults to ``1``, as in the paper.
        image_size (tuple[int, int] | None): Height and width to which images are resized. Defaults to ``None``: the
            paper's 256x256, or the only size that the backbone takes.
        pre_processor (PreProcessor | bool): Transforms the images. ``True``: resizes to ``image_size``, and normalises
            as in the teacher's training. Defaults to ``True``.
        post_processor (PostProcessor | bool): Normalises and thresholds maps and scores. Defaults to ``True``,
            anomalib's with :class:`.MiddleThreshold`.
        evaluator (Evaluator | bool): Computes the metrics. Defaults to ``True``, anomalib's.
        visualizer (Visualizer | bool): Draws the results. Defaults to ``True``, anomalib's pictures in the background.

    A trainer without ``max_epochs``, ``max_steps`` and ``max_time`` runs the paper's 100 epochs.

    Raises:
        ValueError: If the backbone or a layer does not exist, a number is out of range, or weights do not fit.
        FileNotFoundError: If the file of weights does not exist.
        RuntimeError: If timm's pretrained weights cannot be loaded.
    """

    learning_type = LearningType.ONE_CLASS
    trainer_arguments: ClassVar[dict[str, Any]] = {"num_sanity_val_steps": 0}

    def __init__(
        self,
        backbone: str = "resnet18.tv_in1k",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        teacher_weights: bool | Path = True,
        combine_at: Literal["image", "finest"] = "image",
        lr: float | None = None,
        held_out_share: float = 0.2,
        seed: int | None = None,
        save_teacher: bool = True,
        teacher_cache: CacheLocation | None = "auto",
        compile_mode: CompileMode | None = None,
        inference_precision: InferencePrecision | None = None,
        selection: Selection = "synthetic",
        precise_bn: bool = True,
        hard_share: float = 1.0,
        image_size: tuple[int, int] | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        backbone, layers, combine_at, selection, lr = map(plain, (backbone, layers, combine_at, selection, lr))
        held_out_share, hard_share, seed, image_size = map(plain, (held_out_share, hard_share, seed, image_size))
        check_settings(lr, seed, save_teacher, precise_bn, inference_precision, image_size, pre_processor is True)
        loss = StfpmExtLoss(hard_share)
        student_selection = StudentSelection(held_out_share, seed or 0, selection)
        cache = None if teacher_cache is None else TeacherCache(teacher_cache)
        if seed is not None:
            seed_everything(seed, workers=True)
        model = StfpmExtModel(backbone, layers, teacher_weights, combine_at, compile_mode)
        self.given = {  # what the caller gives overrides a checkpoint
            "pre_processor": image_size is not None or not isinstance(pre_processor, bool),
            "post_processor": not isinstance(post_processor, bool),
        }
        if pre_processor is True:
            config = pretrained_config(backbone)
            size = config.input_size[1:] if image_size is None and config.fixed_input_size else image_size
            pre_processor = self.configure_pre_processor(size, config.mean, config.std)
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        use_middle_threshold(self.post_processor)
        self.model, self.loss, self.cache, self.student_selection = model, loss, cache, student_selection
        self.inference_precision, self.precise_bn, self.save_teacher = inference_precision, precise_bn, save_teacher
        self.asked_precision = asked_precision(inference_precision)  # or the trainer's; see ScoringDtype
        model.score_by(None, self.asked_precision or "float32")
        rate, _ = default_rate(model.student_model, selection, precise_bn, math.inf if held_out_share else 0)
        self.lr = rate if lr is None else lr
        self.default_lr = rate if lr is None else None  # the callback LearningRate settles it
        self.last_trainer: int | None = None  # the id, for Checks

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Compute the loss of a batch of good images; ``None`` skips a single image whose features lack variance."""
        if not self.model.training:  # as an aborted test or a callback leaves it
            self.model.train()
        try:
            with DepthwiseGradients():
                teacher, student = self.model(batch.image, self.cached_teacher)
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            pass_over_single_image(self.trainer, batch_idx=(*args, *kwargs.values(), 0)[0])
            return None
        loss = self.loss(teacher, student)
        self.log("train_loss", loss, on_epoch=True, prog_bar=True, batch_size=len(batch.image), sync_dist=True)
        return {"loss": loss}

    @override
    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int) -> None:
        # Lightning would skip the validation, which sets the threshold, where max_steps ends within an epoch.
        if self.student_selection.is_fitting and self.trainer.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True

    def score(self, batch: Batch) -> STEP_OUTPUT:
        """Add anomaly maps and raw scores to a batch."""
        return batch.update(**self.model(batch.image)._asdict())  # type: ignore[no-any-return]

    @override
    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        return self.score(batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        return self.score(batch)

    @override
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        return self.score(batch)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.SGD(self.model.student_model.parameters(), self.lr, MOMENTUM, weight_decay=WEIGHT_DECAY)

    @override
    def configure_callbacks(self) -> Sequence[Callback]:
        return [
            *super().configure_callbacks(),
            Checks(),
            ImageReading(),  # before anything asks for loaders
            DistributedSetup(),
            FiniteLoss(self.student_selection.describe_kept),  # reads losses before the student is measured
            *([PreciseBatchNorm()] if self.precise_bn else []),  # sets its statistics before it is measured
            UnchangedStudent(),  # looks at the student before the selection keeps it
            self.student_selection,
            LearningRate(),  # depends on how many images are held out
            ScoringDtype(),  # tries a precision on the student that is kept
            *([self.cache] if self.cache else []),
            AllocatorTuning(),  # trims what the others free
        ]

    @property
    def cached_teacher(self) -> Callable[[torch.Tensor], dict[str, torch.Tensor]] | None:
        """Maps images ``(B, 3, H, W)`` of a fit to the teacher's features by level; ``None`` without a cache."""
        return partial(self.cache.features, teacher=self.model.teacher_features) if self.cache else None

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoints.write(checkpoint, self)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fit = checkpoints.read(checkpoint, self)
        super().on_load_checkpoint(checkpoint)
        resize_as(self)
        self.student_selection.forget()
        if is_fitting(self):
            self.student_selection.resume(fit, checkpoint["global_step"])

    @AnomalibModule.trainer.setter  # type: ignore[untyped-decorator]
    def trainer(self, trainer: Trainer | None) -> None:
        """Lightning's trainer that this model is attached to."""
        AnomalibModule.trainer.fset(self, trainer)
        if trainer is not None:
            limit_epochs(trainer)

    @override
    def unfreeze(self) -> None:
        super().unfreeze()
        self.model.teacher_model.freeze()

    @override
    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> PreProcessor:
        size = image_size or (256, 256)  # the paper's
        return PreProcessor(Compose([Resize(size, antialias=True), Normalize(mean=list(mean), std=list(std))]))

    @override
    def configure_post_processor(self) -> PostProcessor:
        return FewPassPostProcessor()

    @override
    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        return BackgroundImageVisualizer()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "StfpmExt":
        """Load a model from a Lightning checkpoint, teacher included: neither internet nor file of weights is needed.

        Args:
            checkpoint_path (str | Path): The checkpoint. One with ``save_teacher=False`` needs ``teacher_weights``.
            args: As in ``AnomalibModule.load_from_checkpoint``.
            kwargs: Likewise.

        Returns:
            StfpmExt: The model.

        Raises:
            ValueError: If it is no checkpoint, or one of another network or teacher.
        """
        # The checkpoint sets weights, precision and transform. The caller's random numbers are left alone.
        unless_given = {"teacher_weights": False, "seed": None, "inference_precision": None, "image_size": None}
        try:
            model: StfpmExt = super().load_from_checkpoint(checkpoint_path, *args, **{**unless_given, **kwargs})
        except Exception:
            if isinstance(checkpoint_path, str | Path) and Path(checkpoint_path).is_file():
                read_file("checkpoint_path", checkpoint_path, "a checkpoint", checkpoints.load_content)  # is it one?
            raise
        return model


_anomalib_stfpm_ext_autoload.publish(StfpmExt)
