"""Median: each weight is the median of the fine-tuned models' weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from fusion_merge.methods.base import Method
from fusion_merge.models.clip import build_tower
from fusion_merge.options import option
from fusion_merge.registry import register_method


@final
@register_method("median")
@dataclass(kw_only=True)
class MedianAlgorithm(Method):
    r"""Static merging by the median.

    .. math:: \theta = \theta_0 + \lambda \operatorname{median}_n (\theta_n - \theta_0)
    """

    scaling_factor: float = option(1.0, help="λ, the weight of the median task vector", minimum=0.0)

    def run(self, modelpool: Any, taskpool: Any = None, fabric: Any = None) -> nn.Module:
        """See `Method.run`."""
        self.check(modelpool, taskpool)
        pretrained = modelpool.state("_pretrained_")
        finetuned = [modelpool.state(name) for name in modelpool.model_names]
        merged = {}
        for name in pretrained:
            base = pretrained[name]
            task_vectors = torch.stack([state[name] - base for state in finetuned])  # (N, …)
            merged[name] = base + self.scaling_factor * task_vectors.median(dim=0).values
        return build_tower(modelpool.config(), merged, where="the merge").requires_grad_(False)
