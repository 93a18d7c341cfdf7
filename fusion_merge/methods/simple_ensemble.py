"""Simple ensemble: all fine-tuned models answer, and their logits are combined; no merging, for reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_merge.methods.base import Method
from fusion_merge.models.ensemble import COMBINATIONS, TowerEnsemble
from fusion_merge.options import option
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.registry import register_method

if TYPE_CHECKING:
    from fusion_merge.adaptation.runtime import Fabric


@final
@register_method("simple_ensemble", aliases=("ensemble",))
@dataclass(kw_only=True)
class SimpleEnsembleAlgorithm(Method):
    r"""The logits of all fine-tuned models, combined: N times the memory and the time, and no model of its own.

    .. math:: z(x) = \frac1N \sum_n z_n(x)

    Each tower sees each image, whatever task it is of. `combine` takes the mean of the probabilities, or the largest
    logit of each class, instead.

    Source: Lakshminarayanan et al. 2017, for models of one task.
    """

    makes_tower: ClassVar[bool] = False

    combine: str = option("mean", help="what becomes of the towers' logits", choices=COMBINATIONS)

    def run(
        self,
        modelpool: CLIPVisionModelPool,
        taskpool: CLIPVisionModelTaskPool | None = None,
        fabric: Fabric | None = None,
    ) -> nn.Module:
        """See `Method.run`."""
        self.check(modelpool, taskpool)
        towers = [modelpool.load_model(name) for name in modelpool.model_names]
        return TowerEnsemble(towers, self.combine).eval()

    def skeleton(self, config: CLIPVisionConfig, num_tasks: int) -> TowerEnsemble:
        """See `Method.skeleton`."""
        with torch.device("meta"):
            return TowerEnsemble((CLIPVisionModel(config) for _ in range(num_tasks)), self.combine)
