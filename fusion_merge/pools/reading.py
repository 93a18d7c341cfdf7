"""Reading data from wherever they come, and choosing one split of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import (
    Dataset,
    DatasetDict,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
)
from hydra.utils import instantiate

from fusion_merge.errors import DataError, nearest
from fusion_merge.files import misspelt
from fusion_merge.models.offline import WAY_OUT, asking_the_hub, is_offline
from fusion_merge.pools.cached_data import check_revision
from fusion_merge.pools.folders import read_file, read_folder, split_called
from fusion_merge.zoo import SCHEME, TASK_POOLS

HELD_OUT = "held_out"
"""The name of the split that `held_out` makes."""


class Purpose(StrEnum):
    """What images are for: it decides which split is the default, and whether labels are needed."""

    SCORING = "scoring"
    ADAPTATION = "adaptation"
    FINE_TUNING = "fine-tuning"


class NoSplits(DataError):
    """A split was named of data that have none."""


def open_data(name: str, data: Any, split: str | None, purpose: Purpose) -> Any:
    """Open the data of a task, with all splits that they have.

    Args:
        name: what the task is called, for errors.
        data: a dataset object, a path, a hub id, `zoo://…`, or a mapping with `_target_` or `path`.
        split: the split that was named, if one was.
        purpose: what the images are for.

    Raises:
        DataError: if the data cannot be read.
    """
    try:
        with _no_bars_without_a_terminal():
            return _load(data, split, purpose)
    except DataError as error:
        raise DataError(f"task `{name}`: {error}") from error
    except Exception as error:  # dataset builders raise errors of every kind
        if "corresponds to no data" in str(error):
            raise DataError(f"the dataset of `{name}` is empty; give one with at least one image") from error
        where = f"cannot read the dataset of `{name}` from `{data}`{_not_beside(data)}"
        if isinstance(error, _NotCached):
            raise DataError(f"{where}: it is not here and not in the cache; {WAY_OUT}") from error
        raise DataError(f"{where}: {error}") from error


def _not_beside(data: Any) -> str:
    """Return in words that what may be a path or a hub id is not in the folder that it would be in, if that is here."""
    try:
        folder = Path(data).parent if isinstance(data, str) and not Path(data).exists() else Path()
        return f", which is not in the folder `{folder}` that is here" if folder.parts and folder.is_dir() else ""
    except (OSError, ValueError):  # what can be no path
        return ""


def same_split(first: str, second: str) -> bool:
    """Tell whether two names mean the same split, as `val` and `validation` do.

    Args:
        first: one name.
        second: the other.
    """
    return first == second or (split_called(first) is not None and split_called(first) == split_called(second))


def held_out(train: Dataset) -> Dataset:
    """Return a random tenth of training images, rounded down: the same one always, and the one that fusion_bench takes.

    It stands in for the validation split that most published datasets lack. Whoever fine-tuned on all of `train` has
    seen these images.

    Args:
        train: at least ten images.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return train.select(order[len(train) - int(len(train) * 0.1) :].tolist())


def zoo_task(source: str) -> tuple[Any, str]:
    """Return the module of an embedded pool, and the name of its task.

    Args:
        source: `zoo://POOL/TASK`.

    Raises:
        DataError: if there is no such pool.
    """
    pool, _, task = source.removeprefix(SCHEME).partition("/")
    if pool not in TASK_POOLS:
        raise DataError(
            f"`{source}` is not in the zoo: there is no pool `{pool}` of tasks; {nearest(pool, TASK_POOLS)}"
        )
    return importlib.import_module(f"fusion_merge.zoo.{pool}"), task


@contextmanager
def _no_bars_without_a_terminal() -> Iterator[None]:
    """Keep `datasets` from drawing progress bars into files and pipes."""
    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            enable_progress_bars()


def folder_of(data: Any) -> Path | None:
    """Return what paths in a table of images are relative to: its folder, or None for what is no table in a file.

    Args:
        data: as `open_data` takes it.
    """
    if not isinstance(data, str | Path) or str(data).startswith(SCHEME):
        return None
    local = Path(data).expanduser()
    return local.parent.absolute() if local.is_file() else local.absolute() if local.is_dir() else None


class _NotCached(ConnectionError):
    """The hub is not to be asked, or cannot be, and the caches do not have what is wanted."""


def _load(data: Any, split: str | None, purpose: Purpose) -> Any:
    if isinstance(data, Mapping) and not isinstance(data, DatasetDict):
        if "_target_" in data:
            return _of_that_revision(_had(partial(instantiate, dict(data))), data)
        if data.get("path") == "imagefolder" and set(data) == {"path", "data_dir"}:
            return _load_path(str(data["data_dir"]), split, purpose)  # whose names `datasets` takes for splits
        return _of_that_revision(_had(partial(load_dataset, **data)), data)
    return _load_path(str(data), split, purpose) if isinstance(data, str | Path) else data


def _load_path(source: str, split: str | None, purpose: Purpose) -> Any:
    if source.startswith(SCHEME):
        pool, task = zoo_task(source)
        wanted = split or ("train" if purpose is Purpose.FINE_TUNING else "test")
        return DatasetDict({wanted: pool.load_task(task, wanted)})
    local = Path(source).expanduser()
    if local.is_file():
        return read_file(local)
    if local.is_dir():
        return read_folder(local)
    if meant := misspelt(source):
        raise DataError(meant)
    if source.startswith((".", "/", "~")):
        raise DataError(
            f"`{source}` does not exist; give images, parquet, a table of paths, a saved dataset or a hub id"
        )
    hub_id, _, revision = source.partition("@")
    loaded = _had(partial(load_dataset, hub_id, revision=revision or None))
    return _of_that_revision(loaded, {"path": hub_id, "revision": revision})


def _had(load: Callable[[], Any]) -> Any:
    """Return what is loaded from the hub, or from its cache."""
    with asking_the_hub():
        try:
            return load()
        except ConnectionError as error:
            raise _NotCached if is_offline() else error from None


def _of_that_revision(loaded: Any, options: Mapping[str, Any]) -> Any:
    """Return what was loaded, if it is of the revision that the options name."""
    hub_id = options.get("path")
    if isinstance(hub_id, str) and hub_id.count("/") <= 1:
        check_revision(loaded, hub_id, options.get("revision") or None)
    return loaded


def pick_split(name: str, data: Any, split: str | None, purpose: Purpose) -> tuple[Any, str | None]:
    """Return one split of data, and its name, where it has one.

    Args:
        name: what the task is called, for errors.
        data: what `open_data` returned.
        split: the split that was named. By default `train` for fine-tuning, `test` or else `validation` for
            everything else; data whose only split is named otherwise, or without splits, are taken whole. `held_out`,
            where the data have no split of that name, is a random tenth of `train`: see `held_out`.
        purpose: what the images are for.

    Raises:
        DataError: if there is no such split.
    """
    if not isinstance(data, DatasetDict):
        if split is None:
            own = getattr(data, "split", None)  # what `load_dataset(…, split=…)` was told
            return data, None if own is None else str(own)
        raise NoSplits(f"`split`={split!r} of `{name}`: its data have no splits; leave `split` out")
    found = _default_split(data, purpose) if split is None else _named_split(data, split)
    if found is not None:
        return data[found], found
    if split == HELD_OUT and (train := _named_split(data, "train")):
        return held_out(data[train]), HELD_OUT
    there = f"the dataset of `{name}` has the splits {', '.join(data)}"
    if split is not None:
        raise DataError(f"{there}, but `split`={split!r} is not one of them")
    wanted = "no `train` among them to fine-tune on" if purpose is Purpose.FINE_TUNING else "no `test` or `validation`"
    raise DataError(f"{there}, and {wanted}; name one with `split`")


def _named_split(data: DatasetDict, split: str) -> str | None:
    """Return the split of that name, or the only one whose name means the same, as `val` and `validation` do."""
    if split in data:
        return split
    called = split_called(split)
    found = [key for key in data if called is not None and split_called(key) == called]
    return found[0] if len(found) == 1 else None


def _default_split(data: DatasetDict, purpose: Purpose) -> str | None:
    tuning = purpose is Purpose.FINE_TUNING
    for split in ("train",) if tuning else ("test", "validation"):
        if found := _named_split(data, split):
            return found
    only = next(iter(data)) if len(data) == 1 else None
    return None if only is None or (tuning and split_called(only)) else only
