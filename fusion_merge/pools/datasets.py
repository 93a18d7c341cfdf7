"""Datasets of labelled images, from wherever they come, as classification tasks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
    load_from_disk,
)
from hydra.utils import instantiate

from fusion_merge.errors import DataError, nearest
from fusion_merge.zoo import SCHEME

DEFAULT_TEMPLATE = "a photo of a {}."
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "jpeg", "webp")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
_DISK_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class ImageTask:
    """One classification task.

    Attributes:
        name: what the task is called.
        data: the images and labels: items are mappings, or (image, label) pairs.
        image_column: where an item's image is.
        label_column: where an item's label is: an integer from 0 to the number of classes less one.
        classnames: one name a class.
        templates: prompts with a `{}` for the class name.
    """

    name: str
    data: Any
    image_column: str | int
    label_column: str | int
    classnames: tuple[str, ...]
    templates: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.data)

    def item(self, index: int) -> tuple[Any, int]:
        """Return one image and its label.

        Args:
            index: from 0 to the number of images less one.

        Raises:
            DataError: if the label is not one of the classes.
        """
        row = self.data[index]
        label = int(row[self.label_column])
        if not 0 <= label < len(self.classnames):
            raise DataError(
                f"`{self.name}`: image {index} has label {label}, but there are {len(self.classnames)} classes"
            )
        return row[self.image_column], label


def make_task(name: str, spec: Any, *, split: str | None = None) -> ImageTask:
    """Make a task from what a user wrote about it.

    Args:
        name: what the task is called.
        spec: a dataset object, a path, a hub id, or a mapping with `data` and optionally `split`, `classnames`,
            `templates`, `image_column`, `label_column`. A mapping with `_target_` is called; any other mapping with
            `path` goes to `datasets.load_dataset`.
        split: the split to take where the spec names none.

    Raises:
        DataError: if the data cannot be read, is empty, has no labels, or more labels than class names.
    """
    options = _options(name, spec)
    data = _load(name, options["data"], options.get("split"), split)
    try:
        empty = len(data) == 0
        columns = [] if empty else _columns(data)
    except (TypeError, KeyError, IndexError) as error:
        raise DataError(
            f"the data of `{name}` are a {type(data).__name__}, not a dataset of images and labels"
        ) from error
    if empty:
        raise DataError(f"the dataset of `{name}` is empty; give one with at least one image")
    image = options.get("image_column") or _find_column(name, "image", columns, _IMAGE_COLUMNS, Image, data)
    label = options.get("label_column") or _find_column(name, "label", columns, _LABEL_COLUMNS, ClassLabel, data)
    for kind, column in (("image_column", image), ("label_column", label)):
        if column not in columns:
            raise DataError(
                f"`{kind}`={column!r} is not in the dataset of `{name}`; {nearest(str(column), map(str, columns))}"
            )
    classnames = _texts(name, options, "classnames") or tuple(_own_classnames(name, data, label))
    templates = _texts(name, options, "templates") or _own_templates(options["data"]) or (DEFAULT_TEMPLATE,)
    for template in templates:
        if "{}" not in template:
            raise DataError(f"template {template!r} of `{name}` has no `{{}}` for the class name")
    _check_labels(name, data, label, len(classnames))
    return ImageTask(name, data, image, label, classnames, templates)


def _options(name: str, spec: Any) -> dict[str, Any]:
    """Return the parts of a spec; what is not a table of known keys is the data themselves."""
    if spec is None:
        raise DataError(f"task `{name}` has no data; give a path, a hub id or a dataset")
    if not isinstance(spec, Mapping) or isinstance(spec, DatasetDict):
        return {"data": spec}
    if "data" not in spec and ("_target_" in spec or "path" in spec):
        return {"data": spec}
    known = ("data", "split", "classnames", "templates", "image_column", "label_column")
    for key in spec:
        if key not in known:
            raise DataError(f"`{key}` is not an option of task `{name}`; {nearest(str(key), known)}")
    if "data" not in spec:
        raise DataError(f"task `{name}` has no `data`; give a path, a hub id or a dataset")
    return dict(spec)


def _texts(name: str, options: Mapping[str, Any], key: str) -> tuple[str, ...]:
    given = options.get(key) or ()
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise DataError(f"`{key}`={given!r} of `{name}` is not a list; write [{given}]")
    return tuple(map(str, given))


def _load(name: str, data: Any, split: str | None, default_split: str | None) -> Any:
    try:
        with _no_bars_without_a_terminal():
            if isinstance(data, Mapping) and not isinstance(data, DatasetDict):
                loaded = instantiate(dict(data)) if "_target_" in data else load_dataset(**data)
            elif isinstance(data, str | Path):
                loaded = _load_path(str(data), split or default_split)
            else:
                loaded = data
    except DataError as error:
        raise DataError(f"task `{name}`: {error}") from error
    except Exception as error:  # dataset builders raise errors of every kind
        if "corresponds to no data" in str(error):
            raise DataError(f"the dataset of `{name}` is empty; give one with at least one image") from error
        raise DataError(f"cannot read the dataset of `{name}` from `{data}`: {error}") from error
    return _pick_split(name, loaded, split, default_split)


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


def _load_path(source: str, split: str | None) -> Any:
    if source.startswith(SCHEME):
        pool, task = _zoo_task(source)
        return pool.load_task(task, split or "test")
    local = Path(source).expanduser()
    if local.is_file():
        return load_dataset(_builder(local), data_files=str(local))
    if local.is_dir():
        if any((local / mark).is_file() for mark in _DISK_MARKS):
            return _from_disk(local)
        if parquet := sorted(map(str, local.rglob("*.parquet"))):
            return load_dataset("parquet", data_files=_by_split(parquet))
        return load_dataset("imagefolder", data_dir=str(local))
    if source.startswith((".", "/", "~")):
        raise DataError(f"`{source}` does not exist; give a folder of images, parquet, a saved dataset or a hub id")
    hub_id, _, revision = source.partition("@")
    return load_dataset(hub_id, revision=revision or None)


def _from_disk(folder: Path) -> Any:
    try:
        return load_from_disk(str(folder))
    except IndexError:  # what `datasets` makes of a saved dataset without rows
        return Dataset.from_dict({})


def _zoo_task(source: str) -> tuple[Any, str]:
    pool, _, task = source.removeprefix(SCHEME).partition("/")
    try:
        return importlib.import_module(f"fusion_merge.zoo.{pool}"), task
    except ModuleNotFoundError as error:
        raise DataError(f"`{source}` is not in the zoo: there is no pool `{pool}`; tiny8 is one") from error


def _builder(file: Path) -> str:
    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
    if file.suffix not in kinds:
        raise DataError(f"`{file}` is of no known kind; known are {', '.join(kinds)}, or a folder")
    return kinds[file.suffix]


def _by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Sort parquet files by the split that their names begin with, as the hub lays them out."""
    splits: dict[str, list[str]] = {}
    for file in files:
        stem = Path(file).stem.split("-")[0]
        splits.setdefault(stem if stem in {"train", "validation", "test"} else "train", []).append(file)
    return splits


def _pick_split(name: str, data: Any, split: str | None, default_split: str | None) -> Any:
    """Take the split that was named, or the default, or the only one, or `test`."""
    if not isinstance(data, DatasetDict):
        return data
    if split is None:
        only = next(iter(data)) if len(data) == 1 else "test"
        split = default_split if default_split in data else only
    if split in data:
        return data[split]
    raise DataError(f"the dataset of `{name}` has the splits {', '.join(data)}; name one with `split`")


def _columns(data: Any) -> list[str | int]:
    if isinstance(data, Dataset):
        return list(data.column_names)
    first = data[0]
    return list(first) if isinstance(first, Mapping) else list(range(len(first)))


def _find_column(
    name: str, kind: str, columns: Sequence[str | int], usual: Sequence[str], feature: type, data: Any
) -> str | int:
    for column in usual:
        if column in columns:
            return column
    if isinstance(data, Dataset):
        typed = [column for column, f in data.features.items() if isinstance(f, feature)]
        if len(typed) == 1:
            return str(typed[0])
    elif 0 in columns and len(columns) == 2:
        return ("image", "label").index(kind)
    raise DataError(
        f"the dataset of `{name}` has no {kind} column among {', '.join(map(str, columns))}; "
        f"name it with `{kind}_column`"
    )


def _own_classnames(name: str, data: Any, label: str | int) -> Sequence[str]:
    feature = data.features.get(label) if isinstance(data, Dataset) else None
    if isinstance(feature, ClassLabel):
        return [str(n) for n in feature.names]
    raise DataError(f"the dataset of `{name}` does not name its classes; give them with `classnames`")


def _own_templates(source: Any) -> tuple[str, ...]:
    if not (isinstance(source, str) and source.startswith(SCHEME)):
        return ()
    pool, task = _zoo_task(source)
    return tuple(pool.templates(task))


def _check_labels(name: str, data: Any, label: str | int, num_classes: int) -> None:
    if not isinstance(data, Dataset):
        return
    labels = np.asarray(data.select_columns([label])[:][label])
    if labels.dtype.kind not in "iub":
        raise DataError(f"column `{label}` of `{name}` holds {labels.dtype} values, not integer labels")
    if labels.min() < 0:
        raise DataError(
            f"the dataset of `{name}` has images without a label (label {labels.min()}); take a labelled split"
        )
    if labels.max() >= num_classes:
        raise DataError(
            f"the dataset of `{name}` has labels up to {labels.max()}, but there are {num_classes} class names; "
            "give one name for each class with `classnames`"
        )
