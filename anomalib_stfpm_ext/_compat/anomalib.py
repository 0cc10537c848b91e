# SPDX-License-Identifier: Apache-2.0

"""What anomalib has no public name for."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from anomalib.data import AnomalibDataModule

from .lightning import trainer_of

if TYPE_CHECKING:  # importing anomalib's models imports this package
    from anomalib.models.components import AnomalibModule


def replace_image_threshold(post_processor: Any, kind: type, replacement: Callable[..., Any]) -> None:
    """Replace what computes a post-processor's threshold of image scores.

    anomalib takes none from a caller.

    Args:
        post_processor (Any): The post-processor; any other object stays as it is.
        kind (type): Class of what is replaced; another one stays.
        replacement (Callable[..., Any]): Makes the new one of the same arguments.
    """
    if type(getattr(post_processor, "_image_threshold_metric", None)) is kind:
        post_processor._image_threshold_metric = replacement(fields=["pred_score", "gt_label"], strict=False)


def resize_as(model: "AnomalibModule") -> None:
    """Have a data module resize images to the size of a model that has been loaded meanwhile.

    anomalib's data modules take over the model's size when they are set up, before Lightning loads a checkpoint.

    Args:
        model (AnomalibModule): The model, with its trainer, if it has one.
    """
    datamodule = getattr(trainer_of(model), "datamodule", None)
    if isinstance(datamodule, AnomalibDataModule):
        datamodule._update_augmentations()
