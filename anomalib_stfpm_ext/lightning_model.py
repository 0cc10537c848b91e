# SPDX-License-Identifier: Apache-2.0

"""StfpmExt, the model that anomalib trains, tests and exports."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

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
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchvision.transforms.v2 import Compose, Normalize, Resize

from ._compat import replace_layer_sync
from .callbacks.allocator import AllocatorTuning, HeldForFit
from .callbacks.distributed import StudentSync, share_images
from .callbacks.hold_out import check_share
from .callbacks.student_selection import CHECKPOINT_KEY, STUDENT_PREFIX, StudentSelection, check_decay, check_resumed
from .callbacks.teacher_cache import CacheLocation, TeacherCache
from .checkpoints import bring_back, leave_out, load_content
from .errors import fail
from .loss import StfpmExtLoss
from .torch_model import CompileMode, StfpmExtModel
from .weights import read_file

MAX_EPOCHS = 100
NETWORK_KEY = "stfpm_ext_network"  # of a checkpoint


class PendingLoss(NamedTuple):
    """A loss on its way from the device, so that nobody waits for the device until the loss is read."""

    value: torch.Tensor
    arrived: torch.cuda.Event | None
    where: str

    @classmethod
    def send(cls, loss: torch.Tensor, where: str) -> "PendingLoss":
        """Start the copy of a loss of the step at ``where``."""
        if not loss.is_cuda:
            return cls(loss, None, where)
        value = loss.to("cpu", non_blocking=True)  # pinned
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(loss.device))
        return cls(value, arrived, where)

    def read(self) -> float:
        """Wait for the loss, and return it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return float(self.value)


class SelectionOfFit(HeldForFit):
    """Leaves the best student in the model where a fit ends by an exception, or before its first step.

    Args:
        model (StfpmExt): The model.
    """

    def __init__(self, model: "StfpmExt") -> None:
        self.model = model

    def release(self) -> None:
        """Keep the best student."""
        self.model.on_train_end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the best student, unless that takes the other processes, which may be elsewhere."""
        if self.model.held_out_share or trainer.world_size == 1:
            super().on_exception(trainer, pl_module, exception)


def unread_losses(device: torch.device) -> int:
    """Return how many losses may be on their way: on CUDA the last, since reading it would wait for its step."""
    return 1 if device.type == "cuda" else 0


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
        combine_at (str): Where the levels' maps are multiplied: ``"image"``, at the image's size as in the paper, or
            ``"finest"``, at that of the finest level, after which the product is stretched to the image's, as in the
            authors' code. Defaults to ``"image"``.
        lr (float): Learning rate of SGD. Defaults to ``0.4``, as in the paper.
        momentum (float): Momentum of SGD. Defaults to ``0.9``, as in the paper.
        weight_decay (float): Weight decay of SGD. Defaults to ``1e-4``, as in the paper.
        held_out_share (float): Share of the good training images that the student never trains on. After every epoch,
            and before a validation within one, the mean anomaly map on them is measured; the student for which it is
            lowest is the one that is validated, saved, tested and kept. Where anomalib's data module splits its
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
        pre_processor (PreProcessor | bool): Transforms the images. ``True``: resizes to 256x256 and normalises as
            the teacher was trained. Defaults to ``True``.
        post_processor (PostProcessor | bool): Normalises and thresholds maps and scores. ``True``: anomalib's
            default. Defaults to ``True``.
        evaluator (Evaluator | bool): Computes the metrics. ``True``: anomalib's default. Defaults to ``True``.
        visualizer (Visualizer | bool): Draws the results. ``True``: anomalib's default. Defaults to ``True``.

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
        lr: float = 0.4,
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
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_share(held_out_share)
        check_decay(ema_decay)
        if lr_schedule not in ("constant", "cosine"):
            fail(ValueError, "lr_schedule", "constant or cosine", repr(lr_schedule))
        for argument, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if isinstance(value, bool) or not isinstance(value, Real):
                fail(TypeError, argument, "a number", repr(value))
            if not 0 <= value < math.inf:
                fail(ValueError, argument, "a finite number of at least 0", value)
        if isinstance(seed, bool) or not isinstance(seed, Integral | None):
            fail(TypeError, "seed", "a whole number or None", repr(seed))
        if seed is not None:
            seed_everything(seed, workers=True)
        model = StfpmExtModel(backbone, layers, teacher_weights, combine_at, compile_mode)
        if pre_processor is True:
            config = timm.get_pretrained_cfg(backbone)
            pre_processor = self.configure_pre_processor(mean=config.mean, std=config.std)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.model = model
        self.loss = StfpmExtLoss()
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.held_out_share, self.seed = held_out_share, seed
        if not isinstance(save_teacher, bool):
            fail(TypeError, "save_teacher", "True or False", repr(save_teacher))
        self.save_teacher = save_teacher
        if teacher_cache is None and teacher_cache_half:
            fail(ValueError, "teacher_cache_half", "False where teacher_cache is None", teacher_cache_half)
        self.cache = None if teacher_cache is None else TeacherCache(teacher_cache, teacher_cache_half)
        self.lr_schedule, self.ema_decay = lr_schedule, ema_decay
        self.choice: StudentSelection | None = None
        self._losses: deque[PendingLoss] = deque()
        self._resumed_choice: dict[str, Any] | None = None

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
        teacher, student = self.model(batch.image, self.cached_teacher)
        loss = self.loss(teacher, student)
        self.log("train_loss", loss, on_epoch=True, prog_bar=True, batch_size=len(batch.image), sync_dist=True)
        return {"loss": loss}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make a step, and let the averaged student follow.

        Args:
            args: As in Lightning's ``optimizer_step``.
            kwargs: Likewise.
        """
        super().optimizer_step(*args, **kwargs)
        if self.choice:
            self.choice.update_average(self.trainer.global_step + 1)

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int) -> None:
        """Stop where the loss is not finite; on CUDA one step later, since nothing waits for the step at work.

        Args:
            outputs (STEP_OUTPUT): What the training step returned.
            batch (Batch): Unused.
            batch_idx (int): Unused.

        Raises:
            FloatingPointError: If the loss is not finite in one of the processes.
        """
        del batch, batch_idx
        loss: torch.Tensor = outputs["loss"].detach()  # type: ignore[index]
        if self.trainer.world_size > 1:  # all processes stop at the same step
            loss = loss.clone()
            torch.distributed.all_reduce(loss)
        self._losses.append(PendingLoss.send(loss, self._where()))
        self._check_losses(unread_losses(loss.device))
        if self.trainer.global_step == self.trainer.max_steps:
            # Or else Lightning leaves out the validation, and so the threshold, where the steps end within an epoch.
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

    def setup(self, stage: str) -> None:
        """Forget the choice of a fit before, and prepare for several processes.

        Args:
            stage (str): What the trainer is about to do.
        """
        if stage == TrainerFn.FITTING:
            self.choice = self._resumed_choice = None
            self._losses.clear()
            replace_layer_sync(self.trainer, TorchSyncBatchNorm, StudentSync())
        elif stage in (TrainerFn.VALIDATING, TrainerFn.TESTING) and self.trainer.world_size > 1:
            share_images(self.trainer)

    def on_fit_start(self) -> None:
        """Hold images out, before Lightning asks for the training images.

        Raises:
            ValueError: If images cannot be held out, or settings are not those of the checkpoint that is resumed.
        """
        self._check_teacher()
        if self._resumed_choice:
            check_resumed(self._resumed_choice, self.held_out_share, self.ema_decay)
        if self.held_out_share or self.ema_decay is not None:
            student = self.model.student_model
            self.choice = StudentSelection(student, self.held_out_share, self.seed or 0, self.ema_decay)
            self.choice.start(self.trainer, self._resumed_choice)
        self._resumed_choice = None

    def on_test_start(self) -> None:
        """Warn of a teacher without weights."""
        self._check_teacher()

    def on_predict_start(self) -> None:
        """Warn of a teacher without weights."""
        self._check_teacher()

    @property
    def cached_teacher(self) -> Callable[[torch.Tensor], dict[str, torch.Tensor]] | None:
        """The teacher of training and held-out images, whose features are computed once.

        Returns:
            Callable[[torch.Tensor], dict[str, torch.Tensor]] | None: Takes images ``(B, 3, H, W)`` and returns features
                by level. ``None`` without a cache.
        """
        return partial(self.cache.features, teacher=self.model.teacher_features) if self.cache else None

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add what lasts as long as a fit: student selection, the teacher cache, allocator tuning.

        Returns:
            Sequence[Callback]: The callbacks.
        """
        # Allocator tuning comes last: it trims what the others free.
        held = [SelectionOfFit(self), *([self.cache] if self.cache else []), AllocatorTuning()]
        return [*super().configure_callbacks(), *held]

    def on_train_start(self) -> None:
        """Stretch the cosine over the training, whose steps are known only now that images are held out.

        Raises:
            ValueError: If the number of steps is not known, or not that of the checkpoint that is resumed.
        """
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, CosineAnnealingLR):
                steps, before = self.trainer.estimated_stepping_batches, config.scheduler.T_max
                if not 0 < steps < math.inf:
                    wanted = "constant, or a trainer that knows its number of steps (max_epochs, max_steps)"
                    fail(ValueError, "lr_schedule", wanted, self.lr_schedule)
                if before not in (0, steps):
                    fail(ValueError, "lr_schedule", f"a training of {before} steps as in the checkpoint", steps)
                config.scheduler.T_max = int(steps)

    def on_validation_start(self) -> None:
        """Validate the best student: threshold and normalisation, which are saved with it, must be its own."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._check_teacher()
        if self.choice and self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            if self.held_out_share:
                self.log("held_out_map", self._measure(self.choice), sync_dist=True)
            self.choice.show(best=True)

    def on_validation_end(self) -> None:
        """Go on with the student in training."""
        if self.choice and self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.choice.show(best=False)

    def on_train_epoch_end(self) -> None:
        """Measure the student, unless the validation has, before checkpoints are saved and early stopping decides.

        Raises:
            FloatingPointError: If a loss of the epoch or the measurement is not finite.
        """
        self._check_losses()
        if self.choice and self.held_out_share:
            self.log("held_out_map", self._measure(self.choice), prog_bar=True, sync_dist=True)

    def on_train_end(self) -> None:
        """Keep the best student."""
        if self.choice:
            self.choice.finish()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the best student as the model's, and what resuming needs beside it.

        Args:
            checkpoint (dict[str, Any]): Lightning's checkpoint.
        """
        super().on_save_checkpoint(checkpoint)
        network = self.model.teacher_model
        checkpoint[NETWORK_KEY] = {
            "backbone": network.backbone,
            "layers": network.layers,
            "combine_at": self.model.combine_at,
        }
        if self.choice:
            self.choice.save(checkpoint)
        if not self.save_teacher:
            leave_out(checkpoint, self.model.teacher_model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume the choice of the student where a fit is resumed, and check the teacher that a checkpoint only names.

        Args:
            checkpoint (dict[str, Any]): Lightning's checkpoint.

        Raises:
            ValueError: If this model's teacher is another.
        """
        super().on_load_checkpoint(checkpoint)
        if not any(name.startswith(STUDENT_PREFIX) for name in checkpoint["state_dict"]):
            fail(ValueError, "checkpoint", "one of StfpmExt or Stfpm", "another model's, without a student")
        # Lightning writes what load_from_checkpoint is given over the hyperparameters.
        saved = checkpoint.get(NETWORK_KEY) or checkpoint.get("hyper_parameters", {})
        self._check_network(saved)
        bring_back(checkpoint, self.model.teacher_model)
        if not self._is_fitting:
            self.choice = None  # that of a fit before; the student is now another
            return
        combine_at = saved.get("combine_at", self.model.combine_at)
        if combine_at != self.model.combine_at:  # held-out maps before and after could not be compared
            fail(ValueError, "combine_at", f"{combine_at} as in the checkpoint", self.model.combine_at)
        before = "cosine" if checkpoint.get("lr_schedulers") else "constant"
        if "lr_schedulers" in checkpoint and self.lr_schedule != before:
            fail(ValueError, "lr_schedule", f"{before} as in the checkpoint", self.lr_schedule)
        self._resumed_choice = checkpoint.get(CHECKPOINT_KEY)
        if self._resumed_choice is None and self.held_out_share and checkpoint["global_step"]:
            rank_zero_warn(
                "held_out_share: the checkpoint comes from a training that held no images out. The choice starts now, "
                "on images that the student may have been trained on."
            )

    @property
    def _is_fitting(self) -> bool:
        try:
            return self.trainer.state.fn == TrainerFn.FITTING
        except RuntimeError:  # Lightning's, of a model without a trainer
            return False

    def __getstate__(self) -> dict[str, Any]:
        # An export is a pickle of the model: the student in training and images have no place in it.
        return {**super().__getstate__(), "choice": None, "_losses": deque()}

    def _check_network(self, saved: Mapping[str, Any]) -> None:
        """Raise an error unless the checkpoint's network, if it names one, is this one."""
        network = self.model.teacher_model
        backbone, layers = saved.get("backbone", network.backbone), saved.get("layers", network.layers)
        if backbone.partition(".")[0] != network.backbone.partition(".")[0]:  # the weights' tag may be another
            fail(ValueError, "backbone", f"{backbone} as in the checkpoint", network.backbone)
        if list(layers) != network.layers:
            fail(ValueError, "layers", f"{list(layers)} as in the checkpoint", network.layers)

    def _check_teacher(self) -> None:
        if self.model.teacher_model.is_random:
            rank_zero_warn(
                "teacher_weights: wanted True, a file, or a checkpoint that brings them, got False and no checkpoint: "
                "the teacher is random, and so is what it finds."
            )

    def _check_losses(self, unread: int = 0) -> None:
        while len(self._losses) > unread:
            loss = self._losses.popleft()
            value = loss.read()
            if not math.isfinite(value):
                self._stop(f"a loss of {value}", loss.where)

    def _measure(self, choice: StudentSelection) -> float:
        self._check_losses()
        value = choice.measure(self.trainer, self)
        if not math.isfinite(value):
            self._stop(f"a mean anomaly map of the held-out images of {value}", self._where())
        return value

    def _where(self) -> str:
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        return f"at step {self.trainer.global_step}, epoch {self.trainer.current_epoch}, learning rate {lr}"

    def _stop(self, got: str, where: str) -> NoReturn:
        kept = "held_out_share is 0, so none is kept but in checkpoints"
        if self.choice and self.held_out_share:
            self.choice.finish()
            best = self.choice.best
            kept = f"that of epoch {best.epoch}" if best else "the one that the training began with"
        fail(
            FloatingPointError,
            "lr",
            "a learning rate with which training stays finite",
            f"{got} {where}. Last good student: {kept}",
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Set up the paper's SGD for the student, and the schedule of its learning rate.

        Returns:
            OptimizerLRScheduler: SGD with the settings given to the model, alone or with a scheduler.
        """
        optimizer = torch.optim.SGD(
            self.model.student_model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        if self.lr_schedule == "constant":
            return optimizer
        scheduler = CosineAnnealingLR(optimizer, T_max=0)  # on_train_start knows
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

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export the model for torch, frozen: anomalib's ``TorchInferencer`` leaves gradients enabled.

        Args:
            args: As in ``AnomalibModule.to_torch``.
            kwargs: Likewise.

        Returns:
            Path: The exported file.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            path: Path = super().to_torch(*args, **kwargs)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
        return path

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
