"""The task vector of one linear layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_merge.task_vectors import factored_svd, truncated_svd


class TaskVector(NamedTuple):
    """The task vector of one linear layer: `weight` of shape (O, I) and `bias` of shape (O,).

    Where the weight is known as a product of two thin matrices, `factors` holds them: (O, r) and (r, I).
    """

    weight: Tensor
    bias: Tensor
    factors: tuple[Tensor, Tensor] | None = None

    def truncated_svd(self, rank: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Return the weight's best approximation of a rank; see `task_vectors.truncated_svd`.

        Args:
            rank: in 1…min(O, I), or -1 for full rank.
            device: where to compute.

        Shape:
            → (O, rank), (rank, I).
        """
        if self.factors is not None:
            return factored_svd(*self.factors, rank, device)
        return truncated_svd(self.weight, rank, device)
