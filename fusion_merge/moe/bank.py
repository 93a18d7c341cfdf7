"""What every expert bank is: what is added to one frozen linear layer, as a function of the merging coefficients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusion_merge.errors import ConfigError
from fusion_merge.moe.row_blocks import along
from fusion_merge.moe.vectors import TaskVector


class LinearDelta(NamedTuple):
    """What a bank adds to a linear layer: `weight` of shape (B, O, I) and `bias` of shape (B, O)."""

    weight: Tensor
    bias: Tensor


class Experts(nn.Module, ABC):
    r"""What is added to one frozen linear layer.

    `forward` equals applying `delta` to rounding; `delta` is the slow, obvious definition.

    A bank stored with unit roundoff u (2⁻¹¹ for float16, 2⁻⁸ for bfloat16) instead of exactly moves a token's output,
    underflow aside, by at most

    .. math:: u \sum_n |g_n| \big(\lVert \tau_n \rVert \lVert x \rVert + \lVert \beta_n \rVert\big)
              \quad\text{(dense, sparse)}, \qquad
              (2u + u^2) \sum_k |g_k| s_k \lVert x \rVert + u |\lambda| \sum_n \lVert \beta_n \rVert
              \quad\text{(low rank).}
    """

    num_coefficients: int

    @abstractmethod
    def forward(self, x: Tensor, coefficients: Tensor, base: nn.Linear) -> Tensor:
        """Return the output of the base layer with the experts added.

        Args:
            x: the layer's input.
            coefficients: one row of merging coefficients a sample, or a single row for the whole batch.
            base: the frozen linear layer.

        Shape:
            x (B, T, I), coefficients (B, K) or (1, K) → (B, T, O).
        """

    def lay_out(self, base: nn.Linear) -> None:
        """Lay the base layer's weight in memory in the order in which `forward` reads it; its values stay.

        Args:
            base: the layer.
        """

    @abstractmethod
    def delta(self, coefficients: Tensor) -> LinearDelta:
        """Return what is added to the base layer's weight and bias.

        Args:
            coefficients: the merging coefficients.

        Shape:
            coefficients (B, K) → weight (B, O, I), bias (B, O).
        """

    @abstractmethod
    def with_task(self, vector: TaskVector) -> Experts:
        """Return a bank that has the experts of one more task, behind the others; this one stays as it is.

        Args:
            vector: the task vector of the layer, pruned already where those of the bank are.

        Raises:
            ConfigError: if the bank's precision cannot hold its values.
        """

    @abstractmethod
    def without_task(self, index: int) -> Experts:
        """Return a bank that lacks the experts of one task; this one stays as it is.

        Args:
            index: which task, in 0…N-1; at least one other is left.
        """

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Return what `empty_experts` needs to make a bank of the same shapes, as plain JSON values."""


def stacked(
    task_vectors: Sequence[TaskVector], change: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> tuple[Tensor, Tensor]:
    """Return all weights along the longer side and all biases, each changed first by itself.

    Args:
        task_vectors: N task vectors of a layer.
        change: what is done with each tensor.

    Shape:
        → (N, L, S), (N, O).

    Raises:
        ConfigError: if there is none.
    """
    weights: Tensor | None = None
    biases = []
    for index, vector in enumerate(task_vectors):  # one at a time: they may be read as they are asked for
        long = along(change(vector.weight))  # (L, S)
        if weights is None:
            weights = long.new_empty(len(task_vectors), *long.shape)
        weights[index] = long
        biases.append(change(vector.bias))
    if weights is None:
        raise ConfigError("an expert bank needs at least one task vector")
    return weights, torch.stack(biases)


def merged_bias(base: nn.Linear, coefficients: Tensor, bias: Tensor) -> Tensor:
    """Return the bias of a layer with those of its experts added.

    Args:
        base: the layer.
        coefficients: the merging coefficients.
        bias: the biases' task vectors.

    Shape:
        coefficients (B, N), bias (N, O) → (B, O).
    """
    return torch.addmm(base.bias.unsqueeze(0), coefficients, bias.to(coefficients.dtype))  # (B, O) or (1, O)


def weighted_sum(coefficients: Tensor, weight: Tensor, bias: Tensor) -> LinearDelta:
    """Return the sum of task vectors, each times its coefficient.

    Args:
        coefficients: the merging coefficients.
        weight: the weights' task vectors.
        bias: the biases' task vectors.

    Shape:
        coefficients (B, N), weight (N, O, I), bias (N, O) → weight (B, O, I), bias (B, O).
    """
    weight, bias = weight.to(coefficients.dtype), bias.to(coefficients.dtype)
    return LinearDelta(torch.einsum("bn,noi->boi", coefficients, weight), coefficients @ bias)


def appended(stack: Tensor, one: Tensor, dim: int = 0) -> Tensor:
    """Return a stack with one more part, in the precision and on the device of the stack.

    Args:
        stack: what there is.
        one: what comes behind it.
        dim: along which dimension.

    Raises:
        ConfigError: if that precision cannot hold the values.
    """
    part = one.detach().to(stack)
    if not torch.isfinite(part).all():
        raise ConfigError(f"experts stored in {stack.dtype} cannot hold those of the new task; build them in float32")
    return torch.cat([stack.detach(), part], dim=dim)


def without(stack: Tensor, first: int, count: int = 1, dim: int = 0) -> Tensor:
    """Return a stack that lacks some parts.

    Args:
        stack: what there is.
        first: the first that goes.
        count: how many go.
        dim: along which dimension.
    """
    left, _, right = stack.detach().tensor_split((first, first + count), dim=dim)
    return torch.cat([left, right], dim=dim)
