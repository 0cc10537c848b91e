# SPDX-License-Identifier: Apache-2.0

"""STFPM as a torch module: images in, anomaly map and score out."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from anomalib.data import InferenceBatch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from ._compat import register_namedtuple
from .acceleration.concurrent import can_run_concurrently, run_concurrently
from .acceleration.precision import Precision, dtype_on
from .errors import fail
from .feature_pyramid import FeaturePyramid, Student, Teacher, is_traced
from .ops.anomaly_map import has_kernel
from .ops.arguments import check_options
from .ops.reference import formula
from .scorer import anomaly_map

if TYPE_CHECKING:
    from anomalib.data.utils.tiler import Tiler

register_namedtuple(InferenceBatch, "anomalib.data.InferenceBatch")

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


class StfpmExtModel(nn.Module):
    """Teacher, student and scorer.

    Args:
        backbone (str): timm's name of the network of teacher and student.
        layers (Sequence[str]): The levels that are compared.
        teacher_weights (str | Path | bool): See :class:`anomalib_stfpm_ext.feature_pyramid.Teacher`.
        combine_at (str): ``"image"``: the levels' maps are stretched to the image's size and multiplied there, as the
            paper has it. ``"finest"``: they are multiplied at the finest level's size, and the product is stretched, as
            the paper's authors' code has it.
        compile_mode (str | None): Mode of ``torch.compile`` for inference: ``"default"``, ``"reduce-overhead"`` or
            ``"max-autotune"``, of which the last two replay CUDA graphs on a GPU. Copies and pickles are not compiled.
            Defaults to ``None``, which compiles nothing.

    Raises:
        ValueError: If ``combine_at`` or ``compile_mode`` is none of these, and as
            :class:`anomalib_stfpm_ext.feature_pyramid.Teacher` does.

    Attributes:
        gain (float): What each level's distances are multiplied by; other than 1 only while ``StfpmExt.to_onnx`` runs.
        precision (Precision): What both networks compute in when they score images, where that is of use; see
            :func:`.acceleration.precision.dtype_on`. Training, exports for ONNX and gradients are of float32.
        tiler (Tiler | None): Cuts large images into tiles; set by anomalib's ``TilerConfigurationCallback``.

    Example:
        >>> import torch
        >>> from anomalib_stfpm_ext import StfpmExtModel
        >>> model = StfpmExtModel("resnet18", ["layer1", "layer2"], teacher_weights=False).eval()
        >>> model(torch.zeros(2, 3, 64, 64)).anomaly_map.shape
        torch.Size([2, 1, 64, 64])
    """

    # Of the class, since models that version 0.1 has exported bring none.
    gain = 1.0
    precision: Precision = "float32"

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str],
        teacher_weights: str | Path | bool = True,
        combine_at: Literal["image", "finest"] = "image",
        compile_mode: CompileMode | None = None,
    ) -> None:
        super().__init__()
        if combine_at not in ("image", "finest"):
            fail(ValueError, "combine_at", "'image' or 'finest'", repr(combine_at))
        if compile_mode not in (None, *get_args(CompileMode)):
            fail(ValueError, "compile_mode", f"None or one of {get_args(CompileMode)}", repr(compile_mode))
        self.combine_at, self.compile_mode = combine_at, compile_mode
        self._compiled: Callable[[torch.Tensor], InferenceBatch] | None = None
        self.tiler: Tiler | None = None
        self.teacher_model = Teacher(backbone, layers, teacher_weights)
        self.student_model = Student(backbone, layers)
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions; the scorer reads any

    def forward(
        self, images: torch.Tensor, teacher: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | InferenceBatch:
        """Compare teacher and student.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``.
            teacher (Callable[[torch.Tensor], dict[str, torch.Tensor]] | None): What to call for the teacher's features
                in place of :meth:`teacher_features`. Defaults to ``None``.

        Returns:
            tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | InferenceBatch: While training, the features of
                teacher and student by level. Otherwise the anomaly map ``(B, 1, H, W)`` and the scores ``(B, 1)``.
        """
        inference = not (self.training or torch.is_grad_enabled())
        if self.compile_mode and inference and teacher is None and not is_traced(images):
            return self._forward_compiled(images)
        image_size = (images.shape[-2], images.shape[-1])
        if teacher is None:
            expected, student = self.features(images)
        else:
            expected, student = teacher(images), self._features(self.student_model, images)
        if self.training:
            return expected, student
        result = self._score(expected, student, image_size)
        if not is_traced(images) and _first(expected).dtype == torch.float16 and not result.pred_score.isfinite().all():
            _warn_of_overflow()
            expected, student = self.teacher_features(images), self._features(self.student_model, images)
            result = self._score(expected, student, image_size)
        return result

    def _score(
        self, expected: dict[str, torch.Tensor], student: dict[str, torch.Tensor], image_size: tuple[int, int]
    ) -> InferenceBatch:
        device = _first(expected).device
        combine_size = self.combine_size(expected)
        lacks_kernel = device.type == "cuda" and not has_kernel(device)
        if lacks_kernel:
            warnings.warn("this build has no CUDA scorer: torch operations make the maps, slower", stacklevel=2)
        if lacks_kernel or self.gain != 1:
            options = check_options(None, "product", combine_size, False, list(expected))
            amap, score = formula(list(expected.values()), list(student.values()), image_size, options, self.gain)
        else:
            amap, score = anomaly_map(expected, student, image_size, combine_size=combine_size)
        return InferenceBatch(anomaly_map=amap, pred_score=score.unsqueeze(1))

    def _forward_compiled(self, images: torch.Tensor) -> InferenceBatch:
        if self._compiled is None:
            self._compiled = torch.compile(self.forward, mode=self.compile_mode)
        with self._autocast(images, dtype_on(self.precision, images.device.type)):
            result = self._compiled(
                images.as_subclass(torch.Tensor)
            )  # torch compiles no methods of torchvision's Image
        # The next replay of a CUDA graph writes where the results of this one are.
        return InferenceBatch(pred_score=result.pred_score.clone(), anomaly_map=result.anomaly_map.clone())

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "compile_mode": None, "_compiled": None}

    def combine_size(self, features: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
        """Say where the scorer combines the levels.

        Args:
            features (Mapping[str, torch.Tensor]): Features ``(B, C, H_l, W_l)`` by level.

        Returns:
            tuple[int, int] | None: Height and width of the finest level, or ``None`` for those of the image.
        """
        if self.combine_at == "image":
            return None
        finest = features[self.teacher_model.finest]
        return (finest.shape[-2], finest.shape[-1])

    def features(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Compute both sides; in inference, where torch has two threads on a CPU, at the same time.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``.

        Returns:
            tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]: Features ``(B, C, H_l, W_l)`` of teacher and
                student by level, of the model's :attr:`precision` in inference.
        """
        if is_traced(images):
            return self.teacher_features(images), self._features(self.student_model, images)
        dtype = dtype_on(self.precision, images.device.type)
        tiles: torch.Tensor = self.tiler.tile(images) if self.tiler else images
        networks = self.teacher_model, self.student_model
        copies = [network.inference_copy(tiles, dtype) for network in networks]
        if copies[0] is None or copies[1] is None:
            with self._autocast(images, dtype):  # of networks with hooks, which cannot be copied
                return self.teacher_features(images), self._features(self.student_model, images)
        if copies[0].dtype != torch.float32:
            tiles = tiles.to(copies[0].dtype).contiguous(memory_format=torch.channels_last)  # once for both
        teacher, student = map(partial, networks, (tiles, tiles), copies)
        sides = run_concurrently(teacher, student) if can_run_concurrently(images.device) else (teacher(), student())
        return (self._untile(sides[0]), self._untile(sides[1])) if self.tiler else sides

    @staticmethod
    def _autocast(images: torch.Tensor, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """Have torch compute in a reduced dtype, but for gradients."""
        reduced = dtype != torch.float32 and not torch.is_grad_enabled()
        return torch.autocast(images.device.type, dtype) if reduced else nullcontext()

    def teacher_features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the teacher's side in float32, which never changes for an image.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``.

        Returns:
            dict[str, torch.Tensor]: Features ``(B, C, H_l, W_l)`` by level.
        """
        return self._features(self.teacher_model, images)

    def _features(self, pyramid: FeaturePyramid, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features: dict[str, torch.Tensor] = pyramid(self.tiler.tile(images) if self.tiler else images)
        return self._untile(features) if self.tiler else features

    def _untile(self, tiles: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert self.tiler is not None
        return {level: self.tiler.untile(features) for level, features in tiles.items()}


def _first(features: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(features.values()))


@cache
def _warn_of_overflow() -> None:
    rank_zero_warn(
        "inference_precision: features of this network overflow in float16. Such images are scored in float32; "
        "inference_precision='bfloat16' has its range."
    )
