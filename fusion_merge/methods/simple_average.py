"""Simple average: the mean of all fine-tuned models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from torch import nn

from fusion_merge.methods.base import Method
from fusion_merge.models.clip import build_tower
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.registry import register_method
from fusion_merge.task_vectors import simple_average

if TYPE_CHECKING:
    from fusion_merge.adaptation.runtime import Fabric


@final
@register_method("simple_average")
@dataclass(kw_only=True)
class SimpleAverageAlgorithm(Method):
    r"""Static merging by the mean.

    .. math:: \theta = \frac1N \sum_n \theta_n

    Source: Wortsman et al., ICML 2022.
    """

    def run(
        self,
        modelpool: CLIPVisionModelPool,
        taskpool: CLIPVisionModelTaskPool | None = None,
        fabric: Fabric | None = None,
    ) -> nn.Module:
        """See `Method.run`."""
        self.check(modelpool, taskpool)
        finetuned = [modelpool.state(name) for name in modelpool.model_names]
        state = simple_average(modelpool.state(PRETRAINED), finetuned)
        return build_tower(modelpool.config(), state, where="the merge").requires_grad_(False)
