"""SMILE: low-rank experts of every linear layer, chosen for each token by projection; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.methods.base import Method
from fusion_merge.models.clip import build_tower, vision_backbone
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.moe.projection import (
    ProjectionMoELinear,
    empty_projection,
    find_linears,
    projection_layer,
    projection_spec,
    upcycle_linears,
)
from fusion_merge.moe.vectors import TaskVector
from fusion_merge.options import option
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.registry import register_method
from fusion_merge.task_vectors import simple_average

if TYPE_CHECKING:
    from fusion_merge.adaptation.runtime import Fabric


@final
@register_method("smile", aliases=("smile_upscaling",))
@dataclass(kw_only=True)
class SmileAlgorithm(Method):
    r"""Sparse mixture of low-rank experts from pretrained models: no router is trained, no image is needed.

    .. math:: \tau_n \approx U_n S_n V_n^\top, \qquad r_n(x) = \lVert V_{n,\cdot \le g}^\top x \rVert_2, \qquad
              y = W_0 x + b_0 + \sum_{n \in \operatorname{top}(r)} \bar p_n (U_n S_n V_n^\top x + \beta_n)

    for every linear layer of the tower, attention's included; p is the softmax of r.

    Source: Tang et al. 2024, arXiv 2408.10174. In the reference `k` and `gate_k` are cut at the layer's width without
    a word, and `k` -1 keeps dense task vectors: here both are checked, and -1 means full rank in factors.
    """

    gate_k: int = option(16, help="singular vectors of each expert that a token is projected on, or -1", minimum=-1)
    k: int = option(32, help="rank of each expert, or -1 for full rank", minimum=-1)
    top_k: int = option(1, help="experts that a token takes", minimum=1)
    routing_use_diff: bool = option(True, help="project on task vectors, instead of fine-tuned weights")
    average_experts: bool = option(False, help="average what is no linear layer, instead of keeping it pretrained")

    def check(self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None = None) -> None:
        """See `Method.check`: also ranks and number of experts against the pool."""
        super().check(modelpool, taskpool)
        self._check_shapes(modelpool.config(), len(modelpool.model_names))

    def run(
        self,
        modelpool: CLIPVisionModelPool,
        taskpool: CLIPVisionModelTaskPool | None = None,
        fabric: Fabric | None = None,
    ) -> nn.Module:
        """See `Method.run`."""
        self.check(modelpool, taskpool)
        device = fabric.device if fabric is not None else torch.device("cpu")
        pretrained = modelpool.state(PRETRAINED)
        finetuned = [modelpool.state(name) for name in modelpool.model_names]
        static = simple_average(pretrained, finetuned) if self.average_experts else pretrained
        backbone = vision_backbone(build_tower(modelpool.config(), static, where="the static part"))

        def make_layer(linear: nn.Linear, task_vectors: Sequence[TaskVector]) -> ProjectionMoELinear:
            return projection_layer(
                linear,
                task_vectors,
                rank=self.k,
                gate_rank=self.gate_k,
                top_k=self.top_k,
                gate_on_difference=self.routing_use_diff,
                device=device,
            )

        with tqdm(find_linears(backbone), desc="building experts", unit="layer", disable=None) as bar:
            if not upcycle_linears(backbone, pretrained, finetuned, make_layer, bar.update):
                raise ModelError("no fine-tuned model differs from the pretrained one in any linear layer")
        return self._wrapped(backbone, modelpool).requires_grad_(False).to(device)  # type: ignore[arg-type]

    def skeleton(self, config: CLIPVisionConfig, num_tasks: int) -> MergedCLIPVisionModel:
        """See `Method.skeleton`."""
        self._check_shapes(config, num_tasks)
        with torch.device("meta"):
            backbone = vision_backbone(CLIPVisionModel(config))
            for name, linear in find_linears(backbone).items():
                limit = min(linear.in_features, linear.out_features)
                rank, gate_rank = (limit if r == -1 else r for r in (self.k, self.gate_k))
                spec = projection_spec(num_tasks, rank, gate_rank, self.top_k)
                backbone.set_submodule(name, empty_projection(spec, linear))
            return self._wrapped(backbone)

    def _wrapped(self, backbone: nn.Module, modelpool: CLIPVisionModelPool | None = None) -> MergedCLIPVisionModel:
        names = modelpool.model_names if modelpool is not None else []
        return MergedCLIPVisionModel.from_tower(
            backbone,
            tasks=names,
            method=self.method_name,
            method_options=self.options(),
            base_model=modelpool.base_model if modelpool is not None else "",
            models={name: modelpool.describe(name) for name in names} if modelpool is not None else None,
        )

    def _check_shapes(self, config: CLIPVisionConfig, num_tasks: int) -> None:
        limit = min(config.hidden_size, config.intermediate_size)
        for name in ("k", "gate_k"):
            value = getattr(self, name)
            if value == 0 or value > limit:
                raise ConfigError(
                    f"`{name}`={value} is not in 1-{limit}, the possible ranks of the tower's linear layers; "
                    f"choose 1-{limit}, or -1 for full rank"
                )
        if self.top_k > num_tasks:
            raise ConfigError(f"`top_k`={self.top_k} is above the number of experts, {num_tasks}; choose 1-{num_tasks}")
