"""Expert banks of pruned task vectors: stored compressed, computed dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from fusion_merge.moe.bank import Experts, LinearDelta, appended, merged_bias, stacked, weighted_sum, without
from fusion_merge.moe.gaps import decode, encode
from fusion_merge.moe.row_blocks import along, block_rows, lay_along, lies_along, merged_linear
from fusion_merge.moe.vectors import TaskVector
from fusion_merge.task_vectors import magnitude_prune


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
        weight, bias = stacked(task_vectors, lambda tensor: magnitude_prune(tensor, prune_ratio))  # (N, L, S), (N, O)
        length, width = weight.shape[1:]
        return cls._encoded(weight, bias, (length, width) if length == bias.shape[1] else (width, length))

    @classmethod
    def _encoded(cls, weight: Tensor, bias: Tensor, shape: tuple[int, int]) -> SparseExperts:
        """Make the bank of pruned weights along the longer side (N, L, S)."""
        num_tasks, _, width = weight.shape
        height = block_rows(width)
        blocks = torch.cat([block.flatten() for block in weight.split(height, dim=1)])  # (N·L·S,)
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
        return merged_linear(x, coefficients, base.weight, merged_bias(base, coefficients, self.bias), self.rows)

    def expand(self) -> Tensor:
        """Return the pruned task vectors as a dense tensor, in the order of the layer.

        Shape:
            → (N, O, I).
        """
        long = self._long()
        return long if lies_along(*self.shape) else long.mT

    def _long(self) -> Tensor:
        """Return the pruned task vectors along the longer side: (N, L, S)."""
        length, height = max(self.shape), block_rows(min(self.shape))
        blocks = [self.rows(first, min(first + height, length)) for first in range(0, length, height)]
        return torch.cat(blocks, dim=1)  # (N, L, S)

    def with_task(self, vector: TaskVector) -> SparseExperts:
        """See `Experts.with_task`: all entries that are not zero are kept."""
        weight = appended(self._long(), along(vector.weight).unsqueeze(0))  # (N + 1, L, S)
        return self._encoded(weight, appended(self.bias, vector.bias.unsqueeze(0)), self.shape)

    def without_task(self, index: int) -> SparseExperts:
        """See `Experts.without_task`."""
        return self._encoded(without(self._long(), index), without(self.bias, index), self.shape)

    def delta(self, coefficients: Tensor) -> LinearDelta:
        """See `Experts.delta`."""
        return weighted_sum(coefficients, self.expand(), self.bias)

    def spec(self) -> dict[str, Any]:
        """See `Experts.spec`."""
        return sparse_spec(self.num_coefficients, self.values.numel())


def sparse_spec(num_tasks: int, num_values: int) -> dict[str, Any]:
    """Return the spec of a sparse bank.

    Args:
        num_tasks: N.
        num_values: S, the entries that are stored: those of all N weights that survive (`num_survivors` says how many
            in one), and some zeros between them.
    """
    return {"kind": "sparse", "num_tasks": num_tasks, "num_values": num_values}
