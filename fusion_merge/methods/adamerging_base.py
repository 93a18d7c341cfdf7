"""What both kinds of AdaMerging share: merging coefficients that are adapted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from transformers import CLIPVisionModel

from fusion_merge.methods.adapted_base import AdaptedMethod
from fusion_merge.models.coefficients import CoefficientMerge
from fusion_merge.options import option
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool

if TYPE_CHECKING:
    from fusion_merge.adaptation.runtime import Fabric

log = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class AdaMergingMethod(AdaptedMethod):
    """A static merge whose coefficients were adapted; nothing of the adaptation is left in the merged tower."""

    adapted_part: ClassVar[str] = "coefficients"
    layer_wise: ClassVar[bool]
    """Whether each tensor has coefficients of its own."""

    init_values: float = option(0.3, help="λ, where every coefficient starts", shapes_model=True)
    clamp_weights: bool = option(False, help="let coefficients count within 0-1 alone", shapes_model=True)
    lr: float = option(1e-3, help="learning rate", above=0.0)

    coefficients: torch.Tensor | None = dataclasses.field(default=None, init=False, repr=False)
    """The coefficients of the last merge: (N, 1), or (N, L) where each of the L tensors has its own."""

    def start(self, modelpool: CLIPVisionModelPool, fabric: Fabric) -> CoefficientMerge:
        """See `AdaptedMethod.start`: all task vectors, in memory."""
        return CoefficientMerge(
            modelpool.config(),
            modelpool.state(PRETRAINED),
            [modelpool.state(name) for name in modelpool.model_names],
            init_values=self.init_values,
            layer_wise=self.layer_wise,
            clamp=self.clamp_weights,
        )

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """See `AdaptedMethod.trained`: the merging coefficients."""
        return {name: parameter for name, parameter in model.named_parameters() if name == "coefficients"}

    def finish(
        self, model: CoefficientMerge, pools: Mapping[str, CLIPVisionModelTaskPool], keep: str | None
    ) -> CLIPVisionModel:
        """See `AdaptedMethod.finish`: the merged tower."""
        self.coefficients = model.effective().detach().cpu().clone()
        means = ", ".join(f"{value:.3f}" for value in self.coefficients.mean(dim=1).tolist())
        log.info("merging coefficients%s: %s", ", means over tensors" if self.layer_wise else "", means)
        return model.to_tower()
