"""A linear layer whose weight is merged for every sample, without ever holding the merged weights.

Output rows are taken in blocks that fit into the processor's cache: the block of all task vectors is read once, merged
for all samples at once, multiplied with their tokens, and let go. Backwards the block is merged again, and the gradient
of the coefficients is the product of dyᵀx with the block. What is kept between the two is the input alone.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

_SAMPLE_BYTES = 4 * 2**20  # of a block where each sample has its own weights: it should stay in the cache
_BATCH_BYTES = 32 * 2**20  # of a block where all share one: it is used once, and larger products are faster


class Rows(Protocol):
    """A bank that gives its task vectors row by row."""

    def __call__(self, first: int, last: int) -> Tensor:
        """Return the rows from `first` up to, not including, `last` of all N task vectors.

        Args:
            first: the first output row.
            last: the row after the last.

        Shape:
            → (N, rows, I).
        """
        ...


def merged_linear(x: Tensor, coefficients: Tensor, weight: Tensor, bias: Tensor, rows: Rows) -> Tensor:
    r"""Apply to each sample's tokens the weight merged for it.

    .. math:: y_b = x_b \Big(W_0 + \sum_n g_{bn} \tau_n\Big)^\top + b_b

    Args:
        x: the layer's input.
        coefficients: one row a sample, or a single row for the whole batch.
        weight: W_0, frozen.
        bias: the merged biases.
        rows: gives the task vectors, in blocks of rows; they are frozen too, and read in the precision of `x`.

    Shape:
        x (B, T, I), coefficients (B, N) or (1, N), weight (O, I), bias (B, O) or (1, O) → (B, T, O).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):  # the backward pass runs outside of the context
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
    with torch.autocast(device, enabled=False):
        output: Tensor = _MergedLinear.apply(x, coefficients.to(x.dtype), weight, bias.to(x.dtype), rows)
    return output


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficients: Tensor, weight: Tensor, bias: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(x, coefficients, weight)
        ctx.rows = rows
        output = x.new_empty(*x.shape[:2], weight.shape[0])  # (B, T, O)
        for first, last in _blocks(x, coefficients, weight):
            merged = _merge(coefficients, weight[first:last], rows(first, last).to(x.dtype))
            part = bias[:, first:last]  # (B, rows) or (1, rows)
            if merged.shape[0] == 1:
                output[..., first:last] = F.linear(x, merged[0], part[0])  # (B, T, rows)
            else:
                output[..., first:last] = torch.baddbmm(part.unsqueeze(1), x, merged.mT)  # (B, T, rows)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, coefficients, weight = ctx.saved_tensors
        for_input, for_coefficients, _, for_bias, _ = ctx.needs_input_grad
        gradient = gradient.contiguous()
        one = coefficients.shape[0] == 1
        exact = torch.promote_types(x.dtype, torch.float32)  # sums over blocks are not rounded to half precision
        dx = torch.zeros_like(x, dtype=exact) if for_input else None  # (B, T, I)
        dg = torch.zeros_like(coefficients, dtype=exact) if for_coefficients else None  # (B, N) or (1, N)
        for first, last in _blocks(x, coefficients, weight):
            block = ctx.rows(first, last).to(x.dtype)  # (N, rows, I)
            dy = gradient[..., first:last]  # (B, T, rows)
            if dx is not None:
                merged = _merge(coefficients, weight[first:last], block)
                dx += torch.matmul(dy, merged[0]) if one else torch.bmm(dy, merged)
            if dg is not None:
                left, right = (dy.flatten(0, 1), x.flatten(0, 1)) if one else (dy, x)
                dw = torch.matmul(left.mT, right)  # (B, rows, I), or (rows, I) for the whole batch
                dg += dw.reshape(coefficients.shape[0], -1) @ block.flatten(1).T
        db = gradient.sum(dim=(0, 1) if one else 1).view(coefficients.shape[0], -1) if for_bias else None
        dx, dg = (d.to(x.dtype) if d is not None else None for d in (dx, dg))
        return dx, dg, None, db, None


def _merge(coefficients: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    merged = torch.addmm(weight.to(block.dtype).reshape(1, -1), coefficients, block.flatten(1))
    return merged.view(-1, *weight.shape)  # (B, rows, I) or (1, rows, I)


def _blocks(x: Tensor, coefficients: Tensor, weight: Tensor) -> list[tuple[int, int]]:
    """Return the first and last rows of blocks that, merged and not, take a few megabytes."""
    out_features, in_features = weight.shape
    row_bytes = sum(coefficients.shape) * in_features * x.element_size()
    wanted = _BATCH_BYTES if coefficients.shape[0] == 1 else _SAMPLE_BYTES
    step = max(16, wanted // row_bytes // 16 * 16)
    return [(first, min(first + step, out_features)) for first in range(0, out_features, step)]
