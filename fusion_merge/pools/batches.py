"""Batches that worker processes read, and what becomes of bad images and of the workers themselves."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fusion_merge.errors import BadImageError, DataError, FusionMergeError, reason
from fusion_merge.pools.images import OnBadImage, TaskImages

log = logging.getLogger(__name__)

_GRACE = 1.0  # seconds between the end of a connection and that of the process at its other end


class ImageBatch(NamedTuple):
    """What comes from a worker process.

    Attributes:
        images: images (B, 3, height, width) and labels (B,); None where none of them is good.
        bad: what is wrong with the bad ones among those that were asked for, or looked at in their place.
        failure: the error that ends all, as the user reads it; the text of a worker's own has its traceback in it.
    """

    images: list[Tensor] | None
    bad: dict[int, str]
    failure: str | None


class ImageLoader(DataLoader[Any]):
    """Gives batches of images (B, 3, height, width) and labels (B,), read here or in worker processes.

    Args:
        images: the images.
        batch_sampler: the indices of each batch.
        replace: take the next good image in the place of a bad one that is left out, so that batches keep their size.
        positions: give the positions that were asked for instead of labels.
        **options: those of torch's `DataLoader`.

    Raises:
        DataError: while batches are taken: if an image cannot be used, or a worker process ends.
    """

    def __init__(
        self, images: TaskImages, batch_sampler: Any, *, replace: bool, positions: bool = False, **options: Any
    ) -> None:
        workers = 0 if images.cached else options.pop("num_workers", 0)
        super().__init__(
            _BatchReader(images, replace, positions),
            batch_sampler=batch_sampler,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_interrupts,
            pin_memory=torch.cuda.is_available(),
            **{**options, "num_workers": workers},
        )
        self.images = images
        self.replaces = replace
        self.bad: dict[int, str] = {}

    def __iter__(self) -> Any:
        """Begin to read, and return the batches; `bad` tells afterwards which images were bad."""
        self.bad = {}
        return LoadedBatches(self, super().__iter__())


class LoadedBatches(Iterator[Any]):
    """The batches of one pass over a loader.

    Args:
        loader: the loader.
        batches: what its worker processes make.
    """

    def __init__(self, loader: ImageLoader, batches: Any) -> None:
        self._loader = loader
        self._batches = batches

    @property
    def workers(self) -> list[Any]:
        """The worker processes; none once they are closed."""
        return list(getattr(self._batches, "_workers", ()))

    def _has_lost_a_worker(self) -> bool:
        try:
            return bool(wait([worker.sentinel for worker in self.workers], timeout=_GRACE))
        except RuntimeError:  # torch says so when it is told of the end, wherever the program is then
            return True

    def close(self) -> None:
        """End the worker processes now, rather than when nothing refers to them any more."""
        shut_down = getattr(self._batches, "_shutdown_workers", None)
        self._batches = iter(())
        self._loader._iterator = None
        if shut_down is not None:
            with suppress(RuntimeError):  # of a worker that ended by itself: whoever closes knows, or need not
                shut_down()

    def __next__(self) -> Any:
        name = self._loader.images.task.name
        while True:
            try:
                batch: ImageBatch = next(self._batches)
            except (RuntimeError, EOFError, ConnectionError) as error:
                cut_off = not isinstance(error, RuntimeError) and self._has_lost_a_worker()  # in the middle of a batch
                self.close()
                if not cut_off and "DataLoader worker" not in str(error):
                    raise
                raise DataError(
                    f"a worker process that reads images of `{name}` has ended ({reason(error)}); it may lack memory: "
                    "try a smaller `num_workers`, or 0"
                ) from error
            except BaseException:
                self.close()
                raise
            if batch.failure is not None:
                self.close()
                raise DataError(batch.failure)
            self._note(batch.bad)
            if batch.images is not None:
                return batch.images

    def _note(self, bad: dict[int, str]) -> None:
        if bad and self._loader.replaces and not self._loader.images.told:
            self._loader.images.told = True
            first = next(iter(bad.values()))
            log.warning("%s; the next good image takes its place, and so on for others of this task", first)
        self._loader.bad |= bad
        self._loader.images.bad |= bad


class _BatchReader(Dataset[Any]):
    """Reads whole batches, so that it can tell what is wrong with some of their images."""

    def __init__(self, images: TaskImages, replace: bool, positions: bool) -> None:
        self._images = images
        self._replace = replace
        self._positions = positions

    def __getitems__(self, indices: list[int]) -> ImageBatch:
        images, items, bad = self._images, [], {}
        try:
            for index in indices:
                try:
                    pixels, label = images.good(index) if self._replace else images[index]
                    items.append((pixels, index if self._positions else label))
                except BadImageError:
                    if images.on_bad_image is OnBadImage.ERROR:
                        raise
                if index in images.bad:
                    bad[index] = images.bad[index]
            return ImageBatch(default_collate(items) if items else None, bad, None)
        except FusionMergeError as error:
            return ImageBatch(None, bad, str(error))
        except RuntimeError as error:  # what `default_collate` makes of different sizes
            if len({item[0].shape for item in items}) < 2:
                raise
            return ImageBatch(None, bad, _different(images, items, error))


def _different(images: TaskImages, items: list[tuple[Tensor, int]], error: Exception) -> str:
    shapes = sorted({str(tuple(pixels.shape)) for pixels, _ in items})
    return (
        f"the images of `{images.task.name}` are of different sizes after preprocessing ({', '.join(shapes)}), so that "
        f"they make no batch; take a `processor` that crops them to one size ({reason(error)})"
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_interrupts(_worker: int) -> None:
    """Let Ctrl-C, which a terminal sends to worker processes too, end what is computed and not its images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
