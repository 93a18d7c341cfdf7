"""What the README claims of the embedded pool: the methods win back what the static merge loses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import run_cli


def scores_of(cwd: Path, *arguments: str) -> dict[str, Any]:
    done = run_cli(*arguments, f"report_save_path={cwd / 'report.json'}", cwd=cwd)
    assert done.code == 0, done.err
    report: dict[str, Any] = json.loads((cwd / "report.json").read_text())
    return report


def average(report: dict[str, Any]) -> float:
    value: float = report["average"]["accuracy"]
    return value


@pytest.fixture(scope="module")
def default_job(tmp_path_factory) -> dict[str, Any]:
    return scores_of(tmp_path_factory.mktemp("default"))


def test_interference_is_real(default_job):
    beside = default_job["baselines"]
    assert average(beside["fine_tuned"]) >= 0.92
    assert average(beside["task_arithmetic"]) <= average(beside["fine_tuned"]) - 0.12
    assert average(beside["zero_shot"]) <= average(beside["fine_tuned"]) - 0.05


def test_the_default_job_wins_back_three_quarters_of_the_gap(default_job):
    beside = default_job["baselines"]
    lost = average(beside["fine_tuned"]) - average(beside["task_arithmetic"])
    assert average(default_job) - average(beside["task_arithmetic"]) >= 0.75 * lost


def test_adaptation_itself_adds_what_no_static_merge_has(default_job, tmp_path):
    still = scores_of(tmp_path / "still", "method.max_steps=0", "baselines=[]")
    best = scores_of(tmp_path / "best", "method=task_arithmetic", "method.scaling_factor=0.1", "baselines=[]")
    assert average(default_job) >= average(still) + 0.04
    assert average(default_job) >= average(best) + 0.015


@pytest.mark.parametrize("method", ["wemoe", "e_wemoe"])
def test_a_quarter_of_the_steps_wins_back_more_than_half_of_the_gap(default_job, tmp_path, method):
    beside = default_job["baselines"]
    found = scores_of(tmp_path, f"method={method}", "method.max_steps=100", "baselines=[]")
    lost = average(beside["fine_tuned"]) - average(beside["task_arithmetic"])
    assert average(found) - average(beside["task_arithmetic"]) >= 0.6 * lost
    assert not found["run"]["adaptation"]["collapsed"]
