"""A linear layer with a low-rank sum added, whose terms are weighed for each sample, or for all of them alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fusion_merge.moe.precision import in_autocast_dtype


def factored_linear(
    x: Tensor, coefficients: Tensor, weight: Tensor, bias: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    r"""Apply the sum in factors, with no merged weight.

    .. math:: y_b = x_b W_0^\top + \big((x_b V^\top) \odot g_b\big)\, U^\top + b

    Args:
        x: the layer's input.
        coefficients: g, one row a sample, or a single row for the whole batch.
        weight: W_0.
        bias: b.
        left: U; converted to the precision of the product.
        right: V; converted too.

    Shape:
        x (B, T, I), coefficients (B, K) or (1, K), weight (O, I), bias (O,), left (O, K), right (K, I) → (B, T, O).
    """
    output = F.linear(x, weight, bias)  # (B, T, O)
    left, right = left.to(output.dtype), right.to(output.dtype)
    hidden = (F.linear(x, right) * coefficients.unsqueeze(1)).to(output.dtype)  # (B, T, K)
    return output.flatten(0, 1).addmm_(hidden.flatten(0, 1), left.T).view_as(output)  # the sum is part of the product


def merged_factors(
    x: Tensor, coefficients: Tensor, weight: Tensor, bias: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    r"""Apply the sum as one merged weight for the whole batch; its coefficients' gradient is formed in factors.

    .. math:: W = W_0 + U \operatorname{diag}(g)\, V, \qquad
              \frac{\partial}{\partial g_k} = \sum_t (\mathrm{d}y_t\, u_k)(x_t\, v_k)

    Args:
        x: the layer's input.
        coefficients: g.
        weight: W_0, frozen.
        bias: b, frozen.
        left: U, frozen; converted to the precision of `x`.
        right: V, frozen; converted too.

    Shape:
        x (B, T, I), coefficients (1, K), weight (O, I), bias (O,), left (O, K), right (K, I) → (B, T, O).
    """
    x = in_autocast_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        output: Tensor = _MergedFactors.apply(x, coefficients.to(x.dtype), weight, bias, left, right)
    return output


class _MergedFactors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, coefficients: Tensor, weight: Tensor, bias: Tensor, left: Tensor, right: Tensor
    ) -> Tensor:
        weighed = left.to(x.dtype) * coefficients  # (O, K)
        merged = torch.addmm(weight.to(x.dtype), weighed, right.to(x.dtype))  # (O, I)
        ctx.save_for_backward(x, merged, left, right)
        return F.linear(x, merged, bias.to(x.dtype))  # (B, T, O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, left, right = ctx.saved_tensors
        for_input, for_coefficients, *_ = ctx.needs_input_grad
        dx = torch.matmul(gradient, merged) if for_input else None  # (B, T, I)
        dg = None
        if for_coefficients:
            outer, inner = torch.matmul(gradient, left.to(x.dtype)), F.linear(x, right.to(x.dtype))  # (B, T, K) each
            dg = (outer * inner).sum(dim=(0, 1)).unsqueeze(0)  # (1, K)
        return dx, dg, None, None, None, None
