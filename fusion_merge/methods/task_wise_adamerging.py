"""Task-wise AdaMerging: one coefficient for each task, adapted on unlabelled images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from fusion_merge.methods.adamerging_base import AdaMergingMethod
from fusion_merge.registry import register_method


@final
@register_method("task_wise_adamerging", aliases=("clip_task_wise_adamerging",))
@dataclass(kw_only=True)
class TaskWiseAdaMergingAlgorithm(AdaMergingMethod):
    r"""Static merging with one adapted coefficient for each task.

    .. math:: \theta = \theta_0 + \sum_n \lambda_n \tau_n, \qquad
              \min_\lambda \sum_n \mathbb{E}_x\, H\big(\operatorname{softmax} z_n(x; \theta)\big)

    Source: Yang et al., ICLR 2024, arXiv 2310.02575, §3.2. The authors' code keeps coefficients within 0-1; as in
    fusion_bench's preset, here they are free unless `clamp_weights`.
    """

    layer_wise: ClassVar[bool] = False
