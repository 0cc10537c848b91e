# SPDX-License-Identifier: Apache-2.0

"""What tests make for themselves: features, pictures and data modules."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# Channels and stride of each level, as the backbones' feature pyramids have them.
PYRAMIDS = {
    "resnet18": ((64, 4), (128, 8), (256, 16)),
    "wide_resnet50_2": ((256, 4), (512, 8), (1024, 16)),
    "tf_efficientnet_lite0": ((24, 4), (40, 8), (112, 16)),
}

LAYERS = ("layer1", "layer2", "layer3")
# Tiny networks of timm's, one for each way in which it wraps a backbone.
TINY_BACKBONES = {
    "test_resnet": ["layer1", "layer3"],
    "test_efficientnet": ["blocks.1", "blocks.2", "blocks.4"],
    "test_convnext": ["stages.0", "stages.2"],
    "test_mambaout": ["stages.0", "stages.1"],
}

# Arguments of a trainer or an engine.
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}

# Images of each kind in a category of the tiny MVTec AD.
ROLES = {"train/good": 6, "test/good": 3, "test/broken": 2, "test/scratched": 2}


def make_features(
    pyramid: tuple[tuple[int, int], ...],
    batch: int,
    image_size: tuple[int, int],
    noise: float = 0.1,
    dtype: str = "float32",
    seed: int = 0,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Make the teacher's features, and the student's, which are the teacher's plus noise."""
    rng = np.random.default_rng(seed)
    teacher, student = [], []
    for channels, stride in pyramid:
        shape = (batch, channels, *(-(-size // stride) for size in image_size))
        teacher.append(rng.standard_normal(shape).astype(dtype))
        student.append((teacher[-1] + noise * rng.standard_normal(shape)).astype(dtype))
    return teacher, student


def make_picture(path: Path, defective: bool, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.normal(128, 20, (48, 64, 3)).clip(0, 255).astype(np.uint8)
    if defective:
        pixels[10:30, 20:40] = (255, 0, 0)
    Image.fromarray(pixels).save(path)


def make_mask(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((48, 64), np.uint8)
    pixels[10:30, 20:40] = 255
    Image.fromarray(pixels).save(path)


def folder(images: Path, **arguments):
    """Return the data module of ``images``."""
    from anomalib.data import Folder  # here, since tests of the scorer run without anomalib

    settings = {"normal_test_dir": "good_test", "abnormal_dir": "bad", "train_batch_size": 4, "num_workers": 0}
    return Folder(name="noise", root=images, normal_dir="good", seed=0, **(settings | arguments))


def skip_unless_computed(*precisions: str) -> None:
    """Skip a test where oneDNN's convolutions cannot compute in one of these precisions at all."""
    computed = {
        "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    for precision in precisions:
        if not computed[precision]:
            pytest.skip(f"oneDNN does not compute in {precision} on this CPU")
