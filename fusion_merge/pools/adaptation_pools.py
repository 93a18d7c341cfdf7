"""Which images a routed model is adapted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusion_merge.errors import ConfigError, DataError
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.reading import NoSplits, same_split
from fusion_merge.pools.specs import same_data
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool

TTA_SPLITS = ("test", "validation", "train")
"""What may be adapted on: `test` are the images that are scored, or the model pool's own to adapt on."""


def adaptation_pools(
    modelpool: CLIPVisionModelPool,
    taskpool: CLIPVisionModelTaskPool | None,
    tta_split: str = "test",
    names: Sequence[str] | None = None,
) -> dict[str, CLIPVisionModelTaskPool]:
    """Return, for each task, the pool whose images are adapted on: the model pool's own datasets come first.

    Args:
        modelpool: the models, perhaps with `test_datasets`.
        taskpool: what is scored, if there is any.
        tta_split: one of `TTA_SPLITS`: other than `test`, that split of the same data is adapted on instead.
        names: which tasks; by default those whose models are merged.

    Raises:
        ConfigError: if a task has images in neither, or if the split that is adapted on is the one that is scored.
        DataError: if the data of a task have no such split.
    """
    own = modelpool.test_datasets
    scored = taskpool.specs if taskpool is not None else {}
    pools: dict[str, CLIPVisionModelTaskPool] = {}
    alike = taskpool is not None and taskpool.on_bad_image is modelpool.on_bad_image
    for name in modelpool.model_names if names is None else names:
        if taskpool is not None and name in scored and (name not in own or (alike and _same(own[name], scored[name]))):
            pools[name] = taskpool  # where both pools have the same images, heads and preprocessing are shared
        elif name in own:
            pools[name] = modelpool.task_pool()
        else:
            raise ConfigError(
                f"adaptation needs images of `{name}`: neither the model pool's `test_datasets` nor the task pool "
                "has that task; add it to one of them"
            )
    if taskpool is not None:
        modelpool.lend_pretrained(taskpool)
    return pools if tta_split == "test" else _on_split(pools, taskpool, tta_split)


def _on_split(
    pools: dict[str, CLIPVisionModelTaskPool], taskpool: CLIPVisionModelTaskPool | None, split: str
) -> dict[str, CLIPVisionModelTaskPool]:
    """Return pools over another split of the same data; classes, and so heads, are those of the usual one."""
    others: dict[str, CLIPVisionModelTaskPool] = {}
    for name, pool in pools.items():
        others[name] = other = pool.on_split(split, [n for n in pools if pools[n] is pool])
        try:
            adapted = other.task(name)
        except NoSplits as error:
            raise DataError(
                f"`tta_split`={split}: the data of `{name}` have no splits to take another from than what is scored; "
                "give data that have, or images to adapt on as `modelpool.test_datasets` and `tta_split=test`"
            ) from error
        except DataError as error:
            raise DataError(f"`tta_split`={split}: {error}") from error
        _refuse_scored_images(name, other, adapted.split or split, taskpool)
        if adapted.classnames != pools[name].task(name).classnames:
            raise DataError(
                f"`tta_split`={split}: that split of `{name}` has other classes than the one that is usually adapted on"
            )
    return others


def _refuse_scored_images(
    name: str, other: CLIPVisionModelTaskPool, split: str, taskpool: CLIPVisionModelTaskPool | None
) -> None:
    if taskpool is None or name not in taskpool.specs or not same_data(other.specs[name], taskpool.specs[name]):
        return
    scored = taskpool.task(name).split
    if scored is not None and same_split(scored, split):
        raise ConfigError(
            f"`tta_split`={split} is the very split `{scored}` that `{name}` is scored on; choose another split, "
            "or `tta_split=test` to adapt on what is scored"
        )


def _same(spec: Any, other: Any) -> bool:
    """Tell whether two specs of data are the same; of objects, only the same object is."""
    return spec is other or (isinstance(spec, str | dict) and type(spec) is type(other) and bool(spec == other))
