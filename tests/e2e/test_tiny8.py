"""The embedded pool: it is there, its tasks are sound, and the routed methods run; its scores are in test_scores.py."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from runs import run_cli

from fusion_merge.pools.datasets import make_task
from fusion_merge.zoo import tiny8

EVERY_TASK = tiny8.TASKS + tiny8.UNSEEN_TASKS


# Tasks


@pytest.mark.parametrize("task", EVERY_TASK)
def test_task_is_the_same_every_time(task):
    first, second = tiny8.load_task(task, "test"), tiny8.load_task(task, "test")
    assert first["label"] == second["label"]
    assert all(np.array_equal(a, b) for a, b in zip(first["image"], second["image"], strict=True))


@pytest.mark.parametrize("task", EVERY_TASK)
def test_task_is_labelled_and_balanced(task):
    data = tiny8.load_task(task, "test")
    assert data.features["label"].names == tiny8.classnames(task)
    counts = Counter(data["label"])
    assert counts.keys() == set(range(len(tiny8.classnames(task))))
    assert max(counts.values()) <= 1.25 * min(counts.values())


@pytest.mark.parametrize("task", EVERY_TASK)
def test_task_has_small_colour_pictures_in_mixed_order(task):
    data = tiny8.load_task(task, "test")
    assert {(image.mode, image.size) for image in data["image"]} == {("RGB", (32, 32))}
    assert data["label"] != sorted(data["label"])


@pytest.mark.parametrize("task", ["letters", "shapes", "dots"])
def test_training_and_test_images_differ(task):
    seen, unseen = ({image.tobytes() for image in tiny8.load_task(task, split)["image"]} for split in ("train", "test"))
    assert not seen & unseen


@pytest.mark.parametrize("task", EVERY_TASK)
def test_task_has_its_own_templates(task):
    templates = make_task(task, f"zoo://tiny8/{task}").templates
    assert templates
    assert all(template.count("{}") == 1 for template in templates)


@pytest.mark.parametrize(("task", "split"), [("digit", "test"), ("digits", "validation")])
def test_unknown_task_or_split_is_refused(task, split):
    with pytest.raises(ValueError, match=task if split == "test" else split):
        tiny8.load_task(task, split)


# Runs


@pytest.mark.parametrize("method", ["rankone_moe", "wemoe", "e_wemoe"])
def test_routed_methods_run(tmp_path, method):
    done = run_cli(
        f"method={method}", "fast_dev_run=true", "baselines=[]", "output_dir=here", "print_config=false", cwd=tmp_path
    )
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "here" / "report.json").read_text())
    assert [name for name in report if name in tiny8.TASKS] == list(tiny8.TASKS)
    assert report["run"]["adaptation"]["steps"] == 1
    assert report["average"]["accuracy"] > 0.3


def test_unseen_tasks_are_scored(tmp_path):
    done = run_cli("method=dummy", "taskpool=tiny8_unseen", "baselines=[]", "output_dir=here", cwd=tmp_path)
    assert done.code == 0, done.err
    assert set(tiny8.UNSEEN_TASKS) <= json.loads((tmp_path / "here" / "report.json").read_text()).keys()


def test_routed_method_adapts_on_the_eight_and_is_scored_on_the_unseen(tmp_path):
    arguments = ["method=wemoe", "taskpool=tiny8_unseen", "fast_dev_run=true", "baselines=[]", "output_dir=here"]
    done = run_cli(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "here" / "report.json").read_text())
    assert report["run"]["adaptation"]["steps"] == 1
    assert set(tiny8.UNSEEN_TASKS) <= report.keys()
