"""RankOne-MoE: each task vector becomes rank-one experts, and one router a layer weighs them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from fusion_merge.methods.rank_one_base import RankOneMethod
from fusion_merge.moe import SoftTopK
from fusion_merge.registry import register_method


@final
@register_method("rankone_moe", aliases=("clip_rankone_moe", "rankone_wemoe", "clip_rankone_wemoe"))
@dataclass(kw_only=True)
class RankOneMoEAlgorithm(RankOneMethod):
    r"""Rank-one experts from truncated SVDs of task vectors.

    .. math:: \tau_n \approx \sum_{j \le k} u_{nj} (s_{nj} v_{nj})^\top, \qquad
              W = W_0 + \sum_{n,j} m(g)_{nj}\, u_{nj} (s_{nj} v_{nj})^\top, \qquad
              b = b_0 + \lambda \sum_n \beta_n

    One g a layer drives both linear layers of the MLP; biases are static. With full rank, g ≡ λ and no selection
    the model equals task arithmetic. How experts and routers are made is in `rank_one_base`.

    Source: RankOne-MoE (EnnengYang/RankOne-MoE). There `svd_accelerator` is `cuda` and rank -1 crashes; here the
    device is chosen from what is there and -1 means full rank.
    """

    def make_selection(self) -> SoftTopK | None:
        """See `MoEMethod.make_selection`."""
        return SoftTopK(self.select_k) if self.select_k > 0 else None
