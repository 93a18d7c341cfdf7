"""Published rows: how they compare with ours, and what is said to depart from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from helpers import TASKS

from fusion_merge.commands import COMMANDS, overrides_first, spell_out
from fusion_merge.errors import ConfigError
from fusion_merge.report.departures import departures
from fusion_merge.report.published import (
    PublishedRow,
    agrees,
    compare,
    comparison_table,
    plain_figures,
    published_row,
    rows_table,
    verdict,
)

TABLE: dict[str, Any] = {
    "title": "a row",
    "source": "a paper",
    "published": {"cats": 70, "dogs": 80.5, "average": 75.25},
    "tolerance": {"average": 1.0, "task": 2.5},
    "evaluated_with": "batch",
}


def row(**changes: Any) -> PublishedRow:
    return published_row("a_row", TABLE | changes)


def report(**accuracies: float) -> dict[str, Any]:
    return {task: {"accuracy": value / 100, "loss": 1.0} for task, value in accuracies.items()}


# The comparison


def test_figures_have_differences_in_points_and_the_average_last():
    columns = {"batch routing": report(cats=71, dogs=80), "sample routing": report(cats=60, dogs=70)}
    cats, dogs, average = compare(row(), columns, list(TASKS))
    assert (cats.task, dogs.task, average.task) == ("cats", "dogs", "average")
    assert cats.ours == pytest.approx({"batch routing": 71, "sample routing": 60})
    assert average.ours == pytest.approx({"batch routing": 75.5, "sample routing": 65})
    assert [f.difference for f in (cats, dogs, average)] == pytest.approx([1.0, -0.5, 0.25])


@pytest.mark.parametrize(
    ("cats", "dogs", "expected"),
    [
        (72.5, 78.0, {"cats": True, "dogs": True, "average": True}),  # exactly at the tolerance, either way
        (72.51, 78.0, {"cats": False, "dogs": True, "average": True}),
        (67.4, 80.5, {"cats": False, "dogs": True, "average": False}),
        (71.5, 82.0, {"cats": True, "dogs": True, "average": False}),  # each task is near, their mean is not
        (99.0, 99.0, {"cats": False, "dogs": False, "average": False}),  # better is not the same either
    ],
)
def test_tolerances_hold_either_way(cats, dogs, expected):
    figures = compare(row(), {"": report(cats=cats, dogs=dogs)}, list(TASKS))
    assert {f.task: f.within for f in figures} == expected
    assert agrees(figures) is all(expected.values())


def test_first_column_alone_is_compared():
    near, far = report(cats=70, dogs=80), report(cats=10, dogs=10)
    assert agrees(compare(row(), {"batch routing": near, "sample routing": far}, list(TASKS)))
    assert not agrees(compare(row(), {"batch routing": far, "sample routing": near}, list(TASKS)))


def test_row_with_an_average_alone_shows_our_tasks_beside_it():
    figures = compare(row(published={"average": 75}), {"": report(cats=10, dogs=140)}, list(TASKS))
    assert [(f.task, f.published, f.within) for f in figures] == [
        ("cats", None, None),
        ("dogs", None, None),
        ("average", 75.0, True),
    ]


def test_average_is_over_the_published_tasks_and_no_others():
    scores = report(cats=70, dogs=80.5, birds=0)
    assert compare(row(), {"": scores}, list(TASKS))[-1].ours[""] == pytest.approx(75.25)


def test_task_that_was_not_scored_is_no_success():
    figures = compare(row(), {"": report(cats=70)}, list(TASKS))
    assert [(f.task, f.within) for f in figures] == [("cats", True), ("dogs", False), ("average", False)]
    assert not agrees(figures)
    assert verdict(row(), figures).endswith("dogs not scored, average not scored")


def test_verdict_names_what_is_off_and_the_tolerances():
    assert verdict(row(), compare(row(), {"": report(cats=70, dogs=80)}, list(TASKS))) == (
        "within tolerance (±1 points on the average, ±2.5 on a task)"
    )
    off = verdict(row(), compare(row(), {"": report(cats=60, dogs=81)}, list(TASKS)))
    assert off.startswith("NOT within tolerance")
    assert off.endswith(": cats -10.00, average -4.75")


def test_table_has_every_column():
    columns = {"batch routing": report(cats=60, dogs=80), "sample routing": report(cats=61, dogs=79)}
    figures = compare(row(published={"cats": 70}), columns, list(TASKS))
    lines = comparison_table(figures, style="github").splitlines()
    head, cats, dogs = (lines[i].strip("|").split("|") for i in (0, 2, 3))
    assert [cell.strip() for cell in head] == [
        "task",
        "published",
        "ours (batch routing)",
        "ours (sample routing)",
        "difference",
        "within tolerance",
    ]
    assert [cell.strip() for cell in cats] == ["cats", "70.00", "60.00", "61.00", "-10.00", "NO"]
    assert [cell.strip() for cell in dogs] == ["dogs", "", "80.00", "79.00", "", ""]
    assert plain_figures(figures)[0]["difference"] == -10.0


def test_list_of_rows_leaves_blank_what_a_row_does_not_say():
    text = rows_table({"one": {"reproduction": {"title": "One", "published": {"average": 5}}}, "two": {}})
    assert [line.split() for line in text.splitlines()[2:]] == [["one", "One", "5.00"], ["two"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"publised": {}}, r"`reproduction\.publised` is not a key of a published row; did you mean `published`\?"),
        ({"published": {}}, r"`reproduction\.published` is empty"),
        ({"published": None}, r"`reproduction\.published`=None is not a table"),
        ({"published": {"cats": "70 %"}}, r"`reproduction\.published\.cats`='70 %' is not a number of percent"),
        ({"published": {"cats": -1}}, r"in 0-100"),
        ({"tolerance": 1.0}, r"`reproduction\.tolerance`=1\.0 is not a table"),
        ({"tolerance": {"average": 1}}, r"`reproduction\.tolerance\.task`=None is not a number"),
        ({"evaluated_with": "both"}, r"`reproduction\.evaluated_with`='both' is not a routing; choose batch, sample"),
    ],
)
def test_row_that_says_something_impossible_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        row(**changes)


# Departures


RECIPE: dict[str, Any] = {
    "method": {"_target_": "a.WEMoEAlgorithm", "max_steps": 1000, "lr": 1e-4, "seed": 0, "fast_dev_run": False},
    "modelpool": {
        "models": {"_pretrained_": "openai/clip", "cats": "owner/cats"},
        "test_datasets": {"cats": {"data": "owner/cat-images", "split": "test"}},
        "fast_dev_run": False,
    },
    "taskpool": {
        "tasks": {"cats": {"data": "owner/cat-images", "classnames": ["tabby", "siamese"]}},
        "clip_model": None,
        "batch_size": 128,
        "num_workers": 8,
        "fast_dev_run": False,
    },
    "fabric": {"devices": 1, "accelerator": "auto"},
    "reproduction": {"tolerance": {"average": 1.0}},
    "seed": 0,
    "fast_dev_run": False,
    "output_dir": None,
}


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(RECIPE)
    for path, value in changes:
        *groups, key = path.split(".")
        table = config
        for group in groups:
            table = table[group]
        table[key] = value
    return config


def test_recipe_itself_has_no_departures():
    found = departures(RECIPE, changed())
    assert (found.changes, found.copies) == ([], [])


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("method.max_steps", 20, "max_steps=20 instead of 1000"),
        ("method.fast_dev_run", True, "fast_dev_run=true instead of false"),
        ("method.new", 1, "new=1 instead of nothing"),
        ("taskpool.batch_size", 8, "taskpool.batch_size=8 instead of 128"),
        ("taskpool.tasks.cats.classnames", ["a", "b"], "taskpool.tasks.cats.classnames=['a', 'b'] instead of"),
        ("modelpool.test_datasets.cats.split", "train", "modelpool.test_datasets.cats.split=train instead of test"),
        ("modelpool.models.cats", "other/cats", "modelpool.models.cats=other/cats instead of owner/cats"),
        (
            "modelpool.models",
            {"_pretrained_": "openai/clip", "dogs": "x"},
            "modelpool.models without cats and with dogs",
        ),
        ("fabric.devices", 2, "fabric.devices=2 instead of 1"),
        ("reproduction.tolerance.average", 50, "reproduction.tolerance.average=50 instead of 1.0"),
        ("tta_split", "train", "tta_split=train instead of nothing"),
    ],
)
def test_what_changes_the_recipe_is_named(path, value, expected):
    found = departures(RECIPE, changed((path, value)))
    assert len(found.changes) == 1
    assert found.changes[0].startswith(expected)
    assert found.copies == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 3),
        ("method.seed", 3),
        ("method.save_checkpoint", "routers.ckpt"),
        ("taskpool.num_workers", 0),
        ("fabric.accelerator", "cpu"),
        ("output_dir", "out"),
        ("modelpool.train_datasets", {"cats": "x"}),
    ],
)
def test_what_does_not_matter_is_not_named(path, value):
    found = departures(RECIPE, changed((path, value)))
    assert (found.changes, found.copies) == ([], [])


def test_trial_run_is_one_departure_not_four():
    places = ("fast_dev_run", "method.fast_dev_run", "modelpool.fast_dev_run", "taskpool.fast_dev_run")
    found = departures(RECIPE, changed(*((place, True) for place in places)))
    assert found.changes == ["fast_dev_run=true instead of false"]


def test_other_method_is_one_departure_whatever_its_options():
    found = departures(RECIPE, changed(("method", {"_target_": "b.DummyAlgorithm", "other": 1})))
    assert found.changes == ["method DummyAlgorithm instead of WEMoEAlgorithm"]


@pytest.mark.parametrize(
    "path",
    ["modelpool.models.cats", "modelpool.test_datasets.cats.data", "taskpool.tasks.cats.data", "taskpool.clip_model"],
)
def test_local_paths_are_taken_for_copies(path, tmp_path):
    found = departures(RECIPE, changed((path, str(tmp_path))))
    assert found.changes == []
    assert len(found.copies) == 1
    assert found.copies[0].startswith(f"{path}={tmp_path}"[:80])


@pytest.mark.parametrize("value", ["owner/cats@abc", {"path": "owner/cats", "revision": "abc"}])
def test_published_model_at_a_revision_is_a_copy(value):
    found = departures(RECIPE, changed(("modelpool.models.cats", value)))
    assert (found.changes, found.copies) == ([], ["modelpool.models.cats=owner/cats@abc instead of owner/cats"])


def test_a_local_path_is_a_copy_of_data_with_a_configuration(tmp_path):
    key = "modelpool.test_datasets.cats.data"
    recipe = changed((key, {"path": "owner/numbers", "name": "cropped"}))
    found = departures(recipe, changed((key, str(tmp_path))))
    assert found.changes == []
    assert found.copies == [f"{key}={tmp_path} instead of owner/numbers, cropped"]
    other = departures(recipe, changed((key, {"path": "owner/numbers", "name": "whole"})))
    assert other.changes == [f"{key}=owner/numbers, whole instead of owner/numbers, cropped"]


# The command line


def test_reproduce_takes_the_name_of_a_row():
    assert "reproduce" in COMMANDS
    assert spell_out(["reproduce", "wemoe_b32", "seed=1"]) == ["command=reproduce", "reproduction=wemoe_b32", "seed=1"]
    assert spell_out(["reproduce"]) == ["command=reproduce"]
    assert spell_out(["reproduce", "seed=1"]) == ["command=reproduce", "seed=1"]
    assert spell_out(["reproduce", "--help"]) == ["command=reproduce", "--help"]
    assert spell_out(["run", "seed=1"]) == ["command=run", "seed=1"]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("command=plan --multirun seed=0,1", "command=plan seed=0,1 --multirun"),
        ("--config-dir a=b seed=1 -m", "seed=1 --config-dir a=b -m"),
        ("seed=1 --cfg job +x=2 ~y", "seed=1 +x=2 ~y --cfg job"),
        ("--config-dir=d seed=1", "seed=1 --config-dir=d"),
    ],
)
def test_flags_may_stand_anywhere(typed, expected):
    assert overrides_first(typed.split()) == expected.split()
