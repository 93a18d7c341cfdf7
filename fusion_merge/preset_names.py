"""The names of the presets that come with the library, by group."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable

_CONFIG = "fusion_merge.config"


def preset_names() -> dict[str, list[str]]:
    """Return the names of the presets in each group, both in order."""
    return dict(sorted(_below(files(_CONFIG), "").items()))


def method_presets() -> list[str]:
    """Return what may stand after `method=`: short paths and long ones."""
    groups = {group: names for group, names in preset_names().items() if group.split("/")[0] == "method"}
    return [f"{group}/{name}".removeprefix("method/") for group, names in groups.items() for name in names]


def _below(folder: Traversable, group: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name not in ("hydra", "__pycache__"):
            found |= _below(entry, f"{group}/{entry.name}".lstrip("/"))
        elif group and entry.name.endswith(".yaml"):
            found.setdefault(group, []).append(entry.name.removesuffix(".yaml"))
            found[group].sort()
    return found
