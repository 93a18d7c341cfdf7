"""Several towers that answer together: the logits of an image are combined over them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from fusion_merge.errors import ConfigError
from fusion_merge.models.clip import pooled_output

COMBINATIONS = ("mean", "probabilities", "max")
"""How logits are combined: their mean, the mean of the probabilities, or the largest of each class."""


@final
class TowerEnsemble(nn.Module):
    r"""Towers beside each other; each image goes through all of them.

    .. math:: z = \tfrac1N \sum_n z_n, \qquad z = \log \tfrac1N \sum_n \operatorname{softmax}(z_n)
              \quad\text{or}\quad z_c = \max_n z_{nc}

    What it returns of an image is every tower's pooled output; a head makes logits of each, and `combined` one of them.

    Args:
        towers: N vision towers.
        combine: one of `COMBINATIONS`.

    Raises:
        ConfigError: if there is no such combination.
    """

    def __init__(self, towers: Iterable[nn.Module], combine: str = "mean") -> None:
        super().__init__()
        if combine not in COMBINATIONS:
            raise ConfigError(f"`combine`={combine!r} is not possible; choose {', '.join(COMBINATIONS)}")
        self.towers = nn.ModuleList(towers)
        self.combine = combine

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Return every tower's pooled output.

        Args:
            pixel_values: images.
            **kwargs: what the towers take besides.

        Shape:
            (B, 3, height, width) → (N, B, D).
        """
        return torch.stack([pooled_output(tower(pixel_values=pixel_values, **kwargs)) for tower in self.towers])

    def combined(self, logits: Tensor) -> Tensor:
        """Return one row of logits for each image.

        Args:
            logits: of every tower.

        Shape:
            (N, B, C) → (B, C).
        """
        if self.combine == "max":
            return logits.max(dim=0).values
        if self.combine == "mean":
            return logits.mean(dim=0)
        return logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))


def combined_logits(tower: nn.Module, logits: Tensor) -> Tensor:
    """Return one row of logits for each image, whether a tower or an ensemble of them made its head's input.

    Args:
        tower: what that is.
        logits: the head's output.

    Shape:
        (B, C), or (N, B, C) of an ensemble → (B, C).
    """
    return tower.combined(logits) if isinstance(tower, TowerEnsemble) else logits
