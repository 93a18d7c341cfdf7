"""Layer-wise AdaMerging: one coefficient for each task and tensor, adapted on unlabelled images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from fusion_merge.methods.adamerging_base import AdaMergingMethod
from fusion_merge.registry import register_method


@final
@register_method("layer_wise_adamerging", aliases=("adamerging", "clip_layer_wise_adamerging"))
@dataclass(kw_only=True)
class LayerWiseAdaMergingAlgorithm(AdaMergingMethod):
    r"""Static merging with one adapted coefficient for each task and tensor.

    .. math:: \theta_l = \theta_{0l} + \sum_n \lambda_{nl} \tau_{nl}, \qquad
              \min_\lambda \sum_n \mathbb{E}_x\, H\big(\operatorname{softmax} z_n(x; \theta)\big)

    Source: Yang et al., ICLR 2024, arXiv 2310.02575, §3.2. A layer l of the paper is a tensor of its code, and here:
    a weight and its bias have coefficients of their own. The authors' code keeps coefficients within 0-1; as in
    fusion_bench's preset, here they are free unless `clamp_weights`.
    """

    layer_wise: ClassVar[bool] = True
