from collections.abc import Sequence
from typing import TypeAlias

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
    int,  # height of the map
    int,  # width of the map
    Sequence[float],  # weight of each level
    str,  # product, sum or maximum
    int,  # address of the map [batch, 1, height, width]
    int,  # address of the scores [batch]
    int,  # address of the level maps [batch, levels, height, width], or 0
]

def selected_isa() -> str: ...
def anomaly_map(call: Call, num_threads: int) -> None: ...

# Only where the build has a CUDA scorer. `distances` is the address of room for the distances of all levels.
def anomaly_map_cuda(call: Call, distances: int, device: int, stream: int) -> None: ...
