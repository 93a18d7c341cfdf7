"""Task arithmetic: one static model along the sum of all task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from torch import nn

from fusion_merge.methods.base import Method
from fusion_merge.models.clip import build_tower
from fusion_merge.options import option
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.registry import register_method
from fusion_merge.task_vectors import task_arithmetic

if TYPE_CHECKING:
    from fusion_merge.adaptation.runtime import Fabric


@final
@register_method("task_arithmetic")
@dataclass(kw_only=True)
class TaskArithmeticAlgorithm(Method):
    r"""Static merging by task arithmetic.

    .. math:: \theta = \theta_0 + \lambda \sum_n (\theta_n - \theta_0)

    Source: Ilharco et al., ICLR 2023.
    """

    scaling_factor: float = option(0.3, help="λ, the weight of every task vector")

    def run(
        self,
        modelpool: CLIPVisionModelPool,
        taskpool: CLIPVisionModelTaskPool | None = None,
        fabric: Fabric | None = None,
    ) -> nn.Module:
        """See `Method.run`."""
        self.check(modelpool, taskpool)
        finetuned = [modelpool.state(name) for name in modelpool.model_names]
        state = task_arithmetic(modelpool.state(PRETRAINED), finetuned, self.scaling_factor)
        return build_tower(modelpool.config(), state, where="the merge").requires_grad_(False)
