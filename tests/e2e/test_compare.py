"""`fusion_merge compare`, as whole runs of the command line on small models and images of a user's own."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TASKS
from PIL import Image
from runs import Finished, assert_refused, files_in, own_pool, run_cli
from torch import nn

from fusion_merge import MergedCLIPVisionModel
from fusion_merge.commands import compare
from fusion_merge.methods.simple_average import SimpleAverageAlgorithm
from fusion_merge.methods.task_arithmetic import TaskArithmeticAlgorithm
from fusion_merge.models.clip import pooled_output
from fusion_merge.presets import preset_names
from fusion_merge.registry import get_method, list_methods

QUICK = {"max_steps": 2, "batch_size": 4, "lr": 0.1}
STATIC = ["simple_average", "task_arithmetic"]


def options(*methods: str) -> list[str]:
    return [f"compare.options.{m}.{key}={value}" for m in methods for key, value in QUICK.items()]


def report_in(folder: Path, name: str = "comparison.json") -> Any:
    return json.loads((folder / name).read_text())


def rows_in(folder: Path) -> dict[str, Any]:
    return {row["name"]: row for row in report_in(folder)["rows"]}


@pytest.fixture(scope="module")
def compared(pool_dir, tmp_path_factory) -> tuple[Path, Finished]:
    """One comparison with everything that it can write; one method does not fit these narrow towers."""
    cwd = tmp_path_factory.mktemp("compared")
    done = run_cli(
        *["compare", "wemoe", "rankone_moe", "e_wemoe", "task_arithmetic"],
        *own_pool(pool_dir),
        *options("wemoe", "e_wemoe"),
        *["seed=3", "output_dir=out", "merged_model_save_path=merged", "report_save_path=copy.json"],
        *["compare.batch_size=8"],
        cwd=cwd,
    )
    return cwd, done


def test_rows_are_the_baselines_and_the_methods_in_order(compared):
    cwd, _ = compared
    baselines, methods = ["zero_shot", "fine_tuned"], ["wemoe", "rankone_moe", "e_wemoe", "task_arithmetic"]
    assert list(rows_in(cwd / "out")) == [*baselines, *methods]
    kinds = [row["kind"] for row in rows_in(cwd / "out").values()]
    assert kinds == ["baseline", "baseline", "routed", "routed", "routed", "static"]
    assert (cwd / "copy.json").read_text() == (cwd / "out" / "comparison.json").read_text()


def test_a_method_that_does_not_fit_has_a_row_that_says_why_and_ends_no_other(compared):
    cwd, done = compared
    assert done.code == 1
    row = rows_in(cwd / "out")["rankone_moe"]
    assert "rank_k" in row["error"]
    assert row["accuracies"] == {}
    assert "cannot run" in done.out[: done.out.index("wemoe (3 of 6)")]  # it is known before anything is computed
    text = (cwd / "out" / "comparison.md").read_text()
    assert "rankone_moe failed: " in text
    assert not (cwd / "out" / "rankone_moe").exists()


@pytest.mark.parametrize("method", ["wemoe", "task_arithmetic"])
def test_scores_are_those_of_a_run_of_the_method_alone(compared, pool_dir, method, tmp_path):
    own = [f"method.{key}={value}" for key, value in QUICK.items()] if method == "wemoe" else []
    alone = run_cli(*own_pool(pool_dir), f"method={method}", *own, "seed=3", "output_dir=alone", cwd=tmp_path)
    assert alone.code == 0, alone.err
    report = report_in(tmp_path / "alone", "report.json")
    rows = rows_in(compared[0] / "out")
    assert rows[method]["accuracies"] == {task: report[task]["accuracy"] for task in TASKS}
    assert rows[method]["average"] == pytest.approx(report["average"]["accuracy"])
    assert rows[method]["trainable"] == report["model_info"]["trainable_params"]
    assert rows[method]["stored"] == report["model_info"]["all_params"]
    assert report_in(compared[0] / "out" / method, "report.json")["average"] == report["average"]
    for baseline in ("zero_shot", "fine_tuned"):
        assert rows[baseline]["average"] == pytest.approx(report["baselines"][baseline]["average"]["accuracy"])


def test_the_worst_task_is_the_one_with_the_lowest_accuracy(compared):
    for row in rows_in(compared[0] / "out").values():
        if row["error"] is None:
            assert row["worst_accuracy"] == min(row["accuracies"].values())
            assert row["accuracies"][row["worst_task"]] == row["worst_accuracy"]


def test_sizes_are_those_of_real_files(compared):
    cwd, _ = compared
    rows = rows_in(cwd / "out")
    for method in ("wemoe", "e_wemoe", "task_arithmetic"):
        files = [file for file in (cwd / "merged" / method).rglob("*") if file.is_file()]
        assert rows[method]["megabytes"] == pytest.approx(sum(f.stat().st_size for f in files) / 1e6)
        assert rows[method]["saved"]
    assert rows["wemoe"]["megabytes"] > rows["task_arithmetic"]["megabytes"]
    assert rows["fine_tuned"]["megabytes"] == pytest.approx(2 * rows["zero_shot"]["megabytes"])
    assert rows["fine_tuned"]["stored"] == 2 * rows["zero_shot"]["stored"]
    assert sorted(p.name for p in (cwd / "merged").iterdir()) == ["e_wemoe", "task_arithmetic", "wemoe"]
    assert not list((cwd / "out").glob(".saved_*"))


def test_saved_models_are_those_that_were_scored(compared):
    cwd, _ = compared
    model = MergedCLIPVisionModel.from_pretrained(cwd / "merged" / "wemoe")
    assert model.config.scores == rows_in(cwd / "out")["wemoe"]["accuracies"]
    assert "fusion_merge compare" in (cwd / "merged" / "wemoe" / "README.md").read_text()


def test_times_and_costs_are_there_and_make_sense(compared):
    rows = rows_in(compared[0] / "out")
    for method in ("wemoe", "e_wemoe"):
        assert rows[method]["adaptation_seconds"] > 0
        assert rows[method]["build_seconds"] > 0
        assert rows[method]["cost"] > 1
    assert rows["task_arithmetic"]["adaptation_seconds"] is None
    assert rows["zero_shot"]["cost"] == rows["fine_tuned"]["cost"] == 1
    assert report_in(compared[0] / "out")["run"]["batch_size"] == 8
    assert "on 8 images" in (compared[0] / "out" / "comparison.md").read_text()


def test_tables_in_all_formats_say_the_same(compared):
    cwd, done = compared
    rows = rows_in(cwd / "out")
    with (cwd / "out" / "comparison.csv").open(newline="") as file:
        lines = {line["method"]: line for line in csv.DictReader(file)}
    assert list(lines) == list(rows)
    for name, row in rows.items():
        assert lines[name]["average"] == ("" if row["average"] is None else str(row["average"]))
        assert [lines[name][task] for task in TASKS] == [str(row["accuracies"].get(task, "")) for task in TASKS]
        if row["error"] is None:
            text = f"{100 * row['average']:.1f}"
            assert any(name in line and text in line for line in done.out.splitlines())
            assert any(
                name in line and text in line for line in (cwd / "out" / "comparison.md").read_text().splitlines()
            )
    assert done.out.count(f"{rows['wemoe']['stored']:,}") >= 1


def test_the_picture_is_one(compared):
    cwd, _ = compared
    with Image.open(cwd / "out" / "comparison.png") as picture:
        assert picture.width >= 700
        assert len(set(picture.convert("L").resize((200, 120)).tobytes())) > 20
    assert "(comparison.png)" in (cwd / "out" / "comparison.md").read_text()


def test_same_seed_gives_the_same_scores(compared, pool_dir, tmp_path):
    arguments = [*own_pool(pool_dir), *options("wemoe"), "seed=3", "output_dir=again", "baselines=[]"]
    done = run_cli("compare", "method=[wemoe]", *arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    again, before = rows_in(tmp_path / "again"), rows_in(compared[0] / "out")
    assert list(again) == ["wemoe"]
    assert again["wemoe"]["accuracies"] == before["wemoe"]["accuracies"]


# What is compared


def captured(monkeypatch, cwd: Path, *arguments: str) -> Mapping[str, Any]:
    """The configurations that a command line would compare."""
    seen: list[Any] = []

    class Stop(Exception):
        pass

    def keep(configs: Any, *_: Any) -> None:
        seen.append(configs)
        raise Stop

    monkeypatch.setattr(compare, "Comparison", keep)
    with pytest.raises(Stop):
        run_cli("compare", *arguments, cwd=cwd)
    return seen[0]


def test_without_names_every_method_that_merges_is_compared_once(monkeypatch, tmp_path):
    configs = captured(monkeypatch, tmp_path)
    merging = [m for m in list_methods() if get_method(m).min_models > 0 and m in preset_names("method")]
    assert set(merging) <= configs.keys()
    assert {"wemoe", "e_wemoe", "rankone_moe", "simple_average", "task_arithmetic"} <= set(merging)
    assert not {"dummy", "clip_finetune", "weight_ensembling_moe"} & configs.keys()
    targets = [json.dumps(config["method"], sort_keys=True) for config in configs.values()]
    assert len(set(targets)) == len(targets)


def test_each_method_has_the_options_tuned_for_the_pool_and_those_given_for_it(monkeypatch, tmp_path):
    given = ["compare.options.wemoe.max_steps=7", "seed=5"]
    configs = captured(monkeypatch, tmp_path, "wemoe", "e_wemoe", "modelpool=tiny8", *given)
    assert configs["wemoe"]["method"]["max_steps"] == 7
    assert configs["wemoe"]["method"]["lr"] == 1e-3  # config/tuned/tiny8
    assert configs["e_wemoe"]["method"]["max_steps"] == 400
    assert configs["e_wemoe"]["method"]["init_lambda"] == 0.15
    assert {config["method"]["seed"] for config in configs.values()} == {5}


def test_presets_of_a_user_are_compared_too(monkeypatch, tmp_path):
    folder = tmp_path / "mine" / "method"
    folder.mkdir(parents=True)
    (folder / "strong.yaml").write_text("defaults: [/method/task_arithmetic@_here_]\nscaling_factor: 0.7\n")
    configs = captured(monkeypatch, tmp_path, f"--config-dir={tmp_path / 'mine'}")
    assert configs["strong"]["method"]["scaling_factor"] == 0.7
    assert "task_arithmetic" in configs


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["wemo"], ["'wemo'", "did you mean `wemoe`?"]),
        (["dummy"], ["'dummy'", "merges nothing"]),
        (["compare.methods=[]"], ["leaves nothing to compare"]),
        (["wemoe", "weight_ensembling_moe"], ["'weight_ensembling_moe'", "another name of `wemoe`"]),
        (["wemoe", "compare.options.wemoe.lrr=1"], ["`compare.options.wemoe.lrr`", "did you mean `lr`?"]),
        (["wemoe", "compare.options.wemoe.lr=0"], ["`lr`=0", "above 0.0"]),
        (["wemoe", "compare.options.wemoe=3"], ["`compare.options.wemoe`=3"]),
        (["wemoe", "compare.options.wemoe.devices=2"], ["`compare.options.wemoe.devices`=2", "fabric.devices"]),
        (["wemoe", "compare.options.e_wemoe.lr=1"], ["`compare.options.e_wemoe`", "not compared"]),
        (["wemoe", "method.lr=1"], ["`method.lr=1`", "compare.options.NAME.lr=1"]),
        (["wemoe", "compare.method=x"], ["`compare.method`", "did you mean `methods`?"]),
        (["wemoe", "compare.batch_size=0"], ["`compare.batch_size`=0"]),
        (["wemoe", "taskpool=dummy"], ["needs tasks to score on"]),
        (["wemoe", "protocol=robustness"], ["`protocol`", "leave it out"]),
        (["wemoe", "evaluate_routings=[batch]"], ["`evaluate_routings`", "leave it out"]),
        (["wemoe", "merged_model_save_path=/dev/null/x"], ["`merged_model_save_path`", "/dev/null"]),
        (["rankone_moe"], ["`rank_k`=32"]),  # nothing that is compared can be run
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, texts, pool_dir, tmp_path):
    pools = own_pool(pool_dir)[: 2 if "taskpool=dummy" in arguments else None]
    done = run_cli("compare", *arguments, *pools, cwd=tmp_path)
    assert_refused(done, tmp_path, *texts)


# Ways to end


def test_dry_run_checks_all_and_writes_nothing(pool_dir, tmp_path):
    done = run_cli("compare", "wemoe", "rankone_moe", *own_pool(pool_dir), "dry_run=true", cwd=tmp_path)
    assert done.code == 1
    assert "rankone_moe (cannot run: `rank_k`=32" in done.out
    fits = run_cli("compare", "wemoe", *own_pool(pool_dir), "dry_run=true", cwd=tmp_path)
    assert (fits.code, files_in(tmp_path)) == (0, [])
    assert "nothing was computed" in fits.out


def test_plan_shows_the_plan_of_each_method(pool_dir, tmp_path):
    done = run_cli("compare", "wemoe", "rankone_moe", *own_pool(pool_dir), "plan=true", cwd=tmp_path)
    assert done.code == 1
    assert "== wemoe ==" in done.out
    assert "no problems: the run can start" in done.out
    assert "`rank_k`=32" in done.out
    assert files_in(tmp_path) == []


def test_an_error_that_nobody_foresaw_ends_its_own_method_alone(pool_dir, tmp_path, monkeypatch):
    def broken(self: Any, *_: Any) -> Any:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(SimpleAverageAlgorithm, "run", broken)
    done = run_cli("compare", *STATIC, *own_pool(pool_dir), "output_dir=out", cwd=tmp_path)
    assert done.code == 1
    rows = rows_in(tmp_path / "out")
    assert rows["simple_average"]["error"] == "no memory left"
    assert rows["task_arithmetic"]["error"] is None
    assert rows["task_arithmetic"]["average"] > 0


def test_ctrl_c_keeps_what_is_done(pool_dir, tmp_path, monkeypatch):
    def interrupted(self: Any, *_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(TaskArithmeticAlgorithm, "run", interrupted)
    done = run_cli("compare", *STATIC, *own_pool(pool_dir), "output_dir=out", cwd=tmp_path)
    assert done.code == 130
    assert list(rows_in(tmp_path / "out")) == ["zero_shot", "fine_tuned", "simple_average"]
    assert (tmp_path / "out" / "comparison.png").is_file()
    assert "interrupted: 3 of 4 rows" in done.out + done.err


class Ensemble(nn.Module):
    """The mean of two towers' outputs: a module that is no tower."""

    def __init__(self, towers: list[nn.Module]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        outputs = [pooled_output(tower(pixel_values)) for tower in self.towers]
        return (None, torch.stack(outputs).mean(dim=0))


@pytest.mark.parametrize("kind", ["ensemble", "task models"])
def test_results_that_are_no_single_tower_have_rows_too(pool_dir, tmp_path, monkeypatch, kind):
    def several(self: Any, modelpool: Any, *_: Any) -> Any:
        towers = {name: modelpool.load_model(name) for name in modelpool.model_names}
        return Ensemble(list(towers.values())) if kind == "ensemble" else modelpool.fine_tuned_models()

    monkeypatch.setattr(SimpleAverageAlgorithm, "run", several)
    place = ["output_dir=out", "merged_model_save_path=merged"]
    done = run_cli("compare", *STATIC, *own_pool(pool_dir), *place, cwd=tmp_path)
    assert done.code == 0, done.err
    rows = rows_in(tmp_path / "out")
    row, reference = rows["simple_average"], rows["fine_tuned"]
    assert row["kind"] == "other"
    assert row["stored"] == reference["stored"]
    if kind == "ensemble":
        assert not row["saved"]
        assert row["megabytes"] == pytest.approx(4 * row["stored"] / 1e6, rel=0.01)  # float32, and position indices
        assert row["cost"] > 1.3
        assert not (tmp_path / "merged" / "simple_average").exists()
        assert "tensors in memory" in (tmp_path / "out" / "comparison.md").read_text()
    else:
        assert row["accuracies"] == reference["accuracies"]
        assert row["megabytes"] == pytest.approx(reference["megabytes"])
        assert sorted(p.name for p in (tmp_path / "merged" / "simple_average").iterdir()) == sorted(TASKS)
