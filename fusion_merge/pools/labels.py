"""Which class a label means: the number of one, a word, or a number of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Value

from fusion_merge.errors import DataError
from fusion_merge.pools.classnames import in_order
from fusion_merge.pools.decoding import holds_texts
from fusion_merge.pools.reading import Purpose


def own_labels(loaded: Any, data: Any, column: str | int | None, given: Any) -> tuple[list[Any] | None, bool]:
    """Return the labels that a dataset tells by itself, and whether the column holds their numbers.

    Args:
        loaded: the dataset with all its splits, so that classes are the same in each of them.
        data: the split that is used.
        column: the column of labels, if there is one.
        given: the user's `classnames`; their keys are labels where the dataset has integers without names.
    """
    feature = data.features.get(column) if isinstance(data, Dataset) else None
    if isinstance(feature, ClassLabel):
        return [str(name) for name in feature.names], True
    if column is not None and holds_texts(data, column):
        splits = [data, *(loaded.values() if isinstance(loaded, DatasetDict) else ())]
        texts = {v for split in splits if holds_texts(split, str(column)) for v in _values(split, column) if v}
        return in_order(texts) or None, False
    integers = isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))
    if integers and isinstance(given, Mapping) and given and all(_is_integer(key) for key in given):
        return sorted(map(int, given)), False
    return None, True


def labels_in_order(own: Sequence[Any], given: Any) -> list[Any]:
    """Return labels in words, or integers of the user's own, in the order of their classes.

    Args:
        own: those that the dataset has.
        given: the user's `classnames`. A mapping, or a list that has all the labels, may have more, as there may be
            classes without an image.
    """
    if isinstance(given, Mapping) and all(isinstance(label, str) for label in own):
        return in_order({*own, *map(str, given)})
    if isinstance(given, Sequence) and not isinstance(given, str):
        names = list(map(str, given))
        if set(own) <= set(names) and len(set(names)) == len(names):
            return names
    return list(own)


def label_number(value: Any, num_classes: int, numbers: Mapping[Any, int] | None) -> int:
    """Return the number of a label's class.

    Args:
        value: the label.
        num_classes: how many classes there are.
        numbers: the classes by label, where labels are not the numbers of classes.

    Raises:
        DataError: if there is no such class; the message says what the label is.
    """
    if numbers is not None:
        key = value if isinstance(value, str) else int(value)
        if key not in numbers:
            raise DataError(f"label {value!r}, which is none of {', '.join(map(str, numbers))}")
        return numbers[key]
    if value is None or isinstance(value, str | bytes):
        raise DataError(f"label {value!r}, not a whole number; texts can be labels in a table or a `datasets.Dataset`")
    label = int(value)
    if label != value:
        raise DataError(f"label {value!r}, not a whole number")
    if not 0 <= label < num_classes:
        raise DataError(f"label {label}, but there are {num_classes} classes")
    return label


def labels_are_missing(
    name: str, data: Any, column: str | int, numbers: Mapping[Any, int] | None, num_classes: int, purpose: Purpose
) -> bool:
    """Return whether images lack labels, where they may; refuse labels that do not fit.

    Args:
        name: what the task is called.
        data: the dataset.
        column: the column of labels.
        numbers: the classes by label, where labels are not the numbers of classes.
        num_classes: how many classes there are.
        purpose: what the images are for.

    Raises:
        DataError: if the column holds no labels, or not as many as there are classes, or labels are missing.
    """
    if not isinstance(data, Dataset):
        return False
    values = _values(data, column)
    if numbers is not None:
        unknown = [value for value in values if value not in numbers and value not in (None, "", -1)]
        if unknown:
            raise DataError(f"the dataset of `{name}` has the label {unknown[0]!r}, which `classnames` does not have")
        values = [numbers.get(value, -1) for value in values]
    try:
        labels = np.asarray([-1 if value is None else value for value in values])
    except ValueError as error:  # lists of different lengths
        raise DataError(f"column `{column}` of `{name}` holds lists, not integer labels") from error
    if labels.dtype.kind not in "iub" or labels.ndim != 1:
        kind = "lists" if labels.ndim != 1 else f"{labels.dtype} values"
        raise DataError(f"column `{column}` of `{name}` holds {kind}, not integer labels or texts")
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


def _values(data: Dataset, column: str | int | None) -> list[Any]:
    values: list[Any] = data.with_format(None).select_columns([column])[:][column]
    return list(values)


def _is_integer(key: Any) -> bool:
    try:
        return int(key) == key or str(int(key)) == key
    except (TypeError, ValueError):
        return False
