"""What a task pool is, and the one that scores nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, final

from torch import nn

from fusion_merge.models.task_models import TaskModels
from fusion_merge.pools.scoring import model_info

Report = dict[str, Any]


class TaskPool(ABC):
    """What a merged model is scored on."""

    @abstractmethod
    def evaluate(self, model: nn.Module | TaskModels, **options: Any) -> Report:
        """Score a model.

        Args:
            model: what to score.
            **options: what the concrete pool takes.
        """


@final
class DummyTaskPool(TaskPool):
    """Scores nothing: reports the size of the model alone."""

    def evaluate(self, model: nn.Module | TaskModels, **options: Any) -> Report:
        """See `TaskPool.evaluate`."""
        return {} if isinstance(model, TaskModels) else {"model_info": model_info(model)}
