"""Tables, pictures, and the written report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TASKS
from PIL import Image
from runs import files_in

from fusion_merge import FusionMoEAlgorithm, RankOneMoEAlgorithm, WEMoEAlgorithm
from fusion_merge.pools.loaders import Placement
from fusion_merge.report import plots
from fusion_merge.report.plots import loss_curve, routing_picture
from fusion_merge.report.routing import block_names, routing_weights
from fusion_merge.report.tables import accuracy_table, model_size, written_report


def scores(**accuracies: float) -> dict[str, dict[str, float]]:
    return {task: {"accuracy": accuracy, "loss": 1.0} for task, accuracy in accuracies.items()}


def cells(table: str) -> list[list[str]]:
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    return [[cell.strip() for cell in line] for line in lines]


# Tables


def test_table_has_a_row_a_task_and_a_column_a_model():
    columns = {"zero shot": scores(cats=0.25, dogs=0.5), "wemoe": scores(cats=1.0, dogs=0.876)}
    header, _, *rows = cells(accuracy_table(columns, ["cats", "dogs"], style="github"))
    assert header == ["task", "zero shot", "wemoe"]
    assert rows == [["cats", "25.0", "100.0"], ["dogs", "50.0", "87.6"], ["average", "37.5", "93.8"]]


def test_model_that_lacks_a_task_has_neither_its_cell_nor_an_average():
    columns = {"fine tuned": scores(cats=1.0), "wemoe": scores(cats=0.5, unseen=0.25)}
    *_, cats, unseen, average = cells(accuracy_table(columns, ["cats", "unseen"], style="github"))
    assert (cats, unseen, average) == (["cats", "100.0", "50.0"], ["unseen", "", "25.0"], ["average", "", "37.5"])


def test_task_called_like_a_number_is_left_as_it_is():
    assert ["007", "50.0"] in cells(accuracy_table({"m": scores(**{"007": 0.5})}, ["007"], style="github"))


def test_size_of_a_model_in_words():
    info = {"trainable_params": 1234, "all_params": 1_234_567, "trainable_percentage": 1234 / 1_234_567}
    assert model_size(info) == "1,234,567 parameters, 1,234 of them trainable (0.10 %)"


# The written report


def report_of(**run: Any) -> dict[str, Any]:
    defaults = {
        "method": "wemoe",
        "command": "fusion_merge method=wemoe",
        "adaptation": {"steps": 12, "interrupted": False, "collapsed": {}, "seconds": 3.21},
        "seconds": {"method": 4.0},
        "seed": 7,
        "versions": {"torch": "2.13"},
    }
    return {"run": defaults | run}


def test_written_report_says_how_it_came_about():
    text = written_report(report_of(), "| a table |", ["routing.png"])
    assert text.startswith("# wemoe\n")
    for part in (
        "fusion_merge method=wemoe",
        "| a table |",
        "![routing](routing.png)",
        "Adapted for 12 steps in 3.2 s.",
        "| method | 4.0 |",
        "Seed 7; torch 2.13.",
    ):
        assert part in text


def test_written_report_names_models_and_options():
    models = {"_pretrained_": "hub/base", "cats": "models/cats", "dogs": "models/dogs"}
    options = {
        "objective": "infomax",
        "lr": 0.5,
        "patience": 0,
        "mixed_tasks": False,
        "layers": [0, 3],
        "cache_dir": None,
    }
    text = written_report(report_of(models=models, options=options), "", [])
    assert "Models: base `hub/base`, cats `models/cats`, dogs `models/dogs`.\n" in text
    assert (
        "Options: `objective=infomax`, `lr=0.5`, `patience=0`, `mixed_tasks=false`, `layers=[0, 3]`, "
        "`cache_dir=null`.\n" in text
    )


def test_written_report_says_that_adaptation_was_interrupted():
    adaptation = {"steps": 12, "interrupted": True, "collapsed": {}, "seconds": 3.0}
    assert "interrupt" in written_report(report_of(adaptation=adaptation), "", [])
    assert "interrupt" not in written_report(report_of(), "", [])


def test_written_report_names_collapsed_tasks():
    adaptation = {"steps": 12, "interrupted": False, "collapsed": {"cats": 9}, "seconds": 3.0}
    assert "**`cats` collapsed to one class from step 9 on.**" in written_report(
        report_of(adaptation=adaptation), "", []
    )


def test_written_report_tells_of_a_task_that_was_taken_back():
    done = {"task": "cats", "measure": "agreement", "best": 0.8, "score": 0.6, "step": 30, "back_to": 20}
    done |= {"action": "tempered", "pace": 1 / 16}
    adaptation = {"steps": 40, "interrupted": False, "seconds": 3.0, "interventions": [done]}
    assert (
        "**`cats` degraded: its agreement fell from 0.80 to 0.60 within 30 steps; the parameters after 20 steps "
        "were put back, with 1/16 of the learning rate (tempered).**"
    ) in written_report(report_of(adaptation=adaptation), "", [])


def test_written_report_of_a_static_method_says_nothing_of_adaptation():
    assert "adapted" not in written_report(report_of(adaptation=None), "", []).lower()


# Pictures


def check_picture(path: Path) -> None:
    """The file is a whole PNG, not blank, and alone in its folder."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        picture.load()
        assert min(picture.size) > 100
        assert len(picture.convert("L").getcolors()) > 10
    assert files_in(path.parent) == [path.name]


@pytest.mark.parametrize(
    "entropy",
    [
        {"cats": [0.7, 0.6, 0.5], "dogs": [1.1, 1.0, 0.9]},
        {"cats": [0.7]},
        {"cats": [0.0, 0.0]},
        {f"task {i}": [1.0 / (1 + step + i) for step in range(300)] for i in range(20)},
    ],
    ids=["two tasks", "one step", "no entropy", "twenty tasks"],
)
def test_loss_curve_is_a_picture(tmp_path, entropy):
    loss_curve(tmp_path / "loss.png", entropy)
    check_picture(tmp_path / "loss.png")


def test_loss_curve_marks_where_a_task_was_taken_back(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, _: figures.append(figure))
    losses = {"cats": [0.7, 0.6, 0.5], "dogs": [1.1, 1.0, 0.9]}
    loss_curve(tmp_path / "loss.png", losses, "loss", taken_back=[(1, "dogs"), (2, "cats")])
    lines = figures[0].axes[0].get_lines()
    colours = {line.get_label(): line.get_color() for line in lines}
    marks = [(list(line.get_xdata()), line.get_color()) for line in lines if len(line.get_xdata()) == 2]
    assert marks == [([1, 1], colours["dogs"]), ([2, 2], colours["cats"])]
    assert [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()].count("taken back") == 1


@pytest.mark.parametrize(
    ("tasks", "experts"),
    [
        (["cats", "dogs"], ["cats", "dogs"]),
        (["cats", "dogs", "unseen"], ["cats", "dogs"]),
        (["unseen"], ["cats", "dogs"]),
        (["dogs"], ["cats", "dogs"]),
        ([f"task {i}" for i in range(20)], [f"task {i}" for i in range(20)]),
    ],
    ids=["all", "one unseen", "only unseen", "one of two", "twenty"],
)
def test_routing_picture_is_a_picture(tmp_path, tasks, experts):
    weights = {task: torch.rand(3, len(experts)) for task in tasks}
    routing_picture(tmp_path / "routing.png", weights, experts)
    check_picture(tmp_path / "routing.png")


def test_routing_picture_of_equal_weights_is_a_picture(tmp_path):
    routing_picture(tmp_path / "routing.png", {"cats": torch.full((2, 2), 0.3)}, ["cats", "dogs"])
    check_picture(tmp_path / "routing.png")


# Routing weights


def test_pictures_call_routed_blocks_by_their_layers(modelpool):
    both = FusionMoEAlgorithm(max_steps=0, rank_k=3, router_start="constant").run(modelpool)
    assert block_names(both) == ["0 attn", "0", "1 attn", "1"]
    last = FusionMoEAlgorithm(max_steps=0, rank_k=3, router_start="constant", layers=[1], targets="mlp").run(modelpool)
    assert block_names(last) == ["1"]


@pytest.mark.parametrize(
    "method",
    [WEMoEAlgorithm(max_steps=0, router_hidden_layers=0), RankOneMoEAlgorithm(max_steps=0, rank_k=3)],
    ids=["one coefficient a task", "three coefficients a task"],
)
def test_routing_weights_have_a_row_a_layer_and_a_column_an_expert(method, modelpool, taskpool):
    weights = routing_weights(method.run(modelpool), taskpool, placement=Placement())
    assert {task: w.shape for task, w in weights.items()} == dict.fromkeys(TASKS, (2, 2))


def test_routing_weights_are_the_routers_mean_coefficients(modelpool, taskpool):
    model = RankOneMoEAlgorithm(max_steps=0, rank_k=3, router_hidden_layers=0).run(modelpool)
    coefficients = torch.tensor([0.0, 0.3, 0.6, -1.0, -2.0, -3.0])
    for router in model.parameters():
        if router.requires_grad:
            router.data.copy_(coefficients)
    weights = routing_weights(model, taskpool, placement=Placement())
    for task in TASKS:
        torch.testing.assert_close(weights[task], torch.tensor([[0.3, -2.0], [0.3, -2.0]]))
