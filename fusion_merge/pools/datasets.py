"""Datasets of labelled images, from wherever they come, as classification tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image

from fusion_merge.errors import ConfigError, DataError, nearest
from fusion_merge.pools.classnames import make_classnames
from fusion_merge.pools.corruptions import Corruption
from fusion_merge.pools.prompts import PromptSet, prompt_set
from fusion_merge.pools.reading import Purpose, read_data, zoo_task
from fusion_merge.zoo import SCHEME

DEFAULT_TEMPLATE = "a photo of a {}."
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "jpeg", "webp")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
UNLABELLED = -1
"""The label of an image that has none."""

CORRUPTION_OPTIONS = {
    "corruption": "name",
    "severity": "severity",
    "corruption_constants": "constants",
    "corruption_seed": "seed",
}
"""What a task may say about the corruption of its images, and what `Corruption` calls it."""

TASK_OPTIONS = (
    "data",
    "split",
    "prompts",
    "classnames",
    "templates",
    "image_column",
    "label_column",
    *CORRUPTION_OPTIONS,
)
"""The keys of a task's spec."""


@dataclass(frozen=True)
class ImageTask:
    """One classification task.

    Attributes:
        name: what the task is called.
        data: the images and labels: items are mappings, or (image, label) pairs.
        image_column: where an item's image is.
        label_column: where an item's label is: an integer from 0 to the number of classes less one; None if there
            are no labels.
        classnames: one name a class.
        templates: prompts with a `{}` for the class name.
        split: the split that the data are, where it has a name.
        corruption: what is done to each image before it is preprocessed.
    """

    name: str
    data: Any
    image_column: str | int
    label_column: str | int | None
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    split: str | None = None
    corruption: Corruption | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.data)

    def item(self, index: int) -> tuple[Any, int]:
        """Return one image and its label, -1 where there are no labels.

        Args:
            index: from 0 to the number of images less one.

        Raises:
            DataError: if the label is not one of the classes.
        """
        row = self.data[index]
        if self.label_column is None:
            return row[self.image_column], UNLABELLED
        value = row[self.label_column]
        label = int(value)
        if label != value:
            raise DataError(f"`{self.name}`: image {index} has label {value!r}, not a whole number")
        if not 0 <= label < len(self.classnames):
            raise DataError(
                f"`{self.name}`: image {index} has label {label}, but there are {len(self.classnames)} classes"
            )
        return row[self.image_column], label


def make_task(name: str, spec: Any, *, split: str | None = None, purpose: Purpose = Purpose.SCORING) -> ImageTask:
    """Make a task from what a user wrote about it.

    Args:
        name: what the task is called.
        spec: a dataset object, a path, a hub id, or a mapping with `data` and optionally `split`, `prompts`,
            `classnames`, `templates`, `image_column`, `label_column`, and `corruption` with `severity`,
            `corruption_constants` and `corruption_seed`, which are those of `Corruption`. A mapping with `_target_` is
            called; any other mapping with `path` goes to `datasets.load_dataset`. `classnames` is a list or a mapping
            from the dataset's label names to prompts. A list of the dataset's own label names, in whatever order, is
            matched by name; any other list is in the order of the dataset's labels. `prompts` names a published prompt
            set: its class names belong to the labels by position, whatever the dataset calls them; `classnames` and
            `templates` beside it win, each for itself.
        split: the split to take where the spec names none; what is the default without is said at `read_data`.
        purpose: what the images are for; labels may be missing for adaptation alone.

    Raises:
        DataError: if the data cannot be read, are empty, have no labels, or more labels than class names.
    """
    options = _options(name, spec)
    corruption = _corruption(name, options)
    data, chosen = read_data(name, options["data"], options.get("split") or split, purpose)
    columns = _columns(name, data)
    for kind in ("image_column", "label_column"):
        column = options.get(kind)
        if column is not None and column not in columns:
            raise DataError(
                f"`{kind}`={column!r} is not in the dataset of `{name}`; {nearest(str(column), map(str, columns))}"
            )
    image = options.get("image_column")
    if image is None:
        image = _find_column("image", columns, _IMAGE_COLUMNS, Image, data)
    if image is None:
        raise _no_column(name, "image", columns, "name it with `image_column`")
    label = options.get("label_column")
    if label is None:
        label = _find_column("label", columns, _LABEL_COLUMNS, ClassLabel, data)
    prompts = _prompts(name, options)
    given = options.get("classnames")
    if label is None and (purpose is not Purpose.ADAPTATION or not (given or prompts)):
        more = "; images without labels can be adapted on, if `classnames` are given, but not scored"
        raise _no_column(name, "label", columns, f"name it with `label_column`{more}")
    if prompts is not None and not given:
        classnames = prompts.classnames  # never matched by name: published datasets spell their labels otherwise
    else:
        classnames = make_classnames(name, given, _own_classnames(data, label))
    templates = _templates(name, options, prompts)
    if label is not None and _labels_are_missing(name, data, label, len(classnames), purpose):
        label = None
    return ImageTask(name, data, image, label, classnames, templates, chosen, corruption)


def _options(name: str, spec: Any) -> dict[str, Any]:
    """Return the parts of a spec; what is not a table of known keys is the data themselves."""
    if spec is None:
        raise DataError(f"task `{name}` has no data; give a path, a hub id or a dataset")
    if not isinstance(spec, Mapping) or isinstance(spec, DatasetDict):
        return {"data": spec}
    if "data" not in spec and ("_target_" in spec or "path" in spec):
        return {"data": spec}
    for key in spec:
        if key not in TASK_OPTIONS:
            raise DataError(f"`{key}` is not an option of task `{name}`; {nearest(str(key), TASK_OPTIONS)}")
    if "data" not in spec:
        raise DataError(f"task `{name}` has no `data`; give a path, a hub id or a dataset")
    return dict(spec)


def _corruption(name: str, options: Mapping[str, Any]) -> Corruption | None:
    given = {CORRUPTION_OPTIONS[key]: options[key] for key in CORRUPTION_OPTIONS if options.get(key) is not None}
    if not given:
        return None
    if "name" not in given:
        raise DataError(f"task `{name}` has {' and '.join(given)} of a corruption, but no `corruption`; name one")
    try:
        return Corruption(**given)
    except ConfigError as error:
        raise DataError(f"task `{name}`: {error}") from error


def _prompts(name: str, options: Mapping[str, Any]) -> PromptSet | None:
    given = options.get("prompts")
    if given is None:
        return None
    if not isinstance(given, str):
        raise DataError(f"`prompts`={given!r} of `{name}` is not the name of a prompt set, such as cifar10")
    try:
        return prompt_set(given)
    except DataError as error:
        raise DataError(f"task `{name}`: {error}") from error


def _templates(name: str, options: Mapping[str, Any], prompts: PromptSet | None) -> tuple[str, ...]:
    given = options.get("templates") or ()
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise DataError(f"`templates`={given!r} of `{name}` is not a list; write [{given}]")
    published = prompts.templates if prompts is not None else ()
    templates = tuple(map(str, given)) or published or _own_templates(options["data"]) or (DEFAULT_TEMPLATE,)
    for template in templates:
        if "{}" not in template:
            raise DataError(f"template {template!r} of `{name}` has no `{{}}` for the class name")
    return templates


def _columns(name: str, data: Any) -> list[str | int]:
    """Return the columns of data that are not empty."""
    try:
        empty = len(data) == 0
        first = None if empty or isinstance(data, Dataset) else data[0]
        keys = [] if first is None else list(first) if isinstance(first, Mapping) else list(range(len(first)))
    except (TypeError, KeyError, IndexError) as error:
        raise DataError(
            f"the data of `{name}` are a {type(data).__name__}, not a dataset of images and labels"
        ) from error
    if empty:
        raise DataError(f"the dataset of `{name}` is empty; give one with at least one image")
    return list(data.column_names) if isinstance(data, Dataset) else keys


def _find_column(
    kind: str, columns: Sequence[str | int], usual: Sequence[str], feature: type, data: Any
) -> str | int | None:
    for column in usual:
        if column in columns:
            return column
    if isinstance(data, Dataset):
        typed = [column for column, f in data.features.items() if isinstance(f, feature)]
        if len(typed) == 1:
            return str(typed[0])
    elif 0 in columns and len(columns) == 2:
        return ("image", "label").index(kind)
    return None


def _no_column(name: str, kind: str, columns: Sequence[str | int], way_out: str) -> DataError:
    return DataError(f"the dataset of `{name}` has no {kind} column among {', '.join(map(str, columns))}; {way_out}")


def _own_classnames(data: Any, label: str | int | None) -> list[str] | None:
    feature = data.features.get(label) if isinstance(data, Dataset) else None
    return [str(n) for n in feature.names] if isinstance(feature, ClassLabel) else None


def _own_templates(source: Any) -> tuple[str, ...]:
    if not (isinstance(source, str) and source.startswith(SCHEME)):
        return ()
    pool, task = zoo_task(source)
    return tuple(pool.templates(task))


def _labels_are_missing(name: str, data: Any, label: str | int, num_classes: int, purpose: Purpose) -> bool:
    """Return whether images lack labels, where they may; refuse labels that do not fit."""
    if not isinstance(data, Dataset):
        return False
    values = data.select_columns([label])[:][label]
    try:
        labels = np.asarray([-1 if value is None else value for value in values])
    except ValueError as error:  # lists of different lengths
        raise DataError(f"column `{label}` of `{name}` holds lists, not integer labels") from error
    if labels.dtype.kind not in "iub" or labels.ndim != 1:
        kind = "lists" if labels.ndim != 1 else f"{labels.dtype} values"
        raise DataError(f"column `{label}` of `{name}` holds {kind}, not integer labels")
    if labels.max() >= num_classes:
        raise DataError(
            f"the dataset of `{name}` has labels up to {labels.max()}, but there are {num_classes} class names; "
            "give one name for each class with `classnames`"
        )
    missing = bool(labels.min() < 0)
    if missing and purpose is not Purpose.ADAPTATION:
        raise DataError(
            f"the dataset of `{name}` has images without a label (label {labels.min()}); take a labelled split"
        )
    return missing
