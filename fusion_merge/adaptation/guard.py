"""Watches adaptation for tasks that collapse to one class."""

from __future__ import annotations

import logging
from collections import deque
from typing import final

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@final
class CollapseGuard:
    """Notices when nearly all predictions of a task fall on one class.

    The share of the most frequent class is taken over a window of recent predictions. A task counts as collapsed
    when that share is above `threshold` and clearly above where it was in the task's first window, so that a task
    whose images really are of one class is not accused.

    Args:
        num_classes: for each task, the number of classes.
        window: how many recent predictions of a task are looked at.
        threshold: the share of the top class, in (0, 1], above which a task counts as collapsed.
    """

    def __init__(self, num_classes: dict[str, int], window: int = 128, threshold: float = 0.9) -> None:
        self.window = window
        self.threshold = threshold
        self._num_classes = num_classes
        self._recent = {name: deque[int](maxlen=window) for name in num_classes}
        self._first: dict[str, float] = {}
        self.collapsed: dict[str, int] = {}

    def update(self, step: int, task: str, logits: Tensor) -> float:
        """Take in one batch of predictions; warn, once a task, when the task collapses.

        Args:
            step: the adaptation step, from 0.
            task: whose batch it is.
            logits: (B, C).

        Returns:
            The share of the top class among the recent predictions, in (0, 1].
        """
        recent = self._recent[task]
        recent.extend(logits.detach().argmax(dim=-1).tolist())
        counts = torch.bincount(torch.tensor(list(recent)), minlength=self._num_classes[task])
        share = counts.max().item() / len(recent)
        if len(recent) < self.window:
            return share
        first = self._first.setdefault(task, share)
        if task not in self.collapsed and share > self.threshold and share > first + 0.05:
            self.collapsed[task] = step
            log.warning(
                "task `%s` collapses: at step %d, %.0f %% of its last %d predictions are class %d "
                "(%.0f %% at the start); "
                "its accuracy will suffer: try a smaller `lr`, fewer `max_steps`, or leave the task out of adaptation",
                task,
                step,
                100 * share,
                len(recent),
                int(counts.argmax()),
                100 * first,
            )
        return share
