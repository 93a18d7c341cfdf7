"""Selections: how many of the merging coefficients of a layer take part, and between which bounds."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from fusion_merge.errors import ConfigError
from fusion_merge.moe.probabilities import nucleus, relative_tsallis_entropy


class Selection(nn.Module, ABC):
    """Changes the merging coefficients after all averaging; it has no parameters.

    An expert that takes no part has the coefficient zero.
    """

    @abstractmethod
    def forward(self, coefficients: Tensor) -> Tensor:
        """Return the coefficients as they are applied.

        Args:
            coefficients: after all averaging.

        Shape:
            (B, K) → (B, K).
        """

    def fitted(self, count: int) -> Selection:
        """Return the selection for a layer that has come to have another number of coefficients.

        Args:
            count: K; a selection of more than that selects them all.
        """
        return self

    @abstractmethod
    def spec(self) -> dict[str, Any] | None:
        """Return what `empty_selection` needs, as plain JSON values."""


@final
class SelectAll(Selection):
    """Every coefficient takes part, unchanged."""

    def forward(self, coefficients: Tensor) -> Tensor:
        """See `Selection.forward`."""
        return coefficients

    def spec(self) -> dict[str, Any] | None:
        """See `Selection.spec`."""
        return None


@final
class SoftTopK(Selection):
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
        self.k = _at_least_one(k)
        self.sharpness = sharpness

    def forward(self, coefficients: Tensor) -> Tensor:
        """See `Selection.forward`: the coefficients times their mask."""
        _check_count(self.k, coefficients)
        threshold = torch.topk(coefficients, self.k, dim=-1).values[..., -1:]  # (B, 1)
        return coefficients * torch.sigmoid(self.sharpness * (coefficients - threshold))  # (B, K)

    def fitted(self, count: int) -> SoftTopK:
        """See `Selection.fitted`."""
        return SoftTopK(min(self.k, count), self.sharpness)

    def spec(self) -> dict[str, Any] | None:
        """See `Selection.spec`."""
        return {"kind": "soft_top_k", "k": self.k, "sharpness": self.sharpness}


@final
class TopK(Selection):
    r"""The k largest coefficients as they are; the others are exactly zero.

    .. math:: m(g)_i = g_i \text{ if } g_i \text{ is among the } k \text{ largest of } g, \text{ else } 0

    Exactly k are kept: of equal ones, those of the lowest index. Large means large by value, not by magnitude.
    The gradient reaches the kept coefficients alone.

    Args:
        k: how many to keep, in 1…K.

    Raises:
        ConfigError: if `k` is below 1, or, when applied, above K.

    Source: Shazeer et al. 2017, arXiv 1701.06538; there what is kept goes through a softmax, and noise is
    added while training. Here coefficients are applied as they are, without noise.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = _at_least_one(k)

    def forward(self, coefficients: Tensor) -> Tensor:
        """See `Selection.forward`."""
        _check_count(self.k, coefficients)
        order = coefficients.argsort(dim=-1, descending=True, stable=True)  # (B, K)
        kept = torch.zeros_like(coefficients, dtype=torch.bool).scatter(-1, order[..., : self.k], True)  # (B, K)
        return _where(kept, coefficients)

    def fitted(self, count: int) -> TopK:
        """See `Selection.fitted`."""
        return TopK(min(self.k, count))

    def spec(self) -> dict[str, Any] | None:
        """See `Selection.spec`."""
        return {"kind": "top_k", "k": self.k}


@final
class TopP(Selection):
    r"""As many of the largest coefficients as it takes to be sure, as they are; the others are exactly zero.

    .. math:: m(g)_i = g_i \text{ if } i \in S, \text{ else } 0, \qquad S = \text{the smallest set, by descending }
              \pi_i, \text{ with } \sum_{i \in S} \pi_i \ge p, \qquad \pi = \operatorname{softmax}(g / T)

    At least one is kept; of equal ones, that of the lowest index is the first; p = 1 is the identity. Merging
    coefficients lie close to each other, so their probabilities are nearly equal at T = 1: a temperature of about
    their spread, such as 0.1, tells them apart. The gradient reaches the kept coefficients alone, and none p or T.

    Args:
        p: how much probability is enough, in (0, 1].
        temperature: T, above 0.

    Raises:
        ConfigError: if an argument is out of range.

    Source: Huang et al. 2024, "Harder Tasks Need More Experts", arXiv 2403.07652; there experts are weighted by
    their probabilities, at T = 1. Here the coefficients themselves are applied, as with the other selections.
    """

    def __init__(self, p: float, temperature: float = 1.0) -> None:
        super().__init__()
        self.p = _share(p)
        self.temperature = _above_zero("select_temperature", temperature, "1 is the plain softmax")

    def forward(self, coefficients: Tensor) -> Tensor:
        """See `Selection.forward`."""
        return _where(nucleus(coefficients, self.p, self.temperature), coefficients)

    def spec(self) -> dict[str, Any] | None:
        """See `Selection.spec`."""
        return {"kind": "top_p", "p": self.p, "temperature": self.temperature}


@final
class TsallisTopP(Selection):
    r"""All coefficients where the router is undecided, and those of `TopP` where it is not.

    .. math:: m(g) = g \ \text{ if } \ \frac{S_q(\pi)}{S_q(1/K, \dots, 1/K)} > \theta, \ \text{ else } \
              \mathrm{TopP}(g), \qquad S_q(\pi) = \frac{1 - \sum_i \pi_i^q}{q - 1}, \qquad
              \pi = \operatorname{softmax}(g / T)

    q = 1 is Shannon's entropy. Each row decides for itself. θ = 1 is `TopP`, and θ = 0 keeps all, unless one expert
    has all of the probability. Gradients are those of `TopP`.

    Args:
        p: how much probability is enough, in (0, 1].
        temperature: T, above 0.
        q: the entropic index, above 0.
        threshold: θ, in 0-1.

    Raises:
        ConfigError: if an argument is out of range.

    Source: DynMoLE, arXiv 2504.00661. There the entropy itself is compared with a threshold, at T = 1, at least a
    given number of experts is kept, and experts are weighted by their probabilities. Here the entropy is relative to
    its largest possible value, so that a threshold means the same for every K and q, at least one expert is kept, and
    the coefficients themselves are applied.
    """

    def __init__(self, p: float, temperature: float = 1.0, q: float = 1.0, threshold: float = 0.9) -> None:
        super().__init__()
        self.p = _share(p)
        self.temperature = _above_zero("select_temperature", temperature, "1 is the plain softmax")
        self.q = _above_zero("select_q", q, "1 is Shannon's entropy")
        if not 0 <= threshold <= 1:
            raise ConfigError(
                f"`select_threshold`={threshold} is not in 0-1; 0 keeps nearly always all, 1 is `top_p` alone"
            )
        self.threshold = threshold

    def forward(self, coefficients: Tensor) -> Tensor:
        """See `Selection.forward`."""
        undecided = relative_tsallis_entropy(coefficients, self.temperature, self.q) > self.threshold  # (B, 1)
        return _where(undecided | nucleus(coefficients, self.p, self.temperature), coefficients)

    def spec(self) -> dict[str, Any] | None:
        """See `Selection.spec`."""
        return {
            "kind": "tsallis_top_p",
            "p": self.p,
            "temperature": self.temperature,
            "q": self.q,
            "threshold": self.threshold,
        }


@final
class Bounded(Selection):
    r"""Coefficients between two bounds.

    .. math:: m(g) = \min(\max(g, a), b)

    It is a plain clamp: a coefficient at a bound or between the two has the gradient 1, one that is beyond a bound
    has none, and comes back only as what else its router decides changes it.

    Args:
        low: a.
        high: b, above a.

    Raises:
        ConfigError: if the bounds are not two finite numbers in ascending order.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        if not -math.inf < low < high < math.inf:
            raise ConfigError(
                f"`coefficient_bounds`=[{low}, {high}] is not a lower bound and a higher one; [0, 1] is usual"
            )
        self.low = low
        self.high = high

    def forward(self, coefficients: Tensor) -> Tensor:
        """See `Selection.forward`."""
        return coefficients.clamp(self.low, self.high)

    def spec(self) -> dict[str, Any] | None:
        """See `Selection.spec`."""
        return {"kind": "bounded", "low": self.low, "high": self.high}


@final
class Chain(Selection):
    r"""Selections one after the other.

    .. math:: m = m_n \circ \dots \circ m_1

    Args:
        parts: m_1 to m_n.
    """

    def __init__(self, parts: Iterable[Selection]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, coefficients: Tensor) -> Tensor:
        """See `Selection.forward`."""
        for part in self.parts:
            coefficients = part(coefficients)
        return coefficients

    def fitted(self, count: int) -> Chain:
        """See `Selection.fitted`: each part by itself."""
        return Chain([part.fitted(count) for part in self.parts])  # type: ignore[operator]

    def spec(self) -> dict[str, Any] | None:
        """See `Selection.spec`."""
        return {"kind": "chain", "parts": [part.spec() for part in self.parts]}  # type: ignore[operator]


def empty_selection(spec: dict[str, Any] | None) -> Selection:
    """Make the selection that a spec describes.

    Args:
        spec: what a selection's `spec` returned.

    Raises:
        ConfigError: if the kind of selection is unknown.
    """
    if spec is None:
        return SelectAll()
    arguments = {name: value for name, value in spec.items() if name != "kind"}
    if spec["kind"] == "chain":
        return Chain(empty_selection(part) for part in spec["parts"])
    if spec["kind"] not in _KINDS:
        known = ", ".join([*_KINDS, "chain"])
        raise ConfigError(f"selection of kind `{spec['kind']}` is unknown; known are {known}")
    return _KINDS[spec["kind"]](**arguments)


_KINDS: dict[str, type[Selection]] = {
    "soft_top_k": SoftTopK,
    "top_k": TopK,
    "top_p": TopP,
    "tsallis_top_p": TsallisTopP,
    "bounded": Bounded,
}


def _where(kept: Tensor, coefficients: Tensor) -> Tensor:
    return torch.where(kept, coefficients, torch.zeros_like(coefficients))


def _at_least_one(k: int) -> int:
    if k < 1:
        raise ConfigError(f"`select_k`={k} is below 1; choose 1 to the number of experts, or -1 for all of them")
    return k


def _check_count(k: int, coefficients: Tensor) -> None:
    if k > coefficients.shape[-1]:
        raise ConfigError(
            f"`select_k`={k} is above the number of experts, {coefficients.shape[-1]}; "
            f"choose 1-{coefficients.shape[-1]} or -1 for all of them"
        )


def _share(p: float) -> float:
    if not 0 < p <= 1:
        raise ConfigError(f"`select_p`={p} is not above 0 and up to 1; 0.9 is usual, and 1 keeps all")
    return p


def _above_zero(option: str, value: float, hint: str) -> float:
    if not 0 < value < math.inf:
        raise ConfigError(f"`{option}`={value} is not a number above 0; {hint}")
    return value
