"""What presets say and compose to, along Hydra's search path. Only inside a running command."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from fusion_merge.errors import ConfigError

_PACKAGE = "pkg://"
_FILE = "file://"


def preset_files(group: str) -> dict[str, dict[str, Any]]:
    """Return what the files of a group say, by the names of the presets, in order; `--config-dir` adds its own.

    Args:
        group: such as `method`; groups below it do not count.
    """
    found: dict[str, dict[str, Any]] = {}
    for place in _places():
        folder = place.joinpath(group)
        for entry in folder.iterdir() if folder.is_dir() else ():
            name, dot, ending = entry.name.rpartition(".")
            if dot and ending == "yaml" and name not in found:
                found[name] = yaml.safe_load(entry.read_text(encoding="utf-8")) or {}
    return dict(sorted(found.items()))


def chosen_preset(group: str) -> str:
    """Return the name of the preset that the running command chose from a group.

    Args:
        group: such as `method`.

    Raises:
        ConfigError: if it chose none.
    """
    choice = HydraConfig.get().runtime.choices.get(group)
    if choice in (None, "null"):
        raise ConfigError(f"no preset of `{group}` is chosen; choose one with `{group}=NAME`")
    return str(choice)


def given_overrides() -> list[str]:
    """Return the overrides of the running command: options and presets, without Hydra's own."""
    return [str(override) for override in HydraConfig.get().overrides.task]


def composed(*overrides: str) -> dict[str, Any]:
    """Return the resolved configuration that a command line of nothing but these overrides would give.

    Args:
        *overrides: such as `method=wemoe`; what has no value yet is `???`.

    Raises:
        HydraException: if they cannot be combined.
    """
    plain = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)
    if not isinstance(plain, dict):
        raise ConfigError("the configuration is not a table of keys")
    return {str(key): value for key, value in plain.items()}


def _places() -> Iterator[Traversable]:
    """Yield the folders that Hydra looks for presets in, the first that has one wins."""
    for element in GlobalHydra.instance().config_loader().get_search_path().get_path():
        if element.path.startswith(_PACKAGE):
            yield files(element.path.removeprefix(_PACKAGE))
        elif "://" not in element.path or element.path.startswith(_FILE):
            yield Path(element.path.removeprefix(_FILE))
