# SPDX-License-Identifier: Apache-2.0

"""The model's visualiser: anomalib's pictures, drawn and written while the next images are scored."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import LightningModule, Trainer

from .data.images import is_deep, read_image
from .data.transforms import seen, shows_all
from .errors import fail
from .files import whole_file

# zlib's fastest: the same pixels in files that are a little larger, in a fifth of the time.
COMPRESSION = 1
THREADS = 2
MOST_WAITING = 32  # so that pictures that wait to be drawn do not fill the memory


class BackgroundImageVisualizer(ImageVisualizer):
    """anomalib's ``ImageVisualizer``, whose pictures it draws pixel for pixel, beside the scoring.

    All pictures are on disk when ``test`` or ``predict`` ends. A picture that cannot be written ends them with an error
    that names it. Where maps are not of the whole photograph, because of a crop, pictures show what the model sees of
    it, and photographs of more than 8 bits are shown as they are scored; anomalib's own visualiser lays maps over the
    whole, and clips.

    Args:
        args (Any): As in ``ImageVisualizer``.
        kwargs (Any): Likewise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reset()

    def _reset(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._waiting = BoundedSemaphore(MOST_WAITING)
        self._pictures: list[Future[None]] = []

    def __getstate__(self) -> dict[str, Any]:
        # Threads belong to one process.
        return {name: value for name, value in vars(self).items() if name not in ("_threads", "_waiting", "_pictures")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Have the pictures of a batch drawn.

        Raises:
            RuntimeError: If an earlier picture could not be drawn or written.
        """
        del outputs, batch_idx, dataloader_idx
        if self.output_dir is None:  # the name is anomalib's, and so is the place
            self.output_dir: Any = Path(trainer.default_root_dir) / "images"
        data: Any = getattr(trainer, "datamodule", None)
        pre_processor = getattr(pl_module, "pre_processor", None)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, "pictures")
        for item in batch:
            self._waiting.acquire()
            self._pictures.append(self._threads.submit(self._draw, item, data, pre_processor))
        done = [picture for picture in self._pictures if picture.done()]
        self._pictures = [picture for picture in self._pictures if picture not in done]
        for picture in done:
            picture.result()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until all pictures are on disk.

        Raises:
            RuntimeError: If one could not be drawn or written.
        """
        del trainer, pl_module
        pictures, self._pictures = self._pictures, []
        try:
            for picture in pictures:
                picture.result()
        finally:
            self._close()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until all pictures are on disk; see :meth:`on_test_end`."""
        self.on_test_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw no more pictures; none is left half written."""
        del trainer, pl_module, exception
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the threads go, whatever has happened."""
        del trainer, pl_module, stage
        self._close()

    def _close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._reset()

    def _draw(self, item: Any, data: Any, pre_processor: Any) -> None:
        source = item.image_path
        try:
            if source and not (shows_all(pre_processor) and not is_deep(source)):
                item.image, item.image_path = seen(pre_processor, read_image(source)), None
            picture = self.visualize(item)
            if picture is None:
                return
            file = generate_output_filename(
                input_path=source or "",
                output_path=self.output_dir,
                dataset_name=getattr(data, "name", None),
                category=getattr(data, "category", None),
            )
            with whole_file(file) as unfinished:
                picture.save(unfinished, compress_level=COMPRESSION)
        except Exception as error:  # of decoders and file systems
            fail(RuntimeError, "visualizer", "a picture that can be drawn and written", f"{source}: {error!r}")
        finally:
            self._waiting.release()
