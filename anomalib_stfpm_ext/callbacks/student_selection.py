# SPDX-License-Identifier: Apache-2.0

"""Student selection: images that are held out of the training decide which epoch's student is kept."""

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ..checkpoints import NETWORK_KEY, STUDENT_PREFIX
from ..errors import fail
from ..selection.hold_out import check_share, hold_out
from ..selection.judge import Judge
from ..selection.students import Measurement, Students, check_strategy
from .finite_loss import fail_as_diverged, where
from .fit_resource import FitResource
from .verdicts import Verdicts

if TYPE_CHECKING:
    from torch import nn

    from ..torch_model import StfpmExtModel

CHECKPOINT_KEY = "stfpm_ext_held_out"
Selection = Literal["held_out_map", "synthetic"]


class StudentSelection(FitResource):
    """Holds good training images out, measures students on them and keeps the best, as the paper's authors do.

    The student is measured before each validation within a fit and at the end of each epoch, before checkpoints are
    saved and early stopping decides. A validation sees the student of its step, the averaged one if there is an
    average. Its threshold and range are kept with that student. Where no validation fell on the student that is kept,
    one follows at the end of the fit. Lightning does not ask callbacks about checkpoints of weights alone, so the model
    calls :meth:`save` and :meth:`resume`.

    Args:
        share (float): Share of the good training images that are held out, below 1; with 0 nothing is measured, and the
            averaged student counts as the best.
        seed (int): Says which ones.
        ema_decay (float | None): Decay of an exponential moving average of the student; ``None`` for no average. With
            share 0 and no average there is nothing to select: the last student is kept.
        selection (Selection): ``"held_out_map"`` keeps the student with the lowest mean anomaly map of the held-out
            images. ``"synthetic"`` keeps the one that finds most of the anomalies that are made into them, and weighs
            its levels by how many each one finds.
        precise_bn (bool): Whether :class:`.precise_batch_norm.PreciseBatchNorm` gives students their statistics, which
            cannot change within a fit. Defaults to ``True``.

    Attributes:
        students (Students | None): Those of this fit or the last one, if there was something to select.
        judge (Judge | None): Judges by the held-out images, while a fit lasts that has some.

    Raises:
        TypeError: If ``share`` or ``ema_decay`` is no number.
        ValueError: If one of them is out of range, or ``selection`` is none of these.
    """

    def __init__(
        self, share: float, seed: int, ema_decay: float | None, selection: Selection, precise_bn: bool = True
    ) -> None:
        check_share(share)
        check_decay(ema_decay)
        if selection not in get_args(Selection):
            fail(ValueError, "selection", f"one of {get_args(Selection)}", repr(selection))
        self.share, self.seed, self.ema_decay, self.selection = share, seed, ema_decay, selection
        self.precise_bn = precise_bn
        self.forget()

    def forget(self) -> None:
        """Forget the students of an earlier fit, since the model's student is now another."""
        self.students: Students | None = None
        self.judge: Judge | None = None
        self._num_images = 0
        self._split_seed = self.seed
        self._step = 0
        self._resumed: dict[str, Any] | None = None
        self._verdicts: Verdicts | None = None  # from the start of a fit
        self._network: StfpmExtModel | None = None  # likewise
        self._closing = False

    def __getstate__(self) -> dict[str, Any]:
        # An export is a pickle of the model: other students and images have no place in it.
        return {
            "share": self.share,
            "seed": self.seed,
            "ema_decay": self.ema_decay,
            "selection": self.selection,
            "precise_bn": self.precise_bn,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def history(self) -> list[Measurement]:
        """What was measured, in this order.

        Returns:
            list[Measurement]: The measurements; none without :attr:`students`.
        """
        return self.students.history if self.students else []

    @property
    def best(self) -> Measurement | None:
        """The measurement of the student that is kept.

        Returns:
            Measurement | None: See :func:`.selection.students.best_of`; ``None`` before the first.
        """
        return self.students.best if self.students else None

    def describe_kept(self) -> str:
        """Say which student would be left if the fit ended now.

        Returns:
            str: The student, for an error.
        """
        if not self.share:
            return "held_out_share is 0, so none is kept but in checkpoints"
        return f"that of epoch {self.best.epoch}" if self.best else "the one that the training began with"

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Read a checkpoint from which a fit goes on.

        Args:
            checkpoint (dict[str, Any]): Lightning's checkpoint.
        """
        self._resumed = checkpoint.get(CHECKPOINT_KEY)
        if self._resumed is None and self.share and checkpoint["global_step"]:
            rank_zero_warn(
                "held_out_share: the checkpoint comes from a training that held no images out. The selection starts "
                "now, on images that the student may have been trained on."
            )

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put the best student into the checkpoint's state dict, and what resuming needs beside it.

        Args:
            checkpoint (dict[str, Any]): Lightning's checkpoint, which is changed.
        """
        if self._verdicts is not None:
            self._verdicts.write(checkpoint, self._kept_step)
        if self.students is None:
            return
        best = self.students.best_tensors()
        checkpoint["state_dict"].update({STUDENT_PREFIX + name: tensor for name, tensor in best.items()})
        if self.best:
            checkpoint[NETWORK_KEY]["level_weights"] = self.best.level_weights
        checkpoint[CHECKPOINT_KEY] = {
            "share": self.share,
            "seed": self._split_seed,
            "images": self._num_images,
            "epoch": self.best and self.best.epoch,
            "held_out_map": self.best and self.best.value,
            "synthetic_AUROC": self.best and self.best.synthetic_auroc,
            "selection": self.selection,
            "ema_decay": self.ema_decay,
            "precise_bn": self.precise_bn,
            "random_state": torch.get_rng_state(),
            **self.students.state(),
        }

    def validate_again(self) -> None:
        """Have the student that is kept validated at the end of the fit, since its scores will be others."""
        if self._verdicts is not None:
            self._verdicts.keep_none()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        del trainer, pl_module
        if stage == TrainerFn.FITTING:
            self.forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the held-out images out of the training, before Lightning asks for the loader.

        Raises:
            ValueError: If images cannot be held out, or settings are not those of the checkpoint that is resumed.
        """
        resumed, self._resumed = self._resumed, None
        if resumed:
            if self.share and "selection" not in resumed and self.selection != "held_out_map":
                self.selection = "held_out_map"
                rank_zero_info("selection: the checkpoint is of a version that knew held_out_map alone, which goes on.")
            self._check_settings(resumed)
        model: Any = pl_module
        self._verdicts, self._network = Verdicts(model.post_processor), model.model
        if self.share or self.ema_decay is not None:
            self._start(trainer, model.model.student_model, resumed)
        if trainer.ckpt_path is not None:
            self._verdicts.keep(self._kept_step)  # the checkpoint's, which are of the student that it keeps

    def _start(self, trainer: Trainer, network: "nn.Module", resumed: dict[str, Any] | None) -> None:
        """Hold images out, and begin with the students, or go on with those of a checkpoint."""
        argument, otherwise = ("held_out_share", "0 to hold nothing out") if self.share else ("ema_decay", "None")
        check_strategy(trainer, argument, otherwise)
        if resumed:
            self._split_seed = resumed["seed"]  # the same images as before
        if self.share:
            self._num_images, loader = hold_out(trainer, self.share, self._split_seed)
            self.judge = Judge(loader, self._num_images, self.selection == "synthetic")
        if resumed and resumed["images"] != self._num_images:
            wanted = f"{resumed['images']} held-out images as in the checkpoint"
            fail(ValueError, "held_out_share", wanted, self._num_images)
        self.students = Students(network, bool(self.share), self.ema_decay, trainer.world_size > 1, resumed)
        if resumed:
            torch.set_rng_state(resumed["random_state"])  # so that the images come in the order of an unbroken run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of the steps of a fit that is resumed, which Lightning restores only now."""
        del pl_module
        belong = self._verdicts is not None and self._verdicts.belong_to(self._kept_step)
        self._step = trainer.global_step
        if self._verdicts is not None and belong:
            self._verdicts.keep(self._kept_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the averaged student follow where a step was made."""
        del outputs, batch, batch_idx
        if trainer.global_step > self._step:
            if self.students:
                self.students.update_average(trainer.global_step)
            if not self.share:  # nothing will weigh this student's levels, and what did was another's
                model: Any = pl_module
                model.model.level_weights = None
        self._step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the student, and validate it."""
        if self._is_validating(trainer) and self.students and not self._closing:
            self._measure(trainer, pl_module)
            self.students.swap_average()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep threshold and range if the student is kept, and go on with the student in training."""
        del pl_module
        if self._is_validating(trainer) and self._verdicts is not None:
            if self.students and not self._closing:
                self.students.swap_average()
            if self._closing or self._kept_step == trainer.global_step:
                self._verdicts.keep(self._kept_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the student, unless a validation has since its last step.

        Raises:
            FloatingPointError: If the measurement is not finite.
        """
        if self.students:
            self._measure(trainer, pl_module, prog_bar=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best student, and validate it if no validation has."""
        self.release()
        if self.best and self.best.synthetic_auroc is not None:
            rank_zero_info(
                f"selection: the student of epoch {self.best.epoch} is kept, with an AUROC of "
                f"{self.best.synthetic_auroc:.3f} on synthetic anomalies and a mean held-out map of "
                f"{self.best.value:.3g}; the last has {self.history[-1].synthetic_auroc:.3f} and "
                f"{self.history[-1].value:.3g}. {self._describe_levels()}"
            )
        if self._verdicts is not None and not self._verdicts.belong_to(self._kept_step):
            self._validate_kept(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the best student, unless that needs other processes: they may not have met with an exception."""
        if self.share or trainer.world_size == 1:
            super().on_exception(trainer, pl_module, exception)

    def release(self) -> None:
        """Leave the best student in the network, with its threshold and range, and release the images."""
        if self.students:
            self.students.show(best=True)
        if self._network is not None and self.best:
            self._network.level_weights = self.best.level_weights
        if self._verdicts is not None:
            self._verdicts.restore(self._kept_step)
        self.judge = None

    def _describe_levels(self) -> str:
        """Say what the levels of the student that is kept count."""
        assert self._network is not None
        weights = self.best and self.best.level_weights
        if not weights:
            return "No level finds them alone, so all count the same."
        named = zip(self._network.teacher_model.layers, weights, strict=True)
        return f"Exponents of its levels: {', '.join(f'{name} {weight:.2f}' for name, weight in named)}."

    @property
    def _kept_step(self) -> int | None:
        """The step of the student that would be kept if the fit ended now."""
        if not self.share:
            return self._step
        return self.best.step if self.best else None

    def _is_validating(self, trainer: Trainer) -> bool:
        return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def _validate_kept(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the student that is kept, in the network, as Lightning's loop does within an epoch."""
        assert self._verdicts is not None
        model: Any = pl_module
        if trainer.enable_validation:
            training = pl_module.training
            self._closing = trainer.validating = True
            try:
                trainer.fit_loop.epoch_loop.val_loop.run()
            finally:
                self._closing, trainer.training = False, True
                pl_module.train(training)
        if self._verdicts.belong_to(self._kept_step):
            self._verdicts.complete_files(trainer, model.model, self._kept_step)
        else:
            rank_zero_warn(
                "post_processor: no validation has set a threshold for the student that is kept, so predictions have "
                "no verdict. Validate the model with good and defective images."
            )

    def _check_settings(self, resumed: dict[str, Any]) -> None:
        """Raise an error unless the fit goes on with the settings that it began with."""
        for argument, before, now in (
            ("held_out_share", resumed["share"], self.share),
            ("ema_decay", resumed.get("ema_decay"), self.ema_decay),
            ("selection", resumed.get("selection", "held_out_map"), self.selection),
            ("precise_bn", resumed.get("precise_bn", self.precise_bn), self.precise_bn),  # older versions knew none
        ):
            if before != now:
                fail(ValueError, argument, f"{before} as in the checkpoint", now)

    def _measure(self, trainer: Trainer, pl_module: LightningModule, prog_bar: bool = False) -> None:
        """Measure the student, unless no step was made since the last time, and log the result."""
        if not (self.students and self.judge):
            return
        model: Any = pl_module
        if not self.history or self.history[-1].step != trainer.global_step:
            with self.students.measuring():
                value, auroc, weights = self.judge.measure(trainer, model)
                if not math.isfinite(value + (auroc or 0)):
                    of_anomalies = "" if auroc is None else f" and an AUROC of synthetic anomalies of {auroc}"
                    got = f"a mean anomaly map of the held-out images of {value}{of_anomalies}"
                    fail_as_diverged(got, where(trainer), self.describe_kept())
                self.students.add(Measurement(trainer.current_epoch, trainer.global_step, value, auroc, weights))
        last = self.history[-1]
        model.model.level_weights = last.level_weights  # for the validation that may follow
        pl_module.log("held_out_map", last.value, prog_bar=prog_bar, sync_dist=True)
        if last.synthetic_auroc is not None:
            pl_module.log("synthetic_AUROC", last.synthetic_auroc, prog_bar=prog_bar, sync_dist=True)


def check_decay(decay: float | None) -> None:
    """Check the decay of the exponential moving average.

    Args:
        decay (float | None): The decay.

    Raises:
        TypeError: If it is neither a number nor ``None``.
        ValueError: If it is not in (0, 1).
    """
    wanted = "a decay above 0 and below 1, or None for no average"
    if decay is None:
        return
    if isinstance(decay, bool) or not isinstance(decay, int | float):
        fail(TypeError, "ema_decay", wanted, repr(decay))
    if not 0 < decay < 1:
        fail(ValueError, "ema_decay", wanted, decay)
