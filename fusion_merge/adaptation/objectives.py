"""Objectives of test-time adaptation: what is minimised on unlabelled images."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fusion_merge.errors import ConfigError, nearest


class Objective(Protocol):
    """A scalar of one task's logits that adaptation minimises."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the loss of one batch of one task.

        Args:
            logits: (B, C).
        """
        ...


def entropy(logits: Tensor) -> Tensor:
    r"""Return the Shannon entropy of each prediction, in nats.

    .. math:: H = -\sum_c p_c \log p_c, \qquad p = \operatorname{softmax}(z)

    Args:
        logits: z, in any floating-point precision; the sum is formed in float32, or float64 if they are.

    Shape:
        (B, C) → (B,).

    Source: Wang et al. 2021 (Tent), eq. 1. The reference adds 1e-8 inside the logarithm, which is NaN in half
    precision; log-softmax needs no such constant.
    """
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)  # (B, C)
    return -(log_p.exp() * log_p).sum(dim=-1)  # (B,)


def mean_entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of a batch: the published objective.

    Args:
        logits: (B, C).
    """
    return entropy(logits).mean()


OBJECTIVES: dict[str, Objective] = {"entropy": mean_entropy}
"""Objectives by name."""


def make_objective(name: str) -> Objective:
    """Return an objective by name.

    Args:
        name: one of `OBJECTIVES`.

    Raises:
        ConfigError: if there is no such objective.
    """
    if name not in OBJECTIVES:
        raise ConfigError(f"`objective`={name!r} is unknown; {nearest(name, OBJECTIVES)}")
    return OBJECTIVES[name]
