"""The task vectors of one linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final, overload

import torch
from torch import Tensor

from fusion_merge.task_vectors import State, difference, factored_svd, truncated_svd

PARTS = ("weight", "bias")
"""The tensors of a linear layer."""


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


@final
class LayerTaskVectors(Sequence[TaskVector]):
    """The task vectors of one linear layer, each formed when it is asked for, so that one is in memory at a time.

    A state that has `pretrained`, which is the very one here, and `factors`, which gives a weight's task vector as a
    product of thin matrices, is asked for these.

    Args:
        pretrained: the state that every model was fine-tuned from.
        finetuned: the N fine-tuned states.
        path: the layer's name.
    """

    def __init__(self, pretrained: State, finetuned: Sequence[State], path: str) -> None:
        self._before = {part: pretrained[f"{path}.{part}"] for part in PARTS}
        self._pretrained, self._finetuned, self._path = pretrained, finetuned, path
        self.zero: set[int] = set()
        """Which of those that were asked for are zero throughout."""

    def __len__(self) -> int:
        return len(self._finetuned)

    @overload
    def __getitem__(self, index: int) -> TaskVector: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[TaskVector]: ...

    def __getitem__(self, index: int | slice) -> TaskVector | Sequence[TaskVector]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        state = self._finetuned[index]
        factors = self._factors(state)
        dense = PARTS if factors is None else PARTS[1:]
        before = {part: self._before[part] for part in dense}
        parts = difference({part: state[f"{self._path}.{part}"] for part in dense}, before)
        weight = factors[0] @ factors[1] if factors is not None else parts["weight"]  # (O, I)
        vector = TaskVector(weight, parts["bias"], factors)
        if not (vector.weight.any() or vector.bias.any()):
            self.zero.add(index)
        return vector

    def _factors(self, state: State) -> tuple[Tensor, Tensor] | None:
        factors = getattr(state, "factors", None)
        if factors is None or getattr(state, "pretrained", None) is not self._pretrained:
            return None
        found: tuple[Tensor, Tensor] | None = factors(f"{self._path}.weight")
        return found
