"""From images to batches: preprocessing, a small cache, and seeded endless batches for adaptation."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fusion_merge.errors import DataError, reason
from fusion_merge.pools.datasets import ImageTask


@dataclass(frozen=True)
class Placement:
    """Where tensors go, and which share of the work this process has.

    Attributes:
        device: where models and batches go.
        rank: which process this is.
        world_size: how many processes there are.
        autocast: the context for forward passes, for mixed precision.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


CACHE_BYTES = 128 * 2**20

Preprocess = Callable[[Any], Tensor]
"""From one image to a tensor (3, height, width)."""


class TaskImages(Dataset[tuple[Tensor, int]]):
    """The preprocessed images of a task, with their labels; small datasets are kept in memory once read.

    Args:
        task: the task.
        preprocess: from one image to a tensor (3, height, width).
        cache_bytes: a dataset that takes at most this much memory when preprocessed is kept.
    """

    def __init__(self, task: ImageTask, preprocess: Preprocess, cache_bytes: int = CACHE_BYTES) -> None:
        self.task = task
        self._preprocess = preprocess
        size = self._read(0)[0].nbytes * len(task)
        self._cache: dict[int, tuple[Tensor, int]] | None = {} if size <= cache_bytes else None

    @property
    def cached(self) -> bool:
        """Whether the images are kept in memory, so that worker processes would only cost."""
        return self._cache is not None

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")  # which ends an iteration
        if self._cache is None:
            return self._read(index)
        if index not in self._cache:
            self._cache[index] = self._read(index)
        return self._cache[index]

    def fingerprint(self) -> str:
        """Return a short name for the images as a model sees them: all that are kept in memory, or else 16 of them."""
        step = 1 if self.cached else -(-len(self) // 16)
        digest = hashlib.sha256(f"{len(self)}".encode())
        for index in range(0, len(self), step):
            digest.update(self[index][0].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _read(self, index: int) -> tuple[Tensor, int]:
        try:
            image, label = self.task.item(index)
        except DataError:
            raise
        except Exception as error:  # decoders of images raise errors of every kind
            raise DataError(f"cannot read image {index} of `{self.task.name}`: {reason(error)}") from error
        try:
            if self.task.corruption is not None:
                image = self.task.corruption.apply(image, self.task.name, index)
            pixels = self._preprocess(image)
        except Exception as error:  # and so do processors
            raise DataError(f"cannot use image {index} of `{self.task.name}`: {reason(error)}") from error
        if not torch.isfinite(pixels).all():
            raise DataError(
                f"image {index} of `{self.task.name}` has NaN or infinite values after preprocessing; "
                "look at the mean, the deviation and the factor of the processor"
            )
        return pixels, label


class EndlessBatches(Sampler[list[int]]):
    """Batches of indices without end; a pure function of the seed and the position.

    One shuffled epoch follows the other, and batches run on from the one into the next, so that all are of one size.
    Together the batches of all processes are those that a single process would take with their sizes added up.

    Args:
        num_items: how many items the dataset has.
        batch_size: items a batch, at least 1.
        seed: what the order depends on.
        start: how many batches to skip.
        rank: which of `world_size` processes this is; each takes every `world_size`-th item.
        world_size: how many processes share the items.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        *,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        items = self._items(self.start * self.batch_size * self.world_size)
        while True:
            batch = list(islice(items, self.batch_size * self.world_size))
            yield batch[self.rank :: self.world_size]

    def _items(self, position: int) -> Iterator[int]:
        """Give every process's items from a position on."""
        first, skip = divmod(position, self.num_items)
        for epoch in count(first):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_items)
            yield from order[skip:].tolist()
            skip = 0


def adaptation_loader(
    images: TaskImages, batch_size: int, seed: int, *, workers: int, placement: Placement, start: int = 0
) -> DataLoader[Any]:
    """Return a loader that gives shuffled batches without end.

    Args:
        images: the images.
        batch_size: images a batch.
        seed: what the order depends on.
        workers: how many worker processes read them.
        placement: which share of the images this process takes.
        start: how many batches to skip.
    """
    sampler = EndlessBatches(
        len(images), batch_size, seed, start=start, rank=placement.rank, world_size=placement.world_size
    )
    return DataLoader(
        images,
        batch_sampler=sampler,
        num_workers=0 if images.cached else workers,
        persistent_workers=workers > 0 and not images.cached,
        worker_init_fn=_leave_interrupts,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
    )


def _leave_interrupts(_worker: int) -> None:
    """Let Ctrl-C, which a terminal sends to worker processes too, end the adaptation and not its images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def evaluation_loader(
    images: TaskImages, batch_size: int, *, workers: int, placement: Placement, limit: int | None = None
) -> DataLoader[Any]:
    """Return a loader that gives every image once, in order; processes share the batches without overlap.

    A batch is the same however many processes there are, so that batch routing computes the same too.

    Args:
        images: the images.
        batch_size: images a batch.
        workers: how many worker processes read them.
        placement: which share of the batches this process takes.
        limit: at most this many images, in all.
    """
    total = len(images) if limit is None else min(limit, len(images))
    starts = range(placement.rank * batch_size, total, placement.world_size * batch_size)
    return DataLoader(
        images,
        batch_sampler=[list(range(start, min(start + batch_size, total))) for start in starts],
        num_workers=0 if images.cached else workers,
        pin_memory=torch.cuda.is_available(),
    )


def fitting_workers(wanted: int, num_loaders: int) -> int:
    """Return how many worker processes each of several loaders gets: the machine is shared, never crowded.

    Args:
        wanted: the most a loader may have, at least 0.
        num_loaders: how many loaders live at a time.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, max(0, available - 1) // max(1, num_loaders) if num_loaders > 1 else available)
