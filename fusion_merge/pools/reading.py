"""Reading data from wherever they come, and choosing one split of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from datasets import (
    DatasetDict,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
)
from hydra.utils import instantiate

from fusion_merge.errors import DataError
from fusion_merge.files import misspelt
from fusion_merge.pools.folders import read_file, read_folder, split_called
from fusion_merge.zoo import SCHEME


class Purpose(StrEnum):
    """What images are for: it decides which split is the default, and whether labels are needed."""

    SCORING = "scoring"
    ADAPTATION = "adaptation"
    FINE_TUNING = "fine-tuning"


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
        raise DataError(f"cannot read the dataset of `{name}` from `{data}`: {error}") from error


def zoo_task(source: str) -> tuple[Any, str]:
    """Return the module of an embedded pool, and the name of its task.

    Args:
        source: `zoo://POOL/TASK`.

    Raises:
        DataError: if there is no such pool.
    """
    pool, _, task = source.removeprefix(SCHEME).partition("/")
    try:
        return importlib.import_module(f"fusion_merge.zoo.{pool}"), task
    except ModuleNotFoundError as error:
        raise DataError(f"`{source}` is not in the zoo: there is no pool `{pool}`; tiny8 is one") from error


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


def _load(data: Any, split: str | None, purpose: Purpose) -> Any:
    if isinstance(data, Mapping) and not isinstance(data, DatasetDict):
        if "_target_" in data:
            return instantiate(dict(data))
        if data.get("path") == "imagefolder" and set(data) == {"path", "data_dir"}:
            return _load_path(str(data["data_dir"]), split, purpose)  # whose names `datasets` takes for splits
        return load_dataset(**data)
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
    return load_dataset(hub_id, revision=revision or None)


def pick_split(name: str, data: Any, split: str | None, purpose: Purpose) -> Any:
    """Return one split of data.

    Args:
        name: what the task is called, for errors.
        data: what `open_data` returned.
        split: the split that was named. By default `train` for fine-tuning, `test` or else `validation` for
            everything else; data whose only split is named otherwise, or without splits, are taken whole.
        purpose: what the images are for.

    Raises:
        DataError: if there is no such split.
    """
    if not isinstance(data, DatasetDict):
        if split is None:
            return data
        raise DataError(f"`split`={split!r} of `{name}`: its data have no splits; leave `split` out")
    found = _default_split(data, purpose) if split is None else _named_split(data, split)
    if found is not None:
        return data[found]
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
