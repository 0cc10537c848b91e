# SPDX-License-Identifier: Apache-2.0

"""The judge of students: it measures them on held-out images, without and with synthetic anomalies."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from .batches import evaluation_batches
from .record import Measurement
from .synthetic import FEWEST_IMAGES, KINDS, MOST_IMAGES, add_anomaly, level_weights, mean_auroc

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from ..inference.precision import Precision
    from ..lightning_model import StfpmExt


class Judge:
    """Judges students by the held-out images of a fit. Every process scores its share, and all get the result.

    Args:
        loader (DataLoader): This process's share of the held-out images.
        num_images (int): Number of held-out images in all processes.
        synthetic (bool): Whether to judge by synthetic anomalies, too, unless there are too few images for them.
        precision (Precision): What the networks compute in, the same for all students of a fit.

    Attributes:
        loader (DataLoader): As given.
        num_images (int): As given.
        num_synthetic (int): Number of held-out images in all processes that are also scored with an anomaly.
    """

    def __init__(
        self, loader: "DataLoader[Any]", num_images: int, synthetic: bool, precision: "Precision" = "float32"
    ) -> None:
        self.loader, self.num_images, self.precision = loader, num_images, precision
        self.num_synthetic = min(num_images, MOST_IMAGES) if synthetic and num_images >= FEWEST_IMAGES else 0
        self._defective: dict[int, torch.Tensor] = {}  # images with an anomaly, by number
        if synthetic and not self.num_synthetic:
            rank_zero_info(
                f"selection: synthetic anomalies need {FEWEST_IMAGES} held-out images to judge by, and there are "
                f"{num_images}. As in the paper, the student with their lowest mean anomaly map is kept."
            )

    @torch.no_grad()
    def measure(self, trainer: Trainer, model: "StfpmExt") -> Measurement:
        """Measure the student in training, and put its exponents into force.

        Args:
            trainer (Trainer): Trainer in a fit.
            model (StfpmExt): The model.

        Returns:
            Measurement: The mean anomaly map of all images, without weights; the AUROC of synthetic anomalies, with
                weighted levels; the weights. The last two are ``None`` without synthetic anomalies, the weights also
                where no level alone finds any.
        """
        model.model.score_by(None, self.precision)
        # The cache holds features in the precision of the training.
        teacher = model.cached_teacher if self.precision == "float32" and trainer.precision == "32-true" else None
        plain: list[_Row] = []
        good: list[_Compared] = []
        defective: list[_Compared] = []
        first = 0
        for batch in evaluation_batches(trainer, model, self.loader):
            images = batch.image
            # The processes take turns, so an image's number and anomaly do not depend on how many processes there are.
            numbers = [trainer.global_rank + trainer.world_size * (first + place) for place in range(len(images))]
            first += len(images)
            compared = _Compared.compare(model.model, numbers, images, teacher)
            plain += compared.score(model.model, None)
            if self.num_synthetic:  # else nothing is scored again, and many images would fill the memory
                good.append(compared)
            if made := [number for number in numbers if number < self.num_synthetic]:
                with_anomaly = torch.stack([self._make(number, images[place]) for place, number in enumerate(made)])
                defective.append(_Compared.compare(model.model, made, with_anomaly.to(images.device), teacher))

        def score(batches: list[_Compared], weights: tuple[float, ...] | None = None) -> torch.Tensor:
            return _gather(trainer, [row for batch in batches for row in batch.score(model.model, weights)])

        of_good = _gather(trainer, plain)
        value = math.fsum(of_good[:, 1].tolist()) / len(of_good)
        measurement = Measurement(trainer.current_epoch, trainer.global_step, value)
        if not self.num_synthetic:
            return measurement
        of_defective = score(defective)
        kinds = of_defective[:, 0].long() % len(KINDS)
        weights = level_weights(of_good[:, 3:], of_defective[:, 3:], kinds)
        if weights is not None:
            of_good, of_defective = score(good, weights), score(defective, weights)
        auroc = mean_auroc(of_good[:, 2], of_defective[:, 2], kinds)
        model.model.score_by(weights, self.precision)
        return measurement._replace(synthetic_auroc=auroc, level_weights=weights)

    def _make(self, number: int, image: torch.Tensor) -> torch.Tensor:
        """Return an image with its anomaly; it is made once."""
        if number not in self._defective:
            self._defective[number] = add_anomaly(image, number).cpu()
        return self._defective[number]


_Row = list[float]  # an image's number, mean map, and the maxima of its map and of each level


class _Compared(NamedTuple):
    """Images in which teacher and student have been compared."""

    numbers: list[int]
    image_size: tuple[int, int]
    distances: dict[str, torch.Tensor]

    @classmethod
    def compare(cls, network: Any, numbers: list[int], images: torch.Tensor, teacher: Any) -> "_Compared":
        return cls(numbers, (images.shape[-2], images.shape[-1]), network.level_distances(images, teacher))

    def score(self, network: Any, weights: tuple[float, ...] | None) -> list[_Row]:
        amap, levels = network.combine(self.distances, self.image_size, weights)
        columns = [torch.tensor(self.numbers)[:, None], amap.mean((2, 3)).cpu(), amap.amax((2, 3)).cpu()]
        rows: list[_Row] = torch.cat([*columns, levels.amax((2, 3)).cpu()], 1).tolist()
        return rows


def _gather(trainer: Trainer, rows: list[_Row]) -> torch.Tensor:
    """Gather the rows of all processes, in the order of the images' numbers."""
    shares: list[Any] = [rows] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(shares, rows)
    return torch.tensor(sorted(row for share in shares for row in share), dtype=torch.float64)
