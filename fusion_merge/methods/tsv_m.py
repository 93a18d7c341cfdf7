"""TSV-M: each task's matrices at a part of their rank, with singular vectors made orthogonal between tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fusion_merge.errors import ConfigError
from fusion_merge.merging.spectra import tsv_merge
from fusion_merge.merging.vectors import TaskVectors, matrices
from fusion_merge.methods.static_base import StaticMethod
from fusion_merge.models.clip import expected_shapes
from fusion_merge.options import option
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.registry import register_method
from fusion_merge.task_vectors import State


@final
@register_method("tsv_m", aliases=("task_singular_vector_merging", "TaskSingularVectorMerging"))
@dataclass(kw_only=True)
class TSVMAlgorithm(StaticMethod):
    r"""Static merging by task singular vectors.

    .. math:: \tau_n \approx U_n \Sigma_n V_n^\top \ (\text{rank } r / N), \qquad
              \theta = \theta_0 + \alpha\, \operatorname{polar}([U_1 \dots U_N])\,
              \operatorname{diag}(\Sigma_1, \dots, \Sigma_N)\, \operatorname{polar}([V_1 \dots V_N])^\top

    Matrices are the tensors of two dimensions: weights of linear layers and position embeddings. All others, the kernel
    of the patch embedding among them, are averaged, θ₀ + α mean τₙ.

    Source: Gargiulo et al., CVPR 2025. Here singular vectors of the value zero, which are arbitrary, have no part:
    equal task vectors merge to what is left of them, and a model that was not fine-tuned does not bend the others.
    """

    listing: ClassVar[tuple[str, ...]] = ("exclude_keys",)

    alpha: float | list[float] = option(1.0, help="α of the merge, or one for each task vector before it")
    exclude_keys: list[str] | None = option(None, help="names of matrices that are averaged")
    return_single_task_models: bool = option(False, help="not possible: a method makes one model")

    def __post_init__(self) -> None:
        """Check all options."""
        super().__post_init__()
        if self.return_single_task_models:
            raise ConfigError(
                "`return_single_task_models`=True: this method makes one merged model; the models of single tasks are "
                "those of the pool, which `baselines=[fine_tuned]` scores"
            )

    def decompositions(self, num_tasks: int) -> int:
        """See `StaticMethod.decompositions`: one a task, and one a side."""
        return num_tasks + 2

    def check_fit(self, modelpool: CLIPVisionModelPool) -> None:
        """See `StaticMethod.check_fit`: also whether there are weights, and a share of every matrix, for all tasks."""
        super().check_fit(modelpool)
        tasks = len(modelpool.model_names)
        if isinstance(self.alpha, list) and len(self.alpha) != tasks:
            raise ConfigError(f"`alpha` has {len(self.alpha)} numbers for {tasks} models; give one each, or one number")
        excluded = self.listed("exclude_keys", modelpool)
        for name, shape in expected_shapes(modelpool.config()).items():
            if len(shape) == 2 and min(shape) < tasks and name not in excluded:
                raise ConfigError(
                    f"`{name}` of shape {shape} has fewer than {tasks} singular values, one for each model; "
                    f"merge fewer models, or average it: `exclude_keys=[{name}]`"
                )

    def merge(
        self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None, device: torch.device
    ) -> State:
        """See `StaticMethod.merge`."""
        vectors = TaskVectors(modelpool.state(PRETRAINED), [modelpool.state(name) for name in modelpool.model_names])
        if isinstance(self.alpha, list):
            each = torch.tensor(self.alpha)
            vectors = vectors.changed(lambda _, t: t * each.to(t).view(-1, *[1] * (t.dim() - 1)))  # (N, …)
        excluded = self.listed("exclude_keys", modelpool)
        combine = matrices(tsv_merge, excluded, device)
        scale = self.alpha if isinstance(self.alpha, float) else 1.0

        def scaled(name: str, stacked: Tensor) -> Tensor:
            return scale * combine(name, stacked)

        return vectors.merged(scaled)
