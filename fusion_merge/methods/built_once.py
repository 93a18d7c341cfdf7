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
        self._start: tuple[list[Tensor], Tensor, MergedCLIPVisionConfig] | None = None

    def __call__(
        self, method: MoEMethod, modelpool: CLIPVisionModelPool, device: torch.device
    ) -> MergedCLIPVisionModel:
        """Return the model.

        Args:
            method: what builds and will adapt it.
            modelpool: the models; always the same.
            device: where to do what is costly.
        """
        if self._model is None or self._start is None:
            model = self._model = method.build(modelpool, device)
            routers = [p.detach().clone() for p in router_parameters(model)]
            self._start = routers, model.task_coefficients.clone(), copy.deepcopy(model.config)
            return model
        model = self._model
        routers, coefficients, config = self._start
        for parameter, start in zip(router_parameters(model), routers, strict=True):
            parameter.data, parameter.grad = start.clone().to(parameter.device), None
        model.task_coefficients.copy_(coefficients)
        model.task_inputs = None
        model.config = copy.deepcopy(config)
        model.config.method_options = method.options()
        set_routing(model, Routing.BATCH if method.batch_reduce else Routing.SAMPLE)
        return model
