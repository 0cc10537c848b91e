# SPDX-License-Identifier: Apache-2.0

"""STFPM as a torch module: images in, anomaly map and score out."""

import math
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

from ._compat.torch import is_traced, register_namedtuple
from .choices import CompileMode
from .errors import fail
from .feature_pyramid import CPU_PIXELS, FeaturePyramid, InferenceCopy, Student, Teacher
from .inference.concurrent import can_run_concurrently, run_concurrently
from .inference.precision import PRECISIONS, Precision, dtype_on
from .ops.anomaly_map import why_no_kernel
from .ops.arguments import check_options
from .ops.reference import combine_levels, formula, squared_distance
from .scorer import anomaly_map

if TYPE_CHECKING:
    from anomalib.data.utils.tiler import Tiler

register_namedtuple(InferenceBatch, "anomalib.data.InferenceBatch")

Sides = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]  # features by level, of teacher and student
Copies = tuple[InferenceCopy, InferenceCopy]  # of teacher and student


class StfpmExtModel(nn.Module):
    """Teacher, student and scorer.

    Args:
        backbone (str): timm's name for the network of teacher and student.
        layers (Sequence[str]): The levels to compare.
        teacher_weights (str | Path | bool): See :class:`anomalib_stfpm_ext.feature_pyramid.Teacher`.
        combine_at (str): ``"image"``: the levels' maps are stretched to the image's size and multiplied there, as in
            the paper. ``"finest"``: they are multiplied at the finest level's size, and the product is stretched, as in
            the authors' code.
        compile_mode (str | None): Mode of ``torch.compile`` for inference: ``"default"``, ``"reduce-overhead"`` or
            ``"max-autotune"``. The last two replay CUDA graphs on a GPU. Copies and pickles are not compiled.
            Defaults to ``None``, which compiles nothing.

    Raises:
        ValueError: If ``combine_at`` or ``compile_mode`` is none of these, and as
            :class:`anomalib_stfpm_ext.feature_pyramid.Teacher` does.

    Attributes:
        gain (float): Factor of each level's distances; other than 1 only while ``StfpmExt.to_onnx`` runs.
        level_weights (tuple[float, ...] | None): The exponent of each level's map in the product, in the order of
            ``layers``, chosen by ``StfpmExt(selection="synthetic")``; ``None`` for 1 each, as in the paper.
        precision (Precision): What both networks compute in when they score images, where that gains anything; see
            :func:`.inference.precision.dtype_on`. Training, exports for ONNX and gradients do not use it.
            :meth:`score_by` sets it and :attr:`level_weights`; both are in the state dict.
        is_trained (bool): Whether the student was trained, here or where its weights come from; also in the state dict.
        tiler (Tiler | None): Cuts large images into tiles; set by anomalib's ``TilerConfigurationCallback``.

    Example:
        >>> import torch
        >>> from anomalib_stfpm_ext import StfpmExtModel
        >>> model = StfpmExtModel("resnet18", ["layer1", "layer2"], teacher_weights=False).eval()
        >>> model(torch.zeros(2, 3, 64, 64)).anomaly_map.shape
        torch.Size([2, 1, 64, 64])
    """

    # On the class, since models that version 0.1 exported lack them.
    gain = 1.0
    level_weights: tuple[float, ...] | None = None
    precision: Precision = "float32"
    is_trained = True

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
        self._compiled: Callable[[torch.Tensor], Sides] | None = None
        self.tiler: Tiler | None = None
        self.teacher_model = Teacher(backbone, layers, teacher_weights)
        self.student_model = Student(backbone, layers)
        self.is_trained = False
        self.float()  # whatever torch's default dtype is

    def forward(
        self, images: torch.Tensor, teacher: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | InferenceBatch:
        """Compare teacher and student.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``, of the networks' dtype and on their device.
            teacher (Callable[[torch.Tensor], dict[str, torch.Tensor]] | None): Returns the teacher's features in place
                of :meth:`teacher_features`, while training. Defaults to ``None``.

        Returns:
            tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | InferenceBatch: While training, the features of
                teacher and student by level. Otherwise the anomaly map ``(B, 1, H, W)`` and the scores ``(B, 1)``.

        Raises:
            ValueError: If the images have another shape or dtype, or are on another device.
        """
        try:
            if not self.training:
                with self._own_precision(images):
                    return self._finite(self._infer(images), images)
            self.is_trained = True  # a fit without a step resets it
            if teacher is None:
                return self._run_networks(images)
            return teacher(images), self._student_features(images)
        except RuntimeError:
            self.teacher_model.check_images(images)  # names what it complains of
            raise

    def _own_precision(self, images: torch.Tensor) -> AbstractContextManager[Any]:
        """Disable a caller's autocast: images are scored in the model's own :attr:`precision`."""
        device_type = images.device.type
        if is_traced(images) or not torch.is_autocast_enabled(device_type):
            return nullcontext()
        return torch.autocast(device_type, enabled=False)

    def _infer(self, images: torch.Tensor) -> InferenceBatch:
        if self.compile_mode and not (torch.is_grad_enabled() or is_traced(images)):
            return self._infer_compiled(images)
        copies = self._inference_copies(images)
        if copies is None:
            return self._score(*self._run_networks(images), images)
        return self._infer_by_copies(images, copies)

    def _finite(self, result: InferenceBatch, images: torch.Tensor) -> InferenceBatch:
        """Return the results, or those of float32 where features overflow in float16."""
        if self.precision != "float16" or is_traced(images) or result.pred_score.isfinite().all():
            return result
        _warn_of_overflow()
        return self._score(self.teacher_features(images), self._student_features(images), images)

    def _infer_by_copies(self, images: torch.Tensor, copies: Copies) -> InferenceBatch:
        """Score images by copies of the networks; on a CPU a few at a time, so that features stay in the caches."""
        parts = self._parts(images)
        at_a_time = math.ceil(torch.get_num_threads() / 2)  # each part runs through two networks
        results = []
        for start in range(0, len(parts), at_a_time):
            group = parts[start : start + at_a_time]
            sides = self._run_copies(group, copies)
            results += [self._score(*both, part) for both, part in zip(sides, group, strict=True)]
        if len(results) == 1:
            return results[0]
        return InferenceBatch(
            pred_score=torch.cat([result.pred_score for result in results]),
            anomaly_map=torch.cat([result.anomaly_map for result in results]),
        )

    def _parts(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """Cut a batch into parts for the CPU: as large as caches allow, and enough to keep all of its threads busy."""
        if images.device.type != "cpu" or self.tiler:
            return [images]
        height, width = images.shape[-2:]
        for_all_threads = 2 * len(images) // torch.get_num_threads()
        return torch.split(images, max(1, min(CPU_PIXELS // (height * width), for_all_threads)))

    def _run_copies(self, parts: Sequence[torch.Tensor], copies: Copies) -> list[Sides]:
        """Compute the features of each part by the copies of both networks, at the same time where that pays."""
        dtype = copies[0].dtype
        if self.tiler:
            parts = [self.tiler.tile(part) for part in parts]
        if dtype != parts[0].dtype:
            parts = [part.to(dtype).contiguous(memory_format=torch.channels_last) for part in parts]  # once for both
        networks = (self.teacher_model, copies[0]), (self.student_model, copies[1])
        calls = [partial(network, part, copy) for part in parts for network, copy in networks]
        if can_run_concurrently(parts[0].device, len(calls)):
            features = run_concurrently(calls)
        else:
            features = [call() for call in calls]
        if self.tiler:
            features = [self._untile(tiles) for tiles in features]
        return list(zip(features[::2], features[1::2], strict=True))

    def _run_networks(self, images: torch.Tensor) -> Sides:
        """Compute both sides by the networks themselves: in training, with gradients or hooks, and for compilers."""
        plain = is_traced(images) or torch.is_grad_enabled()
        with nullcontext() if plain else self._autocast(images):
            return self.teacher_features(images), self._student_features(images)

    def _score(
        self, teacher: dict[str, torch.Tensor], student: dict[str, torch.Tensor], images: torch.Tensor
    ) -> InferenceBatch:
        image_size = (images.shape[-2], images.shape[-1])
        combine_size, weights = self.combine_size(teacher), self.level_weights
        if self._lacks_kernel(images) or self.gain != 1:
            options = check_options(weights, "product", combine_size, False, list(teacher))
            amap, score = formula(list(teacher.values()), list(student.values()), image_size, options, self.gain)
        else:
            amap, score = anomaly_map(teacher, student, image_size, weights=weights, combine_size=combine_size)
        return InferenceBatch(pred_score=score.unsqueeze(1), anomaly_map=amap)

    def _lacks_kernel(self, images: torch.Tensor) -> bool:
        reason = why_no_kernel(images.device) if images.device.type == "cuda" else None
        if reason is not None:
            warnings.warn(f"{reason}: torch operations make the maps, slower", stacklevel=2)
        return reason is not None

    def level_distances(
        self, images: torch.Tensor, teacher: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None
    ) -> dict[str, torch.Tensor]:
        """Compare teacher and student at each level, without a gradient.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``.
            teacher (Callable[[torch.Tensor], dict[str, torch.Tensor]] | None): As in :meth:`forward`.

        Returns:
            dict[str, torch.Tensor]: Distances ``(B, 1, H_l, W_l)``, float32, by level.
        """
        parts = self._parts(images)
        if len(parts) > 1:
            of_parts = [self.level_distances(part, teacher) for part in parts]
            return {name: torch.cat([part[name] for part in of_parts]) for name in of_parts[0]}
        with self._own_precision(images):
            sides = self.features(images) if teacher is None else (teacher(images), self._student_features(images))
            distances = self._distances(*sides, images)
            if self.precision == "float16" and not all(distance.isfinite().all() for distance in distances.values()):
                _warn_of_overflow()
                distances = self._distances(self.teacher_features(images), self._student_features(images), images)
        return distances

    def _distances(
        self, teacher: dict[str, torch.Tensor], student: dict[str, torch.Tensor], images: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        if self._lacks_kernel(images):
            return {name: 0.5 * squared_distance(level, student[name]) for name, level in teacher.items()}
        return {name: anomaly_map([t], [student[name]], t.shape[-2:])[0] for name, t in teacher.items()}

    def combine(
        self, distances: dict[str, torch.Tensor], image_size: tuple[int, int], weights: tuple[float, ...] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Combine the levels' distances into anomaly maps, as :meth:`forward` does.

        Args:
            distances (dict[str, torch.Tensor]): See :meth:`level_distances`.
            image_size (tuple[int, int]): Height and width of the images.
            weights (tuple[float, ...] | None): Exponents in place of :attr:`level_weights`.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: The anomaly maps ``(B, 1, H, W)``, and the levels' own maps without
                weights ``(B, levels, h, w)``, at the size at which they are combined.
        """
        options = check_options(weights, "product", self.combine_size(distances), True, list(distances))
        amap, _, levels = combine_levels(list(distances.values()), image_size, options)
        return amap, levels

    def _infer_compiled(self, images: torch.Tensor) -> InferenceBatch:
        """Score images by compiled networks; the scorer stays as it is, since its weights change with the student."""
        if self._compiled is None:
            self._compiled = torch.compile(self._run_networks, mode=self.compile_mode)
        with self._autocast(images):
            sides = self._compiled(images.as_subclass(torch.Tensor))  # torch cannot compile torchvision's Image
        return self._score(*sides, images)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "compile_mode": None, "_compiled": None}

    def score_by(self, level_weights: tuple[float, ...] | None, precision: Precision) -> None:
        """Set how images are scored from now on, whichever student is in the network.

        Args:
            level_weights (tuple[float, ...] | None): See :attr:`level_weights`.
            precision (Precision): See :attr:`precision`.

        Raises:
            ValueError: If a level has no finite weight of at least 0, or there is no such precision.
        """
        levels = self.teacher_model.layers
        if level_weights is not None:
            check_options(level_weights, "product", None, False, levels)
        if precision not in PRECISIONS:
            fail(ValueError, "precision", f"one of {PRECISIONS}", repr(precision))
        all_same = level_weights is None or set(level_weights) == {1}
        self.level_weights, self.precision = None if all_same else level_weights, precision

    def get_extra_state(self) -> torch.Tensor:
        """Return how images are scored, for the state dict: it goes wherever the weights go.

        Returns:
            torch.Tensor: The index of the precision in ``PRECISIONS``, the weight of each level, and 1 for a trained
                student or else 0: ``(levels + 2,)``, float64.
        """
        levels = len(self.teacher_model.layers)
        return encode_scoring(self.level_weights, self.precision, self.is_trained, levels)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Score images as :meth:`get_extra_state` says.

        Args:
            state (torch.Tensor): What it returned.

        Raises:
            ValueError: If it belongs to another number of levels, or is something else.
        """
        number, *weights = state.tolist()
        precision = PRECISIONS[int(number)] if number in range(len(PRECISIONS)) else number
        levels = len(self.teacher_model.layers)
        self.score_by(tuple(weights[:levels]), precision)
        self.is_trained = weights[levels:] != [0]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.is_trained = True  # unless the extra state says otherwise; weights of other programs have none
        super()._load_from_state_dict(state_dict, prefix, *args)

    def warn_if_untrained(self) -> None:
        """Warn of a student that has learned nothing, before it is tested, exported, saved or used."""
        if not self.is_trained:
            rank_zero_warn(
                "student: wanted one that is trained, got one as it was initialised: its scores mean nothing. Fit the "
                "model, or load a checkpoint."
            )

    @property
    def backbone(self) -> str:
        """Name of the network of teacher and student in timm; anomalib's ``Stfpm`` has this attribute, too."""
        return self.teacher_model.backbone

    def combine_size(self, features: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
        """Return the size at which the scorer combines the levels.

        Args:
            features (Mapping[str, torch.Tensor]): Features ``(B, C, H_l, W_l)`` by level.

        Returns:
            tuple[int, int] | None: Height and width of the finest level, or ``None`` for the image's size.
        """
        if self.combine_at == "image":
            return None
        finest = features[self.teacher_model.finest]
        return (finest.shape[-2], finest.shape[-1])

    def features(self, images: torch.Tensor) -> Sides:
        """Compute the features of teacher and student.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``.

        Returns:
            tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]: Features ``(B, C, H_l, W_l)`` of teacher and
                student by level, in the model's :attr:`precision` during inference.
        """
        copies = self._inference_copies(images)
        return self._run_networks(images) if copies is None else self._run_copies([images], copies)[0]

    def _inference_copies(self, images: torch.Tensor) -> Copies | None:
        """Return the inference copies of both networks; ``None`` where more than their features is needed."""
        if self.training or is_traced(images):
            return None
        dtype = dtype_on(self.precision, images.device.type)
        tiles: torch.Tensor = self.tiler.tile(images) if self.tiler else images
        student = self.student_model.inference_copy(tiles, dtype)  # first: it alone may need gradients
        teacher = None if student is None else self.teacher_model.inference_copy(tiles, dtype)
        return None if teacher is None or student is None else (teacher, student)

    def _autocast(self, images: torch.Tensor) -> AbstractContextManager[Any]:
        """Make torch compute in the model's :attr:`precision`."""
        dtype = dtype_on(self.precision, images.device.type)
        return nullcontext() if dtype == torch.float32 else torch.autocast(images.device.type, dtype)

    def teacher_features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the teacher's features in float32; they never change for an image.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``.

        Returns:
            dict[str, torch.Tensor]: Features ``(B, C, H_l, W_l)`` by level.
        """
        return self._features(self.teacher_model, images)

    def _student_features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._features(self.student_model, images)

    def _features(self, pyramid: FeaturePyramid, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features: dict[str, torch.Tensor] = pyramid(self.tiler.tile(images) if self.tiler else images)
        return self._untile(features) if self.tiler else features

    def _untile(self, tiles: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert self.tiler is not None
        return {level: self.tiler.untile(features) for level, features in tiles.items()}


def encode_scoring(
    level_weights: Sequence[float] | None, precision: Precision, is_trained: bool, levels: int
) -> torch.Tensor:
    """Encode how images are scored, as :meth:`StfpmExtModel.get_extra_state` returns it.

    Args:
        level_weights (Sequence[float] | None): The exponent of each level's map; ``None`` for 1 each.
        precision (Precision): What the networks compute in.
        is_trained (bool): Whether the student is trained.
        levels (int): Number of levels.

    Returns:
        torch.Tensor: Numbers ``(levels + 2,)``, float64.
    """
    numbers = [PRECISIONS.index(precision), *(level_weights or [1.0] * levels), is_trained]
    return torch.tensor(numbers, dtype=torch.float64)


@cache
def _warn_of_overflow() -> None:
    rank_zero_warn(
        "inference_precision: features of this network overflow in float16. Such images are scored in float32; "
        "inference_precision='bfloat16' has float32's range."
    )
