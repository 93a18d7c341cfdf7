"""The benchmarks run from end to end on a toy, and every row has figures; how good they are is not looked at."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
METHODS = ("RankOne-MoE", "WEMoE", "E-WEMoE 90 %")
PASSES = ("forward", "forward + backward")


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--output", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def results(output) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "toy-8.json").read_text(encoding="utf-8"))
    return found


def titles(results: dict[str, Any], group: str) -> list[str]:
    return [row["what"] for row in results["rows"] if row["group"] == group]


def test_every_row_is_there(results):
    assert titles(results, "layers") == [
        f"{name}, {routing} routing, {what}" for routing in ("sample", "batch") for name in METHODS for what in PASSES
    ]
    assert titles(results, "growth") == [
        f"{n} experts, {name}, {what}" for n in (2, 8, 20) for name in METHODS for what in PASSES
    ]
    assert titles(results, "geometries") == [f"toy-fine, {name}, {what}" for name in METHODS for what in PASSES]
    assert [len(titles(results, group)) for group in ("model", "step", "build", "startup")] == [2, 2, 1, 2]
    memory = titles(results, "memory")
    assert sum("activations" in title for title in memory) == 1
    assert sum("peak while building" in title for title in memory) == 3
    assert sum("expert banks" in title for title in memory) in (2, 4)  # in half precision too, where there is that


def test_figures_and_ratios_are_finite_and_positive(results):
    for row in results["rows"]:
        assert "ours" in row["figures"]
        for value in (*row["figures"].values(), *row["ratios"].values()):
            assert math.isfinite(value)
            assert value > 0
        assert (row["target"] is None) == (row["met"] is None)


def test_ratios_are_there_for_what_is_compared(results):
    timed = [row for row in results["rows"] if row["unit"] == "ms"]
    assert all("ours / floor" in row["ratios"] for row in timed)
    layers = [row for row in timed if row["group"] in ("layers", "growth", "geometries", "build")]
    known = results["machine"]["fusion-bench"] != "not installed"
    assert all(("reference / ours" in row["ratios"]) == known for row in layers)
    assert all(row["target"] for row in results["rows"] if row["group"] in ("layers", "step", "startup"))


def test_machine_is_described_and_no_model_is_left_behind(output, results):
    described = {"processor", "cores", "threads", "memory_gb", "python", "torch", "transformers", "fusion-bench"}
    assert described <= results["machine"].keys()
    assert sorted(path.name for path in output.iterdir()) == ["toy-8.json", "toy-8.md"]
