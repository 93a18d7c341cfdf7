"""Which presets there are, those of other packages included, and further names of them.

Further names are fusion_bench's long paths, and the task pool that goes with a model pool. A list of tasks is also one
of models. All are made from the files in `config/` when Hydra is set up, so that they work wherever Hydra looks for a
preset: in sweeps, in defaults lists, in `hydra.compose`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import yaml
from hydra.core.config_store import ConfigStore

from fusion_merge.errors import ConfigError

CONFIG = "fusion_merge.config"
"""The package that holds the presets."""

ENTRY_POINTS = "fusion_merge.configs"
"""The entry points by which other packages say which package of theirs holds presets."""

CHOSEN = ("method", "modelpool", "taskpool", "protocol", "reproduction")
"""The groups that a user chooses from; the others are what presets are made of."""

LONG_PATHS = {"modelpool": "CLIPVisionModelPool", "taskpool": "CLIPVisionModelTaskPool"}
"""The folders that fusion_bench keeps the presets of these groups in."""

NOT_MERGING = ("clip_finetune", "dummy")
"""The presets of methods that merge nothing: one makes the models, the other leaves the pretrained one as it is."""

_ENDING = ".yaml"


@cache
def other_packages() -> tuple[str, ...]:
    """Return the packages of presets that installed packages declare, sorted.

    Raises:
        ConfigError: if one cannot be found.
    """
    declared = {point.value: point.name for point in entry_points(group=ENTRY_POINTS)}
    for package, name in declared.items():
        try:
            files(package)
        except Exception as error:  # a package of somebody else's may fail in any way
            raise ConfigError(
                f"the presets `{name}` of another package ({package}) cannot be found: {error}; "
                "mend or uninstall that package"
            ) from error
    return tuple(sorted(declared))


def preset_names(group: str, folders: Iterable[Path] = ()) -> list[str]:
    """Return the presets of a group, sorted, those of other packages included.

    Args:
        group: such as `modelpool` or `dataset/task`.
        folders: the user's own folders of presets.
    """
    own = [folder / group for folder in folders if (folder / group).is_dir()]
    return sorted({name for folder in (*_folders(group), *own) for name in _names(folder)})


def chosen_presets() -> dict[str, list[str]]:
    """Return the presets of the groups that a user chooses from, both in order; long paths are left out."""
    found = {group: preset_names(group) for group in CHOSEN}
    return found | {"method": method_presets()}


def method_presets() -> list[str]:
    """Return what may stand after `method=`: short paths and long ones."""
    folders = {entry.name for folder in _folders("method") for entry in folder.iterdir() if entry.is_dir()}
    long = [f"{f}/{name}" for f in sorted(folders - {"__pycache__"}) for name in preset_names(f"method/{f}")]
    return [*preset_names("method"), *long]


def register_presets(modelpools: Iterable[str] = ()) -> None:
    """Make the further names known to Hydra.

    Each preset has its long path too. A model pool that has no task pool of its name is scored on its own
    `test_datasets`, which is what the task pool `clip_vision` does where it is given no tasks.

    Args:
        modelpools: model pools that are not among the presets, such as those of a user's own `--config-dir`.
    """
    _register_model_lists()
    _register_tuned_names()
    pools, taskpools = preset_names("modelpool"), preset_names("taskpool")
    for name in pools:
        _alias("modelpool", f"{LONG_PATHS['modelpool']}/{name}", name)
    for name in taskpools:
        _alias("taskpool", f"{LONG_PATHS['taskpool']}/{name}", name)
    long = {f"{LONG_PATHS['modelpool']}/{name}": name for name in pools}
    for name in {*pools, *long, *modelpools} - {*taskpools}:
        short = long.get(name, name)
        _alias("taskpool", name, short if short in taskpools else "clip_vision")


def merging_presets() -> dict[str, str]:
    """Return the presets of the methods that merge, in order, each as the text of its file."""
    return {name: _text("method", name) for name in preset_names("method") if name not in NOT_MERGING}


def _folders(group: str) -> list[Traversable]:
    """Return the folders that hold a group, our own first."""
    places = (files(package).joinpath(*group.split("/")) for package in (CONFIG, *other_packages()))
    return [place for place in places if place.is_dir()]


def _names(folder: Traversable) -> list[str]:
    return sorted(entry.name.removesuffix(_ENDING) for entry in folder.iterdir() if entry.name.endswith(_ENDING))


def _text(group: str, name: str) -> str:
    """Return what the file of a preset says; the first folder that has it wins, as in Hydra."""
    files_of_that_name = (folder.joinpath(f"{name}{_ENDING}") for folder in _folders(group))
    return next(file for file in files_of_that_name if file.is_file()).read_text(encoding="utf-8")


def _register_model_lists() -> None:
    """Let each list of tasks in `dataset` be one of models too: `/model/ARCHITECTURE: TA8`, the base one first."""
    lists = {name: tasks for name in preset_names("dataset") if (tasks := _listed(name))}
    for architecture in {entry.name for folder in _folders("model") for entry in folder.iterdir() if entry.is_dir()}:
        models = preset_names(f"model/{architecture}")
        for name, tasks in lists.items():
            if {"pretrained", *tasks} <= {*models}:
                node = {"defaults": ["pretrained", *tasks]}
                ConfigStore.instance().store(group=f"model/{architecture}", name=name, node=node)


def _register_tuned_names() -> None:
    """Let options that were tuned for a method hold under its other names too."""
    others = {name: target for name in method_presets() if (target := _other_name_of(name)) is not None}
    for pool in {entry.name for folder in _folders("tuned") for entry in folder.iterdir() if entry.is_dir()}:
        tuned = preset_names(f"tuned/{pool}")
        for name, target in others.items():
            if target in tuned and name not in tuned:
                _alias(f"tuned/{pool}", name, target, package="method")


def _other_name_of(name: str) -> str | None:
    """Return which preset of a method a preset is merely another name of, if it is one."""
    text = _text("method", name)
    if "_target_:" in text:
        return None
    defaults = yaml.safe_load(text) or {}
    found = [str(part) for part in defaults.get("defaults", [])]
    alone = len(found) == 1 and defaults.keys() == {"defaults"} and found[0].startswith("/method/")
    return found[0].removeprefix("/method/").removesuffix("@_here_") if alone else None


def _listed(name: str) -> list[str]:
    """Return the tasks of a list in `dataset`, those of the lists that it begins with included."""
    tasks: list[str] = []
    for part in (yaml.safe_load(_text("dataset", name)) or {}).get("defaults", []):
        if part != "_self_":
            tasks += _listed(part) if isinstance(part, str) else part.get("task@_here_", [])
    return tasks


def _alias(group: str, name: str, target: str, package: str | None = None) -> None:
    folder, _, short = f"{group}/{name}".rpartition("/")
    node = {"defaults": [f"/{group}/{target}@_here_"]}
    ConfigStore.instance().store(group=folder, name=short, node=node, package=package)
