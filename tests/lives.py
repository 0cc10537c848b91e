# SPDX-License-Identifier: Apache-2.0

"""What a life of a model needs: a world of images, accidents, and ways to ask what a model makes of an image."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import timm
import torch
from anomalib.data import Folder
from helpers import folder
from lightning.pytorch import Callback, Trainer
from PIL import Image

from anomalib_stfpm_ext import Predictor, StfpmExt
from anomalib_stfpm_ext.checkpoints import checksum
from anomalib_stfpm_ext.data.images import read_image
from anomalib_stfpm_ext.torch_model import StfpmExtModel

SIZE, BATCH_SIZE = (48, 64), 4


class World(NamedTuple):
    """What all lives share.

    Attributes:
        teacher (Path): Weights of the teacher.
        data (dict[str, Folder]): ``"line"``; ``"other"`` has other noise and other defects, ``"few"`` fewer images.
        shown (Path): Folder of the images that every form of a model is asked about.
    """

    teacher: Path
    data: dict[str, Folder]
    shown: Path

    @classmethod
    def make(cls, root: Path) -> "World":
        rng = np.random.default_rng(0)

        def make_images(target: Path, count: int, noise: float, defect: tuple[int, int, int] | None = None) -> None:
            target.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = rng.normal(128, noise, (*SIZE, 3)).clip(0, 255).astype(np.uint8)
                if defect is not None:
                    pixels[10:30, 20:40] = defect
                Image.fromarray(pixels).save(target / f"{noise} {defect} {index}.png")

        for name, good, tested, noise, defect in (
            ("line", 12, 4, 20, (255, 0, 0)),
            ("other", 2, 4, 35, (90, 120, 200)),
            ("few", 3, 2, 20, (255, 0, 0)),
        ):
            make_images(root / name / "good", good, noise)
            make_images(root / name / "good_test", tested, noise)
            make_images(root / name / "bad", tested, noise, defect)
        for noise, defect in ((20, None), (20, (255, 0, 0)), (35, None)):
            make_images(root / "shown", 1, noise, defect)
        torch.manual_seed(1)
        torch.save(timm.create_model("test_resnet").state_dict(), root / "teacher.pth")
        data = {name: folder(root / name, train_batch_size=BATCH_SIZE) for name in ("line", "other", "few")}
        return cls(root / "teacher.pth", data, root / "shown")

    def images(self) -> list[torch.Tensor]:
        """Read the images that every form of a model is asked about, by name."""
        return [read_image(path) for path in sorted(self.shown.iterdir())]


class Accident(Exception):  # noqa: N818
    """Ends a fit, a validation, a test or a prediction halfway."""


class Accidents(Callback):
    """Raises one error, or Ctrl-C, at a chosen moment: when a hook is called for the n-th time."""

    MOMENTS: ClassVar = {
        "fit": (
            "on_fit_start",
            "on_train_start",
            "on_train_batch_end",
            "on_validation_batch_end",
            "on_validation_end",
            "on_train_epoch_start",
            "on_train_epoch_end",
            "on_train_end",
        ),
        "validate": ("on_validation_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"),
        "test": ("on_test_start", "on_test_batch_end", "on_test_end"),
        "predict": ("on_predict_start", "on_predict_batch_end", "on_predict_end"),
    }

    def __init__(self) -> None:
        self.expect(None)

    def expect(self, coming: tuple[str, int, type[BaseException]] | None) -> None:
        """Choose hook, count and error of the next accident; ``None`` for none."""
        self._coming = coming
        self._calls = 0

    @property
    def happened(self) -> bool:
        return self._coming is not None and self._calls >= self._coming[1]

    def _reach(self, hook: str) -> None:
        if self._coming is not None and hook == self._coming[0]:
            self._calls += 1
            if self._calls == self._coming[1]:
                raise self._coming[2]


for moment in {moment for moments in Accidents.MOMENTS.values() for moment in moments}:
    setattr(Accidents, moment, lambda self, *_, _moment=moment: self._reach(_moment))


class Sayings(NamedTuple):
    """A model's answers for images.

    Attributes:
        scores (list[float]): One for each image.
        labels (list[bool | None]): Whether each is defective; ``None`` without a threshold.
    """

    scores: list[float]
    labels: list[bool | None]


@torch.inference_mode()
def ask(form: StfpmExt | Predictor, images: list[torch.Tensor]) -> Sayings:
    """Ask a model about images one by one, since in reduced precision a batch is rounded differently."""
    if isinstance(form, Predictor):
        answers = [form(image) for image in images]
        has_threshold = form.threshold is not None
    else:
        modes = [(module, module.training) for module in form.modules()]
        form.eval()
        answers = [form(image[None]) for image in images]
        for module, mode in modes:
            module.training = mode
        has_threshold = form.post_processor is not None and not form.post_processor.image_threshold.isnan()
    labels = [bool(answer.pred_label) if has_threshold else None for answer in answers]
    return Sayings([answer.pred_score.item() for answer in answers], labels)


def verdict_of(model: StfpmExt) -> dict[str, float]:
    """Return threshold and range: nothing without a post-processor, NaN where no validation has set them."""
    state = {} if model.post_processor is None else model.post_processor.state_dict()
    return {name: tensor.item() for name, tensor in state.items() if tensor.is_floating_point()}


def scoring_of(model: StfpmExt) -> tuple:
    """Return exponents, precision and student, trained or not: what scores depend on besides the images."""
    return model.model.level_weights, model.model.precision, model.model.is_trained, student_of(model)


def student_of(model: StfpmExt) -> str:
    """Return the student's checksum."""
    return checksum(model.model.student_model.state_dict())


@contextmanager
def watch_exponents(patch) -> Iterator[dict[str, set]]:
    """Record the exponents by which each student scores images meanwhile."""
    seen: dict[str, set] = {}
    forward = StfpmExtModel.forward

    def spy(network, *arguments, **options):
        if not network.training:
            student = checksum(network.student_model.state_dict())
            seen.setdefault(student, set()).add(network.level_weights)
        return forward(network, *arguments, **options)

    with patch.context() as context:
        context.setattr(StfpmExtModel, "forward", spy)
        yield seen


def is_attached(model: StfpmExt, trainer: Trainer) -> bool:
    """Tell whether a trainer has this model, so that it can save it."""
    return trainer.lightning_module is model
