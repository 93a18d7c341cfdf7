"""One routed model for several adaptations of it: building experts may take longer than adapting routers."""

from __future__ import annotations

import copy
from typing import final

import torch
from torch import Tensor

from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.models.merged_config import MergedCLIPVisionConfig
from fusion_merge.moe import Routing, set_routing
from fusion_merge.moe.layer import router_parameters
from fusion_merge.pools.model_pool import CLIPVisionModelPool


@final
class BuiltOnce:
    """Builds a routed model when it is first asked for, and then gives the same one, as it was before adaptation.

    Only one may be in use at a time. It is a `MoEMethod.builder`, for methods whose options shape the same model.
    """

    def __init__(self) -> None:
        self._model: MergedCLIPVisionModel | None = None
        self._routers: list[Tensor] = []
        self._coefficients: Tensor | None = None
        self._config: MergedCLIPVisionConfig | None = None

    def __call__(
        self, method: MoEMethod, modelpool: CLIPVisionModelPool, device: torch.device
    ) -> MergedCLIPVisionModel:
        """Return the model.

        Args:
            method: what builds and will adapt it.
            modelpool: the models; always the same.
            device: where to do what is costly.
        """
        if self._model is None:
            model = self._model = method.build(modelpool, device)
            self._routers = [p.detach().clone() for p in router_parameters(model)]
            self._coefficients = model.task_coefficients.clone()
            self._config = copy.deepcopy(model.config)
            return model
        for parameter, start in zip(router_parameters(self._model), self._routers, strict=True):
            parameter.data, parameter.grad = start.clone().to(parameter.device), None
        self._model.task_coefficients.copy_(self._coefficients)
        self._model.config = copy.deepcopy(self._config)
        self._model.config.method_options = method.options()
        set_routing(self._model, Routing.BATCH if method.batch_reduce else Routing.SAMPLE)
        return self._model
