"""What tests of the plugin for fusion_bench share: tasks of tiny8 under names that fusion_bench has prompts for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import fusion_merge
from fusion_merge import CLIPVisionModelPool
from fusion_merge.zoo import tiny8

WEIGHTS = Path(fusion_merge.__file__).parent / "zoo" / "weights" / "tiny8"
TASKS = {"mnist": "mnist", "svhn": "digits", "emnist_letters": "letters"}
"""The task of tiny8 that stands in for a task of fusion_bench: its classes are the same, and in the same order."""


def import_plugin() -> Any:
    """Import the adapter; what fusion_bench warns of on import is no business of ours."""
    pytest.importorskip("fusion_bench", reason="fusion-bench is not installed", exc_type=ImportError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fusion_merge.plugins import fusion_bench
    return fusion_bench


def write_images(folder: Path, number: int | None = None) -> Path:
    """Save the first images of each task, or all, as data sets."""
    for name, stand_in in TASKS.items():
        data = tiny8.load_task(stand_in, "test")
        data.select(range(number or len(data))).save_to_disk(folder / name)
    return folder


def sources() -> dict[str, str]:
    """Where the models are."""
    return {"_pretrained_": str(WEIGHTS / "pretrained")} | {name: str(WEIGHTS / task) for name, task in TASKS.items()}


def datasets_config(images: Path) -> dict[str, Any]:
    """The images as fusion_bench's configurations name them."""
    return {n: {"_target_": "datasets.load_from_disk", "dataset_path": str(images / n)} for n in TASKS}


def tasks(images: Path) -> dict[str, Any]:
    """The same images as our pools take them, with the published prompts."""
    return {name: {"data": str(images / name), "prompts": name} for name in TASKS}


def foreign_pool(images: Path, models: Any = None, **options: Any) -> Any:
    """A model pool of fusion_bench."""
    from fusion_bench.modelpool import CLIPVisionModelPool as ForeignModelPool

    if models is None:
        models = OmegaConf.create(sources())
    more = {
        "processor": sources()["_pretrained_"],
        "test_datasets": OmegaConf.create(datasets_config(images)),
    } | options
    return ForeignModelPool(models, **more)


def own_pool(images: Path, **options: Any) -> CLIPVisionModelPool:
    """The same pool as one of ours."""
    return CLIPVisionModelPool(sources(), **({"test_datasets": tasks(images)} | options))
