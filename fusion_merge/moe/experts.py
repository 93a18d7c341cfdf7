"""Expert banks: what is added to one frozen linear layer, as a function of the merging coefficients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from fusion_merge.errors import ConfigError
from fusion_merge.moe.factors import factored_linear, merged_factors
from fusion_merge.moe.gaps import decode, encode
from fusion_merge.moe.row_blocks import along, block_rows, lay_along, lies_along, merged_linear
from fusion_merge.moe.vectors import TaskVector as TaskVector
from fusion_merge.task_vectors import magnitude_prune


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
    def spec(self) -> dict[str, Any]:
        """Return what `empty_experts` needs to make a bank of the same shapes, as plain JSON values."""


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
        return cls(*_stacked(task_vectors))

    def forward(self, x: Tensor, coefficients: Tensor, base: nn.Linear) -> Tensor:
        """See `Experts.forward`."""
        return merged_linear(x, coefficients, base.weight, _merged_bias(base, coefficients, self.bias), self.rows)

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
        return _delta(coefficients, self.expand(), self.bias)

    def spec(self) -> dict[str, Any]:
        """See `Experts.spec`."""
        return dense_spec(self.num_coefficients)


@final
class SparseExperts(Experts):
    r"""Task vectors pruned by magnitude, one coefficient each: stored compressed, computed dense.

    .. math:: W = W_0 + \sum_n g_n \,(\tau_n \odot M_n), \qquad b = b_0 + \sum_n g_n \,(\beta_n \odot m_n)

    Weights are kept as values and the gaps between them (see `gaps`): 5 bytes for each entry that survives instead of
    4 for each entry, so 90 % pruning takes an eighth of the dense bank. Biases are short and kept as they are.

    Args:
        values: the entries that survive, and some zeros between them.
        gaps: how far each is from the one before, in blocks of `block_rows` rows along the longer side: block after
            block, within one task after task, and within that row after row.
        starts: where each block begins in `values`, and the end.
        bias: the pruned biases.
        shape: the layer's (O, I).

    Shape:
        values (S,), gaps (S,) uint8, starts (blocks + 1,) int32, bias (N, O); K = N.

    Source: E-WEMoE, arXiv 2410.21804. The reference stores the zeros; this bank does not.
    """

    gaps: Tensor
    starts: Tensor

    def __init__(self, values: Tensor, gaps: Tensor, starts: Tensor, bias: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.register_buffer("gaps", gaps)
        self.register_buffer("starts", starts)
        self.shape = shape
        self.num_coefficients = bias.shape[0]

    @classmethod
    def from_task_vectors(cls, task_vectors: Sequence[TaskVector], prune_ratio: float) -> SparseExperts:
        """Prune each tensor of each task vector by itself and make the bank.

        Args:
            task_vectors: N task vectors of the layer.
            prune_ratio: the share of each tensor to drop, in [0, 1).
        """
        weight, bias = _stacked(task_vectors, lambda tensor: magnitude_prune(tensor, prune_ratio))  # (N, L, S), (N, O)
        num_tasks, length, width = weight.shape
        height = block_rows(width)
        blocks = torch.cat([block.flatten() for block in weight.split(height, dim=1)])  # (N·L·S,)
        shape = (length, width) if length == bias.shape[1] else (width, length)  # (O, I)
        return cls(*encode(blocks, num_tasks * height * width), bias, shape)

    def lay_out(self, base: nn.Linear) -> None:
        """See `Experts.lay_out`: along the longer side."""
        lay_along(base)

    def rows(self, first: int, last: int, memory: Tensor | None = None) -> Tensor:
        """See `row_blocks.Rows`: a block is expanded when it is asked for; without memory, into its own."""
        short = min(self.shape)
        index = first // block_rows(short)
        begin, end = self.starts[index : index + 2].tolist()
        if memory is None:
            memory = self.values.new_empty(self.num_coefficients * (last - first) * short)
        block = memory.zero_()
        decode(self.values.detach()[begin:end], self.gaps[begin:end], block)
        return block.view(self.num_coefficients, last - first, short)  # (N, rows, S)

    def forward(self, x: Tensor, coefficients: Tensor, base: nn.Linear) -> Tensor:
        """See `Experts.forward`."""
        return merged_linear(x, coefficients, base.weight, _merged_bias(base, coefficients, self.bias), self.rows)

    def expand(self) -> Tensor:
        """Return the pruned task vectors as a dense tensor, in the order of the layer.

        Shape:
            → (N, O, I).
        """
        length, height = max(self.shape), block_rows(min(self.shape))
        blocks = [self.rows(first, min(first + height, length)) for first in range(0, length, height)]
        long = torch.cat(blocks, dim=1)  # (N, L, S)
        return long if lies_along(*self.shape) else long.mT

    def delta(self, coefficients: Tensor) -> LinearDelta:
        """See `Experts.delta`."""
        return _delta(coefficients, self.expand(), self.bias)

    def spec(self) -> dict[str, Any]:
        """See `Experts.spec`."""
        return sparse_spec(self.num_coefficients, self.values.numel())


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

    def spec(self) -> dict[str, Any]:
        """See `Experts.spec`."""
        num_tasks = self.bias.shape[0]
        return low_rank_spec(num_tasks, self.num_coefficients // num_tasks, self.bias_scaling)

    def _bias_delta(self) -> Tensor:
        exact = torch.promote_types(self.bias.dtype, torch.float32)
        return self.bias_scaling * self.bias.sum(dim=0, dtype=exact)  # (O,)


def dense_spec(num_tasks: int) -> dict[str, Any]:
    """Return the spec of a dense bank.

    Args:
        num_tasks: N.
    """
    return {"kind": "dense", "num_tasks": num_tasks}


def sparse_spec(num_tasks: int, num_values: int) -> dict[str, Any]:
    """Return the spec of a sparse bank.

    Args:
        num_tasks: N.
        num_values: S, the entries that are stored: those of all N weights that survive (`num_survivors` says how many
            in one), and some zeros between them.
    """
    return {"kind": "sparse", "num_tasks": num_tasks, "num_values": num_values}


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


def _stacked(
    task_vectors: Sequence[TaskVector], change: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> tuple[Tensor, Tensor]:
    """Return all weights along the longer side (N, L, S) and all biases (N, O), each changed first by itself."""
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


def _merged_bias(base: nn.Linear, coefficients: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(base.bias.unsqueeze(0), coefficients, bias.to(coefficients.dtype))  # (B, O) or (1, O)


def _delta(coefficients: Tensor, weight: Tensor, bias: Tensor) -> LinearDelta:
    weight, bias = weight.to(coefficients.dtype), bias.to(coefficients.dtype)
    return LinearDelta(torch.einsum("bn,noi->boi", coefficients, weight), coefficients @ bias)
