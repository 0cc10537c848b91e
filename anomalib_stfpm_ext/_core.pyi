from collections.abc import Sequence

__version__: str
compiler: str
built_isas: list[str]
available_isas: list[str]
cuda_architectures: list[str]

def selected_isa() -> str: ...
def anomaly_map(
    dtype: str,
    # teacher and student address, channels, height, width, strides [B, C, H, W] of the teacher, then of the student,
    # in elements
    levels: Sequence[tuple[int, ...]],
    batch: int,
    height: int,
    width: int,
    weights: Sequence[float],  # of each level
    combine: str,  # product, sum or maximum
    map: int,  # noqa: A002  # address of [batch, 1, height, width]
    score: int,  # address of [batch]
    level_maps: int,  # address of [batch, levels, height, width], or 0
    num_threads: int,
) -> None: ...
