"""Routers that learn of a new task, or forget one, in closed form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusion_merge.errors import ModelError
from fusion_merge.moe.bank import without
from fusion_merge.moe.router import ConstantRouter, Router


class Moments(NamedTuple):
    """Sums over images, each task's of weight 1: `second` of shape (F + 1, F + 1), and `mean` of shape (F + 1,)."""

    second: Tensor
    mean: Tensor


def moments(inputs: Tensor) -> Moments:
    r"""Return the moments of what a router's last layer reads; rows of zeros stand for no image.

    .. math:: C = \sum_n \frac{1}{B_n} \sum_{b \le B_n} h_{nb} h_{nb}^\top

    Args:
        inputs: h, whose last entry is 1, for each task.

    Shape:
        (N, B, F + 1) → (F + 1, F + 1), (F + 1,), in float64.
    """
    each = inputs.double()
    counts = each[..., -1].sum(dim=1).clamp(min=1)  # (N,)
    second = torch.einsum("nbi,nbj,n->ij", each, each, 1 / counts)  # (F + 1, F + 1)
    return Moments(second, (each.sum(dim=1) / counts[:, None]).sum(dim=0))


def grown_rows(rows: Tensor, old: Moments, new: Moments, count: int, ridge: float) -> Tensor:
    r"""Return a router's last layer that knows one more task.

    .. math:: A' = \arg\min_{A'} \sum_{\text{old}} |A'h - Ah|^2 + \sum_{\text{new}} |A'h|^2 + \rho\,|A' - A|^2
                 = A\,(C_{\text{old}} + \rho J)\,(C_{\text{old}} + C_{\text{new}} + \rho J)^{-1}

    .. math:: a = \arg\min_a \sum_{\text{old}} (a h)^2 + \sum_{\text{new}} (a h - 1)^2 + \rho\,|a|^2
                = \bar h_{\text{new}}^\top (C_{\text{old}} + C_{\text{new}} + \rho J)^{-1}

    with J the identity without the bias, and ρ the ridge times the mean variance of an entry. So what the routers
    decided for the images of old tasks stays as near as it can; on the new task's images the old experts are silent.

    Args:
        rows: A, the bias as its last column.
        old: the moments of the tasks that are there.
        new: those of the new task.
        count: how many coefficients the new task gets, behind the others, all with the row a.
        ridge: above 0.

    Shape:
        (K, F + 1) → (K + count, F + 1), in float64.
    """
    total = old.second + new.second
    tasks = total[-1, -1]
    variances = total.diagonal()[:-1] / tasks - (total[-1, :-1] / tasks).square()  # (F,)
    scale = variances.clamp(min=0).mean().clamp(min=torch.finfo(torch.float32).tiny)
    penalty = torch.full_like(total[0], float(ridge) * float(scale) * float(tasks))  # (F + 1,)
    penalty[-1] = 0.0
    inverted = torch.linalg.solve(
        total + penalty.diag(),
        torch.cat([(old.second + penalty.diag()) @ rows.double().T, new.mean[:, None]], dim=1),
    )  # (F + 1, K + 1)
    kept, added = inverted[:, :-1].T, inverted[:, -1]
    return torch.cat([kept, added.expand(count, -1)])  # (K + count, F + 1)


def rows_of(router: Router) -> Tensor:
    """Return a router's last layer as one matrix, the bias as its last column.

    Args:
        router: one that has a `last_layer`.

    Shape:
        → (K, F + 1).

    Raises:
        ModelError: if it has none.
    """
    layer = router.last_layer()
    if layer is None:
        raise ModelError(f"a {type(router).__name__} has no linear layer that reads the block's input")
    return torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()


def resized(router: Router, rows: Tensor) -> None:
    """Give a router another last layer, of as many coefficients as there are rows.

    Args:
        router: the router that holds the parameters; changed.
        rows: as `rows_of` returns them; of a constant router the coefficients alone.

    Shape:
        rows (K', F + 1), or (K', 1) of a constant router.

    Raises:
        ModelError: if the router ends in no linear layer and is not constant.
    """
    layer = router.last_layer()
    if isinstance(router, ConstantRouter):
        router.coefficients = _like(router.coefficients, rows[:, 0])
    elif layer is not None:
        layer.weight, layer.bias = _like(layer.weight, rows[:, :-1]), _like(layer.bias, rows[:, -1])
        layer.out_features = len(rows)
    else:
        raise ModelError(f"a {type(router).__name__} cannot grow or shrink; merge the tasks anew")
    router.num_coefficients = len(rows)


def shrunk_rows(router: Router, first: int, count: int) -> Tensor:
    """Return what `resized` takes to make a router forget some coefficients.

    Args:
        router: the router that holds the parameters.
        first: the first coefficient that goes.
        count: how many go.

    Shape:
        → (K - count, F + 1), or (K - count, 1) of a constant router.

    Raises:
        ModelError: if the router ends in no linear layer and is not constant.
    """
    rows = router.coefficients.detach()[:, None] if isinstance(router, ConstantRouter) else rows_of(router)
    return without(rows, first, count)


def _like(parameter: Tensor, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(parameter).contiguous(), requires_grad=parameter.requires_grad)
