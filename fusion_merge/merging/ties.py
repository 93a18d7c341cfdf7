"""TIES: trim task vectors to their largest entries, elect a sign for each, and merge those that agree with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

from fusion_merge.errors import ConfigError
from fusion_merge.merging.vectors import Combine, TaskVectors

MERGE_FUNCS = ("sum", "mean", "max")
"""What becomes of the entries that agree with the elected sign."""

_HALF = 16  # bits that are looked at in one pass
_LOW = 2**_HALF


def trimmed(vectors: TaskVectors, percent: float) -> TaskVectors:
    r"""Return task vectors of which only the entries of largest magnitude are left.

    .. math:: \hat\tau_n = \tau_n \odot [\,|\tau_n| \ge t_n\,]

    A model's threshold is one for all its tensors, and the entry at the threshold is kept: of D entries
    ⌊D·percent/100⌋ + 1 are left, more where magnitudes are equal.

    Args:
        vectors: the task vectors; they are read twice for the thresholds, and nothing is kept of them.
        percent: what is kept, above 0, at most 100.

    Raises:
        ConfigError: if the percentage is out of range.

    Source: Yadav et al. 2023, §3, step 1.
    """
    if not 0.0 < percent <= 100.0:
        raise ConfigError(f"{percent} percent of the entries cannot be kept; choose more than 0, and at most 100")
    entries = sum(torch.Size(shape).numel() for shape in vectors.shapes.values())
    dropped = entries - int(entries * (percent / 100))
    if dropped == 0:
        return vectors
    thresholds = smallest(vectors, dropped)  # (N,)

    def trim(_name: str, stacked: Tensor) -> Tensor:
        limits = thresholds.to(stacked.device).view(-1, *[1] * (stacked.dim() - 1))  # (N, 1, …)
        return torch.where(stacked.float().abs() >= limits, stacked, torch.zeros_like(stacked))

    return vectors.changed(trim)


def smallest(vectors: TaskVectors, k: int) -> Tensor:
    """Return the k-th smallest magnitude of each model's task vector, over all its tensors.

    Exact in single precision, without sorting or a copy of a whole task vector: the bits of floating-point numbers
    without a sign are in the order of the numbers, so that counting upper halves tells which lower ones to count.

    Args:
        vectors: the task vectors.
        k: from 1 to the number of entries.

    Shape:
        tensors (N, …) → (N,).
    """
    counts = torch.zeros(vectors.num_models, _LOW, dtype=torch.int64)
    for bits in _bits(vectors):
        for n, row in enumerate(bits):
            counts[n] += torch.bincount(row >> _HALF, minlength=_LOW)
    upper, below = _place(counts, torch.full((len(counts),), k))  # (N,), (N,)
    counts = torch.zeros_like(counts)
    for bits in _bits(vectors):
        for n, row in enumerate(bits):
            counts[n] += torch.bincount(row[row >> _HALF == upper[n]] & (_LOW - 1), minlength=_LOW)
    lower, _ = _place(counts, k - below)
    return (upper << _HALF | lower).to(torch.int32).view(torch.float32)  # (N,)


def ties(vectors: TaskVectors, merge_func: str, scaling_factor: float) -> Combine:
    r"""Return what merges trimmed task vectors.

    .. math:: \gamma = \operatorname{sgn} \sum_n \hat\tau_n, \qquad
              \tau = \lambda\, \operatorname{merge} \{\hat\tau_n : \operatorname{sgn} \hat\tau_n = \gamma\}

    Where entries cancel exactly, the sign is that of most other entries of the whole model.

    Args:
        vectors: the trimmed task vectors; they are read once more if any entries cancel.
        merge_func: `sum`, `mean` over those that agree, or `max`, the one of largest magnitude.
        scaling_factor: λ.

    Source: Yadav et al. 2023, §3, steps 2 and 3; sum and the rule for ties are those of its code.
    """

    @cache
    def most() -> float:
        balance = sum(tensor.sum(dim=0).sign().sum().item() for tensor in vectors.values())
        return float((balance > 0) - (balance < 0))

    def combine(_name: str, stacked: Tensor) -> Tensor:
        sign = stacked.sum(dim=0).sign()
        cancelled = (sign == 0) & (stacked != 0).any(dim=0)
        if cancelled.any():
            sign = sign.masked_fill(cancelled, most())
        return scaling_factor * disjoint_merge(stacked, sign, merge_func)

    return combine


def disjoint_merge(stacked: Tensor, sign: Tensor, merge_func: str) -> Tensor:
    """Return the sum, mean or maximum of the entries that have the elected sign.

    Args:
        stacked: trimmed task vectors of one tensor.
        sign: the elected signs: 1, -1, or 0, with which nothing agrees.
        merge_func: one of `MERGE_FUNCS`.

    Shape:
        (N, …), (…) → (…).

    Raises:
        ConfigError: if there is no such `merge_func`.
    """
    agreeing = torch.where(stacked * sign > 0, stacked, torch.zeros_like(stacked))
    if merge_func == "sum":
        return agreeing.sum(dim=0)
    if merge_func == "mean":
        return agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)
    if merge_func == "max":
        return agreeing.abs().amax(dim=0) * sign
    raise ConfigError(f"`merge_func`={merge_func!r} is not possible; choose {', '.join(MERGE_FUNCS)}")


def _bits(vectors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Give the bits of the magnitudes of each tensor, (N, entries)."""
    for tensor in vectors.values():
        yield tensor.float().abs().flatten(1).contiguous().view(torch.int32)


def _place(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return in which bin each row's k-th smallest is, and how many are in those before it; (N, bins), (N,) → (N,)."""
    reached = counts.cumsum(dim=1)
    place = torch.searchsorted(reached, k[:, None])  # (N, 1)
    before = reached.gather(1, place) - counts.gather(1, place)
    return place[:, 0], before[:, 0]
