"""Class names and templates of the published tasks, one YAML file a task: the CLIP and task-vectors prompt sets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from fusion_merge.errors import DataError, nearest

_ENDING = ".yaml"


@dataclass(frozen=True)
class PromptSet:
    """What a task's classes are called, and how that is put into words.

    Attributes:
        classnames: one name a class, in the order of the published labels.
        templates: prompts with a `{}` for the class name.
    """

    classnames: tuple[str, ...]
    templates: tuple[str, ...]


def prompt_names() -> list[str]:
    """Return the tasks that have a prompt set, sorted."""
    found = (entry.name for entry in files(__name__).iterdir())
    return sorted(name.removesuffix(_ENDING) for name in found if name.endswith(_ENDING))


@cache
def prompt_set(name: str) -> PromptSet:
    """Return the prompt set of a published task.

    Args:
        name: one of `prompt_names()`.

    Raises:
        DataError: if there is none of that name.
    """
    known = prompt_names()
    if name not in known:
        raise DataError(f"`prompts`={name!r} is not a prompt set; {nearest(name, known)}")
    text = (files(__name__) / f"{name}{_ENDING}").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    return PromptSet(tuple(data["classnames"]), tuple(data["templates"]))
