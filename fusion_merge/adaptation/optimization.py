"""Optimisers of what is adapted: their learning rate over time, and steps that can be taken back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from fusion_merge.errors import AdaptationError, ConfigError, nearest, reason

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}

SCHEDULES = ("constant", "cosine")
"""How the learning rate goes on after warm-up."""


@final
@dataclass(frozen=True)
class LearningRate:
    r"""A learning rate as a function of the step alone, so that an adaptation that goes on needs no state for it.

    .. math:: \eta_t = \eta \cdot \min\Big(1, \frac{t + 1}{w}\Big) \cdot
              \begin{cases} 1 & \text{constant} \\ \tfrac12 \big(1 + \cos \pi \tfrac{t}{T}\big) & \text{cosine}
              \end{cases}

    Args:
        highest: η, above 0.
        schedule: one of `SCHEDULES`.
        warmup_steps: w, at most T; 0 is none.
        max_steps: T.
    """

    highest: float
    schedule: str = "constant"
    warmup_steps: int = 0
    max_steps: int = 1

    def at(self, step: int) -> float:
        """Return the learning rate of a step.

        Args:
            step: t, from 0.
        """
        warmup = min(self.warmup_steps, self.max_steps)
        rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
        falling = 0.5 * (1 + math.cos(math.pi * step / self.max_steps)) if self.schedule == "cosine" else 1.0
        return self.highest * rising * falling


def make_optimizer(
    name: str, parameters: list[nn.Parameter], lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Make an optimizer by name.

    Args:
        name: one of `OPTIMIZERS`.
        parameters: what it trains.
        lr: the learning rate, above 0.
        weight_decay: at least 0; of AdamW decoupled from the gradient.

    Raises:
        ConfigError: if there is no such optimizer.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"`optimizer`={name!r} is unknown; {nearest(name, OPTIMIZERS)}")
    return OPTIMIZERS[name](parameters, lr=lr, weight_decay=weight_decay)


class Update:
    """Steps of an optimizer that can be taken back, so that a step gone wrong spoils nothing.

    Args:
        parameters: what is trained.
        optimizer: its optimiser.
        rate: the learning rate of each step.
        what: what the parameters are, in a word, for messages.
    """

    def __init__(
        self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, rate: LearningRate, what: str
    ) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._rate = rate
        self.what = what
        self.before: list[Tensor] = []
        """The parameters before the last step."""

    def take(self, step: int, pace: float = 1.0) -> None:
        """Take a step.

        Args:
            step: its number, from 0.
            pace: what the learning rate is multiplied by, above 0.

        Raises:
            AdaptationError: if the step cannot be taken; it is taken back.
        """
        self.before = [p.detach().clone() for p in self._parameters]
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate.at(step) * pace
        try:
            self._optimizer.step()
        except RuntimeError as error:  # such as a step that no float can hold
            self.take_back()
            raise AdaptationError(
                f"the optimiser fails at step {step} ({reason(error)}); try a smaller `lr`"
            ) from error
        if not all(torch.isfinite(p).all() for p in self._parameters):
            self.take_back()
            raise AdaptationError(
                f"the {self.what} would not be finite after step {step}; they are kept as they were before it: "
                "try a smaller `lr`, or look for broken images or weights"
            )

    def take_back(self) -> None:
        """Put back the parameters that were there before the last step, if there was one."""
        for parameter, value in zip(self._parameters, self.before, strict=False):
            parameter.data.copy_(value)

    def refuse_nan(self, losses: dict[str, float], step: int) -> None:
        """Refuse a loss that is not a number.

        Args:
            losses: each task's.
            step: their step.

        Raises:
            AdaptationError: if one is not a number; the last step is taken back.
        """
        for name, loss in losses.items():
            if not math.isfinite(loss):
                self.take_back()
                raise AdaptationError(
                    f"the loss of task `{name}` is {loss} at step {step}; the {self.what} are the last ones with "
                    "which every loss was a number: try a smaller `lr`, or look for broken images or weights"
                )
