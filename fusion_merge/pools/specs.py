"""What a user wrote about a task's images, and the same with another split or a corruption."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import DatasetDict

from fusion_merge.errors import ConfigError
from fusion_merge.pools.corruptions import CORRUPTIONS
from fusion_merge.pools.datasets import CORRUPTION_OPTIONS


def data_of(spec: Any) -> Any:
    """Return the data alone, without a split that a call of `datasets` names.

    Args:
        spec: a task, as `make_task` takes it.
    """
    data = _table(spec)["data"]
    if isinstance(data, Mapping) and not isinstance(data, DatasetDict):
        return {key: value for key, value in data.items() if key != "split"}
    return data


def with_split(spec: Any, split: str) -> dict[str, Any]:
    """Return a task with another split of the same data.

    Args:
        spec: a task, as `make_task` takes it.
        split: the split.
    """
    return {**_table(spec), "data": data_of(spec), "split": split}


def with_corruption(name: str, spec: Any, **options: Any) -> dict[str, Any]:
    """Return a task whose images are corrupted.

    Args:
        name: what the task is called.
        spec: a task, as `make_task` takes it.
        **options: those of `CORRUPTION_OPTIONS`.

    Raises:
        ConfigError: if they are corrupted already.
    """
    table = _table(spec)
    for key in CORRUPTION_OPTIONS:
        if table.get(key) is not None:
            raise ConfigError(
                f"task `{name}` has `{key}`={table[key]!r} of its own; leave it out: the protocol corrupts every task"
            )
    if table.get("split") in CORRUPTIONS:
        raise ConfigError(
            f"task `{name}` takes the split `{table['split']}`, whose images are corrupted already; take clean ones, "
            "such as those of `modelpool=clip-vit-base-patch32_robustness_clean`"
        )
    return {**table, **options}


def same_data(spec: Any, other: Any) -> bool:
    """Tell whether two tasks have the same data, whatever their splits; of objects, only the same object is.

    Args:
        spec: a task, as `make_task` takes it.
        other: another one.
    """
    first, second = data_of(spec), data_of(other)
    return first is second or (isinstance(first, str | dict) and type(first) is type(second) and bool(first == second))


def _table(spec: Any) -> dict[str, Any]:
    """Return a spec in its longest form."""
    if isinstance(spec, Mapping) and not isinstance(spec, DatasetDict) and "data" in spec:
        return dict(spec)
    return {"data": spec}
