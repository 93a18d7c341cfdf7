"""Dummy: the pretrained model as it is, for zero-shot scores and for trying out a pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from torch import nn

from fusion_merge.methods.base import Method
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.registry import register_method

if TYPE_CHECKING:
    from fusion_merge.adaptation.runtime import Fabric


@final
@register_method("dummy")
@dataclass(kw_only=True)
class DummyAlgorithm(Method):
    """The pretrained model, unchanged."""

    min_models: ClassVar[int] = 0

    def run(
        self,
        modelpool: CLIPVisionModelPool,
        taskpool: CLIPVisionModelTaskPool | None = None,
        fabric: Fabric | None = None,
    ) -> nn.Module:
        """See `Method.run`."""
        self.check(modelpool, taskpool)
        return modelpool.load_pretrained_model()
