"""A router that looks at how much of a sample lies in each task's singular subspace."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_merge.moe.precision import exact
from fusion_merge.moe.router_base import Router, exact_linear, mean_over_tokens, noisy_linear

_TINY = 1e-12  # a variance below which all shares count as equal


@final
class ProjectionRouter(Router):
    r"""Chooses by how much of a sample lies in each task's right singular subspace, and learns what to add to that.

    .. math:: e_n = \frac{\sum_t \lVert V_n x_t \rVert^2}{\sum_t \lVert x_t \rVert^2}, \qquad
              z = \frac{e - \operatorname{mean}(e)}{\operatorname{std}(e)}, \qquad
              g_{nj} = \operatorname{softmax}(\kappa z)_n + A x + a

    1 - e is the relative residual of the projection. κ starts at 3, A and a at zero, and these three are adapted; V is
    fixed. `pooled` is no mean over `forward`, which looks at each token by itself.

    Args:
        width: D.
        num_tasks: N.
        num_coefficients: K, a multiple of N.
        rank: R, the directions of each task, at most D.

    Source: after MASS, arXiv 2504.05342 (which projects at one layer and routes whole models), and SMILE, 2408.10174.
    """

    subspaces: Tensor

    def __init__(self, width: int, num_tasks: int, num_coefficients: int, rank: int) -> None:
        super().__init__()
        self.width = width
        self.num_tasks = num_tasks
        self.num_coefficients = num_coefficients
        self.rank = min(rank, width)
        self.register_buffer("subspaces", torch.zeros(num_tasks, self.rank, width))
        self.sharpness = nn.Parameter(torch.tensor(3.0))
        self.out = noisy_linear(width, num_coefficients, 0.0, None)
        self.out.weight.data.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Router.forward`."""
        alone = tokens.flatten(0, 1).unsqueeze(1)  # (B·T, 1, D)
        return self.pooled(alone).unflatten(0, tokens.shape[:2])  # (B, T, K)

    def pooled(self, tokens: Tensor) -> Tensor:
        """See `Router.pooled`."""
        x = exact(tokens)  # (B, T, D)
        with torch.autocast(x.device.type, enabled=False):
            inside = F.linear(x, self.subspaces.to(x.dtype).flatten(0, 1)).square().sum(dim=1)  # (B, N·R)
            whole = x.square().sum(dim=(1, 2)).clamp_min(torch.finfo(x.dtype).tiny)  # (B,)
            shares = inside.unflatten(1, (self.num_tasks, -1)).sum(dim=-1) / whole.unsqueeze(1)  # (B, N)
            centred = shares - shares.mean(dim=1, keepdim=True)
            spread = (centred.square().mean(dim=1, keepdim=True) + _TINY).sqrt()
            chosen = torch.softmax(self.sharpness * centred / spread, dim=1)  # (B, N)
        each = chosen.repeat_interleave(self.num_coefficients // self.num_tasks, dim=1)  # (B, K)
        return each + exact_linear(self.out, mean_over_tokens(tokens))

    def spec(self) -> dict[str, Any]:
        """See `Router.spec`."""
        spec = {"width": self.width, "num_tasks": self.num_tasks, "num_coefficients": self.num_coefficients}
        return {"kind": "projection", **spec, "rank": self.rank}
