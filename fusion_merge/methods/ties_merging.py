"""TIES-merging: trim task vectors, elect a sign for each weight, merge those that agree with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from fusion_merge.errors import ConfigError
from fusion_merge.merging.ties import MERGE_FUNCS, ties, trimmed
from fusion_merge.merging.vectors import TaskVectors
from fusion_merge.methods.static_base import StaticMethod
from fusion_merge.options import option
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.registry import register_method
from fusion_merge.task_vectors import State


@final
@register_method("ties_merging", aliases=("ties",))
@dataclass(kw_only=True)
class TiesMergingAlgorithm(StaticMethod):
    r"""Static merging that resolves interference by trimming and electing signs.

    .. math:: \hat\tau_n = \text{the largest entries of } \tau_n, \qquad
              \gamma = \operatorname{sgn} \sum_n \hat\tau_n, \qquad
              \theta = \theta_0 + \lambda \operatorname{merge} \{\hat\tau_n : \operatorname{sgn} \hat\tau_n = \gamma\}

    The threshold of a task is one over all its tensors; γ and the merge are taken entry by entry.

    Source: Yadav et al., NeurIPS 2023, which takes the mean of those that agree; the reference takes the sum. There a
    `threshold` up to 1 is a share, and 100 fails; here it is a percentage, and 100 trims nothing. Tensors in
    `remove_keys` stay as they are in the pretrained model; there the model cannot be loaded then.
    """

    readings: ClassVar[int] = 3
    listing: ClassVar[tuple[str, ...]] = ("remove_keys",)

    scaling_factor: float = option(0.3, help="λ, the weight of the merged task vector")
    threshold: float = option(20.0, help="percent of each task vector that is kept", above=0.0, maximum=100.0)
    remove_keys: list[str] | None = option(None, help="names of tensors that are not merged, but stay pretrained")
    merge_func: str = option("sum", help="what becomes of the entries that agree", choices=MERGE_FUNCS)

    def __post_init__(self) -> None:
        """Check all options."""
        super().__post_init__()
        if self.threshold <= 1:
            raise ConfigError(
                f"`threshold`={self.threshold} is a percentage here, but a share in other implementations; "
                f"give {100 * self.threshold:g} if the share {self.threshold:g} was meant, or more than 1 percent"
            )

    def merge(
        self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None, device: torch.device
    ) -> State:
        """See `StaticMethod.merge`."""
        finetuned = [modelpool.state(name) for name in modelpool.model_names]
        leave = self.listed("remove_keys", modelpool)
        vectors = trimmed(TaskVectors(modelpool.state(PRETRAINED), finetuned, leave=leave), self.threshold)
        return vectors.merged(ties(vectors, self.merge_func, self.scaling_factor))
