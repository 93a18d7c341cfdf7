"""Takes back what adaptation does to a task that degrades, and ends adaptation when nothing improves any more."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

_DECAY = 0.9  # of running means: about the last ten steps
_WARM = 5  # steps before a running mean is judged
_BETTER = 1e-3  # what a score must rise by to be a better one
_TEMPERED = 0.25  # what the weight of a task's loss is multiplied by
_OFTEN = 3  # times that a task may be taken back
_ACTIONS = {
    "expert labels": "its loss is the cross-entropy to its expert's labels from now on",
    "expert labels for all": "the loss of every task is the cross-entropy to its expert's labels from now on",
    "tempered": "its loss counts a quarter of what it did from now on",
}


@dataclass(frozen=True)
class Intervention:
    """What was done for a task that degraded.

    Attributes:
        step: when it was seen.
        task: which one.
        measure: what fell: `agreement` with its expert, or the `marginal entropy` over its largest possible value.
        score: that, in 0-1, as the running mean then was.
        best: the best it was.
        back_to: the step whose parameters were put back.
        action: what became of the loss: `expert labels` instead of the objective, `expert labels for all` tasks, or
            `tempered`.
    """

    step: int
    task: str
    measure: str
    score: float
    best: float
    back_to: int
    action: str


@dataclass
class _Watched:
    """What is known of one task."""

    seen: int = 0
    mean: list[float] = field(default_factory=list)
    agreement: float | None = None
    best: float = -math.inf
    best_step: int = -1
    weight: float = 1.0
    by_expert: bool = False
    times: int = 0


@final
class RollbackGuard:
    r"""Watches each task's predictions, and puts better parameters back when a task degrades.

    The score of a task is a running mean over steps: of the share of predictions that agree with its own expert's,
    where there is one, or else of the entropy of its mean prediction,

    .. math:: s = \frac{H(\bar p)}{\log C}, \qquad \bar p \leftarrow 0.9\, \bar p + 0.1\, \tfrac1B \sum_i p_i .

    A task whose score falls more than `margin` below its best has the parameters put back that were best for it, the
    optimiser forgets its moments, and the task's loss becomes the cross-entropy to its expert's labels; the second
    time that of every task does. Without experts its loss counts a quarter of what it did. Adaptation ends early when
    a task was taken back three times, or when the mean score has not risen for `patience` steps.

    Args:
        num_classes: for each task, the number of classes, C.
        parameters: what is adapted.
        margin: how far a score may fall, above 0.
        patience: steps without a better mean score after which adaptation ends; 0 never ends it.
        may_ask_experts: whether a task's loss can become the cross-entropy to its expert's labels.
    """

    def __init__(
        self,
        num_classes: Mapping[str, int],
        parameters: list[nn.Parameter],
        *,
        margin: float = 0.15,
        patience: int = 0,
        may_ask_experts: bool = False,
    ) -> None:
        self.margin = margin
        self.patience = patience
        self.may_ask_experts = may_ask_experts
        self.interventions: list[Intervention] = []
        self.stopped: str | None = None
        """Why adaptation is to end, once it is."""
        self._classes = dict(num_classes)
        self._parameters = parameters
        self._tasks = {task: _Watched() for task in num_classes}
        self._states: dict[int, list[Tensor]] = {}
        self._best_mean, self._best_mean_step = -math.inf, 0

    def weight(self, task: str) -> float:
        """Return what a task's loss is multiplied by.

        Args:
            task: which one.
        """
        return self._tasks[task].weight

    def by_expert(self, task: str) -> bool:
        """Tell whether a task's loss is the cross-entropy to its expert's labels now, whatever the objective.

        Args:
            task: which one.
        """
        return self._tasks[task].by_expert

    def update(
        self,
        step: int,
        means: Mapping[str, Tensor],
        agreement: Mapping[str, float],
        before: list[Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Take in one step's predictions, and act where a task has degraded.

        Args:
            step: the adaptation step, from 0.
            means: each task's mean prediction (C,), over all processes.
            agreement: the share of a task's predictions that are its expert's, in 0-1, where that is known.
            before: the parameters that the predictions were made with.
            optimizer: what trains them.
        """
        scores = {}
        for task, mean in means.items():
            score = self._take_in(task, mean, agreement.get(task))
            if score is not None:
                scores[task] = score
                self._remember(task, score, step, before)
        self._forget_unneeded()
        fallen = {task: score for task, score in scores.items() if score < self._tasks[task].best - self.margin}
        if fallen:
            self._take_back(min(fallen, key=lambda task: fallen[task] - self._tasks[task].best), fallen, step)
            optimizer.state.clear()
        elif len(scores) == len(self._tasks):
            self._consider_ending(sum(scores.values()) / len(scores), step)

    def _take_in(self, task: str, mean: Tensor, agreement: float | None) -> float | None:
        """Update a task's running means; return its score, once it can be judged."""
        watched = self._tasks[task]
        share = max(1 - _DECAY, 1 / (watched.seen + 1))
        old = torch.tensor(watched.mean, dtype=torch.float64) if watched.mean else mean.double().cpu()
        watched.mean = ((1 - share) * old + share * mean.double().cpu()).tolist()
        if agreement is not None:
            known = watched.agreement if watched.agreement is not None else agreement
            watched.agreement = (1 - share) * known + share * agreement
        watched.seen += 1
        return self._score(task) if watched.seen >= _WARM else None

    def _score(self, task: str) -> float:
        watched = self._tasks[task]
        if watched.agreement is not None:
            return watched.agreement
        entropy = -sum(p * math.log(p) for p in watched.mean if p > 0)
        return entropy / math.log(max(2, self._classes[task]))

    def _remember(self, task: str, score: float, step: int, before: list[Tensor]) -> None:
        watched = self._tasks[task]
        if score > watched.best + _BETTER:
            watched.best, watched.best_step = score, step
            self._states[step] = before

    def _forget_unneeded(self) -> None:
        needed = {watched.best_step for watched in self._tasks.values()}
        self._states = {step: state for step, state in self._states.items() if step in needed}

    def _take_back(self, task: str, fallen: Mapping[str, float], step: int) -> None:
        watched = self._tasks[task]
        for parameter, value in zip(self._parameters, self._states[watched.best_step], strict=True):
            parameter.data.copy_(value)
        watched.times += 1
        if self.may_ask_experts and not watched.by_expert:
            watched.by_expert, action = True, "expert labels"
        elif self.may_ask_experts and not all(other.by_expert for other in self._tasks.values()):
            action = "expert labels for all"  # by its own labels it would not degrade: the others' losses drive it
            for other in self._tasks.values():
                other.by_expert = True
        else:
            watched.weight, action = watched.weight * _TEMPERED, "tempered"
        measure = "agreement" if watched.agreement is not None else "marginal entropy"
        done = Intervention(step, task, measure, fallen[task], watched.best, watched.best_step, action)
        self.interventions.append(done)
        log.warning(
            "task `%s` degrades: its %s fell from %.2f to %.2f by step %d; back to the parameters of step %d, and %s",
            *(task, measure, done.best, done.score, step, done.back_to, _ACTIONS[action]),
        )
        for other in self._tasks.values():  # what was seen belongs to parameters that are gone
            other.seen, other.mean, other.agreement = 0, [], None
        if watched.times >= _OFTEN:
            self.stopped = f"task `{task}` was taken back {_OFTEN} times"

    def _consider_ending(self, mean: float, step: int) -> None:
        if mean > self._best_mean + _BETTER:
            self._best_mean, self._best_mean_step = mean, step
        elif self.patience and step - self._best_mean_step >= self.patience:
            self.stopped = f"no better mean score in {self.patience} steps"

    def state(self) -> dict[str, Any]:
        """Return all that the guard knows, but for parameters, as plain JSON values."""
        return {
            "tasks": {task: asdict(watched) for task, watched in self._tasks.items()},
            "best_mean": [self._best_mean, self._best_mean_step] if self._best_mean > -math.inf else None,
            "interventions": [asdict(done) for done in self.interventions],
            "stopped": self.stopped,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters that may be put back, by name."""
        return {f"guard.{step}.{i}": t.clone() for step, state in self._states.items() for i, t in enumerate(state)}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what a guard over the same tasks and parameters knew.

        Args:
            state: what `state` returned.
            tensors: what `tensors` returned.

        Raises:
            KeyError: if a state that is needed is not there.
            TypeError: if the state is of another form.
        """
        self._tasks = {task: _Watched(**state["tasks"][task]) for task in self._tasks}
        if state["best_mean"] is not None:
            self._best_mean, self._best_mean_step = state["best_mean"]
        self.interventions[:] = [Intervention(**done) for done in state["interventions"]]
        self.stopped = state["stopped"]
        steps = sorted({watched.best_step for watched in self._tasks.values() if watched.best_step >= 0})
        self._states = {step: [tensors[f"guard.{step}.{i}"] for i in range(len(self._parameters))] for step in steps}
