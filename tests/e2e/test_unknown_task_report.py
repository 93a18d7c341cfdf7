"""`unknown_task` on the command line: what is scored, written and shown, and what is refused."""

from __future__ import annotations

import json

import pytest
from runs import assert_refused, own_pool, run_cli

from fusion_merge import MergedCLIPVisionModel

QUICK = ["method.max_steps=2", "method.batch_size=4", "method.num_workers=0", "baselines=[]"]


@pytest.mark.parametrize("by", ["agreement", "projection"])
def test_the_report_shows_what_is_scored_when_tasks_are_unknown(pool_dir, tmp_path, by):
    pool = own_pool(pool_dir)
    places = ["output_dir=out", "merged_model_save_path=merged"]
    done = run_cli("method=wemoe", *pool, *QUICK, *places, f"unknown_task={by}", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = report["unknown_task"]
    assert found["by"] == by
    for task in ("cats", "dogs", "average"):
        assert 0 <= found[task]["accuracy"] <= min(report[task]["accuracy"], found[task]["task_accuracy"]) + 1e-6
    written = (tmp_path / "out" / "report.md").read_text()
    for text in (written, done.out):
        assert "wemoe (unknown task)" in text
        assert f"{100 * found['average']['accuracy']:.1f}" in text
    assert f"finds it by {by}" in written
    heads = MergedCLIPVisionModel.from_pretrained(tmp_path / "merged").heads
    assert heads.tasks == ["cats", "dogs"]


def test_without_the_option_nothing_of_it_is_in_the_report(pool_dir, tmp_path):
    done = run_cli("method=wemoe", *own_pool(pool_dir), *QUICK, "output_dir=out", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "unknown_task" not in json.loads((tmp_path / "out" / "report.json").read_text())
    assert "unknown task" not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["method=wemoe", "unknown_task=agreemint"], ("'agreemint'", "did you mean `agreement`")),
        (["method=task_arithmetic", "unknown_task=agreement"], ("makes no routed model",)),
        (["method=smile", "method.k=4", "method.gate_k=2", "unknown_task=agreement"], ("makes no routed model",)),
        (
            ["method=wemoe", "method.inference_batch_reduce=true", "unknown_task=projection"],
            ("inference_batch_reduce",),
        ),
        (["compare", "wemoe", "unknown_task=agreement"], ("`unknown_task`", "leave it out")),
        (["analyse", "routing", "method=wemoe", "unknown_task=agreement"], ("`unknown_task`", "leave it out")),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_computed(pool_dir, tmp_path, arguments, texts):
    assert_refused(run_cli(*arguments, *own_pool(pool_dir), cwd=tmp_path), tmp_path, *texts)


def test_a_task_pool_that_scores_nothing_finds_no_task(pool_dir, tmp_path):
    models = own_pool(pool_dir)[:2]
    done = run_cli(
        "method=wemoe", *models, "method.max_steps=0", "taskpool=dummy", "unknown_task=agreement", cwd=tmp_path
    )
    assert_refused(done, tmp_path, "scores nothing")
