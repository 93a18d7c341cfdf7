"""`tta_split`: adaptation on other images than those that are scored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from helpers import TASKS
from runs import assert_same_bits, module_pool, own_pool, run_cli, tensors_of

from fusion_merge import CLIPVisionModelPool, CLIPVisionModelTaskPool, WEMoEAlgorithm
from fusion_merge.errors import ConfigError, DataError
from fusion_merge.pools.adaptation_pools import adaptation_pools
from fusion_merge.pools.reading import Purpose
from fusion_merge.pools.specs import data_of, same_data, with_corruption, with_split


@pytest.fixture(scope="module")
def splits(pool_dir, tmp_path_factory) -> Path:
    """The images of `pool_dir`, four of each class to train on and two to test on."""
    root = tmp_path_factory.mktemp("splits")
    for picture in (pool_dir / "images").rglob("*.png"):
        task, label = picture.parent.parent.name, picture.parent.name
        folder = root / task / ("test" if picture.stem in ("4", "5") else "train") / label
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, folder)
    return root


def pools(
    pool_dir: Path, specs: dict[str, Any], own: Any = None
) -> tuple[CLIPVisionModelPool, CLIPVisionModelTaskPool]:
    models = {"_pretrained_": str(pool_dir / "pretrained")} | {t: str(pool_dir / t) for t in TASKS}
    modelpool = CLIPVisionModelPool(models, test_datasets=own)
    taskpool = CLIPVisionModelTaskPool(specs)
    modelpool.lend_pretrained(taskpool)
    return modelpool, taskpool


def folders(splits: Path, **options: Any) -> dict[str, Any]:
    return {task: {"data": str(splits / task), **options} for task in TASKS}


@pytest.mark.parametrize("own", [False, True])
def test_train_split_is_adapted_on_and_not_what_is_scored(pool_dir, splits, own):
    specs = folders(splits)
    modelpool, taskpool = pools(pool_dir, specs, folders(splits, split="test") if own else None)
    found = adaptation_pools(modelpool, taskpool, "train")
    assert found.keys() == TASKS.keys()
    for name, pool in found.items():
        assert pool.task(name).split == "train"
        assert pool.purpose == Purpose.ADAPTATION
        assert (len(pool.task(name)), len(taskpool.task(name))) == (4 * len(TASKS[name]), 2 * len(TASKS[name]))
    assert adaptation_pools(modelpool, taskpool, "train") == found  # opened once


def test_heads_are_shared_with_the_usual_split(pool_dir, splits):
    modelpool, taskpool = pools(pool_dir, folders(splits))
    other = adaptation_pools(modelpool, taskpool, "train")["cats"]
    assert other.head("cats") is taskpool.head("cats")
    assert other.clip_model is taskpool.clip_model
    assert other.processor is taskpool.processor


def test_test_split_is_as_ever(pool_dir, splits):
    modelpool, taskpool = pools(pool_dir, folders(splits))
    assert set(adaptation_pools(modelpool, taskpool).values()) == {taskpool}


def test_adaptation_on_the_train_split_gives_what_those_images_give(pool_dir, splits):
    options: dict[str, Any] = {"max_steps": 2, "batch_size": 4, "lr": 0.1}
    modelpool, taskpool = pools(pool_dir, folders(splits))
    model = WEMoEAlgorithm(tta_split="train", **options).run(modelpool, taskpool)
    expected = module_pool(pool_dir, test_datasets=folders(splits, split="train"))
    assert_same_bits(tensors_of(model), tensors_of(WEMoEAlgorithm(**options).run(expected)))
    usual = WEMoEAlgorithm(**options).run(modelpool, taskpool)
    assert any((a != b).any() for a, b in zip(tensors_of(usual).values(), tensors_of(model).values(), strict=True))


@pytest.mark.parametrize(
    ("options", "split", "kind", "texts"),
    [
        ({}, "validation", DataError, ["`tta_split`=validation", "has the splits test, train", "not one of them"]),
        ({"split": "train"}, "train", ConfigError, ["is the very split `train` that `cats` is scored on"]),
    ],
)
def test_split_that_is_not_there_or_scored_is_refused(pool_dir, splits, options, split, kind, texts):
    modelpool, taskpool = pools(pool_dir, folders(splits, **options))
    with pytest.raises(kind) as refused:
        WEMoEAlgorithm(tta_split=split).check(modelpool, taskpool)
    for text in texts:
        assert text in str(refused.value)


def test_default_split_that_is_scored_is_not_adapted_on_under_another_name(pool_dir, splits, tmp_path):
    for task in TASKS:
        shutil.copytree(splits / task / "test", tmp_path / task / "val")
        shutil.copytree(splits / task / "train", tmp_path / task / "train")
    modelpool, taskpool = pools(pool_dir, folders(tmp_path))
    assert len(taskpool.task("cats")) == 4
    with pytest.raises(ConfigError, match="`tta_split`=validation is the very split"):
        adaptation_pools(modelpool, taskpool, "validation")


@pytest.mark.parametrize("form", ["folder", "object"])
def test_data_without_splits_are_refused(pool_dir, form):
    specs: dict[str, Any] = {task: str(pool_dir / "images" / task) for task in TASKS}
    if form == "object":
        specs = {task: load_dataset("imagefolder", data_dir=path, split="train") for task, path in specs.items()}
    modelpool, taskpool = pools(pool_dir, specs)
    with pytest.raises(DataError, match="`tta_split`=train: the data of `cats` have no splits to take another from"):
        adaptation_pools(modelpool, taskpool, "train")


def test_embedded_data_name_the_splits_there_are(pool_dir):
    specs = {task: {"data": "zoo://tiny8/faces", "classnames": ["face", "background"]} for task in TASKS}
    modelpool, taskpool = pools(pool_dir, specs)
    with pytest.raises(DataError, match=r"`tta_split`=validation.*choose one of: train, test"):
        adaptation_pools(modelpool, taskpool, "validation")


def test_unknown_split_is_refused():
    with pytest.raises(ConfigError, match=r"`tta_split`='tests'.*choose test or validation or train"):
        WEMoEAlgorithm(tta_split="tests")


def test_report_says_what_was_adapted_on(pool_dir, splits, tmp_path):
    tasks = [f"taskpool.tasks.{task}={{data: {splits / task}}}" for task in TASKS]
    options = ["method=wemoe", "method.max_steps=1", "method.tta_split=train", "baselines=[]", "output_dir=out"]
    done = run_cli(*own_pool(pool_dir)[:2], *tasks, *options, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "on the split `train`, which is not what is scored" in (tmp_path / "out" / "report.md").read_text()
    assert '"tta_split": "train"' in (tmp_path / "out" / "report.json").read_text()


# Specs


CALL = {"_target_": "datasets.load_dataset", "path": "owner/data", "split": "test"}


@pytest.mark.parametrize(
    ("spec", "data"),
    [
        ("owner/data", "owner/data"),
        (CALL, {"_target_": "datasets.load_dataset", "path": "owner/data"}),
        ({"data": "owner/data", "split": "test"}, "owner/data"),
        ({"data": CALL, "split": "test"}, {"_target_": "datasets.load_dataset", "path": "owner/data"}),
    ],
)
def test_other_split_of_any_spec(spec, data):
    assert data_of(spec) == data
    found = with_split(spec, "train")
    assert (found["data"], found["split"]) == (data, "train")
    assert same_data(spec, found)


def test_corrupted_spec_keeps_the_rest():
    spec = {"data": "owner/data", "split": "test", "templates": ["{}"]}
    assert with_corruption("cats", spec, corruption="contrast") == {**spec, "corruption": "contrast"}
    assert with_corruption("cats", CALL, corruption="contrast") == {"data": CALL, "corruption": "contrast"}
    with pytest.raises(ConfigError, match="task `cats` has `corruption`='pixelate' of its own"):
        with_corruption("cats", {**spec, "corruption": "pixelate"}, corruption="contrast")
