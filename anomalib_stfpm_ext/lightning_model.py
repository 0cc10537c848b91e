# SPDX-License-Identifier: Apache-2.0

"""StfpmExt, the model that anomalib trains, tests and exports."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import _anomalib_stfpm_ext_autoload
import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator, F1AdaptiveThreshold
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchvision.transforms.v2 import Compose, Normalize, Resize

from ._compat import replace_image_threshold
from .backbones import pretrained_config
from .callbacks.allocator import AllocatorTuning
from .callbacks.checks import Checks
from .callbacks.cosine_schedule import CosineSchedule
from .callbacks.distributed import DistributedSetup
from .callbacks.finite_loss import FiniteLoss
from .callbacks.image_reading import ImageReading
from .callbacks.precise_batch_norm import PreciseBatchNorm
from .callbacks.scoring_precision import InferencePrecision, ScoringPrecision, check_precision, tell_other
from .callbacks.student_selection import Selection, StudentSelection
from .callbacks.teacher_cache import CacheLocation, TeacherCache
from .checkpoints import bring_back, check_network, leave_out, load_content, name_network, restore_tiler
from .depthwise import DepthwiseGradients
from .errors import fail
from .exports import ExactExports
from .inference.post_processing import FewPassPostProcessor
from .inference.threshold import MiddleThreshold
from .loss import StfpmExtLoss
from .torch_model import CompileMode, StfpmExtModel
from .visualizer import BackgroundImageVisualizer
from .weights import read_file

MAX_EPOCHS = 100  # as in the paper
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm)
PAPERS_LEARNING_RATE, LARGE_LEARNING_RATE = 0.4, 1.6
TRANSFORM_KEY = "stfpm_ext_transform"  # of a checkpoint: whether there was one, which anomalib may fail to save


def default_learning_rate(student: nn.Module, selection: Selection, precise_bn: bool) -> float:
    """Choose four times the paper's learning rate where that is known to do well.

    Batch norm takes the scale out of the weights before it, and too large a step only increases that scale, so that the
    next steps are smaller (Arora et al., arXiv 1812.03981). Students without it diverge. Running statistics lag behind
    large steps, precise ones do not. Where all levels count the same, it wins on some data and loses on other.

    Args:
        student (nn.Module): The student.
        selection (Selection): See :class:`StfpmExt`.
        precise_bn (bool): Likewise.

    Returns:
        float: The learning rate.
    """
    norms = [module for module in student.modules() if isinstance(module, NORMS)]
    has_batch_norm_alone = norms and all(isinstance(norm, nn.BatchNorm2d) for norm in norms)
    steady = selection == "synthetic" and precise_bn and has_batch_norm_alone
    return LARGE_LEARNING_RATE if steady else PAPERS_LEARNING_RATE


class StfpmExt(ExactExports, AnomalibModule):
    """Student-Teacher Feature Pyramid Matching (Wang et al., BMVC 2021, arXiv 2103.04257).

    A student learns, from good images only, to match the features of a frozen, pretrained teacher of the same
    architecture at several levels. Where the two differ, there is an anomaly.

    Args:
        backbone (str): timm's name of the network of teacher and student; any with a feature pyramid. Defaults to
            ``"resnet18.tv_in1k"``, torchvision's weights as in the paper.
        layers (Sequence[str]): Levels of the pyramid that are compared, by timm's names. Defaults to
            ``("layer1", "layer2", "layer3")``.
        teacher_weights (bool | Path): Local ``.pth`` or ``.safetensors`` file with the teacher's weights. ``True``:
            the file that the environment variable ``STFPM_EXT_TEACHER_WEIGHTS`` names; otherwise timm's pretrained
            ones, from torch hub's cache, timm's own or the internet. ``False``: none, because a checkpoint brings them.
            Defaults to ``True``.
        combine_at (str): Where the levels' maps are multiplied: ``"image"``, at the image's size as in the paper, or
            ``"finest"``, at that of the finest level, after which the product is stretched to the image's, as in the
            authors' code. Defaults to ``"image"``.
        lr (float | None): Learning rate of SGD. Defaults to ``None``: 1.6, or the paper's 0.4 where the student has
            other normalisation than batch norm, or none, ``precise_bn`` is off or ``selection`` is ``"held_out_map"``.
        momentum (float): Momentum of SGD. Defaults to ``0.9``, as in the paper.
        weight_decay (float): Weight decay of SGD. Defaults to ``1e-4``, as in the paper.
        held_out_share (float): Share of the good training images that the student never trains on. After every epoch,
            and before a validation within one, they say how good the student is; the best one, see ``selection``, is
            saved, tested and kept. Where anomalib's data module splits its
            validation images from the training images (``val_split_mode=FROM_TRAIN``), those serve instead. ``0``
            switches it off: the last student is kept. Defaults to ``0.2``, as the authors have it.
        lr_schedule (Literal["constant", "cosine"]): ``"cosine"`` lets the learning rate fall to 0 along half a cosine,
            step by step, so the number of steps must be known: from the trainer's ``max_epochs`` or ``max_steps``.
            Defaults to ``"constant"``, as in the paper.
        ema_decay (float | None): Decay of an exponential moving average of the student, above 0 and below 1, per step.
            The averaged student is the one that is measured, chosen, validated, saved and kept; the student itself
            trains on. Defaults to ``None``, no average, as in the paper.
        seed (int | None): Seed of Python's, NumPy's and torch's random numbers, set before the student is initialised:
            with it a training run can be repeated. It is here since anomalib's command line accepts
            ``--seed_everything`` and ignores it. It also says which images are held out. Defaults to ``None``, which
            leaves the numbers alone and holds out the images of seed 0, as the authors do.
        save_teacher (bool): Whether checkpoints hold the teacher, half of the model. With ``False`` they name it by its
            backbone and checksum, and whoever loads one gives the same ``teacher_weights`` again; others are an error.
            Exports hold the teacher all the same. Defaults to ``True``.
        teacher_cache (Literal["auto", "memory", "disk"] | None): Where the teacher's features are kept from the first
            epoch to the end of the fit, so that later epochs run without a teacher: same losses. ``"memory"`` and
            ``"disk"``, the folder for temporary files (``TMPDIR``), want images that are the same in every epoch, so no
            random augmentation, and room for all. ``"auto"`` is memory where that is so, on a CPU, and a quarter of
            what is free will do; ``None`` keeps none. Defaults to ``"auto"``.
        teacher_cache_half (bool): Keep them in float16, half the space; losses differ slightly. Defaults to ``False``.
        compile_mode (Literal["default", "reduce-overhead", "max-autotune"] | None): Have ``torch.compile`` compile
            inference in this mode, once for each size of images; the last two replay CUDA graphs on a GPU. Neither
            checkpoints nor exports are of it. Defaults to ``None``, which compiles nothing.
        inference_precision (Literal["float32", "bfloat16", "float16", "auto"] | None): What both networks compute in
            when they score images: in validation, test and prediction alike, since thresholds fit one precision only.
            It is saved in checkpoints. Where the machine does not compute faster in it, float32 is used, and a line
            says so. ``"auto"`` takes the fastest whose scores of the held-out images stay those of float32 but for a
            tenth of their standard deviation, tried at the end of the fit. Defaults to ``None``: the checkpoint's, or
            the trainer's (``bf16-mixed`` and its like), or float32.
        selection (Literal["held_out_map", "synthetic"]): What held-out images decide. ``"synthetic"``: the student is
            kept that best tells them from copies with synthetic anomalies (noise, pasted patches, scratches, spots;
            always the same), by the mean image AUROC; of those within 0.005 of the highest, the one with the lowest
            anomaly map of good images. The levels' maps get exponents, by how well each level alone tells them apart.
            It needs 20 held-out images; with fewer the other rule is in force. ``"held_out_map"``: as in the paper, the
            student with the lowest mean anomaly map of good images, and all levels count the same. Defaults to
            ``"synthetic"``.
        precise_bn (bool): Whether the student gets the batch norm statistics of its own features, estimated over the
            latest batches with some 64 training images, before it is measured, validated and saved. ``False``: running
            averages over the last steps, as in the paper. Losses are the same. Defaults to ``True``.
        image_size (tuple[int, int] | None): Height and width to which images are resized; the normalisation stays the
            teacher's. Defaults to ``None``, the paper's 256x256, or the one size that the backbone takes.
        pre_processor (PreProcessor | bool): Transforms the images. ``True``: resizes to ``image_size``, and normalises
            as the teacher was trained. Defaults to ``True``.
        post_processor (PostProcessor | bool): Normalises and thresholds maps and scores. ``True``: anomalib's
            default. Its threshold of image scores is :class:`.MiddleThreshold`. Defaults to ``True``.
        evaluator (Evaluator | bool): Computes the metrics. ``True``: anomalib's default. Defaults to ``True``.
        visualizer (Visualizer | bool): Draws the results. ``True``: anomalib's pictures, drawn beside the scoring.
            Defaults to ``True``.

    Note:
        The paper's 100 epochs are the default: a trainer without ``max_epochs``, ``max_steps`` and ``max_time`` gets
        them. Held-out images pass through the test transforms of anomalib's data module. Those from a ``DataLoader``
        of your own come as its data set gives them, augmented if it augments.

    Raises:
        ValueError: If the backbone or a layer does not exist, an optimiser setting or the held-out share is out of
            range, or the teacher's weights do not fit.
        FileNotFoundError: If the file of weights does not exist.
        RuntimeError: If timm's pretrained weights cannot be had.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib_stfpm_ext import StfpmExt
        >>> engine = Engine()
        >>> engine.train(StfpmExt(), datamodule=MVTecAD())  # doctest: +SKIP
    """

    def __init__(
        self,
        backbone: str = "resnet18.tv_in1k",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        teacher_weights: bool | Path = True,
        combine_at: Literal["image", "finest"] = "image",
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        held_out_share: float = 0.2,
        lr_schedule: Literal["constant", "cosine"] = "constant",
        ema_decay: float | None = None,
        seed: int | None = None,
        save_teacher: bool = True,
        teacher_cache: CacheLocation | None = "auto",
        teacher_cache_half: bool = False,
        compile_mode: CompileMode | None = None,
        inference_precision: InferencePrecision | None = None,
        selection: Selection = "synthetic",
        precise_bn: bool = True,
        image_size: tuple[int, int] | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if lr_schedule not in ("constant", "cosine"):
            fail(ValueError, "lr_schedule", "constant or cosine", repr(lr_schedule))
        rates = {} if lr is None else {"lr": lr}
        for argument, value in {**rates, "momentum": momentum, "weight_decay": weight_decay}.items():
            if isinstance(value, bool) or not isinstance(value, Real):
                fail(TypeError, argument, "a number", repr(value))
            if not 0 <= value < math.inf:
                fail(ValueError, argument, "a finite number of at least 0", value)
        if isinstance(seed, bool) or not isinstance(seed, Integral | None):
            fail(TypeError, "seed", "a whole number or None", repr(seed))
        for argument, flag in (("save_teacher", save_teacher), ("precise_bn", precise_bn)):
            if not isinstance(flag, bool):
                fail(TypeError, argument, "True or False", repr(flag))
        check_precision(inference_precision)
        student_selection = StudentSelection(held_out_share, seed or 0, ema_decay, selection, precise_bn)
        if seed is not None:
            seed_everything(seed, workers=True)
        model = StfpmExtModel(backbone, layers, teacher_weights, combine_at, compile_mode)
        # What a caller gives is in force beside a checkpoint, too.
        self._given = {
            "pre_processor": image_size is not None or not isinstance(pre_processor, bool),
            "post_processor": not isinstance(post_processor, bool),
        }
        if image_size is not None and pre_processor is not True:
            fail(ValueError, "image_size", "None where pre_processor is given, which resizes images itself", image_size)
        if pre_processor is True:
            config = pretrained_config(backbone)
            size = config.input_size[1:] if image_size is None and config.fixed_input_size else image_size
            pre_processor = self.configure_pre_processor(size, config.mean, config.std)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        replace_image_threshold(self.post_processor, F1AdaptiveThreshold, MiddleThreshold)
        self.model = model
        self.inference_precision = inference_precision
        self.asked_precision = None if inference_precision == "auto" else inference_precision  # or the trainer's
        model.precision = self.asked_precision or "float32"
        self.last_trainer: int | None = None  # the id, for Checks
        self.loss = StfpmExtLoss()
        self.lr = default_learning_rate(model.student_model, selection, precise_bn) if lr is None else lr
        self.momentum, self.weight_decay = momentum, weight_decay
        self.save_teacher = save_teacher
        if teacher_cache is None and teacher_cache_half:
            fail(ValueError, "teacher_cache_half", "False where teacher_cache is None", teacher_cache_half)
        self.cache = None if teacher_cache is None else TeacherCache(teacher_cache, teacher_cache_half)
        self.lr_schedule, self.seed = lr_schedule, seed
        self.student_selection = student_selection

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Compute the loss of a batch of good images.

        Args:
            batch (Batch): Images ``(B, 3, H, W)``.
            args: The number of the batch.
            kwargs: Likewise.

        Returns:
            STEP_OUTPUT: The loss, or ``None`` for a batch that is passed over: one image left at the end of an epoch,
                of whose features of 1x1 there is no variance.

        Raises:
            ValueError: If all batches are like that.
        """
        try:
            with DepthwiseGradients():
                teacher, student = self.model(batch.image, self.cached_teacher)
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            is_first = (*args, *kwargs.values(), 0)[0] == 0
            if is_first or self.trainer.world_size > 1:
                wanted = "at least two images in each batch (another train_batch_size), or larger images"
                fail(ValueError, "train_batch_size", wanted, "one image, whose features at a level are of 1x1")
            rank_zero_warn(
                "train_batch_size: the last image of each epoch is passed over, since features of 1x1 need two"
            )
            return None
        loss = self.loss(teacher, student)
        self.log("train_loss", loss, on_epoch=True, prog_bar=True, batch_size=len(batch.image), sync_dist=True)
        return {"loss": loss}

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int) -> None:
        """Have the last step followed by a validation, and so by a threshold.

        Lightning would leave the validation out where ``max_steps`` ends within an epoch.

        Args:
            outputs (STEP_OUTPUT): Unused.
            batch (Batch): Unused.
            batch_idx (int): Unused.
        """
        del outputs, batch, batch_idx
        if self.trainer.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True

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
        return self._score(batch)

    def test_step(self, batch: Batch, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch; see :meth:`validation_step`."""
        del batch_idx, args, kwargs
        return self._score(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Score a batch; see :meth:`validation_step`."""
        del batch_idx, dataloader_idx
        return self._score(batch)

    def _score(self, batch: Batch) -> STEP_OUTPUT:
        # The networks' precision is their own, the same with every trainer; see ScoringPrecision.
        with torch.autocast(self.device.type, enabled=False):
            result: STEP_OUTPUT = batch.update(**self.model(batch.image)._asdict())
        return result

    @property
    def trainer(self) -> Trainer:
        """Lightning's trainer.

        Returns:
            Trainer: The one that this model is attached to.
        """
        trainer: Trainer = super().trainer
        return trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        # The one place where a model can still tell whether the user gave max_epochs: a moment later Lightning makes
        # it 1000. In trainer_arguments it would override what the user gave.
        AnomalibModule.trainer.fset(self, trainer)
        if (
            trainer is not None
            and trainer.state.fn == TrainerFn.FITTING
            and trainer.max_epochs is None
            and trainer.max_steps == -1
            and not any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        ):
            trainer.fit_loop.max_epochs = MAX_EPOCHS

    @property
    def cached_teacher(self) -> Callable[[torch.Tensor], dict[str, torch.Tensor]] | None:
        """The teacher of training and held-out images, whose features are computed once.

        Returns:
            Callable[[torch.Tensor], dict[str, torch.Tensor]] | None: Takes images ``(B, 3, H, W)`` and returns features
                by level. ``None`` without a cache.
        """
        return partial(self.cache.features, teacher=self.model.teacher_features) if self.cache else None

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add what happens besides the steps, in this order.

        Returns:
            Sequence[Callback]: The callbacks.
        """
        return [
            *super().configure_callbacks(),
            Checks(),
            ImageReading(),  # before anything asks for loaders
            DistributedSetup(),
            CosineSchedule(),
            FiniteLoss(self.student_selection.describe_kept),  # reads losses before the student is measured
            ScoringPrecision(self.student_selection),  # before the student that is kept gets its last validation
            *([PreciseBatchNorm(self.student_selection)] if self.student_selection.precise_bn else []),
            self.student_selection,
            *([self.cache] if self.cache else []),
            AllocatorTuning(),  # trims what the others free
        ]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the best student as the model's, and what resuming needs beside it.

        Args:
            checkpoint (dict[str, Any]): Lightning's checkpoint.
        """
        super().on_save_checkpoint(checkpoint)
        name_network(checkpoint, self.model)
        checkpoint[TRANSFORM_KEY] = getattr(self.pre_processor, "transform", None) is not None
        self.student_selection.save(checkpoint)
        if not self.save_teacher:
            leave_out(checkpoint, self.model.teacher_model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that network and teacher are the checkpoint's, and prepare to resume its fit.

        Args:
            checkpoint (dict[str, Any]): Lightning's checkpoint.

        Raises:
            ValueError: If network or teacher are others, or, in a fit, ``combine_at`` or ``lr_schedule``.
        """
        saved = check_network(checkpoint, self.model.teacher_model)
        self._keep_given(checkpoint)
        super().on_load_checkpoint(checkpoint)
        bring_back(checkpoint, self.model.teacher_model)
        restore_tiler(self.model, saved, must_match=self._is_fitting)
        self.model.level_weights = saved.get("level_weights")
        if self.asked_precision is None:
            self.model.precision = saved.get("precision", "float32")
        elif not self._is_fitting:
            tell_other(saved.get("precision", "float32"), self.asked_precision)
        if not self._is_fitting:
            self.student_selection.forget()
            return
        combine_at = saved.get("combine_at", self.model.combine_at)
        if combine_at != self.model.combine_at:  # held-out maps before and after could not be compared
            fail(ValueError, "combine_at", f"{combine_at} as in the checkpoint", self.model.combine_at)
        before = "cosine" if checkpoint.get("lr_schedulers") else "constant"
        if "lr_schedulers" in checkpoint and self.lr_schedule != before:
            fail(ValueError, "lr_schedule", f"{before} as in the checkpoint", self.lr_schedule)
        self.student_selection.resume(checkpoint)

    def _keep_given(self, checkpoint: dict[str, Any]) -> None:
        """Leave in force what was given beside the checkpoint, and say so; anomalib would replace it in silence."""
        before = {name: checkpoint.get(f"anomalib_{name}_config") for name in self._given}
        for name, saved in before.items():
            component: Any = getattr(self, name)
            if self._given[name] and saved is not None and hasattr(component, "checkpoint_config"):
                checkpoint[f"anomalib_{name}_config"] = component.checkpoint_config()
                if checkpoint[f"anomalib_{name}_config"] != saved:
                    rank_zero_warn(f"{name}: what was given is in force, and differs from the checkpoint's: {saved}")
        lost = before["pre_processor"] == {"transform": None} and checkpoint.get(TRANSFORM_KEY, True)
        if lost and not self._given["pre_processor"] and self.pre_processor:
            wanted = "the one of the training, since the checkpoint could not hold it (PreProcessor() for none)"
            fail(ValueError, "pre_processor", wanted, "none")

    @property
    def _is_fitting(self) -> bool:
        try:
            return self.trainer.state.fn == TrainerFn.FITTING
        except RuntimeError:  # Lightning's, of a model without a trainer
            return False

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Set up SGD, the paper's optimizer, for the student, and the schedule of its learning rate.

        Returns:
            OptimizerLRScheduler: SGD with the settings given to the model, alone or with a scheduler.
        """
        optimizer = torch.optim.SGD(
            self.model.student_model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        if self.lr_schedule == "constant":
            return optimizer
        scheduler = CosineAnnealingLR(optimizer, T_max=0)  # CosineSchedule sets it
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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

    def configure_post_processor(self) -> PostProcessor:
        """Normalise and threshold as anomalib does.

        Returns:
            PostProcessor: The post-processor.
        """
        return FewPassPostProcessor()

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Draw anomalib's pictures beside the scoring.

        Returns:
            ImageVisualizer: The visualiser.
        """
        return BackgroundImageVisualizer()

    def unfreeze(self) -> None:
        """Unfreeze the student; the teacher stays as it is."""
        super().unfreeze()
        self.model.teacher_model.freeze()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "StfpmExt":
        """Load a model from a Lightning checkpoint, teacher included: neither internet nor file of weights is needed.

        A checkpoint that was saved with ``save_teacher=False`` needs ``teacher_weights``, as for a new model.

        Args:
            checkpoint_path (str | Path): The checkpoint.
            args: As in ``AnomalibModule.load_from_checkpoint``.
            kwargs: Likewise.

        Returns:
            StfpmExt: The model.

        Raises:
            ValueError: If it is no checkpoint, or that of another network, or leaves the teacher out and
                ``teacher_weights`` is not that teacher.
        """
        kwargs.setdefault("teacher_weights", False)
        kwargs.setdefault("seed", None)  # of the training; the caller's random numbers are not ours
        kwargs.setdefault("inference_precision", None)  # the checkpoint says what was chosen
        kwargs.setdefault("image_size", None)  # the checkpoint brings the whole transform
        try:
            model: StfpmExt = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except Exception:
            if isinstance(checkpoint_path, str | Path) and Path(checkpoint_path).is_file():
                read_file("checkpoint_path", checkpoint_path, "a checkpoint", load_content)  # complains if that is it
            raise
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
