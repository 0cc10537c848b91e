# SPDX-License-Identifier: Apache-2.0

"""Images as anomalib reads them, and those that anomalib 2.7 reads wrongly: gray ones of more than 8 bits."""

import functools
import logging
from pathlib import Path

import anomalib.data.utils
import numpy as np
import torch
from PIL import Image

from .errors import fail

logger = logging.getLogger(__name__)

DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "F")  # Pillow's: convert("RGB") clips them to 255
MAX_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE = 281, 341  # TIFF's tags for the largest value that a camera writes


def read_image(path: str | Path, as_tensor: bool = True) -> torch.Tensor:
    """Read an image.

    Images of 8 bits, and colour images, are anomalib's own to the bit. Gray images of more bits are scaled by the range
    of their type, or by the largest value that a TIFF file names, never by what a single image happens to hold.

    Args:
        path (str | Path): The file.
        as_tensor (bool): Must be ``True``; it is there since anomalib's function has it.

    Returns:
        torch.Tensor: The image ``(3, H, W)``, float32 of 0 to 1.

    Raises:
        ValueError: If the file is broken, or has numbers whose range is not known. The error names the file.
    """
    del as_tensor
    try:
        with Image.open(path) as image:
            if image.mode not in DEEP_MODES:
                read: torch.Tensor = anomalib.data.utils.read_image(path, as_tensor=True)
                return read
            pixels, largest = np.asarray(image), _largest_value(image)
    except Exception as error:  # decoders raise all sorts of them
        fail(ValueError, "image", "an image that can be read", f"{path}: {type(error).__name__}: {error}")
    if largest is None or pixels.min() < 0 or pixels.max() > largest:
        wanted = "gray of 16 bits, floats of 0 to 1, or a TIFF file that names its largest value (MaxSampleValue)"
        fail(ValueError, "image", wanted, f"{path}: {pixels.dtype} from {pixels.min()} to {pixels.max()}")
    _tell_scale(str(pixels.dtype), largest)
    gray = torch.from_numpy(pixels.astype(np.float32) / np.float32(largest))
    return gray.expand(3, -1, -1).contiguous()


def _largest_value(image: Image.Image) -> float | None:
    """Return the value that stands for white, or ``None`` where nobody says."""
    tags = getattr(image, "tag_v2", {})
    for tag in (S_MAX_SAMPLE_VALUE, MAX_SAMPLE_VALUE):
        value = tags.get(tag)
        value = value[0] if isinstance(value, tuple) else value
        if value:
            return float(value)
    if image.mode == "F":
        return 1.0
    return 65535.0 if image.mode != "I" or image.format == "PNG" else None


@functools.cache
def _tell_scale(dtype: str, largest: float) -> None:
    logger.info("Images of %s are scaled by %g. Cameras that use fewer bits give darker images.", dtype, largest)


def is_hidden(path: Path, folder: Path) -> bool:
    """Tell whether a file, or a folder that it is in, has a name that begins with a dot.

    Args:
        path (Path): The file.
        folder (Path): A folder above, whose own name does not count.

    Returns:
        bool: Whether it has; such files are the work of other programs, not images of a camera.
    """
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
