"""Which class name stands for which label: by name where that is possible, by position elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusion_merge.errors import DataError, nearest


def make_classnames(name: str, given: Any, own: Sequence[str] | None) -> tuple[str, ...]:
    """Return one class name a label, in the order of the labels.

    Args:
        name: what the task is called, for errors.
        given: nothing, for the dataset's own names; a mapping from each of them to a prompt; or a list. A list of the
            dataset's own names is matched by name, whatever its order, capitals and underscores; any other list is
            in the order of the dataset's labels.
        own: the dataset's own label names in the order of its labels, if it has any.

    Raises:
        DataError: if there are no names, or it is not clear which label one stands for.
    """
    if isinstance(given, Mapping) and given:
        return _by_label_name(name, given, own)
    if given and (isinstance(given, str) or not isinstance(given, Sequence)):
        raise DataError(f"`classnames`={given!r} of `{name}` is not a list; write [{given}]")
    texts = tuple(map(str, given or ()))
    if own is None:
        if texts:
            return texts
        raise DataError(f"the dataset of `{name}` does not name its classes; give them with `classnames`")
    return _by_place(name, texts, own) if texts else tuple(own)


def published_classnames(name: str, published: Sequence[str], own: Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names of a published prompt set for labels of one's own, in their order.

    Labels that are all among the names are matched by name. Others take the names in order, if there are as many and
    none of them contradicts.

    Args:
        name: what the task is called, for errors.
        published: the class names of the prompt set.
        own: the dataset's own label names in the order of its labels, if it has any.

    Raises:
        DataError: if it is not clear which label a name stands for.
    """
    if own is None:
        return tuple(published)
    by_name = {_plain(text): text for text in published}
    if all(_plain(label) in by_name for label in own):
        return tuple(by_name[_plain(label)] for label in own)
    return _by_place(name, tuple(published), own)


def in_order(labels: Iterable[str]) -> list[str]:
    """Return labels in words in the order of their classes: that of the alphabet, or of the numbers if all are some.

    Args:
        labels: the labels, each once.
    """
    words = sorted(labels)
    return sorted(words, key=int) if all(word.isascii() and word.isdigit() for word in words) else words


def _by_label_name(name: str, given: Mapping[Any, Any], own: Sequence[str] | None) -> tuple[str, ...]:
    if own is None:
        raise DataError(
            f"`classnames` of `{name}` is a mapping, but its dataset does not name its labels; "
            "give a list in the order of the labels"
        )
    prompts = {str(key): value for key, value in given.items()}
    for key, value in prompts.items():
        if key not in own:
            raise DataError(f"`classnames` of `{name}` has `{key}`, not a label of the dataset; {nearest(key, own)}")
        if not isinstance(value, str | int | float):
            raise DataError(f"`classnames` of `{name}` has {value!r} for `{key}`, not a text")
    missing = [label for label in own if label not in prompts]
    if missing:
        raise DataError(
            f"`classnames` of `{name}` has nothing for the dataset's label `{missing[0]}`; "
            f"add `{missing[0]}: {missing[0]}`"
        )
    return tuple(str(prompts[label]) for label in own)


def _by_place(name: str, texts: tuple[str, ...], own: Sequence[str]) -> tuple[str, ...]:
    labels = {_plain(label): index for index, label in enumerate(own)}
    places = [labels.get(_plain(text)) for text in texts]
    if len(labels) == len(own) == len(texts) and set(places) == set(labels.values()):
        by_label = dict(zip(places, texts, strict=True))
        return tuple(by_label[index] for index in range(len(own)))
    for index, (text, place) in enumerate(zip(texts, places, strict=True)):
        if place is not None and place != index:
            unknown = [t for t, p in zip(texts, places, strict=True) if p is None]
            left = [own[i] for i in range(len(own)) if i not in places]
            hint = f" `{unknown[0]}` is none of them: {nearest(unknown[0], left)}" if unknown and left else ""
            raise DataError(
                f"`classnames` of `{name}` has {len(texts)} names, of which {text!r} is one of the {len(own)} that the "
                f"dataset has, but not at its place.{hint} Give all of {', '.join(own)} in any order, names of your "
                f"own in that order, or a mapping {{{own[0]}: NAME, …}}"
            )
    if len(texts) != len(own):
        raise DataError(
            f"there are {len(texts)} class names for `{name}`, but its dataset has {len(own)} classes "
            f"({', '.join(own)}); give one for each in `classnames`, best as a mapping {{{own[0]}: NAME, …}}"
        )
    return texts


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", text).strip().casefold()
