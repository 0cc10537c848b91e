from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

Result = TypeVar("Result")

__version__: str
compiler: str
built_isas: list[str]
available_isas: list[str]
cuda_architectures: str  # such as "80, 90, 90 (PTX)"; empty where the build has no CUDA scorer

# Features are described by: address of the teacher's, of the student's, channels, height, width, strides [B, C, H, W]
# of the teacher's, of the student's, in elements.
Level: TypeAlias = tuple[int, ...]
Call: TypeAlias = tuple[
    str,  # dtype
    Sequence[Level],
    int,  # batch
    tuple[int, int],  # height and width of the map
    tuple[int, int],  # height and width at which the levels are combined
    Sequence[float],  # weight of each level
    str,  # product, sum or maximum
    int,  # address of the map [batch, 1, height, width]
    int,  # address of the scores [batch]
    int,  # address of the level maps [batch, levels, height and width where they are combined], or 0
]
MatchingCall: TypeAlias = tuple[
    str,  # dtype
    Sequence[Level],
    int,  # batch, at least 1
    int,  # address of the scalars [2, positions of all levels]: factors, projections
]
Gradients: TypeAlias = Sequence[tuple[int, ...]]  # of each level: address, strides [B, C, H, W]

most_partial_sums: int

def selected_isa() -> str: ...
def anomaly_map(call: Call, num_threads: int) -> None: ...
def feature_matching(call: MatchingCall, loss: int, num_threads: int) -> None: ...
def feature_matching_backward(call: MatchingCall, upstream: int, gradients: Gradients, num_threads: int) -> None: ...
def run_both(first: Callable[[], Result], second: Callable[[], Result]) -> tuple[Result, Result]: ...

# Only where the build has a CUDA scorer. `scratch` is the address of room for the distances of all levels and, where
# they are combined at another size than the map's, for the combined map; `partial_sums` that of room for
# `most_partial_sums` float64.
def anomaly_map_cuda(call: Call, scratch: int, device: int, stream: int) -> None: ...
def feature_matching_cuda(call: MatchingCall, loss: int, partial_sums: int, device: int, stream: int) -> None: ...
def feature_matching_backward_cuda(
    call: MatchingCall, upstream: int, gradients: Gradients, device: int, stream: int
) -> None: ...
