"""Watches adaptation for tasks that collapse to one class."""

from __future__ import annotations

import logging
from collections import deque
from itertools import accumulate
from typing import Any, final

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_AT_FIRST = 16  # predictions that tell how a task began; few, because a collapse can come within the first steps
_ENOUGH = 32  # predictions before a task is judged at all
_MARGIN = 0.1  # how far above its beginning the share of the top class must rise


@final
class CollapseGuard:
    """Notices when nearly all predictions of a task fall on one class.

    The share of the most frequent class is taken over a window of recent predictions. A task counts as collapsed
    when that share is above `threshold` and clearly above where it was in the task's first 16 predictions, so that a
    task whose images really are of one class is not accused. Before 32 predictions no task is judged.

    Args:
        num_classes: for each task, the number of classes.
        window: how many recent predictions of a task are looked at, at least 32.
        threshold: the share of the top class, in (0, 1], above which a task counts as collapsed.
    """

    def __init__(self, num_classes: dict[str, int], window: int = 128, threshold: float = 0.9) -> None:
        self.window = window
        self.threshold = threshold
        self._num_classes = num_classes
        self._recent = {name: deque[int](maxlen=window) for name in num_classes}
        self._steps = {name: deque[int](maxlen=window) for name in num_classes}
        self._first: dict[str, float] = {}
        self.collapsed: dict[str, int] = {}
        """For each collapsed task, the step at which its recent predictions began to be of one class."""

    def update(self, step: int, task: str, predictions: Tensor) -> float:
        """Take in one batch of predictions; warn, once a task, when the task collapses.

        Args:
            step: the adaptation step, from 0.
            task: whose batch it is.
            predictions: the predicted classes, (B,).

        Returns:
            The share of the top class among the recent predictions, in (0, 1].
        """
        recent, steps = self._recent[task], self._steps[task]
        recent.extend(predictions.tolist())
        steps.extend([step] * len(predictions))
        counts = torch.bincount(torch.tensor(list(recent)), minlength=self._num_classes[task])
        share = counts.max().item() / len(recent)
        if len(recent) >= _AT_FIRST:
            self._first.setdefault(task, _top_share(list(recent)[:_AT_FIRST]))
        if len(recent) < _ENOUGH or task in self.collapsed:
            return share
        if share > self.threshold and share > self._first[task] + _MARGIN:
            top = int(counts.argmax())
            self.collapsed[task] = self._beginning(task, top)
            log.warning(
                "task `%s` collapses: since step %d, nearly all of its predictions are class %d "
                "(at step %d, %.0f %% of the last %d; %.0f %% at the start); "
                "its accuracy will suffer: try a smaller `lr`, fewer `max_steps`, or leave the task out of adaptation",
                task,
                self.collapsed[task],
                top,
                step,
                100 * share,
                len(recent),
                100 * self._first[task],
            )
        return share

    def state(self) -> dict[str, Any]:
        """Return what the guard has seen, as plain JSON values."""
        return {
            "recent": {task: list(recent) for task, recent in self._recent.items()},
            "steps": {task: list(steps) for task, steps in self._steps.items()},
            "first": dict(self._first),
            "collapsed": dict(self.collapsed),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a guard over the same tasks had seen.

        Args:
            state: what `state` returned.
        """
        for task in self._recent:
            self._recent[task].extend(state["recent"][task])
            self._steps[task].extend(state["steps"][task])
        self._first |= state["first"]
        self.collapsed |= state["collapsed"]

    def _beginning(self, task: str, top: int) -> int:
        """Return where the run of the top class began: the end of the window with the best balance of gain and loss."""
        cost = self.threshold / (1 - self.threshold) if self.threshold < 1 else float(self.window)
        gains = [1.0 if prediction == top else -cost for prediction in reversed(self._recent[task])]
        balance = list(accumulate(gains))
        return list(reversed(self._steps[task]))[balance.index(max(balance))]


def _top_share(predictions: list[int]) -> float:
    return max(predictions.count(p) for p in set(predictions)) / len(predictions)
