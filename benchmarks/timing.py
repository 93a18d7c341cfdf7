"""Fair comparison on a machine whose speed drifts: what is compared takes turns, and ratios are formed turn by turn."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch.utils import benchmark

from benchmarks.settings import Settings

Call = Callable[[], object]

_FEW = 3  # rounds of what is slow


@dataclass(frozen=True)
class Comparison:
    """The milliseconds of a call, of each contestant in each round."""

    rounds: Mapping[str, list[float]]

    def __contains__(self, name: str) -> bool:
        return name in self.rounds

    def milliseconds(self, name: str) -> float:
        """Return the median over rounds.

        Args:
            name: a contestant.
        """
        return _median(self.rounds[name])

    def ratio(self, name: str, other: str) -> float:
        """Return the median over rounds of a ratio.

        Args:
            name: a contestant.
            other: what it is divided by.
        """
        return _median([a / b for a, b in zip(self.rounds[name], self.rounds[other], strict=True)])


def compare(calls: Mapping[str, Call], settings: Settings) -> Comparison:
    """Time several calls in turns, forwards and backwards alternately.

    Each call is made once beforehand, to warm up and to learn how long it takes. Where these first calls alone take
    twice the time that a figure is given, they are the first of three rounds.

    Args:
        calls: what is compared, by name.
        settings: how long, and how many rounds.
    """
    timers = {name: timeit.Timer(call, timer=benchmark.timer) for name, call in calls.items()}
    first = {name: timer.timeit(1) for name, timer in timers.items()}
    slow = sum(first.values()) > 2 * settings.seconds and not settings.quick
    rounds = {name: [1e3 * seconds] if slow else [] for name, seconds in first.items()}
    each = settings.seconds / settings.rounds
    for turn in range(_FEW - 1 if slow else settings.rounds):
        for name in list(timers)[:: -1 if turn % 2 else 1]:
            count = max(1, int(each / first[name]))
            rounds[name].append(1e3 * timers[name].timeit(count) / count)
    return Comparison(rounds)


def _median(values: list[float]) -> float:
    measurement = benchmark.Measurement(1, values, benchmark.TaskSpec("", ""))
    return float(measurement.median)
