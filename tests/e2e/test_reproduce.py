"""`fusion_merge reproduce`: a stand-in for a published row, on small models and images of a user's own."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import TASKS
from runs import Finished, assert_refused, files_in, own_pool, run_cli

QUICK = {"max_steps": 2, "batch_size": 4, "num_workers": 0, "cache_dir": None}


def write_row(folder: Path, pool_dir: Path, name: str, method: str, **table: Any) -> None:
    """Write presets as a published row has them: the row, its model pool and its task pool."""
    models = {"_pretrained_": str(pool_dir / "pretrained")} | {task: str(pool_dir / task) for task in TASKS}
    tasks = {task: {"data": str(pool_dir / "images" / task)} for task in TASKS}
    routed = method == "wemoe"
    row = {
        "defaults": [{"override /method": method}, {"override /modelpool": "two"}, {"override /taskpool": "two"}],
        **({"method": QUICK, "evaluate_routings": ["batch", "sample"]} if routed else {}),
        "baselines": [],
        "reproduction": {
            "title": "a small stand-in",
            "source": "nowhere",
            "evaluated_with": "batch" if routed else None,
            "tolerance": {"average": 100, "task": 100},
            **table,
        },
    }
    for group, preset, content, head in (
        ("reproduction", name, row, "# @package _global_\n"),
        ("modelpool", "two", {"defaults": ["clip_vision"], "models": models}, ""),
        ("taskpool", "two", {"defaults": ["clip_vision"], "tasks": tasks}, ""),
    ):
        (folder / group).mkdir(parents=True, exist_ok=True)
        (folder / group / f"{preset}.yaml").write_text(head + yaml.safe_dump(content, sort_keys=False))


@pytest.fixture(scope="module")
def presets(pool_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("presets")
    write_row(folder, pool_dir, "small", "wemoe", published={"cats": 50, "average": 40}, note="mind the gap")
    write_row(folder, pool_dir, "still", "simple_average", published={"average": 40})
    return folder


def reproduce(presets: Path, cwd: Path, name: str, *arguments: str) -> Finished:
    return run_cli("reproduce", name, "output_dir=out", *arguments, "--config-dir", str(presets), cwd=cwd)


def comparison(cwd: Path) -> dict[str, Any]:
    return comparison_in(cwd / "out")


def comparison_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "reproduction.json").read_text())
    return content


@pytest.fixture(scope="module")
def finished(presets, tmp_path_factory) -> tuple[Path, Finished]:
    """One repetition of the stand-in row as it is."""
    cwd = tmp_path_factory.mktemp("work")
    return cwd, reproduce(presets, cwd, "small")


def test_row_within_its_tolerance_ends_with_code_0(finished):
    cwd, done = finished
    assert done.code == 0, done.err
    content = comparison(cwd)
    assert content["within_tolerance"] is True
    assert content["departures"] == []
    assert content["copies"] == []
    for text in ("ours (batch routing)", "ours (sample routing)", "within tolerance (", "mind the gap"):
        assert text in done.out
    assert "not the published recipe" not in done.out


def test_both_routings_are_scored_in_one_run(finished):
    cwd, _ = finished
    report = json.loads((cwd / "out" / "report.json").read_text())
    assert report["run"]["evaluation"] == {"routing": "sample", "batch_size": 128, "processes": 1}
    batch = report["routings"]["batch"]
    assert batch["evaluation"] == {"routing": "batch", "batch_size": 128, "processes": 1}
    assert list(report["routings"]) == ["batch"]
    assert batch.keys() == {*TASKS, "average", "evaluation"}
    assert any(batch[task]["loss"] != report[task]["loss"] for task in TASKS)
    for line in comparison(cwd)["figures"]:
        for column, scores in (("batch routing", batch), ("sample routing", report)):
            assert line["ours"][column] == pytest.approx(100 * scores[line["task"]]["accuracy"], abs=1e-3)
    assert "wemoe (batch routing)" in (cwd / "out" / "report.md").read_text()


def test_written_comparison_has_table_verdict_and_provenance(finished, pool_dir):
    cwd, _ = finished
    content, text = comparison(cwd), (cwd / "out" / "reproduction.md").read_text()
    assert content["verdict"] in text
    assert [line["task"] for line in content["figures"]] == [*TASKS, "average"]
    known = content["run"]["provenance"]
    assert known["models"].keys() == {"_pretrained_", *TASKS}
    for name, model in known["models"].items():
        assert model["revision"] is None
        assert len(model["fingerprint"]) == 16
        assert model["fingerprint"] in text
        assert str(pool_dir) in model["source"], name
    for use in ("adapted_on", "scored_on"):
        assert known[use]["cats"] == {
            "source": str(pool_dir / "images" / "cats"),
            "revision": None,
            "split": None,
            "images": 12,
        }
    assert known["machine"]["cores"] >= 1
    assert known["machine"]["processor"]
    assert content["run"]["versions"]["python"] == platform.python_version()
    assert "Seed 0" in text


def test_row_out_of_tolerance_ends_with_code_3_and_says_where(presets, tmp_path):
    done = reproduce(
        presets,
        tmp_path,
        "small",
        "reproduction.tolerance={average: 0.5, task: 100}",
        "reproduction.published.average=0",
        "method.max_steps=1",
    )
    assert done.code == 3, done.err
    content = comparison(tmp_path)
    assert content["within_tolerance"] is False
    assert content["verdict"].startswith("NOT within tolerance (±0.5 points on the average, ±100 on a task): average +")
    assert content["verdict"] in done.out
    assert "not the published recipe: max_steps=1 instead of 2" in done.out
    assert "max_steps=1 instead of 2" in content["departures"]
    assert "reproduction.published.average=0 instead of 40" in content["departures"]
    assert len(content["departures"]) == 3


def test_exact_repetition_meets_its_own_figures(finished, presets, tmp_path):
    figures = comparison(finished[0])["figures"]
    ours = {line["task"]: line["ours"]["batch routing"] for line in figures}
    done = reproduce(
        presets,
        tmp_path,
        "small",
        "reproduction.tolerance={average: 0.001, task: 0.001}",
        f"reproduction.published.cats={ours['cats']}",
        f"reproduction.published.average={ours['average']}",
    )
    assert done.code == 0, done.out + done.err


def test_several_seeds_of_a_row_are_run_though_one_is_out_of_tolerance(presets, tmp_path):
    published = "reproduction.published.average=0"
    arguments = ["output_dir=out", "seed=0,1", "protocol=sweep", "reproduction.tolerance.average=0.1", published]
    done = run_cli("reproduce", "still", "--config-dir", str(presets), "--multirun", *arguments, cwd=tmp_path)
    assert done.code == 3, done.err
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["options"]["seed"] for row in rows] == ["0", "1"]
    assert all(row["error"] is None and row["accuracy"] > 0 for row in rows)
    changes = comparison_in(tmp_path / "out" / "1")["departures"]
    assert sorted(changes) == [f"{published} instead of 40", "reproduction.tolerance.average=0.1 instead of 100"]


def test_a_row_is_planned_and_not_run(presets, tmp_path):
    done = reproduce(presets, tmp_path, "small", "plan=true")
    assert (done.code, files_in(tmp_path)) == (0, []), done.err
    assert "no problems: the run can start" in done.out


def test_static_row_has_one_column(presets, tmp_path):
    done = reproduce(presets, tmp_path, "still")
    assert done.code == 0, done.err
    assert "ours" in done.out
    assert "routing)" not in done.out
    assert list(comparison(tmp_path)["figures"][0]["ours"]) == [""]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["run"]["evaluation"]["routing"] is None
    assert report["run"]["provenance"]["adapted_on"] == {}


def test_dry_run_says_what_would_be_compared_and_writes_nothing(presets, tmp_path):
    done = reproduce(presets, tmp_path, "small", "dry_run=true", "method.max_steps=7")
    assert done.code == 0, done.err
    assert "a small stand-in" in done.out
    assert "not the published recipe: max_steps=7 instead of 2" in done.out
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "argument", "texts"),
    [
        ("small", "evaluate_routings=null", ("scored with batch routing", "add `batch`")),
        ("small", "evaluate_routings=[batch,smple]", ("'smple'", "did you mean `sample`?")),
        ("small", "taskpool=dummy", ("`taskpool=dummy` scores nothing to compare",)),
        ("still", "evaluate_routings=[batch]", ("`simple_average` makes no routed model",)),
        ("small", "reproduction.published.cats=990", ("`reproduction.published.cats`=990", "0-100")),
        ("smal", "seed=0", ("`reproduction=smal` is not a preset", "did you mean `small`?")),
        ("small", "method.max_step=3", ("`method.max_step` is not an option",)),
        ("small", "protocol=robustness", ("`protocol` makes several of `small`", "leave it out")),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_computed(presets, tmp_path, name, argument, texts):
    assert_refused(reproduce(presets, tmp_path, name, argument), tmp_path, *texts)


def test_row_of_a_baseline_needs_that_baseline(presets, pool_dir, tmp_path):
    folder = tmp_path / "presets"
    write_row(folder, pool_dir, "tuned", "dummy", published={"average": 40}, baseline="fine_tuned")
    cwd = tmp_path / "work"
    assert_refused(reproduce(folder, cwd, "tuned"), cwd, "`baselines`=[]", "`fine_tuned`; add it")
    done = reproduce(folder, cwd, "tuned", "baselines=[fine_tuned]")
    assert done.code == 0, done.err
    report = json.loads((cwd / "out" / "report.json").read_text())
    average = comparison(cwd)["figures"][-1]["ours"][""]
    assert average == pytest.approx(100 * report["baselines"]["fine_tuned"]["average"]["accuracy"], abs=1e-3)


def test_list_has_the_published_rows_and_those_of_another_folder(presets, tmp_path):
    done = run_cli("reproduce", "--config-dir", str(presets), cwd=tmp_path)
    assert done.code == 0, done.err
    lines = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert lines["wemoe_b32"].endswith("89.25")
    assert "a small stand-in" in lines["small"]
    assert files_in(tmp_path) == []


# Routings in ordinary runs


def test_ordinary_run_keeps_the_method_s_own_routing(pool_dir, tmp_path):
    done = run_cli(
        *own_pool(pool_dir),
        "method=wemoe",
        "method.max_steps=1",
        "method.batch_size=4",
        "method.inference_batch_reduce=true",
        "evaluate_routings=[sample,batch]",
        "baselines=[]",
        "output_dir=out",
        "merged_model_save_path=merged",
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["run"]["evaluation"]["routing"] == "batch"
    assert list(report["routings"]) == ["sample"]
    saved = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert {layer["routing"] for layer in saved["moe"].values()} == {"batch"}


def test_dummy_task_pool_cannot_be_scored_under_routings(pool_dir, tmp_path):
    done = run_cli(
        *own_pool(pool_dir)[:2],
        "taskpool=dummy",
        "method=wemoe",
        "method.max_steps=0",
        "evaluate_routings=[batch]",
        cwd=tmp_path,
    )
    assert_refused(done, tmp_path, "`evaluate_routings`=['batch']", "scores nothing")
