"""Iso-CTS: the leading part of the summed task matrices, and directions of each task's own, with a flat spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch

from fusion_merge.merging.spectra import iso_cts
from fusion_merge.merging.vectors import TaskVectors, matrices
from fusion_merge.methods.static_base import StaticMethod
from fusion_merge.options import option
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.registry import register_method
from fusion_merge.task_vectors import State


@final
@register_method("iso_cts")
@dataclass(kw_only=True)
class IsoCTSAlgorithm(StaticMethod):
    r"""Isotropic static merging in common and task-specific subspaces.

    .. math:: \sum_n \tau_n \approx U_c \Sigma_c V_c^\top, \qquad
              \tau_n - U_c U_c^\top \tau_n \approx U_n \Sigma_n V_n^\top, \qquad
              \theta = \theta_0 + \lambda\, \bar\sigma\, \operatorname{polar}([U_c\ U_1 \dots U_N])\,
              \operatorname{polar}([V_c\ V_1 \dots V_N])^\top

    With `common_space_fraction` 1 it is Iso-C. Matrices are the tensors of two dimensions: weights of linear layers and
    position embeddings. All others, the kernel of the patch embedding among them, are averaged, θ₀ + λ mean τₙ.

    Source: Marczak et al., ICML 2025. Singular values of zero have no part, as in Iso-C. Where rounding would give the
    tasks more directions than there are, the reference fails; here they have as many as there are.
    """

    listing: ClassVar[tuple[str, ...]] = ("exclude_keys",)

    scaling_factor: float = option(1.0, help="λ, the weight of the merged task vector")
    common_space_fraction: float = option(
        0.8, help="part of each matrix's rank for the common space; tasks share the rest", minimum=0.0, maximum=1.0
    )
    exclude_keys: list[str] | None = option(None, help="names of matrices that are averaged")

    def decompositions(self, num_tasks: int) -> int:
        """See `StaticMethod.decompositions`: of the sum, one a task, and one a side."""
        return num_tasks + 3

    def merge(
        self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None, device: torch.device
    ) -> State:
        """See `StaticMethod.merge`."""
        vectors = TaskVectors(modelpool.state(PRETRAINED), [modelpool.state(name) for name in modelpool.model_names])
        excluded = self.listed("exclude_keys", modelpool)
        function = partial(iso_cts, common_space_fraction=self.common_space_fraction)
        combine = matrices(function, excluded, device)
        return vectors.merged(lambda name, stacked: self.scaling_factor * combine(name, stacked))
