# SPDX-License-Identifier: Apache-2.0

"""The compiled module. This is its only caller: arrays become addresses, shapes and strides.

Neither NumPy nor torch is imported: their arrays differ in ``Access`` alone. Where the package was installed without
the compiled module, ``is_built`` is False, torch operations serve, and nothing else of this module may be called.
"""

import warnings
from array import array
from collections.abc import Callable, Sequence
from importlib import import_module, util
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .arguments import Options, dtype_name

if TYPE_CHECKING:
    from .. import _core

Result = TypeVar("Result")

is_built = util.find_spec("anomalib_stfpm_ext._core") is not None
if is_built:
    _core = import_module("anomalib_stfpm_ext._core")
    # What the build is, and what it picks on this machine.
    __version__, compiler = _core.__version__, _core.compiler
    built_isas, available_isas, selected_isa = _core.built_isas, _core.available_isas, _core.selected_isa
    cuda_architectures = _core.cuda_architectures  # such as "80, 90, 90 (PTX)"; empty where there is no CUDA scorer
    most_partial_sums = _core.most_partial_sums  # how many float64 the loss needs room for on CUDA
else:
    cuda_architectures = ""
    warnings.warn(
        "anomalib_stfpm_ext was installed without its compiled scorer: torch operations do its work, several times "
        "slower (docs/install.md).",
        stacklevel=2,
    )


class Access(NamedTuple):
    """How to address arrays of one kind.

    Args:
        address (Callable): Gives the address of an array's first element.
        strides (Callable): Gives an array's strides, in elements.
    """

    address: Callable[[Any], int]
    strides: Callable[[Any], Sequence[int]]


class CudaQueue(NamedTuple):
    """Where CUDA kernels are enqueued.

    Args:
        device (int): Index of the device.
        stream (int): Address of the stream.
    """

    device: int
    stream: int


class Levels(NamedTuple):
    """The features of both sides; ``csrc/bindings/calls.cpp`` reads the fields in this order, here and below.

    Addresses and strides stand in lists by level, since a tuple for each level takes longer to make and to read.

    Args:
        dtype (str): Of the features, by NumPy's name.
        shapes (Sequence[Sequence[int]]): Shape ``(B, C, H, W)`` of each level, 1 to 8 of them.
        teacher (Sequence[int]): Address of the teacher's features at each level.
        teacher_strides (Sequence[Sequence[int]]): Their strides ``(B, C, H, W)``, in elements.
        student (Sequence[int]): Address of the student's features at each level.
        student_strides (Sequence[Sequence[int]]): Their strides.
    """

    dtype: str
    shapes: Sequence[Sequence[int]]
    teacher: Sequence[int]
    teacher_strides: Sequence[Sequence[int]]
    student: Sequence[int]
    student_strides: Sequence[Sequence[int]]


class ScorerCall(NamedTuple):
    """One call of the scorer.

    Args:
        levels (Levels): The features.
        image_size (Sequence[int]): Height and width of the map.
        combine_size (Sequence[int]): Height and width at which the levels are combined.
        weights (Sequence[float]): Weight of each level.
        combine (str): ``"product"``, ``"sum"`` or ``"maximum"``.
        amap (int): Address of the map ``(B, 1, height, width)``.
        score (int): Address of the scores ``(B,)``.
        level_maps (int): Address of the level maps ``(B, levels, *combine_size)``, or 0.
    """

    levels: Levels
    image_size: Sequence[int]
    combine_size: Sequence[int]
    weights: Sequence[float]
    combine: str
    amap: int
    score: int
    level_maps: int


class LossCall(NamedTuple):
    """One call of the loss, forward or backward.

    Args:
        levels (Levels): The features, of at least one image.
        scalars (int): Address of what forward knows of each position, ``(3, positions of all levels)``.
    """

    levels: Levels
    scalars: int


class PoolingCall(NamedTuple):
    """One call of max pooling, for features whose channels are neighbours in memory.

    Args:
        dtype (str): Of features and maxima, by NumPy's name.
        shape (Sequence[int]): Shape ``(B, C, H, W)`` of the features.
        pooled_size (Sequence[int]): Height and width of the maxima.
        features (int): Address of the features.
        maxima (int): Address of the maxima.
        window (int): Height and width of the window.
        stride (int): Distance between windows.
        padding (int): How far windows reach beyond the features, less than the window.
    """

    dtype: str
    shape: Sequence[int]
    pooled_size: Sequence[int]
    features: int
    maxima: int
    window: int
    stride: int
    padding: int


class Gradients(NamedTuple):
    """Memory for the gradients of all levels.

    Args:
        addresses (Sequence[int]): Address of each level's gradients.
        strides (Sequence[Sequence[int]]): Their strides ``(B, C, H, W)``, in elements.
    """

    addresses: Sequence[int]
    strides: Sequence[Sequence[int]]


def scorer_call(
    teacher: Sequence[Any], student: Sequence[Any], outputs: Sequence[Any], options: Options, access: Access
) -> ScorerCall:
    """Describe a call of the scorer.

    Args:
        teacher (Sequence): Features ``(B, C, H, W)`` of every level, as ``check_features`` wants them.
        student (Sequence): Likewise.
        outputs (Sequence): Receive map, scores and, if wanted, level maps, as ``output_shapes`` has them; contiguous.
        options (Options): As ``check_call`` returns them.
        access (Access): How to address all of them.

    Returns:
        ScorerCall: The call.
    """
    address = access.address
    amap, score, *level_maps = outputs
    image_size = amap.shape[2:]
    return ScorerCall(
        _levels(teacher, student, access),
        image_size,
        options.combine_size or image_size,
        options.weights,
        options.combine,
        address(amap),
        address(score),
        address(level_maps[0]) if level_maps else 0,
    )


def loss_call(teacher: Sequence[Any], student: Sequence[Any], scalars: Any, access: Access) -> LossCall:
    """Describe a call of the loss.

    Args:
        teacher (Sequence): Features ``(B, C, H, W)`` of every level, as ``check_features`` wants them.
        student (Sequence): Likewise.
        scalars (Any): Memory ``(3, positions of all levels)``, contiguous.
        access (Access): How to address all of them.

    Returns:
        LossCall: The call.
    """
    return LossCall(_levels(teacher, student, access), access.address(scalars))


def _levels(teacher: Sequence[Any], student: Sequence[Any], access: Access) -> Levels:
    address, strides = access
    return Levels(
        dtype_name(teacher[0].dtype),
        [level.shape for level in teacher],
        list(map(address, teacher)),
        list(map(strides, teacher)),
        list(map(address, student)),
        list(map(strides, student)),
    )


def anomaly_map(call: ScorerCall, num_threads: int) -> None:
    """Score on the CPU. Raise a ValueError where outputs overlap with features or with each other."""
    _core.anomaly_map(call, num_threads)


def anomaly_map_cuda(call: ScorerCall, scratch: int, queue: CudaQueue) -> None:
    """Enqueue the same.

    ``scratch`` is the address of memory for the distances of all levels and, where they are combined at another size
    than the map's, for the combined map.
    """
    _core.anomaly_map_cuda(call, scratch, *queue)


def try_cuda(device: int) -> None:
    """Raise a RuntimeError where a CUDA device does not run the kernels: no code for it, or a driver too old for it."""
    _core.try_cuda(device)


def feature_matching(call: LossCall, loss: int, num_threads: int) -> None:
    """Write the loss to the address ``loss``, and the scalars of the call."""
    _core.feature_matching(call, loss, num_threads)


def feature_matching_cuda(call: LossCall, loss: int, partial_sums: int, queue: CudaQueue) -> None:
    """Enqueue the same. ``partial_sums`` is the address of memory for ``most_partial_sums`` float64."""
    _core.feature_matching_cuda(call, loss, partial_sums, *queue)


def feature_matching_backward(call: LossCall, upstream: int, gradients: Gradients, num_threads: int) -> None:
    """Write the student's gradients of each level, given the scalars and the address of the loss's gradient."""
    _core.feature_matching_backward(call, upstream, gradients, num_threads)


def feature_matching_backward_cuda(call: LossCall, upstream: int, gradients: Gradients, queue: CudaQueue) -> None:
    """Enqueue the same."""
    _core.feature_matching_backward_cuda(call, upstream, gradients, *queue)


def max_pooling(call: PoolingCall, num_threads: int) -> None:
    """Write the maxima; NaN where a window has one."""
    _core.max_pooling(call, num_threads)


def threads_are_late() -> bool:
    """Tell whether threads have begun late, since other programs want the processor: then the caller works alone."""
    return _core.threads_are_late()


def run_all(functions: Sequence[Callable[[], Result]], num_threads: int) -> list[Result]:
    """Call functions on ``num_threads`` threads, the caller's among them; raise the first error, if any."""
    return _core.run_all(functions, num_threads)


def fingerprint(blocks: "array[int]") -> int:
    """Hash a sample of memory: one word of each row, or all where rows are no larger than a word.

    ``blocks`` has three numbers of 64 bits for each block: its address, its size in bytes, and its number of rows.
    """
    return _core.fingerprint(blocks)
