"""From images to batches: each image once, or seeded batches without end, and this process's share of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from fusion_merge.pools.batches import ImageLoader
from fusion_merge.pools.images import TaskImages as TaskImages
from fusion_merge.pools.machine import fitting_workers as fitting_workers


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
    images: TaskImages,
    batch_size: int,
    seed: int,
    *,
    workers: int,
    placement: Placement,
    start: int = 0,
    positions: bool = False,
) -> ImageLoader:
    """Return a loader that gives shuffled batches without end, all of one size.

    Args:
        images: the images; the next good one takes the place of a bad one that is left out.
        batch_size: images a batch.
        seed: what the order depends on.
        workers: how many worker processes read them.
        placement: which share of the images this process takes.
        start: how many batches to skip.
        positions: give the images' positions instead of labels.
    """
    sampler = EndlessBatches(
        len(images), batch_size, seed, start=start, rank=placement.rank, world_size=placement.world_size
    )
    return ImageLoader(
        images,
        sampler,
        replace=True,
        positions=positions,
        num_workers=workers,
        persistent_workers=workers > 0 and not images.cached,
        generator=torch.Generator().manual_seed(seed),
    )


def evaluation_loader(
    images: TaskImages,
    batch_size: int,
    *,
    workers: int,
    placement: Placement,
    limit: int | None = None,
    replace: bool = False,
) -> ImageLoader:
    """Return a loader that gives every image once, in order; processes share the batches without overlap.

    A batch is the same however many processes there are, so that batch routing computes the same too.

    Args:
        images: the images.
        batch_size: images a batch.
        workers: how many worker processes read them; never more than batches.
        placement: which share of the batches this process takes.
        limit: at most this many images, in all.
        replace: take the next good image in the place of a bad one that is left out; by default batches are smaller.
    """
    total = len(images) if limit is None else min(limit, len(images))
    starts = range(placement.rank * batch_size, total, placement.world_size * batch_size)
    return ImageLoader(
        images,
        [list(range(start, min(start + batch_size, total))) for start in starts],
        replace=replace,
        num_workers=min(workers, len(starts)),
    )
