"""Several towers that stand beside each other, one a task: no merging, the task is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import final

from torch import nn


@final
class TaskModels(Mapping[str, nn.Module]):
    """One tower a task, loaded when it is asked for and not kept.

    It stands for individually fine-tuned models wherever a single model is evaluated.

    Args:
        loaders: for each task, what loads its tower.
    """

    def __init__(self, loaders: Mapping[str, Callable[[], nn.Module]]) -> None:
        self._loaders = dict(loaders)

    def __getitem__(self, task: str) -> nn.Module:
        return self._loaders[task]()

    def __contains__(self, task: object) -> bool:
        return task in self._loaders  # Mapping's own would load the tower

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)
