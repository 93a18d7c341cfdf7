"""Expert banks: what is added to one frozen linear layer, as a function of the merging coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from fusion_merge.errors import ConfigError
from fusion_merge.moe.bank import Experts as Experts
from fusion_merge.moe.bank import LinearDelta as LinearDelta
from fusion_merge.moe.bank import appended, merged_bias, stacked, weighted_sum, without
from fusion_merge.moe.factors import factored_linear, merged_factors
from fusion_merge.moe.row_blocks import along, block_rows, lay_along, merged_linear
from fusion_merge.moe.sparse_experts import SparseExperts as SparseExperts
from fusion_merge.moe.sparse_experts import sparse_spec as sparse_spec
from fusion_merge.moe.vectors import TaskVector as TaskVector


@final
class DenseExperts(Experts):
    r"""Whole task vectors, one coefficient each.

    .. math:: W = W_0 + \sum_n g_n \tau_n, \qquad b = b_0 + \sum_n g_n \beta_n

    Args:
        weight: the weights' task vectors, along the longer side: transposed where the layer narrows.
        bias: the biases' task vectors.

    Shape:
        weight (N, L, S), bias (N, O); K = N.

    Source: WEMoE, arXiv 2402.00433, eq. 4.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.num_coefficients = weight.shape[0]

    @classmethod
    def from_task_vectors(cls, task_vectors: Sequence[TaskVector]) -> DenseExperts:
        """Make the bank from one task vector a task.

        Args:
            task_vectors: N task vectors of the layer.
        """
        return cls(*stacked(task_vectors))

    def forward(self, x: Tensor, coefficients: Tensor, base: nn.Linear) -> Tensor:
        """See `Experts.forward`."""
        return merged_linear(x, coefficients, base.weight, merged_bias(base, coefficients, self.bias), self.rows)

    def lay_out(self, base: nn.Linear) -> None:
        """See `Experts.lay_out`: along the longer side."""
        lay_along(base)

    def rows(self, first: int, last: int, memory: Tensor | None = None) -> Tensor:
        """See `row_blocks.Rows`: they are there, and need no memory."""
        return self.weight[:, first:last]  # (N, rows, S)

    def expand(self) -> Tensor:
        """Return the task vectors in the order of the layer.

        Shape:
            → (N, O, I).
        """
        return self.weight.mT if self.weight.shape[1] != self.bias.shape[1] else self.weight

    def delta(self, coefficients: Tensor) -> LinearDelta:
        """See `Experts.delta`."""
        return weighted_sum(coefficients, self.expand(), self.bias)

    def with_task(self, vector: TaskVector) -> DenseExperts:
        """See `Experts.with_task`."""
        weight = appended(self.weight, along(vector.weight).unsqueeze(0))  # (N + 1, L, S)
        return DenseExperts(weight, appended(self.bias, vector.bias.unsqueeze(0)))

    def without_task(self, index: int) -> DenseExperts:
        """See `Experts.without_task`."""
        return DenseExperts(without(self.weight, index), without(self.bias, index))

    def spec(self) -> dict[str, Any]:
        """See `Experts.spec`."""
        return dense_spec(self.num_coefficients)


@final
class LowRankExperts(Experts):
    r"""Rank-one experts, one coefficient each; the biases are static.

    .. math:: W = W_0 + \sum_{n,j} g_{nj}\, u_{nj} (s_{nj} v_{nj})^\top, \qquad b = b_0 + \lambda \sum_n \beta_n

    In factors, with no merged weight: :math:`y = x W_0^\top + ((x V^\top) \odot g)\, U^\top + b`.

    Args:
        left: U, the left singular vectors of all tasks, task after task, by descending singular value.
        right: V, the right singular vectors scaled by their singular values, in the same order.
        bias: the biases' task vectors.
        bias_scaling: λ, the static weight of every bias.

    Shape:
        left (O, K), right (K, I), bias (N, O); K = N·R.

    Source: RankOne-MoE (EnnengYang/RankOne-MoE).
    """

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor, bias_scaling: float) -> None:
        super().__init__()
        self.left = nn.Parameter(left, requires_grad=False)
        self.right = nn.Parameter(right, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.bias_scaling = bias_scaling
        self.num_coefficients = right.shape[0]

    @classmethod
    def from_task_vectors(
        cls,
        task_vectors: Sequence[TaskVector],
        rank: int,
        bias_scaling: float,
        device: torch.device | str | None = None,
    ) -> LowRankExperts:
        """Decompose each task vector by truncated SVD, from its factors where it has them, and make the bank.

        Args:
            task_vectors: N task vectors of the layer.
            rank: R, the rank-one experts a task, in 1…min(O, I), or -1 for full rank.
            bias_scaling: λ, the static weight of every bias.
            device: where to decompose.
        """
        parts = [(*t.truncated_svd(rank, device), t.bias) for t in task_vectors]
        lefts, rights, biases = zip(*parts, strict=True)
        left, right = torch.cat(lefts, dim=1), torch.cat(rights, dim=0)  # (O, N·R), (N·R, I)
        return cls(left, right, torch.stack(biases), bias_scaling)

    def forward(self, x: Tensor, coefficients: Tensor, base: nn.Linear) -> Tensor:
        """See `Experts.forward`: in factors, or as one merged weight a batch where that takes fewer operations."""
        bias = base.bias + self._bias_delta().to(base.bias.dtype)  # (O,)
        out_features, in_features = base.weight.shape
        tokens = x.shape[0] * x.shape[1]
        one = coefficients.shape[0] == 1 and out_features * in_features < tokens * (out_features + in_features)
        apply = merged_factors if one else factored_linear
        return apply(x, coefficients, base.weight, bias, self.left, self.right)

    def delta(self, coefficients: Tensor) -> LinearDelta:
        """See `Experts.delta`."""
        left, right = self.left.to(coefficients.dtype), self.right.to(coefficients.dtype)
        weight = torch.einsum("ok,bk,ki->boi", left, coefficients, right)  # (B, O, I)
        return LinearDelta(weight, self._bias_delta().to(weight.dtype).expand(coefficients.shape[0], -1))  # (B, O)

    @property
    def rank(self) -> int:
        """R, the experts of each task."""
        return self.num_coefficients // self.bias.shape[0]

    def with_task(self, vector: TaskVector) -> LowRankExperts:
        """See `Experts.with_task`: decomposed to the rank of the others."""
        left, right = vector.truncated_svd(self.rank)  # (O, R), (R, I)
        bias = appended(self.bias, vector.bias.unsqueeze(0))  # (N + 1, O)
        return LowRankExperts(appended(self.left, left, 1), appended(self.right, right), bias, self.bias_scaling)

    def without_task(self, index: int) -> LowRankExperts:
        """See `Experts.without_task`."""
        first, rank = index * self.rank, self.rank
        left, right = without(self.left, first, rank, 1), without(self.right, first, rank)
        return LowRankExperts(left, right, without(self.bias, index), self.bias_scaling)

    def spec(self) -> dict[str, Any]:
        """See `Experts.spec`."""
        return low_rank_spec(self.bias.shape[0], self.rank, self.bias_scaling)

    def _bias_delta(self) -> Tensor:
        exact = torch.promote_types(self.bias.dtype, torch.float32)
        return self.bias_scaling * self.bias.sum(dim=0, dtype=exact)  # (O,)


def dense_spec(num_tasks: int) -> dict[str, Any]:
    """Return the spec of a dense bank.

    Args:
        num_tasks: N.
    """
    return {"kind": "dense", "num_tasks": num_tasks}


def low_rank_spec(num_tasks: int, rank: int, bias_scaling: float) -> dict[str, Any]:
    """Return the spec of a low-rank bank.

    Args:
        num_tasks: N.
        rank: R, at least 1.
        bias_scaling: λ, the static weight of every bias.
    """
    return {"kind": "low_rank", "num_tasks": num_tasks, "rank": rank, "bias_scaling": bias_scaling}


def empty_experts(spec: dict[str, Any], in_features: int, out_features: int) -> Experts:
    """Make a bank with the shapes that a spec describes and values that are still to be loaded.

    Args:
        spec: what `Experts.spec` returned.
        in_features: I.
        out_features: O.

    Raises:
        ConfigError: if the kind of bank is unknown.
    """
    kind, num_tasks = spec["kind"], spec["num_tasks"]
    bias = torch.zeros(num_tasks, out_features)
    if kind == "dense":
        return DenseExperts(along(torch.zeros(num_tasks, out_features, in_features)).contiguous(), bias)
    if kind == "sparse":
        values, gaps = torch.zeros(spec["num_values"]), torch.zeros(spec["num_values"], dtype=torch.uint8)
        length, width = sorted((out_features, in_features), reverse=True)
        starts = torch.zeros(-(-length // block_rows(width)) + 1, dtype=torch.int32)
        return SparseExperts(values, gaps, starts, bias, (out_features, in_features))
    if kind == "low_rank":
        size = num_tasks * spec["rank"]
        left, right = torch.zeros(out_features, size), torch.zeros(size, in_features)
        return LowRankExperts(left, right, bias, spec["bias_scaling"])
    raise ConfigError(f"expert bank of kind `{kind}` is unknown; known are dense, sparse and low_rank")
