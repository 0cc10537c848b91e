# SPDX-License-Identifier: Apache-2.0

"""``stfpm-ext draw``: pictures of what a trained model sees in folders of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..console import tell
from ..errors import fail


def levels(
    checkpoint: Path, images: Path, output: Path, masks: Path | None = None, teacher_weights: Path | None = None
) -> None:
    """Draw the maps of the single levels beside their product, a picture for each image.

    Args:
        checkpoint: The trained model.
        images: Folder of images, with those in its subfolders.
        output: Folder for the pictures, which are named like the images.
        masks: Folder of masks, in the same subfolders, named like the images, with or without _mask at the end.
        teacher_weights: The teacher's weights, for a checkpoint that leaves them out.
    """
    from rich.progress import track
    from torchvision.tv_tensors import Mask

    from ..data.images import read_image
    from ..data.transforms import seen, shows_all
    from ..figures import draw_levels, measure_levels, raw_threshold
    from ..prediction import load_model

    model, paths = load_model(checkpoint, teacher_weights=teacher_weights), _images("images", images)
    if output.resolve() in (images.resolve(), *images.resolve().parents):
        fail(ValueError, "output", "a folder that does not hold the images, which it might overwrite", output)
    mask_of = _match_masks(paths, images, masks) if masks else {}
    for path in track(paths, "drawing"):
        image = read_image(path, "images")
        mask = _read_mask(mask_of[path]) if path in mask_of else None
        measured = measure_levels(model, image)
        if not shows_all(model.pre_processor):  # so that a place in a map is the same place in image and mask
            image = seen(model.pre_processor, image)
            mask = None if mask is None else seen(model.pre_processor, Mask(mask[None]))[0].numpy()
        picture = draw_levels(image.permute(1, 2, 0).numpy(), measured, mask, raw_threshold(model, pixels=True))
        file = output / path.relative_to(images)
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    print(f"Pictures of {len(paths)} images are in {output}")


def histogram(checkpoint: Path, good: Path, defective: Path, output: Path, teacher_weights: Path | None = None) -> None:
    """Draw a histogram of the raw scores of good and defective images, with the threshold.

    Args:
        checkpoint: The trained model.
        good: Folder of good images, with those in its subfolders.
        defective: Folder of defective images, likewise.
        output: The picture to write.
        teacher_weights: The teacher's weights, for a checkpoint that leaves them out.
    """
    import torch
    from rich.progress import track

    from ..data.images import read_image
    from ..figures import draw_histogram, measure_levels, raw_threshold
    from ..prediction import load_model

    model = load_model(checkpoint, teacher_weights=teacher_weights)
    good_paths, defective_paths = _images("good", good), _images("defective", defective)
    scores = [
        measure_levels(model, read_image(path, argument)).score
        for argument, paths in (("good", good_paths), ("defective", defective_paths))
        for path in track(paths, f"scoring, {argument}")
    ]
    labels = torch.tensor([0] * len(good_paths) + [1] * len(defective_paths))
    picture = draw_histogram(torch.tensor(scores), labels, raw_threshold(model))
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(output)
    print(f"The histogram of {len(scores)} scores is {output}")


def _read_mask(path: Path) -> Any:
    from anomalib.data.utils import read_mask

    try:
        mask = read_mask(path)
    except Exception as error:  # decoders raise errors of all kinds
        fail(ValueError, "masks", "masks that can be read", f"{path}: {type(error).__name__}: {error}")
    return mask


def _images(argument: str, folder: Path) -> list[Path]:
    from ..data.images import find_images, passed_over

    paths, others = find_images(folder), passed_over(folder.glob("**/*"))
    if others:
        tell(f"{argument}: not drawn: {others}")
    if not paths:
        fail(ValueError, argument, "a folder with images", folder)
    return paths


def _match_masks(paths: Sequence[Path], images: Path, masks: Path) -> dict[Path, Path]:
    found = {mask.relative_to(masks).with_suffix(""): mask for mask in _images("masks", masks)}
    matched = []
    for path in paths:
        name = path.relative_to(images).with_suffix("")
        mask = found.get(name) or found.get(name.with_name(f"{name.name}_mask"))
        if mask:
            matched.append((path, mask))
    if not matched:
        fail(ValueError, "masks", f"masks of images in {images}, named like them", f"none in {masks}")
    return dict(matched)
