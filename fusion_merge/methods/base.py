"""What every method is: options as dataclass fields, and `run`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from transformers import CLIPVisionConfig

from fusion_merge import registry
from fusion_merge.errors import ConfigError, nearest
from fusion_merge.models.task_models import TaskModels
from fusion_merge.options import check_options, option
from fusion_merge.pools.adaptation_pools import adaptation_pools
from fusion_merge.pools.foreign import own_pool
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool

if TYPE_CHECKING:
    from fusion_merge.adaptation.runtime import Fabric


@dataclasses.dataclass(kw_only=True)
class Method(ABC):
    """A way to make one model of a pool.

    Subclasses are dataclasses registered with `register_method`; their fields, declared with `option`, are the
    keywords of the constructor and the keys of the YAML. `check` and `run` take the model pools of other packages too,
    fusion_bench's: a subclass sees pools of ours alone.
    """

    method_name: ClassVar[str]
    min_models: ClassVar[int] = 2
    makes_one_model: ClassVar[bool] = True
    makes_tower: ClassVar[bool] = True
    """Whether that model is one vision tower, which can be saved as such."""
    trains: ClassVar[bool] = False
    routed: ClassVar[bool] = False

    name: str | None = option(None, help="a name of this method; accepted as fusion_bench's configs give one")

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Let what a subclass says itself see model pools of ours alone."""
        super().__init_subclass__(**keywords)
        for name in ("check", "run"):
            if name in vars(cls):
                setattr(cls, name, _on_own_pool(vars(cls)[name]))

    def __post_init__(self) -> None:
        """Check all options.

        Raises:
            ConfigError: if one is of the wrong type or out of range.
        """
        check_options(self)
        names = registry.names_of(type(self))
        if self.name is not None and names and self.name not in names and registry.is_registered(self.name):
            other = registry.get_method(self.name).method_name
            raise ConfigError(
                f"`name`={self.name!r} is a name of `{other}`, not of `{self.method_name}`; choose `method={other}`"
            )
        if self.name is not None and names and self.name not in names:
            raise ConfigError(
                f"`name`={self.name!r} is not a name of `{self.method_name}`; {nearest(self.name, names)}"
            )

    def check(self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None = None) -> None:
        """Refuse what does not fit, before anything is computed or written; `run` does so too.

        Args:
            modelpool: the models.
            taskpool: the tasks.

        Raises:
            FusionMergeError: if the pool does not fit.
        """
        modelpool = own_pool(modelpool)
        modelpool.check(self.min_models)
        if taskpool is not None:
            modelpool.check_heads(taskpool)

    @abstractmethod
    def run(
        self,
        modelpool: CLIPVisionModelPool,
        taskpool: CLIPVisionModelTaskPool | None = None,
        fabric: Fabric | None = None,
    ) -> nn.Module | TaskModels:
        """Make one model of the pool; the pool is not changed.

        Args:
            modelpool: the models.
            taskpool: the tasks, where a method needs images and the model pool has no datasets of its own.
            fabric: where to compute; by default a new one on what the machine has.

        Raises:
            FusionMergeError: if the pool does not fit.
        """

    def adaptation_pools(
        self,
        modelpool: CLIPVisionModelPool,
        taskpool: CLIPVisionModelTaskPool | None = None,
        names: Sequence[str] | None = None,
    ) -> dict[str, CLIPVisionModelTaskPool]:
        """Return, for each task, the pool whose images are adapted on, or looked at.

        Args:
            modelpool: the models.
            taskpool: what is scored, if there is any.
            names: which tasks; by default all.

        Raises:
            FusionMergeError: if a task has no such images.
        """
        return adaptation_pools(modelpool, taskpool, getattr(self, "tta_split", "test"), names)

    def skeleton(self, config: CLIPVisionConfig, num_tasks: int) -> nn.Module | None:
        """Return the model that `run` would give on the meta device, its shapes alone; None for a plain tower.

        Args:
            config: the tower's configuration.
            num_tasks: N, at least 1.

        Raises:
            ConfigError: if the options do not fit that tower or number of tasks.
        """
        return None

    def on_run_end(self) -> None:  # noqa: B027 (most methods keep nothing)
        """Let go of what was kept in case the run would not come to its end; the program calls it when it has."""

    def options(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init and f.name != "name"}


def _on_own_pool(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def on_own_pool(self: Method, modelpool: Any, *args: Any, **keywords: Any) -> Any:
        return function(self, own_pool(modelpool), *args, **keywords)

    return on_own_pool
