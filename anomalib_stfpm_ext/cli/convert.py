# SPDX-License-Identifier: Apache-2.0

"""``stfpm-ext convert``: students of the authors' code and checkpoints of anomalib's Stfpm, in both directions."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..lightning_model import StfpmExt


def from_authors(student: Path, output: Path, teacher_weights: bool | Path = True) -> None:
    """Turn a student of the authors' code into a checkpoint of StfpmExt.

    Args:
        student: The file that the authors' code saved, best.pth.tar.
        output: The checkpoint to write.
        teacher_weights: File with torchvision's weights of ResNet18, or true for those from cache or internet.
    """
    from ..convert import read_authors_student

    _save(read_authors_student(student, teacher_weights, "student"), output)


def from_anomalib(checkpoint: Path, output: Path, backbone: str | None = None, layers: list[str] | None = None) -> None:
    """Turn a checkpoint of anomalib's Stfpm into one of StfpmExt.

    Args:
        checkpoint: The checkpoint of Stfpm.
        output: The checkpoint to write.
        backbone: The backbone, for a checkpoint that does not name it.
        layers: The layers, likewise, as in [layer1,layer2].
    """
    from ..convert import read_anomalib_checkpoint

    _save(read_anomalib_checkpoint(checkpoint, backbone, layers, "checkpoint"), output)


def to_authors(checkpoint: Path, output: Path, category: str = "") -> None:
    """Write the student of a checkpoint of StfpmExt, or of anomalib's Stfpm, for the authors' code.

    Args:
        checkpoint: The checkpoint.
        output: The file to write, snapshots/CATEGORY/best.pth.tar for them.
        category: The category that the file names.
    """
    from ..convert import write_authors_student

    write_authors_student(checkpoint, output, category, "checkpoint")
    print(f"wrote {output}")


def _save(model: "StfpmExt", output: Path) -> None:
    from ..convert import save_checkpoint

    save_checkpoint(model, output)
    backbone, layers = model.model.teacher_model.backbone, ",".join(model.model.teacher_model.layers)
    print(
        f'wrote {output}; give anomalib: --model StfpmExt --model.backbone {backbone} --model.layers "[{layers}]" '
        f"--model.combine_at {model.model.combine_at} --model.teacher_weights false "
        f"--ckpt_path {shlex.quote(str(output))}"
    )
