"""DARE: drop entries of task vectors at random, rescale the others, and merge."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, final
from zlib import crc32

import torch
from torch import Tensor

from fusion_merge.errors import ConfigError
from fusion_merge.merging.ties import MERGE_FUNCS, ties, trimmed
from fusion_merge.merging.vectors import Combine, TaskVectors, mean
from fusion_merge.methods.static_base import StaticMethod
from fusion_merge.methods.ties_merging import TiesMergingAlgorithm
from fusion_merge.models.tensor_names import linear_weights
from fusion_merge.options import option
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.registry import register_method
from fusion_merge.task_vectors import State


@final
@register_method("dare")
@dataclass(kw_only=True)
class DareAlgorithm(StaticMethod):
    r"""Static merging of task vectors of which a random part is dropped.

    .. math:: \tilde\tau_n = \frac{m_n \odot \tau_n}{1 - p}, \quad m_n \sim \operatorname{Bernoulli}(1 - p), \qquad
              \theta = \theta_0 + \operatorname{merge}(\tilde\tau_1, \dots, \tilde\tau_N)

    The expectation of a dropped and rescaled task vector is the task vector.

    Source: Yu et al., ICML 2024. Here what is dropped depends on `seed` alone: not on the device, nor on what is
    merged how.
    """

    readings: ClassVar[int] = 3
    listing: ClassVar[tuple[str, ...]] = ("remove_keys",)

    sparsity_ratio: float = option(0.5, help="p, the share of entries that is dropped", minimum=0.0, below=1.0)
    only_on_linear_weights: bool = option(False, help="drop in the weights of linear layers alone")
    rescale: bool = option(True, help="divide what is left by 1 - p")
    merging: str = option(
        "task_arithmetic",
        help="how what is left is merged",
        choices=("task_arithmetic", "simple_average", "ties_merging"),
    )
    scaling_factor: float = option(0.3, help="λ, the weight of the merged task vector; the average has none")
    threshold: float = option(20.0, help="ties_merging: percent that is kept", above=0.0, maximum=100.0)
    remove_keys: list[str] | None = option(None, help="ties_merging: names of tensors that stay pretrained")
    merge_func: str = option("sum", help="ties_merging: what becomes of the entries that agree", choices=MERGE_FUNCS)
    seed: int = option(0, help="of what is dropped", minimum=0)

    def __post_init__(self) -> None:
        """Check all options, those of TIES-merging as it does."""
        super().__post_init__()
        if self.merging == "ties_merging":
            TiesMergingAlgorithm(threshold=self.threshold)
        if self.remove_keys and self.merging != "ties_merging":
            raise ConfigError(
                f"`remove_keys`={self.remove_keys!r} goes with `merging`=ties_merging, not {self.merging}; leave it out"
            )

    def merge(
        self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None, device: torch.device
    ) -> State:
        """See `StaticMethod.merge`."""
        finetuned = [modelpool.state(name) for name in modelpool.model_names]
        leave = self.listed("remove_keys", modelpool)
        vectors = TaskVectors(modelpool.state(PRETRAINED), finetuned, leave=leave)
        linear = linear_weights(modelpool.config()) if self.only_on_linear_weights else None
        vectors = dropped(vectors, self.sparsity_ratio, rescale=self.rescale, seed=self.seed, only=linear)
        if self.merging == "ties_merging":
            vectors = trimmed(vectors, self.threshold)
        return vectors.merged(self._combine(vectors))

    def _combine(self, vectors: TaskVectors) -> Combine:
        if self.merging == "ties_merging":
            return ties(vectors, self.merge_func, self.scaling_factor)
        if self.merging == "simple_average":
            return mean
        return lambda _, stacked: self.scaling_factor * stacked.sum(dim=0)


def dropped(
    vectors: TaskVectors, ratio: float, *, rescale: bool = True, seed: int = 0, only: Collection[str] | None = None
) -> TaskVectors:
    """Return task vectors of which entries are set to zero at random, the same ones whenever they are read.

    Args:
        vectors: the task vectors.
        ratio: p, the probability that an entry is dropped, in [0, 1).
        rescale: divide what is left by 1 - p.
        seed: what is dropped of a tensor depends on it, on the tensor's name, and on the place of its model.
        only: names of the tensors of which entries are dropped; by default all.

    Source: Yu et al. 2024, §3.
    """

    def drop(name: str, stacked: Tensor) -> Tensor:
        if only is not None and name not in only:
            return stacked
        generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))  # it takes 32 bits
        kept = torch.rand(stacked.shape, generator=generator).to(stacked.device) >= ratio
        left = torch.where(kept, stacked, torch.zeros_like(stacked))
        return left / (1 - ratio) if rescale else left

    return vectors.changed(drop)
