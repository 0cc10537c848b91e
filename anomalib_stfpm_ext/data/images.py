# SPDX-License-Identifier: Apache-2.0

"""Images in files: which there are, and how their values are scaled to 0 to 1, also those of more than 8 bits.

anomalib reads all images with Pillow's ``convert("RGB")``, which clips gray of more than 8 bits: 16 bits become white,
floats black.
"""

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataset, ImageItem, PredictDataset
from anomalib.data.utils import read_image as read_8_bits
from anomalib.data.utils.image import is_image_file
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from PIL import ExifTags, Image
from torch.utils.data import get_worker_info
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import fail
from .nested import leaves, replace_leaves
from .whole import check_picture

logger = logging.getLogger(__name__)

OVERSHOOT = 0.01  # of resampling at an edge; images of 0 to 255, or normalised ones, are far beyond
_WANTED = "gray or colour of up to 16 bits, or gray of floats from 0 to 1"
_TAGS = ExifTags.Base  # TIFF's own
_SEPARATE, _WHITE_IS_ZERO, _UNCOMPRESSED = 2, 0, 1  # values of TIFF's tags
_DATA_FORMATS = {"BUFR", "GRIB", "HDF5", "MPEG", "PDF"}  # Pillow's formats that are no pictures
_OTHER_PICTURES = {".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".raw"}  # unknown to Pillow


def read_image(path: str | Path, argument: str = "image") -> torch.Tensor:
    """Read an image: one of 8 bits as anomalib does, others scaled by the range of their type.

    The scale depends on the file's format alone: 65535 for 16 bits, 4095 for a TIFF of 12 bits, the maximum that a PGM
    declares. It depends neither on the values nor on TIFF's ``MaxSampleValue``, which is a picture's own maximum: a
    score must not depend on how bright the brightest pixel is. Values in a PNG fill all 16 bits.

    Args:
        path (str | Path): The file.
        argument (str): The name of the argument for errors. Defaults to ``"image"``.

    Returns:
        torch.Tensor: The image ``(3, H, W)``, float32 of 0 to 1.

    Raises:
        ValueError: If the file is broken, is not whole, has several pictures, or has values that cannot be scaled, such
            as floats outside 0 to 1.
    """
    image: torch.Tensor
    with _opened(path, argument) as picture:
        white = _white(picture)
        if white is None:
            image = read_8_bits(path, as_tensor=True)
            return image
        pixels = np.asarray(picture)
        inverted = _tag(picture, _TAGS.PhotometricInterpretation) == _WHITE_IS_ZERO
    values = pixels.astype(np.float64)
    # First to 0 to 255 and then as torchvision does, so that the 8-bit copy of a picture gives identical values.
    gray = torch.from_numpy((white - values if inverted else values) * 255 / white).float() * (1 / 255)
    if not in_range(gray):
        fail(ValueError, argument, "floats from 0 to 1", f"{path}: {values.min():g} to {values.max():g}")
    if white != 1:
        _tell_scale(white)
    image = tv_tensors.Image(gray[..., None].repeat(1, 1, 3).permute(2, 0, 1))  # in anomalib's memory format
    return image


@contextmanager
def _opened(path: str | Path, argument: str, wanted: str = "an image that can be read") -> Iterator[Image.Image]:
    """Open a file that holds one whole picture; errors name it."""
    try:
        with Image.open(path) as picture:
            check_picture(picture, path)
            yield picture
    except Exception as error:  # decoders raise errors of all kinds
        fail(ValueError, argument, wanted, f"{path}: {type(error).__name__}: {error}")


def in_range(image: torch.Tensor) -> bool:
    """Tell whether the values of an image are from 0 to 1, up to the overshoot of resampling.

    Args:
        image (torch.Tensor): The image.

    Returns:
        bool: Whether they are; ``False`` if one is NaN.
    """
    low, high = image.aminmax()
    return bool(low >= -OVERSHOOT and high <= 1 + OVERSHOOT)


def check_image(image: torch.Tensor) -> None:
    """Check an image that a caller has made.

    Args:
        image (torch.Tensor): Should be an image ``(3, H, W)``, floats of 0 to 1.

    Raises:
        TypeError: If it is no tensor of floats.
        ValueError: If its shape or its range is wrong.
    """
    wanted = "an image (3, H, W) of floats from 0 to 1, not normalised (the model does that)"
    if not isinstance(image, torch.Tensor):
        fail(TypeError, "image", wanted, type(image).__qualname__)
    if not image.is_floating_point():
        fail(TypeError, "image", wanted, image.dtype)
    if image.ndim != 3 or len(image) != 3 or not image.numel():
        fail(ValueError, "image", wanted, f"shape {tuple(image.shape)}")
    if not in_range(image):
        fail(ValueError, "image", wanted, f"values from {image.min().item():g} to {image.max().item():g}")


def find_images(folder: Path) -> list[Path]:
    """Find the images in a folder and its subfolders, except hidden ones and those in hidden folders.

    Args:
        folder (Path): The folder.

    Returns:
        list[Path]: The files, sorted.
    """
    return sorted(path for path in folder.glob("**/*") if is_image_file(path) and not is_junk(path, folder))


def is_junk(path: Path, root: Path) -> bool:
    """Tell whether a path is hidden, as files are that systems and tools leave behind, or no file.

    Args:
        path (Path): The path.
        root (Path): A folder above; its own name does not count.

    Returns:
        bool: Whether its name, or that of a folder between the two, begins with a dot, or it is no file.
    """
    return any(part.startswith(".") for part in path.relative_to(root).parts) or not path.is_file()


def looks_like_picture(path: Path) -> bool:
    """Tell by its name whether a file is a picture, but not an image that anomalib reads.

    Args:
        path (Path): The path.

    Returns:
        bool: Whether it is, and is neither hidden nor a folder.
    """
    return path.suffix.lower() in _other_pictures() and not path.name.startswith(".") and path.is_file()


@cache
def _other_pictures() -> set[str]:
    known = {suffix for suffix, name in Image.registered_extensions().items() if name not in _DATA_FORMATS}
    return (known | _OTHER_PICTURES) - {*IMG_EXTENSIONS}


def passed_over(paths: Iterable[Path]) -> str:
    """Say which files look like pictures, but are not read as images.

    Args:
        paths (Iterable[Path]): Any paths.

    Returns:
        str: How many there are by suffix, and which suffixes are read; empty if there are none.
    """
    counts = Counter(path.suffix.lower() for path in paths if looks_like_picture(path))
    files = ", ".join(f"{count} file{'s' * (count > 1)} of {suffix}" for suffix, count in sorted(counts.items()))
    return files and f"{files} (anomalib reads {', '.join(sorted(IMG_EXTENSIONS))})"


def read_right(dataset: Any) -> Any:
    """Copy a data set so that it reads images with :func:`read_image`, where it is one of anomalib's.

    Args:
        dataset (Dataset): A data set, which is not changed.

    Returns:
        Dataset: The copy; data sets that read images in their own way are returned as they are.

    Raises:
        ValueError: If anomalib makes synthetic anomalies in images of more than 8 bits, which it clips.
    """
    return replace_leaves(dataset, _read_right)


def _read_right(dataset: Any) -> Any:
    if type(dataset).__getitem__ is AnomalibDataset.__getitem__:
        if isinstance(dataset, SyntheticAnomalyDataset):
            refuse_deep(dataset, "for synthetic anomalies, for which anomalib clips others")
        return _LabelledImages(dataset)
    if type(dataset).__getitem__ is PredictDataset.__getitem__:
        return _Images(dataset)
    return dataset


def refuse_deep(dataset: Any, where: str) -> None:
    """Refuse a data set of anomalib with images of more than 8 bits, which it would clip.

    Args:
        dataset (Any): Any data set.
        where (str): Says for the error where other images cannot be used.

    Raises:
        ValueError: If it has such images.
    """
    for path in image_paths(dataset):
        with Image.open(path) as picture:
            if _white(picture) is not None:
                fail(ValueError, "data", f"images of 8 bits {where}", f"{path}, of Pillow's mode {picture.mode}")


class _LabelledImages(AnomalibDataset):
    """A data set of anomalib that reads images of more than 8 bits correctly, and names broken files."""

    def __init__(self, source: AnomalibDataset) -> None:
        self.__dict__.update(vars(source))

    def __getitem__(self, index: int) -> ImageItem:
        sample = self.samples.iloc[index]
        with _opened(sample.image_path, "data") as picture:
            deep = _white(picture) is not None
        plain = copy.copy(self)
        plain.augmentations = None
        try:
            item = super(_LabelledImages, plain).__getitem__(index)
        except Exception as error:  # decoders raise errors of all kinds
            read_image(sample.image_path, "data")  # raises, unless it is the mask that is broken
            fail(ValueError, "data", "a mask that can be read", f"{sample.mask_path}: {type(error).__name__}: {error}")
        if deep:
            item.image = read_image(sample.image_path, "data")
        if self.augmentations and item.gt_mask is None:
            item.image = self.augmentations(item.image)
        elif self.augmentations:
            item.image, item.gt_mask = self.augmentations(item.image, item.gt_mask)
        return item


class _Images(PredictDataset):
    """Likewise, anomalib's data set of images without labels."""

    def __init__(self, source: PredictDataset) -> None:
        self.__dict__.update(vars(source))

    def __getitem__(self, index: int) -> ImageItem:
        path = self.image_filenames[index]
        image = read_image(path, "data")
        return ImageItem(image=self.transform(image) if self.transform else image, image_path=str(path))


def image_paths(dataset: Any) -> Iterator[str | Path]:
    """Iterate over the files of anomalib's data sets; the files of others are not known.

    Args:
        dataset (Any): Any data set, or nest of them.

    Yields:
        str | Path: A file.
    """
    for leaf in leaves(dataset):
        if isinstance(leaf.dataset, AnomalibDataset):
            yield from leaf.dataset.samples.image_path.iloc[leaf.indices]
        elif isinstance(leaf.dataset, PredictDataset):
            yield from (leaf.dataset.image_filenames[index] for index in leaf.indices)


def check_file(path: Path) -> None:
    """Raise where a file does not hold one whole image. It is not decoded, since a data set has many files.

    Args:
        path (Path): The file.

    Raises:
        ValueError: If the file cannot be read as an image, is empty, is not whole, or has several pictures.
    """
    with _opened(path, "data", "images that can be read"):
        pass


def is_deep(path: str | Path) -> bool:
    """Tell whether a file holds gray of more than 8 bits, which anomalib clips.

    Args:
        path (str | Path): The file.

    Returns:
        bool: Whether it does.
    """
    with Image.open(path) as picture:
        return _white(picture) is not None


def _white(picture: Image.Image) -> float | None:
    """Return the value of white in a picture of more than 8 bits, ``None`` in others; raise where it is unknown.

    Colour of 16 bits counts among the others, since Pillow scales it to 8.
    """
    bits = _tag(picture, _TAGS.BitsPerSample) or 16
    if (
        _tag(picture, _TAGS.PlanarConfiguration) == _SEPARATE
        and _tag(picture, _TAGS.Compression) == _UNCOMPRESSED
        and picture.mode not in ("L", "I;16", "I;16B")
        and bits > 8
    ):
        msg = (
            f"wanted {_WANTED}, got {bits} bits, one colour after the other, which Pillow misreads: save it interleaved"
        )
        raise ValueError(msg)
    if picture.mode.startswith("I;16"):
        return float(2**bits - 1)
    if picture.mode == "I" and picture.format in ("PNG", "PPM"):  # Pillow stretches a PGM's maximum to 65535
        return 65535.0
    if picture.mode == "F":
        return 1.0
    if picture.mode == "I":
        msg = f"wanted {_WANTED}, got integers that have a sign, or 32 bits: their value of white is unknown"
        raise ValueError(msg)
    return None


def _tag(picture: Image.Image, tag: int) -> int | None:
    """Return a tag of a TIFF, or the first of its numbers."""
    value = getattr(picture, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) else value


@cache
def _tell_scale(white: float) -> None:
    """Log once what counts as white; of several processes that load images, only the first does."""
    worker = get_worker_info()
    if worker is None or worker.id == 0:
        logger.warning(
            "Images of %d bits of gray: 0 is black, %d is white. If the camera has fewer bits, have it fill all of "
            "these, or say so in a TIFF (BitsPerSample) or a PGM (its maximum): else its images are dark.",
            int(white).bit_length(),
            white,
        )
