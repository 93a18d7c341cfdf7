"""The task vectors of several models side by side, and what becomes of them: one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from fusion_merge.errors import ModelError
from fusion_merge.task_vectors import State, check_same_shapes, shapes_of

Change = Callable[[str, Tensor], Tensor]
"""From a tensor's name and its N task vectors (N, …) to others of the same shape."""

Combine = Callable[[str, Tensor], Tensor]
"""From a tensor's name and its N task vectors (N, …) to the merged one (…)."""


@final
class TaskVectors(Mapping[str, Tensor]):
    r"""The task vectors of N models: for each tensor those of all models, formed when they are asked for.

    .. math:: \tau_n = \theta_n - \theta_0

    Args:
        pretrained: θ₀.
        finetuned: the θₙ, with the same names and shapes.
        leave: names of tensors that have no part in the merge.

    Shape:
        (N, …), N first.

    Raises:
        ModelError: if names or shapes differ, or if there is no model.
    """

    def __init__(self, pretrained: State, finetuned: Sequence[State], *, leave: Collection[str] = ()) -> None:
        self._pretrained, self._finetuned, self.leave = pretrained, list(finetuned), frozenset(leave)
        self._changes: tuple[Change, ...] = ()
        if not self._finetuned:
            raise ModelError("there is no fine-tuned model to merge; give at least one beside `_pretrained_`")
        for state in self._finetuned:
            check_same_shapes(pretrained, state)

    @property
    def num_models(self) -> int:
        """N."""
        return len(self._finetuned)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that has task vectors, without N; whole numbers have none."""
        shapes = {name: shape for name, shape in shapes_of(self._pretrained).items() if name not in self.leave}
        return {name: shape for name, shape in shapes.items() if self._pretrained[name].is_floating_point()}

    def changed(self, change: Change) -> TaskVectors:
        """Return other task vectors, each tensor changed when it is asked for.

        Args:
            change: the same for the same tensor, whenever it is called; it must not change its argument.
        """
        other = TaskVectors(self._pretrained, self._finetuned, leave=self.leave)
        other._changes = (*self._changes, change)
        return other

    def merged(self, combine: Combine) -> MergedState:
        """Return the pretrained model with merged task vectors added.

        Args:
            combine: how the task vectors of one tensor become one.
        """
        return MergedState(self._pretrained, self, combine)

    def beside(self, name: str, pretrained: Tensor) -> Tensor:
        """Return the task vectors of one tensor, whose pretrained value is at hand.

        Args:
            name: the tensor's.
            pretrained: its value in the pretrained model.
        """
        stacked = torch.stack([self._difference(state, name, pretrained) for state in self._finetuned])  # (N, …)
        for change in self._changes:
            stacked = change(name, stacked)
        return stacked

    def _difference(self, state: State, name: str, pretrained: Tensor) -> Tensor:
        """Return one task vector: the product of its factors where it has them, as that is exactly of low rank."""
        factors = getattr(state, "factors", None)
        if factors is None or getattr(state, "pretrained", None) is not self._pretrained:
            return state[name].to(pretrained) - pretrained
        parts = factors(name)
        return state[name].to(pretrained) - pretrained if parts is None else (parts[0] @ parts[1]).to(pretrained)

    def __getitem__(self, name: str) -> Tensor:
        return self.beside(name, self._pretrained[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@final
class MergedState(Mapping[str, Tensor]):
    r"""A static merge whose tensors are formed when they are asked for.

    .. math:: \theta = \theta_0 + \operatorname{combine}(\tau_1, \dots, \tau_N)

    Tensors that have no task vector, and those of whole numbers, are the pretrained model's.

    Args:
        pretrained: θ₀.
        vectors: the task vectors.
        combine: how those of one tensor become one.
    """

    def __init__(self, pretrained: State, vectors: TaskVectors, combine: Combine) -> None:
        self._pretrained, self._vectors, self._combine = pretrained, vectors, combine
        self.shapes = shapes_of(pretrained)

    def __getitem__(self, name: str) -> Tensor:
        base = self._pretrained[name]
        if name in self._vectors.leave or not base.is_floating_point():
            return base.clone()
        return base + self._combine(name, self._vectors.beside(name, base)).to(base)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pretrained)

    def __len__(self) -> int:
        return len(self._pretrained)


def mean(_name: str, stacked: Tensor) -> Tensor:
    """Return the mean task vector; a `Combine`.

    Args:
        stacked: the task vectors of one tensor.

    Shape:
        (N, …) → (…).
    """
    return stacked.mean(dim=0)


def matrices(function: Callable[[Tensor], Tensor], excluded: Collection[str], device: torch.device) -> Combine:
    """Return what merges matrices by a function and all else by its mean.

    A matrix is a tensor of two dimensions: the weights of linear layers and the table of position embeddings. The
    kernel of the patch embedding has four, and is averaged.

    Args:
        function: from the task vectors of one matrix (N, O, I) to the merged one (O, I).
        excluded: names of matrices that are averaged all the same.
        device: where to compute the function.
    """

    def combine(name: str, stacked: Tensor) -> Tensor:
        if stacked.dim() != 3 or name in excluded:
            return mean(name, stacked)
        exact = torch.promote_types(stacked.dtype, torch.float32)
        return function(stacked.to(device, exact)).to(stacked)

    return combine
