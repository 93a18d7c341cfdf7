"""What each task's own expert says of the images that adaptation sees: computed once, and then the expert is let go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import final

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm.auto import tqdm

from fusion_merge.models.clip import pooled_output
from fusion_merge.pools.batches import ImageLoader
from fusion_merge.pools.images import TaskImages
from fusion_merge.processes import together

ASKED_TOGETHER = 64
"""Images that an expert looks at together."""


@final
class ExpertLogits:
    """Gives the logits of a task's own expert for some of the task's images.

    The first call, or `prepare`, loads the expert and computes the logits of all images that will ever be asked for;
    they take C numbers an image, and the expert's memory is free again.

    Args:
        load: gives the expert, a vision tower.
        head: the task's head.
        images: the task's images; the next good one takes the place of a bad one that is left out, as in adaptation.
        order: the positions that this process asks for, step after step from the first, without end.
        needed: which of them will be asked for, from one place to another.
        fabric: where to compute.
        workers: how many worker processes read images.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        head: nn.Module,
        images: TaskImages,
        order: Iterable[int],
        needed: range,
        *,
        fabric: Fabric,
        workers: int = 0,
    ) -> None:
        self._load, self._head, self._images = load, head, images
        self._batches = _batches(order, needed, len(images))
        self._fabric, self._workers = fabric, workers
        self._rows: dict[int, int] = {}
        self._logits: Tensor | None = None

    def __call__(self, positions: Tensor) -> Tensor:
        """Return the logits of some images.

        Args:
            positions: which ones.

        Shape:
            (B,) → (B, C).

        Raises:
            KeyError: if a position was not announced.
        """
        if self._logits is None:
            with together():
                self.prepare()
        rows = [self._rows[position] for position in positions.tolist()]
        return self._logits[rows]  # type: ignore[index]

    @torch.no_grad()
    def prepare(self) -> None:
        """Compute all logits, unless that was done.

        Raises:
            FusionMergeError: if the expert or an image cannot be read.
        """
        if self._logits is not None:
            return
        workers = min(self._workers, len(self._batches))
        loader = ImageLoader(self._images, self._batches, replace=True, num_workers=workers)
        expert = self._fabric.to_device(self._load()).eval()
        head = self._fabric.to_device(self._head)
        quiet = None if self._fabric.is_global_zero else True
        found = []
        with tqdm(loader, desc=f"asking the expert of {self._images.task.name}", unit="batch", disable=quiet) as bar:
            for pixels, _ in bar:
                with self._fabric.autocast():
                    pooled = pooled_output(expert(pixel_values=self._fabric.to_device(pixels)))
                found.append(head(pooled).float().cpu())
        self._rows = {position: row for row, position in enumerate(chain.from_iterable(self._batches))}
        self._logits = torch.cat(found) if found else torch.zeros(0, 0)  # (images, C)


def _batches(order: Iterable[int], needed: range, count: int) -> list[list[int]]:
    """Return the batches that an expert looks at, of those images that are needed.

    Images stand in the order in which they are first asked for, whatever part of it is needed: what stands in a batch,
    and so the last bits of its logits, is the same wherever an adaptation was taken up, and wherever it is to end.
    """
    first: dict[int, None] = {}
    wanted: set[int] = set()
    for place, position in enumerate(order):
        if place >= needed.stop and (len(first) % ASKED_TOGETHER == 0 or len(first) == count):
            break
        first.setdefault(position)
        if place in needed:
            wanted.add(position)
    places = list(first)
    batches = [places[i : i + ASKED_TOGETHER] for i in range(0, len(places), ASKED_TOGETHER)]
    return [batch for batch in batches if wanted.intersection(batch)]
