"""What the methods with rank-one experts share: truncated SVDs of task vectors, and routers that weigh the pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig

from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.models.ranks import check_rank, check_select_k, svd_device
from fusion_merge.moe import LowRankExperts, make_router
from fusion_merge.moe.experts import TaskVector, low_rank_spec
from fusion_merge.moe.upcycle import MakeRouter
from fusion_merge.options import option
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool


@dataclass(kw_only=True)
class RankOneMethod(MoEMethod):
    r"""Each task vector becomes rank-one experts, the K = N·k leading pieces of truncated SVDs.

    .. math:: \tau_n \approx \sum_{j \le k} u_{nj} (s_{nj} v_{nj})^\top

    A concrete method says which of their coefficients take part.
    """

    router_hidden_layers: int = option(1, help="linear layers of a router", choices=(0, 1, 2), shapes_model=True)
    rank_k: int = option(32, help="rank-one experts a task, or -1 for full rank", minimum=-1, shapes_model=True)
    select_k: int = option(
        -1,
        help="softly keep the k largest coefficients of a layer, or -1 for all",
        minimum=-1,
        shapes_model=True,
    )
    svd_accelerator: str = option("auto", help="where to decompose: auto (as Fabric), cpu, cuda, …")

    def check_shapes(self, config: CLIPVisionConfig, num_tasks: int) -> None:
        """See `MoEMethod.check_shapes`: rank and selection against the width of the tower."""
        super().check_shapes(config, num_tasks)
        check_select_k(self.select_k, num_tasks * check_rank(self.rank_k, config))

    def check(self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None = None) -> None:
        """See `Method.check`: also whether there is the device to decompose on."""
        svd_device(self.svd_accelerator, torch.device("cpu"))
        super().check(modelpool, taskpool)

    def make_experts(self, path: str, task_vectors: Sequence[TaskVector], device: torch.device) -> LowRankExperts:
        """See `MoEMethod.make_experts`."""
        where = svd_device(self.svd_accelerator, device)
        return LowRankExperts.from_task_vectors(task_vectors, self.rank_k, self.static_weight(len(task_vectors)), where)

    def experts_spec(self, num_tasks: int, in_features: int, out_features: int) -> dict[str, Any]:
        """See `MoEMethod.experts_spec`."""
        rank = min(in_features, out_features) if self.rank_k == -1 else self.rank_k
        return low_rank_spec(num_tasks, rank, self.static_weight(num_tasks))

    def router_maker(self, generator: torch.Generator, num_tasks: int) -> MakeRouter:
        """See `MoEMethod.router_maker`: between two layers a router is 2·K wide."""
        weight = self.static_weight(num_tasks)
        return lambda index, width, count: make_router(
            self.router_hidden_layers, width, count, weight, hidden=2 * count, generator=generator
        )
