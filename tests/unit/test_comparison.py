"""Rows side by side: averages, tables, sizes, costs, and labels that do not cover one another."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from helpers import ToyTower
from matplotlib.text import Text
from PIL import Image
from runs import random_tower
from torch import nn

from fusion_merge.commands import find_command, spell_out
from fusion_merge.errors import ConfigError
from fusion_merge.models.task_models import TaskModels
from fusion_merge.pools.loaders import Placement
from fusion_merge.report import costs
from fusion_merge.report.comparison import (
    Row,
    accuracies_table,
    comparison_csv,
    comparison_notes,
    costs_table,
    plain_rows,
)
from fusion_merge.report.comparison_plot import comparison_picture
from fusion_merge.report.costs import inference_cost, is_tower, sample_images, size_of
from fusion_merge.report.drawing import label_points, new_figure

TASKS = ["a", "b"]


def test_an_average_is_over_all_tasks_or_none():
    assert Row(name="x", accuracies={"a": 0.5, "b": 0.7}).average(TASKS) == pytest.approx(0.6)
    assert Row(name="x", accuracies={"a": 0.5}).average(TASKS) is None
    assert Row(name="x").average([]) is None


def test_tables_leave_blank_what_is_not_known_and_say_who_failed():
    rows = [Row(name="good", accuracies={"a": 0.5, "b": 0.75}, megabytes=1.25), Row(name="bad", error="no\nimages")]
    table = accuracies_table(rows, TASKS)
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["good", "50.0", "75.0", "62.5", "a", "50.0"],
        ["bad", "failed"],
    ]
    assert "bad" not in costs_table(rows, TASKS)
    assert comparison_notes(rows) == ["bad failed: no images"]
    assert comparison_csv(rows, TASKS).splitlines()[2].startswith("bad,static,,,,,,")
    assert plain_rows(rows, TASKS)[1]["worst_task"] is None


def test_sizes_of_towers_add_up_and_files_go_unless_they_are_kept(tmp_path):
    tower = random_tower(0)
    one = size_of(tower, tmp_path / "one", keep=True)
    files = sum(file.stat().st_size for file in (tmp_path / "one").iterdir())
    assert one.megabytes == files / 1e6
    assert one.stored == sum(p.numel() for p in tower.parameters())
    two = size_of(TaskModels({"a": lambda: tower, "b": lambda: tower}), tmp_path / "two", keep=False)
    assert (two.stored, two.megabytes, two.saved) == (2 * one.stored, 2 * one.megabytes, True)
    assert not list((tmp_path / "two").glob("*"))


def test_a_module_that_is_no_tower_is_weighed_by_its_tensors_a_shared_one_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.second = self.first
            self.register_buffer("scale", torch.ones(2, dtype=torch.float16))

    size = size_of(Twice(), tmp_path / "x", keep=True)
    assert (size.stored, size.trainable, size.saved) == (16, 16, False)
    assert size.megabytes == (16 * 4 + 2 * 2) / 1e6
    assert not (tmp_path / "x").exists()
    assert not is_tower(Twice())
    assert is_tower(random_tower(0))


class Taking(nn.Module):
    """A tower that takes so many seconds of a clock that only such towers move; the first pass takes more."""

    now = 0.0

    def __init__(self, *seconds: float) -> None:
        super().__init__()
        self.seconds = itertools.chain([100.0], itertools.cycle(seconds))

    def forward(self, pixels: torch.Tensor) -> tuple[None, torch.Tensor]:
        Taking.now += next(self.seconds)
        return None, pixels.mean(dim=(2, 3))


def test_cost_is_the_median_ratio_of_times_without_the_first_pass(monkeypatch):
    monkeypatch.setattr(costs.time, "perf_counter", lambda: Taking.now)
    pixels = torch.randn(2, 3, 4, 4)
    assert inference_cost(Taking(3.0), Taking(2.0), pixels, Placement()) == pytest.approx(1.5)
    busy = Taking(3.0, 3.0, 90.0, 3.0, 3.0)  # once, something else was going on
    assert inference_cost(busy, Taking(2.0), pixels, Placement()) == pytest.approx(1.5)
    several = TaskModels({"a": lambda: Taking(1.0), "b": lambda: Taking(9.0)})
    assert inference_cost(several, Taking(1.0), pixels, Placement()) == pytest.approx(1.0)


@pytest.mark.parametrize(("quick", "passes"), [(True, 1 + 5), (False, 1 + 101)])
def test_a_quick_look_takes_the_fewest_turns(monkeypatch, quick, passes):
    tower = Taking(0.0)  # of no time at all, so that only the number of turns ends it
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    tower.register_forward_hook(counted)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: (Taking.now, setattr(Taking, "now", Taking.now + 1e-9))[0])
    inference_cost(tower, Taking(1e-9), torch.randn(2, 3, 4, 4), Placement(), quick=quick)
    assert count == passes


def test_what_computes_more_costs_more(monkeypatch):
    monkeypatch.setattr(costs.time, "perf_counter", lambda: Taking.now)

    class Deep(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.tower, self.times = ToyTower(width=64, hidden=256, depth=4), times

        def forward(self, pixels: torch.Tensor) -> tuple[None, torch.Tensor]:
            outputs = [self.tower(pixels) for _ in range(self.times)]
            Taking.now += self.times  # each tower takes a second of this clock
            return None, outputs[0]

    assert inference_cost(Deep(8), Deep(1), torch.randn(16, 32, 64), Placement()) == pytest.approx(8)


def test_timed_images_are_of_all_tasks(taskpool):
    pixels = sample_images(taskpool, 6)
    assert pixels.shape == (6, 3, 16, 16)
    for index, name in enumerate(taskpool.task_names):
        own = [taskpool.images(name)[i][0] for i in range(3)]
        assert torch.equal(pixels[3 * index : 3 * index + 3], torch.stack(own))


@pytest.mark.parametrize("seed", range(4))
def test_labels_cover_neither_one_another_nor_points(seed):
    generator = random.Random(seed)
    figure, (axis,) = new_figure((7.0, 4.6))
    axis.set_xscale("log")
    axis.set(xlim=(1, 60), ylim=(40, 95))
    points = [(2.0, generator.uniform(55, 70)) for _ in range(12)]  # static methods: all of one size
    points += [(generator.uniform(3, 40), generator.uniform(45, 90)) for _ in range(6)]
    label_points(axis, points, [f"method_number_{i}" for i in range(18)], font=9)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in axis.texts]  # without the lines to the points
    for a, b in itertools.combinations(boxes, 2):
        assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1)
    for x, y in (axis.transData.transform(point) for point in points):
        assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for box in boxes)
    assert all(axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 for box in boxes)


def test_the_picture_leaves_out_what_has_no_size_or_average(tmp_path: Path):
    rows = [
        Row(name="static", accuracies={"a": 0.5, "b": 0.6}, megabytes=2.0),
        Row(name="routed", kind="routed", accuracies={"a": 0.9, "b": 0.8}, megabytes=20.0),
        Row(name="failed", error="why"),
        Row(name="half", accuracies={"a": 1.0}, megabytes=3.0),
    ]
    comparison_picture(tmp_path / "x.png", rows, TASKS)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (1050, 690)
    comparison_picture(tmp_path / "one.png", rows[:1], TASKS)
    assert (tmp_path / "one.png").is_file()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("compare", "command=compare"),
        ("compare a b seed=1", "command=compare seed=1 compare.methods=[a,b]"),
        ("compare method=[a,b] seed=1", "command=compare seed=1 compare.methods=[a,b]"),
        ("compare method=a,b", "command=compare compare.methods=[a,b]"),
        ("compare --help", "command=compare --help"),
        ("compare seed=1 a b", "command=compare seed=1 compare.methods=[a,b]"),
        ("compare --config-dir own a", "command=compare --config-dir own compare.methods=[a]"),
        ("analyse seed=1 routing", "command=analyse analyse.name=routing seed=1"),
        ("analyze variation", "command=analyse analyse.name=variation"),
        ("analyse sparsity seed=1", "command=analyse analyse.name=sparsity seed=1 method=e_wemoe"),
        ("analyse rank method=x", "command=analyse analyse.name=rank method=x"),
        ("analyse routing", "command=analyse analyse.name=routing"),
        ("analyse seed=1", "command=analyse seed=1"),
    ],
)
def test_words_after_a_command_are_options(typed, expected):
    assert spell_out(typed.split()) == expected.split()


def test_methods_named_in_two_places_are_refused():
    with pytest.raises(ConfigError, match=r"`compare.methods=\[b\]` and a: name the methods in one place"):
        spell_out(["compare", "a", "compare.methods=[b]"])


def test_both_spellings_are_one_command():
    assert find_command("analyze") is find_command("analyse")
    with pytest.raises(ConfigError, match="did you mean `compare`"):
        find_command("compar")
