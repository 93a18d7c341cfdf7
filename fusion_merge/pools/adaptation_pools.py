"""Which images a routed model is adapted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusion_merge.errors import ConfigError
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool


def adaptation_pools(
    modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None, names: Sequence[str] | None = None
) -> dict[str, CLIPVisionModelTaskPool]:
    """Return, for each task, the pool whose images are adapted on: the model pool's own datasets come first.

    Args:
        modelpool: the models, perhaps with `test_datasets`.
        taskpool: what is scored, if there is any.
        names: which tasks; by default those whose models are merged.

    Raises:
        ConfigError: if a task has images in neither.
    """
    own = modelpool.test_datasets
    scored = taskpool.specs if taskpool is not None else {}
    pools: dict[str, CLIPVisionModelTaskPool] = {}
    for name in modelpool.model_names if names is None else names:
        if taskpool is not None and name in scored and (name not in own or _same(own[name], scored[name])):
            pools[name] = taskpool  # where both pools have the same images, heads and preprocessing are shared
        elif name in own:
            pools[name] = modelpool.task_pool()
        else:
            raise ConfigError(
                f"adaptation needs images of `{name}`: neither the model pool's `test_datasets` nor the task pool "
                "has that task; add it to one of them, or load adapted routers with `checkpoint`"
            )
    if taskpool is not None:
        modelpool.lend_pretrained(taskpool)
    return pools


def _same(spec: Any, other: Any) -> bool:
    """Tell whether two specs of data are the same; of objects, only the same object is."""
    return spec is other or (isinstance(spec, str | dict) and type(spec) is type(other) and bool(spec == other))
