# SPDX-License-Identifier: Apache-2.0

"""Student selection: images that are held out of the training decide which epoch's student is kept."""

import math
from typing import TYPE_CHECKING, Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torchmetrics import Metric

from ..choices import Selection
from ..errors import fail
from ..selection.hold_out import check_share, hold_out
from ..selection.judge import Judge
from ..selection.record import Measurement, Record, forget_verdict, has_verdict
from ..selection.students import Students
from ..selection.thresholds import set_verdict
from ..selection.trial import Choice, choose_precision
from .distributed import check_strategy, share_statistics
from .finite_loss import fail_as_diverged, where

if TYPE_CHECKING:
    from ..inference.precision import Precision
    from ..lightning_model import StfpmExt


class StudentSelection(Callback):
    """Holds good training images out, measures students on them and keeps the best, as the paper's authors do.

    The student is measured before each validation within a fit and at the end of each epoch, before checkpoints are
    saved and early stopping decides. A validation sees the student of its step, and sets its threshold and range. A
    kept student without them gets them when a checkpoint is written, or when the fit ends.

    Args:
        share (float): Share of the good training images that are held out, below 1; with 0 nothing is measured, and the
            last student is kept.
        seed (int): Seed of their choice.
        selection (Selection): ``"held_out_map"`` keeps the student with the lowest mean anomaly map of the held-out
            images. ``"synthetic"`` keeps the one that finds most of the synthetic anomalies in them, and weights its
            levels by how well each of them finds these.

    Attributes:
        students (Students | None): The students of this fit or the last one, if it holds images out.
        judge (Judge | None): Measures students on the held-out images, while a fit runs that has some.
        is_fitting (bool): Whether a fit runs.

    Raises:
        TypeError: If ``share`` is no number.
        ValueError: If it is out of range, or ``selection`` is none of these.
    """

    def __init__(self, share: float, seed: int, selection: Selection) -> None:
        check_share(share)
        if selection not in get_args(Selection):
            fail(ValueError, "selection", f"one of {get_args(Selection)}", repr(selection))
        self.share, self.seed, self.selection = share, seed, selection
        self.forget()

    def forget(self) -> None:
        """Forget the students of an earlier fit, since the model's student is now another."""
        self.students: Students | None = None
        self.judge: Judge | None = None
        self.split_seed = self.seed
        self._before: Record | None = None  # the student that a fit begins with, until its first step
        self._resumed: dict[str, Any] | None = None
        self._choice: Choice | None = None  # of precision, for the kept student
        self.is_fitting = False  # also while a finder of Lightning's makes steps
        self._is_validating = False  # while the post-processor gathers the scores of a validation
        self._validated_step: int | None = None  # of the latest kept student that was validated
        self._saved_step: int | None = None  # of the latest student in a checkpoint

    def __getstate__(self) -> dict[str, Any]:
        # An export is a pickle of the model, and needs neither other students nor images.
        return {"share": self.share, "seed": self.seed, "selection": self.selection}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["share"], state["seed"], state.get("selection", "held_out_map"))  # type: ignore[misc]

    @property
    def history(self) -> list[Measurement]:
        """All measurements, in order of time; none without :attr:`students`."""
        return self.students.history if self.students else []

    @property
    def best(self) -> Measurement | None:
        """The measurement of the kept student, see :func:`.best_of`; ``None`` before the first."""
        return self.students.best if self.students else None

    def describe_kept(self) -> str:
        """Say which student would be left if the fit ended now.

        Returns:
            str: The student, for an error.
        """
        if not self.share:
            return "held_out_share is 0, so none is kept but in checkpoints"
        return f"that of epoch {self.best.epoch}" if self.best else "the one that the training began with"

    def resume(self, fit: dict[str, Any] | None, step: int) -> None:
        """Go on with the students of a checkpoint when the fit starts.

        Args:
            fit (dict[str, Any] | None): What :meth:`state` returned; ``None`` for a fit that held nothing out.
            step (int): Number of training steps that the checkpoint has behind it.
        """
        self._before, self._resumed, self._saved_step = None, fit, step
        if fit and self.share and "selection" not in fit and self.selection != "held_out_map":
            self.selection = "held_out_map"
            rank_zero_info("selection: the checkpoint's version had held_out_map alone, so the fit goes on with that.")
        if fit is None and self.share and step:
            rank_zero_warn(
                "held_out_share: the checkpoint comes from a training that held no images out. The selection starts "
                "now, on images that the student may have been trained on."
            )

    def state(self) -> dict[str, Any] | None:
        """Return what resuming needs besides the kept student; ``None`` if nothing was held out."""
        if self.students is None:
            return None
        return {
            "share": self.share,
            "seed": self.split_seed,
            "images": self._num_images,
            "epoch": self.best and self.best.epoch,
            "held_out_map": self.best and self.best.value,
            "synthetic_AUROC": self.best and self.best.synthetic_auroc,
            "selection": self.selection,
            "random_state": torch.get_rng_state(),
            **self.students.state(),
        }

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit, and what an aborted stage has left in metrics."""
        del trainer
        model: Any = pl_module
        for metric in model.modules():
            if isinstance(metric, Metric):
                metric.reset()
        if stage == TrainerFn.FITTING:
            self.forget()
            self._before = Record.take(model)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the held-out images out of the training, before Lightning asks for the loader.

        Raises:
            ValueError: If images cannot be held out, or not as many as in the checkpoint that is resumed.
        """
        model: Any = pl_module
        self.is_fitting = True
        if self._before is None and not self._saved_step:  # a finder has taken its steps back
            self._before = Record.take(model)
        resumed, self._resumed = self._resumed, None
        if not self.share:
            return
        check_strategy(trainer, "held_out_share", "0 to hold nothing out")
        if resumed:
            self.split_seed = resumed["seed"]  # the same images as before
        number, loader = hold_out(trainer, self.share, self.split_seed)
        if resumed and resumed["images"] != number:
            fail(ValueError, "held_out_share", f"{resumed['images']} held-out images as in the checkpoint", number)
        precision: Precision = "float32" if model.inference_precision == "auto" else model.model.precision
        self._num_images = number
        self.judge = Judge(loader, number, self.selection == "synthetic", precision)
        self.students = Students(model, self._before, resumed)
        if resumed:
            self._saved_step = self.best and self.best.step
            torch.set_rng_state(resumed["random_state"])  # so that the images come in the order of an unbroken run

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Reset exponents, threshold and range before a step: a callback may save the student that it makes."""
        del trainer, optimizer
        forget_verdict(pl_module)  # type: ignore[arg-type]
        self._before = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the student before it is validated."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._measure(trainer, pl_module)
            self._is_validating = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record threshold and range if this student is the kept one; callbacks may save it next."""
        del pl_module
        self._is_validating = False
        if trainer.state.fn == TrainerFn.FITTING and self.best and self.best.step == trainer.global_step:
            assert self.students is not None
            self.students.take_again()
            self._validated_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the student, unless a validation has measured it since its last step.

        Raises:
            FloatingPointError: If the measurement is not finite.
        """
        self._measure(trainer, pl_module, prog_bar=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the kept student in the network, with threshold and range, and say which one it is."""
        model: Any = pl_module
        if not self.is_fitting:
            return
        if self.students:
            self.students.show_kept()
        self._complete(trainer, model, self.best.step if self.best else trainer.global_step)
        if self.best and self.best.synthetic_auroc is not None:
            rank_zero_info(
                f"selection: the student of epoch {self.best.epoch} is kept, with an AUROC of "
                f"{self.best.synthetic_auroc:.3f} on synthetic anomalies and a mean held-out map of "
                f"{self.best.value:.3g}; the last has {self.history[-1].synthetic_auroc:.3f} and "
                f"{self.history[-1].value:.3g}. {_describe_levels(model)}"
            )
        if self._choice:
            rank_zero_info(f"Inference: {self._choice.reason}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the kept student even if nothing was left to train; warn of what was not trained or not saved."""
        step = self.best.step if self.best else trainer.global_step
        if trainer.checkpoint_callbacks and self._saved_step != step and not self._before:
            rank_zero_warn(
                "ModelCheckpoint: it wrote no checkpoint after the student that is kept (see check_val_every_n_epoch, "
                "every_n_epochs, monitor), which is in the model alone. trainer.save_checkpoint(path) saves it."
            )
        if self._before:
            rank_zero_warn(
                "fit: no step was made (see max_epochs, max_steps, max_time, limit_train_batches), so the student is "
                "what it was before: untrained, unless it was loaded."
            )
        self._leave_kept(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the kept student where an exception ends the fit; other processes, which may go on, are not asked."""
        del exception
        if trainer.state.fn == TrainerFn.FITTING:
            self._leave_kept(pl_module)

    def before_saving(self, model: "StfpmExt") -> dict[str, torch.Tensor]:
        """During a fit, give the kept student threshold and range if it lacks them, and return what to save.

        Args:
            model (StfpmExt): The model.

        Returns:
            dict[str, torch.Tensor]: Tensors to save instead of those in the network, by their names in the state dict.
        """
        self._saved_step = self.best.step if self.best else model.global_step
        if self.judge is None or self.students is None or self.best is None:
            return {}
        if self._validated_step != self.best.step and not self._is_validating:
            with self.students.kept_in_network():
                self._complete(model.trainer, model, self.best.step)
        return self.students.to_save()

    def _complete(self, trainer: Trainer, model: "StfpmExt", step: int) -> None:
        """Give the student in the network threshold and range, unless it has them or was validated already."""
        if not has_verdict(model) and self._validated_step != step:
            set_verdict(trainer, model)
        self._validated_step = step

    def _leave_kept(self, module: Any) -> None:
        if self.students:
            self.students.show_kept()
        elif self._before:  # no step was made
            self._before.put(module)
        if self.is_fitting and not has_verdict(module):
            rank_zero_warn(
                "post_processor: no validation has set a threshold for the student that is kept, so predictions have "
                "no verdict. Validate the model with good and defective images."
            )
        self.judge, self.is_fitting = None, False

    def _measure(self, trainer: Trainer, module: Any, prog_bar: bool = False) -> None:
        """Measure the student, if a step was made since the last time, and log the result."""
        if not (self.students and self.judge):
            return
        if not self.history or self.history[-1].step != trainer.global_step:
            share_statistics(trainer, module.model.student_model)
            measurement = self.judge.measure(trainer, module)
            value, auroc = measurement.value, measurement.synthetic_auroc
            if not math.isfinite(value + (auroc or 0)):
                of_anomalies = "" if auroc is None else f" and an AUROC of synthetic anomalies of {auroc}"
                got = f"a mean anomaly map of the held-out images of {value}{of_anomalies}"
                fail_as_diverged(got, where(trainer), self.describe_kept())
            if self.students.add(measurement) and module.inference_precision == "auto":
                self._choice = choose_precision(self.judge, trainer, module)
        last = self.history[-1]
        chosen = self._choice.precision if self._choice and last is self.best else self.judge.precision
        module.model.score_by(last.level_weights, chosen)
        if last is self.best:
            self.students.take_again()
        module.log("held_out_map", last.value, prog_bar=prog_bar, sync_dist=True)
        if last.synthetic_auroc is not None:
            module.log("synthetic_AUROC", last.synthetic_auroc, prog_bar=prog_bar, sync_dist=True)


def _describe_levels(model: Any) -> str:
    """Describe the exponents of the levels of the student in the network."""
    weights = model.model.level_weights
    if not weights:
        return "No level finds them alone, so all count the same."
    named = zip(model.model.teacher_model.layers, weights, strict=True)
    return f"Exponents of its levels: {', '.join(f'{name} {weight:.2f}' for name, weight in named)}."
