# SPDX-License-Identifier: Apache-2.0

"""Exports that give the scores of ``anomalib predict``, for images of any size and in float16."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import InferenceBatch
from anomalib.deploy import CompressionType
from lightning.pytorch.utilities import rank_zero_warn

from ..errors import fail
from .float16 import float16_range, largest_score
from .resizing import exportable, pre_process

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule as Base
else:
    Base = object  # anomalib lists all subclasses of AnomalibModule as models


class ExactExports(Base):
    """The exports of ``StfpmExt``, which come before those of ``AnomalibModule``."""

    def forward(self, batch: torch.Tensor, *args: Any, **kwargs: Any) -> InferenceBatch:
        """Give verdicts on images of any size, as exports do: those of ``anomalib predict``.

        Args:
            batch (torch.Tensor): Images ``(B, 3, H, W)`` of 0 to 1.
            args: Unused.
            kwargs: Unused.

        Returns:
            InferenceBatch: Anomaly maps, scores and, if the post-processor has a threshold, masks and labels.
        """
        del args, kwargs
        result: InferenceBatch = self.model(pre_process(self.pre_processor, batch))
        return self.post_processor(result) if self.post_processor else result

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export the model for torch, frozen: anomalib's ``TorchInferencer`` leaves gradients enabled.

        Args:
            args: As in ``AnomalibModule.to_torch``.
            kwargs: Likewise.

        Returns:
            Path: The exported file.
        """
        self.model.warn_if_untrained()
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            path: Path = super().to_torch(*args, **kwargs)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
        return path

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:
        """Export the model for ONNX, also as a step to OpenVINO.

        Args:
            args: As in ``AnomalibModule.to_onnx``.
            kwargs: Likewise.

        Returns:
            Path: The exported file.

        Raises:
            ValueError: If the pre-processor antialiases, but not bilinearly, which no runtime does as torch does.
        """
        self.model.warn_if_untrained()
        if self.pre_processor and self.pre_processor.transform:
            exportable(self.pre_processor.transform)  # raises here, since torch would wrap the error in its own
        if self.model.precision != "float32":
            rank_zero_warn(
                f"inference_precision: threshold and range were set in {self.model.precision}. An export for ONNX or "
                "OpenVINO computes in what its runtime chooses, so scores differ slightly."
            )
        with float16_range(self.model, self.post_processor):
            path: Path = super().to_onnx(*args, **kwargs)
        return path

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export the model for OpenVINO.

        Args:
            export_root (Path | str): As in ``AnomalibModule.to_openvino``.
            model_file_name (str): Likewise. Defaults to ``"model"``.
            input_size (tuple[int, int] | None): Likewise. Defaults to ``None``.
            compression_type (CompressionType | None): Likewise. Defaults to ``None``.
            kwargs: Likewise.

        Returns:
            Path: The exported file.

        Raises:
            ValueError: If it is compressed to float16 and gives raw scores, which float16 does not hold.
        """
        if compression_type == CompressionType.FP16 and largest_score(self.post_processor) is None:
            wanted = "another than FP16, since no post-processor normalises scores, or they have not been validated"
            fail(ValueError, "compression_type", wanted, compression_type)
        path: Path = super().to_openvino(export_root, model_file_name, input_size, compression_type, **kwargs)
        return path
