"""Further names of presets: fusion_bench's long paths, and the task pool that goes with a model pool.

A list of tasks is also one of models. All are made from the files in `config/` when Hydra is set up, so that they work
wherever Hydra looks for a preset: in sweeps, in defaults lists, in `hydra.compose`.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files

import yaml
from hydra.core.config_store import ConfigStore

CONFIG = "fusion_merge.config"
"""The package that holds the presets."""

CHOSEN = ("method", "modelpool", "taskpool", "protocol", "reproduction")
"""The groups that a user chooses from; the others are what presets are made of."""

LONG_PATHS = {"modelpool": "CLIPVisionModelPool", "taskpool": "CLIPVisionModelTaskPool"}
"""The folders that fusion_bench keeps the presets of these groups in."""

_ENDING = ".yaml"


def preset_names(group: str) -> list[str]:
    """Return the presets of a group, sorted.

    Args:
        group: such as `modelpool` or `dataset/task`.
    """
    folder = files(CONFIG).joinpath(*group.split("/"))
    return sorted(entry.name.removesuffix(_ENDING) for entry in folder.iterdir() if entry.name.endswith(_ENDING))


def chosen_presets() -> dict[str, list[str]]:
    """Return the presets of the groups that a user chooses from, both in order; long paths are left out."""
    found = {group: preset_names(group) for group in CHOSEN}
    return found | {"method": method_presets()}


def method_presets() -> list[str]:
    """Return what may stand after `method=`: short paths and long ones."""
    folders = [entry.name for entry in files(CONFIG).joinpath("method").iterdir() if entry.is_dir()]
    long = [f"{f}/{name}" for f in sorted(folders) if f != "__pycache__" for name in preset_names(f"method/{f}")]
    return [*preset_names("method"), *long]


def register_presets(modelpools: Iterable[str] = ()) -> None:
    """Make the further names known to Hydra.

    Each preset has its long path too. A model pool that has no task pool of its name is scored on its own
    `test_datasets`, which is what the task pool `clip_vision` does where it is given no tasks.

    Args:
        modelpools: model pools that are not among the presets, such as those of a user's own `--config-dir`.
    """
    _register_model_lists()
    pools, taskpools = preset_names("modelpool"), preset_names("taskpool")
    for name in pools:
        _alias("modelpool", f"{LONG_PATHS['modelpool']}/{name}", name)
    for name in taskpools:
        _alias("taskpool", f"{LONG_PATHS['taskpool']}/{name}", name)
    long = {f"{LONG_PATHS['modelpool']}/{name}": name for name in pools}
    for name in {*pools, *long, *modelpools} - {*taskpools}:
        short = long.get(name, name)
        _alias("taskpool", name, short if short in taskpools else "clip_vision")


def _register_model_lists() -> None:
    """Let each list of tasks in `dataset` be one of models too: `/model/ARCHITECTURE: TA8`, the base one first."""
    lists = {name: tasks for name in preset_names("dataset") if (tasks := _listed(name))}
    for folder in files(CONFIG).joinpath("model").iterdir():
        models = preset_names(f"model/{folder.name}") if folder.is_dir() else []
        for name, tasks in lists.items():
            if {"pretrained", *tasks} <= {*models}:
                node = {"defaults": ["pretrained", *tasks]}
                ConfigStore.instance().store(group=f"model/{folder.name}", name=name, node=node)


def _listed(name: str) -> list[str]:
    """Return the tasks of a list in `dataset`, those of the lists that it begins with included."""
    text = files(CONFIG).joinpath("dataset", f"{name}{_ENDING}").read_text(encoding="utf-8")
    tasks: list[str] = []
    for part in (yaml.safe_load(text) or {}).get("defaults", []):
        tasks += _listed(part) if isinstance(part, str) and part != "_self_" else part.get("task@_here_", [])
    return tasks


def _alias(group: str, name: str, target: str) -> None:
    folder, _, short = f"{group}/{name}".rpartition("/")
    ConfigStore.instance().store(group=folder, name=short, node={"defaults": [f"/{group}/{target}@_here_"]})
