"""WEMoE: whole task vectors as experts, one router a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.moe import DenseExperts
from fusion_merge.moe.experts import TaskVector, dense_spec
from fusion_merge.registry import register_method


@final
@register_method("wemoe", aliases=("weight_ensembling_moe", "clip_weight_ensembling_moe"))
@dataclass(kw_only=True)
class WEMoEAlgorithm(MoEMethod):
    r"""Weight-ensembling mixture of experts.

    .. math:: W = W_0 + \sum_n g_n \tau_n, \qquad b = b_0 + \sum_n g_n \beta_n

    for all four tensors of an MLP, with one g a layer from that layer's own router.

    Source: Tang et al., ICML 2024, arXiv 2402.00433. The reference keeps batch routing after adaptation by
    accident; here inference is sample-wise unless `inference_batch_reduce`.
    """

    def make_experts(self, path: str, task_vectors: Sequence[TaskVector], device: torch.device) -> DenseExperts:
        """See `MoEMethod.make_experts`."""
        return DenseExperts.from_task_vectors(task_vectors)

    def experts_spec(self, num_tasks: int, in_features: int, out_features: int) -> dict[str, Any]:
        """See `MoEMethod.experts_spec`."""
        return dense_spec(num_tasks)
