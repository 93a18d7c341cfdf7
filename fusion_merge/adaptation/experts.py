"""What each task's own expert says of the images that adaptation sees: computed once, and then the expert is let go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import final

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm.auto import tqdm

from fusion_merge.models.clip import pooled_output
from fusion_merge.pools.batches import ImageLoader
from fusion_merge.pools.images import TaskImages
from fusion_merge.processes import together

_BATCH = 64  # images that an expert looks at together


@final
class ExpertLogits:
    """Gives the logits of a task's own expert for some of the task's images.

    The first call, or `prepare`, loads the expert and computes the logits of all images that will ever be asked for;
    they take C numbers an image, and the expert's memory is free again.

    Args:
        load: gives the expert, a vision tower.
        head: the task's head.
        images: the task's images; the next good one takes the place of a bad one that is left out, as in adaptation.
        positions: those that will be asked for by this process.
        fabric: where to compute.
        workers: how many worker processes read images.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        head: nn.Module,
        images: TaskImages,
        positions: Iterable[int],
        *,
        fabric: Fabric,
        workers: int = 0,
    ) -> None:
        self._load, self._head, self._images = load, head, images
        self._positions = sorted(set(positions))
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
        batches = [self._positions[i : i + _BATCH] for i in range(0, len(self._positions), _BATCH)]
        loader = ImageLoader(self._images, batches, replace=True, num_workers=min(self._workers, len(batches)))
        expert = self._fabric.to_device(self._load()).eval()
        head = self._fabric.to_device(self._head)
        quiet = None if self._fabric.is_global_zero else True
        found = []
        with tqdm(loader, desc=f"asking the expert of {self._images.task.name}", unit="batch", disable=quiet) as bar:
            for pixels, _ in bar:
                with self._fabric.autocast():
                    logits = head(pooled_output(expert(pixel_values=self._fabric.to_device(pixels))))
                found.append(logits.float().cpu())
        self._rows = {position: row for row, position in enumerate(self._positions)}
        self._logits = torch.cat(found)  # (images, C)
