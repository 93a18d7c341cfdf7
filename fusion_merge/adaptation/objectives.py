"""Objectives of test-time adaptation: what is minimised on unlabelled images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from fusion_merge.errors import AdaptationError, ConfigError, nearest

_NOTHING = -80.0  # the logarithm of a probability that adds nothing to a sum


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
    log_p = _log_softmax(logits)  # (B, C)
    return -(log_p.exp() * log_p).sum(dim=-1)  # (B,)


def mean_entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of a batch: the published objective.

    Args:
        logits: (B, C).
    """
    return entropy(logits).mean()


def tsallis_entropy(logits: Tensor, order: float) -> Tensor:
    r"""Return the Tsallis entropy of each prediction.

    .. math:: S_q = \frac{1 - \sum_c p_c^q}{q - 1}, \qquad S_1 = H

    An order above 1 lets predictions that are nearly decided weigh less than under Shannon's; 2 is the Gini impurity.

    Args:
        logits: z; the sum is formed in float32, or float64 if they are.
        order: q, above 0.

    Shape:
        (B, C) → (B,).

    Source: Tsallis 1988.
    """
    if order == 1.0:
        return entropy(logits)
    log_p = _log_softmax(logits).clamp_min(_NOTHING)  # (B, C)
    return -(log_p.exp() * torch.expm1((order - 1) * log_p)).sum(dim=-1) / (order - 1)  # exact near order 1 too


def _alone(mean: Tensor) -> Tensor:
    """Return what the only process has: the mean over all processes."""
    return mean


def marginal_entropy(logits: Tensor, average: Callable[[Tensor], Tensor] = _alone) -> Tensor:
    r"""Return the entropy of a batch's mean prediction, in nats: low where all are of one class.

    .. math:: H(\bar p), \qquad \bar p = \frac1B \sum_i \operatorname{softmax}(z_i)

    Args:
        logits: z, of this process.
        average: returns the mean of a tensor over all processes, whose batches are equally large. The mean of the
            processes' gradients is that of the whole batch then.

    Shape:
        (B, C) → ().
    """
    mean = _log_softmax(logits).exp().mean(dim=0)  # (C,)
    whole = average(mean.detach())
    log_whole = whole.clamp_min(torch.finfo(whole.dtype).tiny).log()
    return -(log_whole * (whole + mean - mean.detach())).sum()  # probabilities sum up to 1: no more gradient than that


def infomax(logits: Tensor, average: Callable[[Tensor], Tensor] = _alone) -> Tensor:
    r"""Return the negative mutual information of images and predictions: each decided, all together spread out.

    .. math:: \frac1B \sum_i H(p_i) - H(\bar p)

    Driving all of a task's images to one class does not lower it.

    Args:
        logits: z, (B, C).
        average: see `marginal_entropy`.

    Source: Krause et al. 2010; Liang et al. 2020 (SHOT).
    """
    return mean_entropy(logits) - marginal_entropy(logits, average)


def expert_labels(logits: Tensor, expert_logits: Tensor, temperature: float) -> Tensor:
    r"""Return the cross-entropy to the soft labels of the task's own expert.

    .. math:: -\frac{T^2}{B} \sum_i \sum_c q_{ic} \log p_{ic}, \qquad
              q = \operatorname{softmax}(z^*/T), \quad p = \operatorname{softmax}(z/T)

    Args:
        logits: z, (B, C).
        expert_logits: z*, (B, C), of the same images.
        temperature: T, above 0. T² keeps the gradient's size (Hinton et al. 2015).

    Source: Hinton et al. 2015; for merged models SyMerge, arXiv 2412.19098.
    """
    soft = _log_softmax(expert_logits / temperature).exp()  # (B, C)
    return -(temperature**2) * (soft * _log_softmax(logits / temperature)).sum(dim=-1).mean()


@final
@dataclass(frozen=True)
class Objective:
    r"""A weighted sum of objectives, as a scalar of one task's logits and, where one of them needs it, its expert's.

    Args:
        terms: names of `OBJECTIVES` with their weights.
        temperature: T of `expert_labels`, above 0.
        order: q of `tsallis`, above 0.
        average: returns the mean of a tensor over all processes; of one process by default.
    """

    terms: tuple[tuple[str, float], ...] = (("entropy", 1.0),)
    temperature: float = 1.0
    order: float = 2.0
    average: Callable[[Tensor], Tensor] = field(default=_alone, compare=False, repr=False)

    @property
    def needs_experts(self) -> bool:
        """Whether the expert's logits are needed."""
        return any(name == "expert_labels" for name, _ in self.terms)

    @property
    def asks_experts_alone(self) -> bool:
        """Whether it is made of experts' labels and nothing else."""
        return all(name == "expert_labels" for name, _ in self.terms)

    @property
    def measure(self) -> str:
        """What its value is called in logs and pictures."""
        return "entropy" if self.terms == (("entropy", 1.0),) else "loss"

    def __call__(self, logits: Tensor, expert_logits: Tensor | None = None) -> Tensor:
        """Return the loss of one batch of one task.

        Args:
            logits: (B, C).
            expert_logits: (B, C), where they are needed.

        Raises:
            AdaptationError: if they are needed and not given.
        """
        values = [weight * OBJECTIVES[name](self, logits, expert_logits) for name, weight in self.terms]
        return torch.stack(values).sum()


def _of_expert(objective: Objective, logits: Tensor, expert_logits: Tensor | None) -> Tensor:
    if expert_logits is None:
        raise AdaptationError("`objective`=expert_labels needs the logits of the task's expert; give a pool of models")
    return expert_labels(logits, expert_logits, objective.temperature)


OBJECTIVES: dict[str, Callable[[Objective, Tensor, Tensor | None], Tensor]] = {
    "entropy": lambda _objective, logits, _expert: mean_entropy(logits),
    "expert_labels": _of_expert,
    "infomax": lambda objective, logits, _expert: infomax(logits, objective.average),
    "tsallis": lambda objective, logits, _expert: tsallis_entropy(logits, objective.order).mean(),
}
"""Objectives by name."""


def make_objective(text: str, *, temperature: float = 1.0, order: float = 2.0) -> Objective:
    """Return the objective that a text such as `entropy` or `expert_labels+0.1*infomax` stands for.

    Args:
        text: names of `OBJECTIVES`, each with a weight above 0 and `*` before it if that is not 1, joined by `+`.
        temperature: T of `expert_labels`.
        order: q of `tsallis`.

    Raises:
        ConfigError: if there is no such objective, one is named twice, or a weight is not above 0.
    """
    terms: dict[str, float] = {}
    for part in text.split("+"):
        before, star, after = part.partition("*")
        name = (after if star else before).strip()
        if name not in OBJECTIVES:
            raise ConfigError(f"`objective`={text!r}: there is no objective `{name}`; {nearest(name, OBJECTIVES)}")
        if name in terms:
            raise ConfigError(f"`objective`={text!r} names `{name}` twice; add its weights up")
        terms[name] = _weight(before, text) if star else 1.0
    return Objective(tuple(terms.items()), temperature, order)


def _weight(number: str, text: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(
            f"`objective`={text!r}: the weight {number.strip()!r} is not a number above 0; "
            "write it like expert_labels+0.1*infomax"
        )
    return weight


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
