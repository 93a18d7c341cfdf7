"""Iso-C: the sum of all task matrices with a flat spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from fusion_merge.merging.spectra import iso_c
from fusion_merge.merging.vectors import TaskVectors, matrices
from fusion_merge.methods.static_base import StaticMethod
from fusion_merge.options import option
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.registry import register_method
from fusion_merge.task_vectors import State


@final
@register_method("iso_c")
@dataclass(kw_only=True)
class IsoCAlgorithm(StaticMethod):
    r"""Isotropic static merging in the common subspace.

    .. math:: \sum_n \tau_n = U \Sigma V^\top, \qquad \theta = \theta_0 + \lambda\, \bar\sigma\, U V^\top

    Matrices are the tensors of two dimensions: weights of linear layers and position embeddings. All others, the kernel
    of the patch embedding among them, are averaged, θ₀ + λ mean τₙ.

    Source: Marczak et al., ICML 2025. Here the mean is over the singular values that are not zero, and directions of
    the value zero, which are arbitrary, are not made up; for a sum of full rank there is no difference.
    """

    listing: ClassVar[tuple[str, ...]] = ("exclude_keys",)

    scaling_factor: float = option(1.0, help="λ, the weight of the merged task vector")
    exclude_keys: list[str] | None = option(None, help="names of matrices that are averaged")

    def decompositions(self, num_tasks: int) -> int:
        """See `StaticMethod.decompositions`."""
        return 1

    def merge(
        self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None, device: torch.device
    ) -> State:
        """See `StaticMethod.merge`."""
        vectors = TaskVectors(modelpool.state(PRETRAINED), [modelpool.state(name) for name in modelpool.model_names])
        excluded = self.listed("exclude_keys", modelpool)
        combine = matrices(lambda stacked: iso_c(stacked.sum(dim=0)), excluded, device)
        return vectors.merged(lambda name, stacked: self.scaling_factor * combine(name, stacked))
