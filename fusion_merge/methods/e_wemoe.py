"""E-WEMoE: pruned task vectors as experts, one router for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from fusion_merge.errors import ConfigError
from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.moe import LayerEncodedRouter, Router, SparseExperts, make_router
from fusion_merge.moe.experts import TaskVector, sparse_spec
from fusion_merge.moe.layer import router_parameters
from fusion_merge.moe.upcycle import MakeRouter
from fusion_merge.options import option
from fusion_merge.registry import register_method
from fusion_merge.task_vectors import magnitude_prune, num_survivors

_WIDEST_CODE = 4096  # as wide as no tower is


@final
@register_method("e_wemoe", aliases=("sparse_weight_ensembling_moe", "sparse_clip_weight_ensembling_moe"))
@dataclass(kw_only=True)
class EWEMoEAlgorithm(MoEMethod):
    r"""Efficient weight-ensembling mixture of experts.

    .. math:: W = W_0 + \sum_n g_n\,(\tau_n \odot M_n), \qquad
              M_n = \big[\,|\tau_n| > Q_{r}(|\tau_n|)\,\big]

    for all four tensors of an MLP, each pruned by itself, with one router shared by all layers that may also see
    a code of the layer's position.

    Source: Shen et al. 2024, arXiv 2410.21804. The reference stores the zeros; here they are really saved.
    """

    tv_prune_ratio: float = option(
        0.9, help="share of each task vector that is dropped", minimum=0.0, below=1.0, shapes_model=True
    )
    shared_gate: bool = option(True, help="one router for all layers", shapes_model=True)
    position_encoding: bool = option(False, help="show the shared router which layer it decides for", shapes_model=True)
    position_encoding_dim: int = option(8, help="width of that code, even", minimum=2, shapes_model=True)
    post_sparse_gate: bool = option(False, help="prune the router's tensors after adaptation")
    gate_prune_ratio: float = option(
        0.0, help="share of each router tensor that is dropped then", minimum=0.0, below=1.0
    )
    use_grad_accumulate: bool = option(False, help="backward after each task: the same gradient in less memory")

    def __post_init__(self) -> None:
        """Check all options.

        Raises:
            ConfigError: if one is out of range, or if the position code has no router to be shown to.
        """
        super().__post_init__()
        if self.position_encoding_dim % 2 or self.position_encoding_dim > _WIDEST_CODE:
            raise ConfigError(
                f"`position_encoding_dim`={self.position_encoding_dim} is odd or too wide; "
                f"choose an even number up to {_WIDEST_CODE}"
            )
        if self.shared_gate and self.router_start != "constant":
            raise ConfigError(
                f"`router_start`={self.router_start} needs a router for each layer; choose `shared_gate`=false too"
            )
        if self.position_encoding and not (self.shared_gate and self.router_hidden_layers):
            raise ConfigError(
                "`position_encoding`=True tells a shared router which layer it decides for; it needs "
                f"`shared_gate`=True, not {self.shared_gate}, and `router_hidden_layers` 1 or 2, "
                f"not {self.router_hidden_layers}"
            )

    def make_experts(self, path: str, task_vectors: Sequence[TaskVector], device: torch.device) -> SparseExperts:
        """See `MoEMethod.make_experts`."""
        return SparseExperts.from_task_vectors(task_vectors, self.tv_prune_ratio)

    def experts_spec(self, num_tasks: int, in_features: int, out_features: int) -> dict[str, Any]:
        """See `MoEMethod.experts_spec`."""
        return sparse_spec(num_tasks, num_tasks * num_survivors(in_features * out_features, self.tv_prune_ratio))

    def router_maker(self, generator: torch.Generator, num_tasks: int) -> MakeRouter:
        """See `MoEMethod.router_maker`: the first layer's router serves all, if it is shared."""
        if not self.shared_gate:
            return super().router_maker(generator, num_tasks)
        weight = self.static_weight(num_tasks)
        code = self.position_encoding_dim if self.position_encoding else 0
        shared: list[Router] = []

        def share(index: int, width: int, count: int) -> Router:
            if not shared:
                wide = width + code
                router = make_router(self.router_hidden_layers, wide, count, weight, hidden=wide, generator=generator)
                shared.append(router)
            return LayerEncodedRouter(shared[0], index, code) if code else shared[0]

        return share

    def after_adaptation(self, model: MergedCLIPVisionModel) -> None:
        """See `MoEMethod.after_adaptation`: prune the router, if asked to."""
        if self.post_sparse_gate:
            for parameter in (p for p in router_parameters(model) if p.ndim):  # a single number is no tensor to prune
                parameter.data = magnitude_prune(parameter.data, self.gate_prune_ratio)
