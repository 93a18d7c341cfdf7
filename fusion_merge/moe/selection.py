"""Selections: how many of the merging coefficients of a layer take part."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from fusion_merge.errors import ConfigError


@final
class SelectAll(nn.Module):
    """Every coefficient takes part, unchanged."""

    def forward(self, coefficients: Tensor) -> Tensor:
        """Return the coefficients.

        Args:
            coefficients: after all averaging.

        Shape:
            (B, K) → (B, K).
        """
        return coefficients

    def spec(self) -> dict[str, Any] | None:
        """Return what `empty_selection` needs."""
        return None


@final
class SoftTopK(nn.Module):
    r"""A soft mask that keeps the k largest coefficients.

    .. math:: m(g) = g \cdot \sigma\big(s\,(g - t)\big), \quad t = \text{the } k\text{-th largest of } g

    The mask is soft: the k-th coefficient is halved, near ties leak, equal coefficients are all halved, and
    k = K is not the identity. The gradient also flows through t.

    Args:
        k: how many to keep, in 1…K.
        sharpness: s, above 0.

    Raises:
        ConfigError: if `k` is below 1, or, when applied, above K.

    Source: RankOne-MoE (EnnengYang/RankOne-MoE), `top_k_soft`, with s = 100.
    """

    def __init__(self, k: int, sharpness: float = 100.0) -> None:
        super().__init__()
        if k < 1:
            raise ConfigError(f"`select_k`={k} is below 1; choose 1 to the number of experts, or -1 for all of them")
        self.k = k
        self.sharpness = sharpness

    def forward(self, coefficients: Tensor) -> Tensor:
        """Return the coefficients times their mask.

        Args:
            coefficients: after all averaging.

        Shape:
            (B, K) → (B, K).
        """
        if self.k > coefficients.shape[-1]:
            raise ConfigError(
                f"`select_k`={self.k} is above the number of experts, {coefficients.shape[-1]}; "
                f"choose 1-{coefficients.shape[-1]} or -1 for all of them"
            )
        threshold = torch.topk(coefficients, self.k, dim=-1).values[..., -1:]  # (B, 1)
        return coefficients * torch.sigmoid(self.sharpness * (coefficients - threshold))  # (B, K)

    def spec(self) -> dict[str, Any] | None:
        """Return what `empty_selection` needs."""
        return {"kind": "soft_top_k", "k": self.k, "sharpness": self.sharpness}


Selection = SelectAll | SoftTopK


def empty_selection(spec: dict[str, Any] | None) -> Selection:
    """Make the selection that a spec describes.

    Args:
        spec: what a selection's `spec` returned.

    Raises:
        ConfigError: if the kind of selection is unknown.
    """
    if spec is None:
        return SelectAll()
    if spec["kind"] == "soft_top_k":
        return SoftTopK(spec["k"], spec["sharpness"])
    raise ConfigError(f"selection of kind `{spec['kind']}` is unknown; known is soft_top_k")
