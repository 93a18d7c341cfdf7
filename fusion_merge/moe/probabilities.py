"""What merging coefficients say as probabilities: how sure a router is, and how many experts it takes to be sure."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_merge.moe.precision import exact


@torch.no_grad()
def nucleus(coefficients: Tensor, p: float, temperature: float) -> Tensor:
    r"""Say which coefficients are in the smallest set, by descending probability, whose sum reaches p.

    .. math:: \pi = \operatorname{softmax}(g / T), \qquad
              \min |S| \ \text{ such that } \sum_{i \in S} \pi_i \ge p

    Of equal coefficients, the one of the lowest index is the first. At p = 1 all are in the set, whatever rounding
    makes of the sum.

    Args:
        coefficients: g.
        p: how much probability is enough, in (0, 1].
        temperature: T, above 0.

    Shape:
        (B, K) → (B, K) of truth values.
    """
    inside = torch.ones_like(coefficients, dtype=torch.bool)
    if p == 1:
        return inside
    order = coefficients.argsort(dim=-1, descending=True, stable=True)  # (B, K)
    sums = log_probabilities(coefficients, temperature).exp().gather(-1, order).cumsum(dim=-1)  # (B, K)
    before = F.pad(sums[..., :-1], (1, 0))  # (B, K): what is there without this one
    return inside.scatter(-1, order, before < p)


@torch.no_grad()
def relative_tsallis_entropy(coefficients: Tensor, temperature: float, q: float) -> Tensor:
    r"""Return how undecided each row is: 0 if one expert has all the probability, 1 if all have the same.

    .. math:: \frac{S_q(\pi)}{S_q(1/K, \dots, 1/K)}, \qquad S_q(\pi) = \frac{1 - \sum_i \pi_i^q}{q - 1}, \qquad
              \lim_{q \to 1} S_q(\pi) = -\sum_i \pi_i \ln \pi_i, \qquad \pi = \operatorname{softmax}(g / T)

    It is computed without differences of nearly equal numbers, so that q may be as near to 1 as one likes.
    A single expert counts as undecided: 1.

    Args:
        coefficients: g.
        temperature: T, above 0.
        q: the entropic index, above 0; 1 is Shannon's entropy.

    Shape:
        (B, K) → (B, 1).
    """
    count = coefficients.shape[-1]
    logs = log_probabilities(coefficients, temperature)  # (B, K)
    if count == 1:
        return torch.ones_like(logs)
    largest = _tsallis(torch.full_like(logs[:1], -math.log(count)), q)  # (1, 1)
    return (_tsallis(logs, q) / largest).clamp(max=1)  # (B, 1)


def log_probabilities(coefficients: Tensor, temperature: float) -> Tensor:
    r"""Return :math:`\ln \operatorname{softmax}(g / T)`, in float32 at least.

    Args:
        coefficients: g.
        temperature: T, above 0.

    Shape:
        (B, K) → (B, K).
    """
    values = exact(coefficients)
    return F.log_softmax((values - values.amax(dim=-1, keepdim=True)) / temperature, dim=-1)


def _tsallis(logs: Tensor, q: float) -> Tensor:
    """Return S_q of log-probabilities; since Σ π = 1, it is Σ (π - π^q) / (q - 1): (B, K) → (B, 1)."""
    if q == 1:
        terms = torch.special.entr(logs.exp())
    else:
        distance = abs(q - 1)
        terms = -(min(q, 1.0) * logs).exp() * torch.expm1(distance * logs) / distance
    return terms.sum(dim=-1, keepdim=True)
