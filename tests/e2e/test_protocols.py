"""The protocols, as whole runs of the command line on small models and images of a user's own."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import DatasetDict
from helpers import TASKS
from runs import Finished, assert_refused, files_in, own_pool, run_cli

from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.pools.folders import read_folder

QUICK = ["method.max_steps=2", "method.batch_size=4"]
TWO = "protocol.corruptions=[contrast,impulse_noise]"


def report_in(folder: Path, name: str = "report.json") -> Any:
    return json.loads((folder / name).read_text())


def scores(report: dict[str, Any]) -> dict[str, Any]:
    return {task: report[task] for task in TASKS}


# Robustness


@pytest.fixture(scope="module")
def robust(pool_dir, tmp_path_factory) -> tuple[Path, Finished, list[Any]]:
    """One run of the robustness protocol with everything it can write, and the models that were built."""
    cwd = tmp_path_factory.mktemp("robust")
    built = []
    build = MoEMethod.build

    def counted(self: MoEMethod, *args: Any) -> Any:
        built.append(self)
        return build(self, *args)

    places = ["output_dir=out", "report_save_path=copy.json", "merged_model_save_path=merged"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MoEMethod, "build", counted)
        done = run_cli(
            *own_pool(pool_dir),
            "protocol=robustness",
            "method=e_wemoe",
            "method.post_sparse_gate=true",
            "method.gate_prune_ratio=0.5",
            "method.lr=0.1",
            "method.save_checkpoint=routers.ckpt",
            *QUICK,
            *places,
            TWO,
            "protocol.constants=imagenet-c",
            cwd=cwd,
        )
    assert done.code == 0, done.err
    return cwd, done, built


def test_robustness_has_one_table_of_all_conditions(robust):
    cwd, done, _ = robust
    report = report_in(cwd / "out")
    assert list(report["conditions"]) == ["clean", "contrast", "impulse_noise"]
    assert list(report["averages"]) == ["clean", "contrast", "impulse_noise", "mean of corruptions"]
    for name, condition in report["conditions"].items():
        row = report["averages"][name]
        assert list(row) == ["zero shot", "fine tuned", "task arithmetic", "e_wemoe"]
        assert row["e_wemoe"] == pytest.approx(condition["average"])
        assert row["zero shot"] == pytest.approx(condition["baselines"]["zero_shot"]["average"])
    corrupted = [report["averages"][name]["e_wemoe"]["loss"] for name in ("contrast", "impulse_noise")]
    assert report["averages"]["mean of corruptions"]["e_wemoe"]["loss"] == pytest.approx(sum(corrupted) / 2)
    assert report["run"]["protocol"]["severity"] == 5
    for text in (done.out, (cwd / "out" / "report.md").read_text()):
        assert "mean of corruptions" in text
        assert "impulse noise" in text
    assert (cwd / "copy.json").read_text() == (cwd / "out" / "report.json").read_text()


def test_robustness_keeps_each_condition_s_own_files(robust):
    cwd, _, _ = robust
    for name in ("clean", "contrast", "impulse_noise"):
        assert {"report.json", "report.md", "config.yaml", "logs/metrics.csv"} <= set(files_in(cwd / "out" / name))
        assert (cwd / "merged" / name / "model.safetensors").is_file()
        assert (cwd / f"routers-{name}.ckpt").is_file()
        assert report_in(cwd / "out" / name) == report_in(cwd / "out")["conditions"][name]
        assert f"({name}/report.md)" in (cwd / "out" / "report.md").read_text()


def test_robustness_builds_experts_once(robust):
    assert len(robust[2]) == 1


def test_condition_is_the_run_of_corrupted_tasks_by_itself(robust, pool_dir, tmp_path):
    tasks = [
        f"taskpool.tasks.{task}={{data: {pool_dir / 'images' / task}, corruption: impulse_noise, "
        "corruption_constants: imagenet-c}"
        for task in TASKS
    ]
    options = ["method=e_wemoe", "method.post_sparse_gate=true", "method.gate_prune_ratio=0.5", "method.lr=0.1"]
    pool = own_pool(pool_dir)[:2]
    done = run_cli(*pool, *tasks, *options, *QUICK, "output_dir=out", "merged_model_save_path=merged", cwd=tmp_path)
    assert done.code == 0, done.err
    alone, one_of = report_in(tmp_path / "out"), report_in(robust[0] / "out" / "impulse_noise")
    assert scores(alone) == scores(one_of)
    assert alone["baselines"] == one_of["baselines"]
    weights = "model.safetensors"
    assert (tmp_path / "merged" / weights).read_bytes() == (
        robust[0] / "merged" / "impulse_noise" / weights
    ).read_bytes()


def test_robustness_of_a_static_method_on_corrupted_splits(pool_dir, tmp_path):
    for task in TASKS:
        images = read_folder(pool_dir / "images" / task)
        DatasetDict(test=images, contrast=images.select(range(3))).save_to_disk(tmp_path / "data" / task)
    tasks = [f"taskpool.tasks.{task}={{data: {tmp_path / 'data' / task}}}" for task in TASKS]
    protocol = ["protocol=robustness", "protocol.source=splits", "protocol.corruptions=[contrast]"]
    cwd = tmp_path / "work"
    common = [*own_pool(pool_dir)[:2], *tasks, *protocol, "baselines=[]", "output_dir=out"]
    done = run_cli(*common, "method=task_arithmetic", cwd=cwd)
    assert done.code == 0, done.err
    report = report_in(cwd / "out")
    assert report["conditions"]["clean"]["cats"] != report["conditions"]["contrast"]["cats"]
    assert report["run"]["images"] == "Corrupted images are splits of the data."
    again = run_cli(*common, "method=task_arithmetic", "taskpool.tasks.cats.split=contrast", cwd=tmp_path / "again")
    assert_refused(again, tmp_path / "again", "`cats` takes the split `contrast`, whose images are corrupted already")


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["protocol.corruptions=[contrats]"], ["`protocol.corruptions` has 'contrats'", "did you mean `contrast`?"]),
        (["protocol.corruptions=[]", "protocol.clean=false"], ["leave nothing to do"]),
        (["protocol.severity=6"], ["`severity`=6", "at most 5"]),
        (["protocol.severty=3"], ["`protocol.severty`", "did you mean `severity`?"]),
        (["method=clip_finetune"], ["`protocol=robustness`", "`clip_finetune` makes one model a task"]),
        (["taskpool=dummy"], ["needs tasks to score on"]),
        (["method.tta_split=train", "protocol.source=splits"], ["do not go together"]),
        (["protocol.source=splits"], ["its data have no splits"]),
        (["protocol.source=splits", "protocol.severity=3"], ["`protocol.severity`=3", "generated images"]),
        (["taskpool.tasks.cats.corruption=spatter"], ["`cats` has `corruption`='spatter' of its own", "leave it out"]),
    ],
)
def test_impossible_robustness_is_refused(pool_dir, tmp_path, arguments, texts):
    pool = [a for a in own_pool(pool_dir) if "taskpool=dummy" not in arguments or not a.startswith("taskpool")]
    done = run_cli(*pool, "method=wemoe", "protocol=robustness", *arguments, cwd=tmp_path)
    assert_refused(done, tmp_path, *texts)


def test_dry_run_of_a_protocol_shows_the_plan_and_writes_nothing(pool_dir, tmp_path):
    done = run_cli(*own_pool(pool_dir), "method=wemoe", "protocol=robustness", "dry_run=true", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "robustness: clean, motion_blur, impulse_noise" in done.out
    assert files_in(tmp_path) == []


def test_unknown_protocol_names_the_right_one(tmp_path):
    assert_refused(run_cli("protocol=robustnes", cwd=tmp_path), tmp_path, "did you mean `robustness`?")


# Generalization


def seen_and_unseen(pool_dir: Path) -> list[str]:
    """Three tasks: `cats` and `pets` have models, `dogs` has none."""
    models = f"{{_pretrained_: {pool_dir / 'pretrained'}, cats: {pool_dir / 'cats'}, pets: {pool_dir / 'dogs'}}}"
    data = f"taskpool.tasks.pets={{data: {pool_dir / 'images' / 'dogs'}}}"
    return ["modelpool=clip_vision", f"modelpool.models={models}", *own_pool(pool_dir)[2:], data]


def test_generalization_averages_seen_and_unseen_apart(pool_dir, tmp_path):
    pool = seen_and_unseen(pool_dir)
    done = run_cli(*pool, "protocol=generalization", "method=wemoe", *QUICK, "output_dir=out", cwd=tmp_path)
    assert done.code == 0, done.err
    report = report_in(tmp_path / "out")
    for key in ("accuracy", "loss"):
        assert report["averages"]["seen"][key] == pytest.approx((report["cats"][key] + report["pets"][key]) / 2)
        assert report["averages"]["unseen"][key] == pytest.approx(report["dogs"][key])
    assert report["baselines"]["fine_tuned"]["averages"]["unseen"] is None
    assert report["baselines"]["zero_shot"]["averages"]["unseen"] is not None
    for text in (done.out, (tmp_path / "out" / "report.md").read_text()):
        (line,) = [line for line in text.splitlines() if "unseen average" in line]
        assert f"{100 * report['averages']['unseen']['accuracy']:.1f}" in line
    plain = run_cli(*pool, "method=wemoe", *QUICK, "output_dir=out", cwd=tmp_path / "plain")
    assert plain.code == 0, plain.err
    assert report_in(tmp_path / "plain" / "out")["cats"] == report["cats"]
    assert "averages" not in report_in(tmp_path / "plain" / "out")


@pytest.mark.parametrize(
    ("models", "texts"),
    [(TASKS, ["none is unseen", "add tasks to the task pool"]), (["a", "b"], ["none is seen", "of a, b"])],
)
def test_generalization_needs_seen_and_unseen_tasks(pool_dir, tmp_path, models, texts):
    sources = dict(zip(models, TASKS, strict=True))
    table = ", ".join(f"{name}: {pool_dir / source}" for name, source in sources.items())
    pool = f"modelpool.models={{_pretrained_: {pool_dir / 'pretrained'}, {table}}}"
    arguments = ["modelpool=clip_vision", pool, *own_pool(pool_dir)[2:], "method=task_arithmetic"]
    assert_refused(run_cli(*arguments, "protocol=generalization", cwd=tmp_path), tmp_path, *texts)


# Sweeps


def test_sweep_has_one_table_with_a_row_for_jobs_that_fail(pool_dir, tmp_path):
    arguments = [*own_pool(pool_dir), "method=wemoe", *QUICK, "baselines=[]"]
    done = run_cli("--multirun", "protocol=sweep", *arguments, "method.lr=0.01,0", "seed=0,1", cwd=tmp_path)
    assert done.code == 1, done.err
    (folder,) = (tmp_path / "outputs").iterdir()
    rows = report_in(folder, "sweep.json")
    options = [(lr, seed) for lr in ("0.01", "0") for seed in ("0", "1")]
    assert [(row["options"]["method.lr"], row["options"]["seed"]) for row in rows] == options
    assert [row["job"] for row in rows] == list(range(4))
    best = max(row["accuracy"] for row in rows if row["error"] is None)
    for row in rows:
        if row["options"]["method.lr"] == "0":
            assert "`lr`=0.0" in row["error"]
            assert row["accuracy"] is row["report"] is None
            assert row["best"] is False
            continue
        report = json.loads((tmp_path / row["report"]).read_text())
        assert row["accuracy"] == report["average"]["accuracy"]
        assert row["loss"] == report["average"]["loss"]
        assert row["worst_accuracy"] == min(report[task]["accuracy"] for task in TASKS)
        assert row["best"] == (row["accuracy"] == best)
        assert row["seconds"] > 0
    with (folder / "sweep.csv").open() as file:
        assert [row["method.lr"] for row in csv.DictReader(file)] == [lr for lr, _ in options]
    for text in (done.out, (folder / "sweep.md").read_text()):
        assert "(best)" in text
        assert "failed" in text
    assert str((folder / "sweep.md").relative_to(tmp_path)) in done.out


def test_sweep_into_a_named_folder_has_its_table_there_and_no_earlier_jobs(pool_dir, tmp_path):
    arguments = [*own_pool(pool_dir), "output_dir=here", "baselines=[]", "hydra.sweep.dir=jobs"]
    for methods in ("method=task_arithmetic,simple_average,dummy", "method=task_arithmetic,simple_average"):
        for old in (tmp_path / "jobs").rglob("job.json") if (tmp_path / "jobs").exists() else ():
            os.utime(old, (0, 0))
        done = run_cli("--multirun", "protocol=sweep", *arguments, methods, cwd=tmp_path)
        assert done.code == 0, done.err
    rows = report_in(tmp_path / "here", "sweep.json")
    assert [row["options"] for row in rows] == [{"method": "task_arithmetic"}, {"method": "simple_average"}]
    assert [row["report"] for row in rows] == ["here/0/report.json", "here/1/report.json"]


def test_a_job_that_writes_no_report_has_no_scores(pool_dir, tmp_path):
    arguments = [*own_pool(pool_dir), "output_dir='my, out'", "baselines=[]", "seed=0,1", "--multirun"]
    assert run_cli("method=dummy", *arguments, cwd=tmp_path).code == 0
    more = ["method=task_arithmetic", "protocol=sweep", "dry_run=true"]
    assert run_cli(*more, *arguments, cwd=tmp_path).code == 0
    rows = report_in(tmp_path / "my, out", "sweep.json")
    assert [(row["accuracy"], row["report"], row["error"]) for row in rows] == [(None, None, None)] * 2


def test_sweep_needs_multirun(pool_dir, tmp_path):
    done = run_cli(*own_pool(pool_dir), "method=wemoe", "protocol=sweep", cwd=tmp_path)
    assert_refused(done, tmp_path, "`protocol=sweep` is for several runs", "--multirun")
