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
_SETTLED = 10  # steps after which a task's first score, and the mean over tasks, are known
_SURE = 3.0  # standard deviations on each side of a score
_BETTER = 1e-3  # what the mean of all tasks must rise by to be better
_TEMPERED = 0.25  # what the weight of a task's loss is multiplied by
_AGREEMENT, _ENTROPY = "agreement", "marginal entropy"
_SLOWER = 0.25  # what the learning rate is multiplied by
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
        step: after how many steps it was seen.
        task: which one.
        measure: what fell: `agreement` with its expert, or the `marginal entropy` over its largest possible value.
        score: that, in 0-1, as the running mean then was.
        best: the running mean where that was surely best.
        back_to: after how many steps the parameters were that were put back.
        action: what became of the loss: `expert labels` instead of the objective, `expert labels for all` tasks, or
            `tempered`.
        pace: what the learning rate is multiplied by from then on, in 0-1.
    """

    step: int
    task: str
    measure: str
    score: float
    best: float
    back_to: int
    action: str
    pace: float


@dataclass
class _Score:
    """A running mean of one measure of a task, and the best it surely was.

    Attributes:
        value: the mean, in 0-1.
        noise: the variance of the mean beside that of one image: how much of the noise is left.
        best: the largest lower bound so far.
        at_best: the mean that it was the bound of.
        first: the lower bound when it was first settled.
    """

    value: float = 0.0
    noise: float = 1.0
    best: float = -math.inf
    at_best: float = 0.0
    first: float | None = None

    def bounds(self, images: int) -> tuple[float, float]:
        """Return what the score surely lies between, of so many images a step: Wilson's interval of a share."""
        count = max(1, images) / self.noise  # of images that are as good as the mean
        shrink = _SURE**2 / count
        middle = (self.value + shrink / 2) / (1 + shrink)
        reach = math.sqrt(self.value * (1 - self.value) * shrink + shrink**2 / 4) / (1 + shrink)
        return middle - reach, middle + reach


@dataclass
class _Watched:
    """What is known of one task."""

    seen: int = 0
    mean: list[float] = field(default_factory=list)
    scores: dict[str, _Score] = field(default_factory=dict)
    best_step: int = -1
    weight: float = 1.0
    by_expert: bool = False
    times: int = 0


@final
class RollbackGuard:
    r"""Watches each task's predictions, and puts better parameters back when a task degrades.

    Two measures of a task are followed, as running means over about ten steps: the share of predictions that agree with
    its own expert's, where there is one, and the entropy of its mean prediction,

    .. math:: s = \frac{H(\bar p)}{\log C}, \qquad \bar p \leftarrow 0.9\, \bar p + 0.1\, \tfrac1B \sum_i p_i .

    A task degrades when a measure is surely more than `margin` below the best that it surely was, from the first step
    on, by Wilson's intervals of three standard deviations on both sides; a fall of the entropy does not count while the
    agreement is above where it began. The parameters that were best for the task are put back, the optimiser forgets
    its moments and learns at a quarter of its rate so far, and the task's loss becomes the cross-entropy to its
    expert's labels; the second time that of all tasks does. Without experts its loss counts a quarter of what it did
    beside the others'. Adaptation ends early when a task was taken back three times, or when the mean over tasks has
    not risen for `patience` steps since that; it ends with the parameters that were best on average, those that were
    taken back not among them.

    Args:
        num_classes: for each task, the number of classes, C.
        parameters: what is adapted.
        margin: how far a measure may fall beside its noise, above 0.
        patience: steps without a better mean after which adaptation ends; 0 never ends it.
        may_ask_experts: whether a task's loss can become the cross-entropy to its expert's labels.
    """

    def __init__(
        self,
        num_classes: Mapping[str, int],
        parameters: list[nn.Parameter],
        *,
        margin: float = 0.05,
        patience: int = 0,
        may_ask_experts: bool = False,
    ) -> None:
        self.margin = margin
        self.patience = patience
        self.may_ask_experts = may_ask_experts
        self.interventions: list[Intervention] = []
        self.pace = 1.0
        """What the learning rate is multiplied by: a quarter of it after each time that a task was taken back."""
        self.stopped: str | None = None
        """Why adaptation is to end, once it is."""
        self._classes = dict(num_classes)
        self._parameters = parameters
        self._tasks = {task: _Watched() for task in num_classes}
        self._states: dict[int, list[Tensor]] = {}
        self._best_mean, self._best_mean_step = -math.inf, 0
        self._waited_from = 0  # patience counts from here

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
        images: int,
    ) -> bool:
        """Take in one step's predictions, and act where a task has degraded.

        Args:
            step: the adaptation step, from 0.
            means: each task's mean prediction (C,), over all processes.
            agreement: the share of a task's predictions that are its expert's, in 0-1, where that is known.
            before: the parameters that the predictions were made with.
            optimizer: what trains them.
            images: of each task, in all processes.

        Returns:
            Whether other parameters were put back.
        """
        for task, mean in means.items():
            self._take_in(task, mean, agreement.get(task))
            self._remember(task, step, before, images)
        fallen = [(*found, task) for task in self._tasks if (found := self._fall(task, images)) is not None]
        if fallen:
            _, measure, task = max(fallen)
            self._take_back(task, measure, step)
            optimizer.state.clear()
        elif all(watched.seen >= _SETTLED for watched in self._tasks.values()):
            self._consider_ending(step, before)
        if self.stopped is not None and self._best_mean_step in self._states:
            self._put_back(self._best_mean_step)
        self._forget_unneeded()
        return bool(fallen) or self.stopped is not None

    def _take_in(self, task: str, mean: Tensor, agreement: float | None) -> None:
        """Update a task's running means."""
        watched = self._tasks[task]
        share = max(1 - _DECAY, 1 / (watched.seen + 1))
        new = mean.cpu().double()
        old = torch.tensor(watched.mean, dtype=torch.float64) if watched.mean else new
        watched.mean = ((1 - share) * old + share * new).tolist()
        entropy = -sum(p * math.log(p) for p in watched.mean if p > 0) / math.log(max(2, self._classes[task]))
        scores = watched.scores
        scores.setdefault(_ENTROPY, _Score()).value = min(1.0, entropy)
        if agreement is not None:
            score = scores.setdefault(_AGREEMENT, _Score())
            score.value = (1 - share) * score.value + share * agreement
        for score in scores.values():
            score.noise = (1 - share) ** 2 * score.noise + share**2 if watched.seen else 1.0
        watched.seen += 1

    def _remember(self, task: str, step: int, before: list[Tensor], images: int) -> None:
        watched = self._tasks[task]
        for measure, score in watched.scores.items():
            low, _ = score.bounds(images)
            if watched.seen == _SETTLED and score.first is None:
                score.first = low
            if low <= score.best:
                continue
            score.best, score.at_best = low, score.value
            if measure == (_AGREEMENT if _AGREEMENT in watched.scores else _ENTROPY):
                watched.best_step = step
                self._states[step] = before

    def _fall(self, task: str, images: int) -> tuple[float, str] | None:
        """Return how far a measure of a task surely fell, and which; None if none did too far."""
        scores = self._tasks[task].scores
        falls = {measure: score.best - score.bounds(images)[1] for measure, score in scores.items()}
        known = scores.get(_AGREEMENT)
        if known is not None and known.first is not None and known.bounds(images)[0] > known.first:
            falls.pop(_ENTROPY, None)
        worst = max(((fall, measure) for measure, fall in falls.items()), default=None)
        return worst if worst is not None and worst[0] > self.margin else None

    def _forget_unneeded(self) -> None:
        needed = {watched.best_step for watched in self._tasks.values()} | {self._best_mean_step}
        self._states = {step: state for step, state in self._states.items() if step in needed}

    def _put_back(self, step: int) -> None:
        for parameter, value in zip(self._parameters, self._states[step], strict=True):
            parameter.data.copy_(value)

    def _take_back(self, task: str, measure: str, step: int) -> None:
        watched = self._tasks[task]
        score = watched.scores[measure]
        self._put_back(watched.best_step)
        watched.times += 1
        self.pace *= _SLOWER
        if self.may_ask_experts and not watched.by_expert:
            watched.by_expert, action = True, "expert labels"
        elif self.may_ask_experts and not all(other.by_expert for other in self._tasks.values()):
            action = "expert labels for all"  # by its own labels it would not degrade: the others' losses drive it
            for other in self._tasks.values():
                other.by_expert = True
        else:
            watched.weight, action = watched.weight * _TEMPERED, "tempered"
        done = Intervention(step, task, measure, score.value, score.at_best, watched.best_step, action, self.pace)
        self.interventions.append(done)
        log.warning(
            "task `%s` degrades: its %s fell from %.2f to %.2f within %d steps; "
            "back to the parameters after %d steps, with 1/%d of the learning rate, and %s",
            *(task, measure, done.best, done.score, step, done.back_to, round(1 / self.pace), _ACTIONS[action]),
        )
        self._forget_after(watched.best_step)
        self._waited_from = step
        if watched.times >= _OFTEN:
            self.stopped = f"task `{task}` was taken back {_OFTEN} times"

    def _forget_after(self, kept: int) -> None:
        """Forget what belongs to parameters that are gone: running means, and what was best after a step."""
        for watched in self._tasks.values():
            watched.seen, watched.mean = 0, []
            for score in watched.scores.values():
                score.value, score.noise = 0.0, 1.0
            if watched.best_step > kept:  # else the task would seem to degrade at once, beside what cost another
                watched.best_step = kept
                for score in watched.scores.values():
                    score.best = -math.inf
        if self._best_mean_step > kept:
            self._best_mean, self._best_mean_step = -math.inf, kept

    def _consider_ending(self, step: int, before: list[Tensor]) -> None:
        leading = [w.scores.get(_AGREEMENT, w.scores[_ENTROPY]).value for w in self._tasks.values()]
        mean = sum(leading) / len(leading)
        if mean > self._best_mean + _BETTER:
            self._best_mean, self._best_mean_step = mean, step
            self._waited_from = step
            self._states[step] = before
        elif self.patience and step - self._waited_from >= self.patience:
            self.stopped = f"no better mean score in {self.patience} steps"

    def state(self) -> dict[str, Any]:
        """Return all that the guard knows, but for parameters, as plain JSON values."""
        return {
            "tasks": {task: asdict(watched) for task, watched in self._tasks.items()},
            "best_mean": [self._best_mean, self._best_mean_step],
            "waited_from": self._waited_from,
            "interventions": [asdict(done) for done in self.interventions],
            "pace": self.pace,
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
        for task in self._tasks:
            table = dict(state["tasks"][task])
            scores = {measure: _Score(**score) for measure, score in table.pop("scores").items()}
            self._tasks[task] = _Watched(**table, scores=scores)
        self._best_mean, self._best_mean_step = state["best_mean"]
        self._waited_from = int(state["waited_from"])
        self.interventions[:] = [Intervention(**done) for done in state["interventions"]]
        self.pace = float(state["pace"])
        self.stopped = state["stopped"]
        steps = {int(name.split(".")[1]) for name in tensors if name.startswith("guard.")}
        self._states = {
            step: [tensors[f"guard.{step}.{i}"] for i in range(len(self._parameters))] for step in sorted(steps)
        }
