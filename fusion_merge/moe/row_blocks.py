"""A linear layer whose weight is merged for every sample, without ever holding the merged weights.

Every weight here lies along its longer side: (L, S), which is the layer's (O, I) where it widens, and the transpose
where it narrows. Its rows are taken in blocks that fit into the processor's cache: the block of all task vectors is
read once, merged for all samples at once, multiplied with their tokens, and let go. Backwards the block is merged
again, and the gradient of the coefficients is the product of the weight's own gradient, dyᵀx, with the block. What is
kept between the two is the input alone.

Where all samples share one weight, that is kept too: it is no larger than the layer's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fusion_merge.moe.precision import exact, in_autocast_dtype

_ENTRIES = 64 * 768
"""Entries of a block: few enough for the cache, and enough for products that are worth their memory traffic."""

SAMPLES = 16
"""Samples that a block is merged for at a time."""


class Rows(Protocol):
    """A bank that gives its task vectors row by row, along the longer side."""

    def __call__(self, first: int, last: int, memory: Tensor) -> Tensor:
        """Return the rows from `first` up to, not including, `last` of all N task vectors.

        Args:
            first: the first row, a multiple of `block_rows`.
            last: the row after the last, at most `first + block_rows`.
            memory: to be used for the rows where they have to be made, and again for the next ones.

        Shape:
            memory (N·rows·S,) → (N, rows, S).
        """
        ...


def block_rows(width: int) -> int:
    """Return how many rows along the longer side make a block.

    Args:
        width: S, how wide a row is.
    """
    return max(1, _ENTRIES // width)


def lies_along(out_features: int, in_features: int) -> bool:
    """Tell whether a weight (O, I) is taken as it is; one that narrows is taken transposed.

    Args:
        out_features: O.
        in_features: I.
    """
    return out_features >= in_features


def along(weight: Tensor) -> Tensor:
    """Return a weight, or a stack of them, along the longer side: the same tensor, or its transpose.

    Args:
        weight: in the order of a linear layer.

    Shape:
        (…, O, I) → (…, L, S).
    """
    return weight if lies_along(*weight.shape[-2:]) else weight.mT


def lay_along(base: nn.Linear) -> None:
    """Lay a weight along its longer side in memory too, so that no product has to copy it; its values stay.

    Args:
        base: the layer, changed.
    """
    if not lies_along(*base.weight.shape):
        base.weight.data = base.weight.data.mT.contiguous().mT


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
    if x.shape[0] > SAMPLES and coefficients.shape[0] > 1:  # their merged blocks together would not fit into the cache
        groups = zip(x.split(SAMPLES), coefficients.split(SAMPLES), bias.split(SAMPLES), strict=True)
        return torch.cat([merged_linear(tokens, g, weight, b, rows) for tokens, g, b in groups])
    x = in_autocast_dtype(x)
    function = _MergedForAll if coefficients.shape[0] == 1 else _MergedForEach
    with torch.autocast(x.device.type, enabled=False):
        output: Tensor = function.apply(x, coefficients.to(x.dtype), weight, bias.to(x.dtype), rows)
    return output


class _MergedForEach(torch.autograd.Function):
    """Each sample has a weight of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficients: Tensor, weight: Tensor, bias: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(x, coefficients, weight)
        ctx.rows = rows
        widens = lies_along(*weight.shape)
        if widens:
            output = x.new_empty(*x.shape[:2], weight.shape[0])  # (B, T, O)
        else:
            output = exact(bias).unsqueeze(1).repeat(1, x.shape[1], 1)  # (B, T, O)
        for part, merged, _ in _merged_blocks(x, coefficients, weight, rows):
            if widens:
                output[..., part] = torch.baddbmm(bias[:, None, part], x, merged.mT)  # (B, T, rows)
            else:
                _accumulate(output, x[..., part], merged)
        return output.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, coefficients, weight = ctx.saved_tensors
        for_input, for_coefficients, _, for_bias, _ = ctx.needs_input_grad
        widens = lies_along(*weight.shape)
        short, long = (x, gradient) if widens else (gradient, x)  # (B, T, S), (B, T, L)
        dx = torch.zeros_like(exact(x)) if for_input else None  # (B, T, I)
        dg = torch.zeros_like(exact(coefficients)) if for_coefficients else None  # (B, N)
        memory = _scratch(x, short.shape[-1], max(weight.shape))
        for part, merged, block in _merged_blocks(x, coefficients, weight, ctx.rows):
            if dx is not None and widens:
                _accumulate(dx, gradient[..., part], merged)
            elif dx is not None:
                dx[..., part] = torch.bmm(gradient, merged.mT)  # (B, T, rows)
            if dg is not None:
                dw = _view(memory, *merged.shape)  # (B, rows, S)
                torch.bmm(long[..., part].mT, short, out=dw)
                dg += dw.flatten(1) @ block.flatten(1).T
        db = gradient.sum(dim=1) if for_bias else None  # (B, O)
        dx, dg = (d.to(x.dtype) if d is not None else None for d in (dx, dg))
        return dx, dg, None, db, None


class _MergedForAll(torch.autograd.Function):
    """All samples share one weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficients: Tensor, weight: Tensor, bias: Tensor, rows: Rows) -> Tensor:
        base = along(weight).contiguous().to(x.dtype)
        merged = torch.empty_like(base)  # (L, S)
        for part, block in _blocks(rows, base, coefficients.shape[1]):
            torch.addmm(base[part].view(1, -1), coefficients, block.flatten(1), out=merged[part].view(1, -1))
        merged = merged if lies_along(*weight.shape) else merged.T  # (O, I)
        ctx.save_for_backward(x, coefficients, merged)
        ctx.rows = rows
        return F.linear(x, merged, bias[0])  # (B, T, O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, coefficients, merged = ctx.saved_tensors
        for_input, for_coefficients, _, for_bias, _ = ctx.needs_input_grad
        dx = torch.matmul(gradient, merged) if for_input else None  # (B, T, I)
        dg = None
        if for_coefficients:
            dg = torch.zeros_like(exact(coefficients))  # (1, N)
            short, long = (x, gradient) if lies_along(*merged.shape) else (gradient, x)
            dw = torch.matmul(long.flatten(0, 1).T, short.flatten(0, 1))  # (L, S)
            for part, block in _blocks(ctx.rows, dw, dg.shape[1]):
                dg += dw[part].view(1, -1) @ block.flatten(1).T
            dg = dg.to(x.dtype)
        db = gradient.sum(dim=(0, 1)).unsqueeze(0) if for_bias else None  # (1, O)
        return dx, dg, None, db, None


def _merged_blocks(
    x: Tensor, coefficients: Tensor, weight: Tensor, rows: Rows
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Give each block's place along the longer side, its rows merged for each sample (B, rows, S), and the block."""
    base, samples = along(weight).contiguous().to(x.dtype), x.shape[0]  # (L, S)
    memory = _scratch(x, base.shape[1], base.shape[0])
    for part, block in _blocks(rows, base, coefficients.shape[1]):
        height = block.shape[1]
        merged = _view(memory, height, samples, base.shape[1])  # (rows, B, S): small products, row by row, are fastest
        each = coefficients.expand(height, -1, -1)  # (rows, B, N)
        torch.baddbmm(base[part].unsqueeze(1), each, block.transpose(0, 1), out=merged)
        yield part, merged.transpose(0, 1), block


def _blocks(rows: Rows, base: Tensor, num_tasks: int) -> Iterator[tuple[slice, Tensor]]:
    """Give each block's place along the longer side, and all task vectors' rows in the precision of `base`."""
    height = min(block_rows(base.shape[1]), base.shape[0])
    memory = base.new_empty(num_tasks * height * base.shape[1])
    for first in range(0, base.shape[0], height):
        last = min(first + height, base.shape[0])
        room = memory[: num_tasks * (last - first) * base.shape[1]]
        yield slice(first, last), rows(first, last, room).to(base.dtype)


def _accumulate(total: Tensor, tokens: Tensor, weight: Tensor) -> None:
    """Add to a sum over blocks, which may be of a higher precision."""
    if total.dtype == tokens.dtype:
        total.baddbmm_(tokens, weight)
    else:
        total += torch.bmm(tokens, weight)


def _scratch(x: Tensor, width: int, length: int) -> Tensor:
    """Return memory for one block of each sample, to be used again and again: fresh memory has to be mapped in."""
    return x.new_empty(x.shape[0] * min(block_rows(width), length) * width)


def _view(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)
