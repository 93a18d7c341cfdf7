"""Whole runs of the command line, on small models and images of a user's own."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import TASKS
from lightning_fabric import Fabric
from PIL import Image
from runs import Finished, assert_refused, files_in, own_pool, random_tower, run_cli
from transformers import CLIPVisionModel

from fusion_merge import CLIPVisionModelTaskPool, MergedCLIPVisionModel, WEMoEAlgorithm
from fusion_merge.models.clip import save_tower
from fusion_merge.pools import heads

QUICK = ["method.max_steps=3", "method.batch_size=4"]


def run(pool_dir: Path, cwd: Path, *arguments: str, **models: Path | str) -> Finished:
    """A quick run on the pool of a user's own."""
    return run_cli(*own_pool(pool_dir, **models), *arguments, cwd=cwd)


def output_of(cwd: Path) -> Path:
    """The one output folder of a run."""
    (folder,) = (cwd / "outputs").iterdir()
    return folder


def report_of(cwd: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((output_of(cwd) / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def finished(pool_dir, tmp_path_factory) -> tuple[Path, Finished]:
    """One run of WEMoE, with everything that it can write."""
    cwd = tmp_path_factory.mktemp("work")
    done = run(
        pool_dir,
        cwd,
        "method=wemoe",
        *QUICK,
        "method.save_checkpoint=kept/routers.ckpt",
        "merged_model_save_path=kept/merged",
        "report_save_path=kept/copy.json",
        "print_config=true",
    )
    assert done.code == 0, done.err
    return cwd, done


# What a run leaves behind


def test_run_writes_its_output_folder_and_what_was_asked_for_and_nothing_else(finished):
    cwd, _ = finished
    folder = output_of(cwd)
    assert {path for path in files_in(folder) if "tensorboard" not in path} == {
        "config.yaml",
        "logs",
        "logs/metrics.csv",
        "loss.png",
        "report.json",
        "report.md",
        "routing.png",
    }
    assert files_in(cwd / "kept") == [
        "copy.json",
        "merged",
        "merged/README.md",
        "merged/config.json",
        "merged/model.safetensors",
        "routers.ckpt",
    ]
    assert sorted(path.name for path in cwd.iterdir()) == ["kept", "outputs"]


def test_report_has_scores_of_the_model_and_its_baselines(finished):
    report = report_of(finished[0])
    assert report.keys() == {*TASKS, "average", "model_info", "baselines", "run"}
    assert report["model_info"].keys() == {"trainable_params", "all_params", "trainable_percentage"}
    assert list(report["baselines"]) == ["zero_shot", "fine_tuned", "task_arithmetic"]
    for column in (report, *report["baselines"].values()):
        for row in (*TASKS, "average"):
            assert column[row].keys() == {"accuracy", "loss"}
            assert 0 <= column[row]["accuracy"] <= 1


def test_report_tells_how_the_run_came_about(finished, pool_dir):
    told = report_of(finished[0])["run"]
    assert told["method"] == "wemoe"
    assert told["seed"] == 0
    assert told["options"]["max_steps"] == 3
    assert told["command"].startswith("fusion_merge ")
    assert "method=wemoe" in told["command"]
    assert told["models"] == {"_pretrained_": str(pool_dir / "pretrained")} | {t: str(pool_dir / t) for t in TASKS}
    assert told["adaptation"]["steps"] == 3
    assert told["adaptation"]["interrupted"] is False
    assert {"python", "fusion_merge", "torch", "transformers"} <= told["versions"].keys()
    assert {"method", "evaluation", "baselines"} <= told["seconds"].keys()
    assert {task: [len(row) for row in rows] for task, rows in told["routing"].items()} == {
        task: [2, 2] for task in TASKS
    }


def test_report_command_can_be_pasted_to_run_again(finished, tmp_path):
    words = shlex.split(report_of(finished[0])["run"]["command"])
    again = run_cli(*words[1:], "report_save_path=null", cwd=tmp_path)
    assert again.code == 0, again.err
    first, second = report_of(finished[0]), report_of(tmp_path)
    assert {task: second[task] for task in TASKS} == {task: first[task] for task in TASKS}


def test_report_is_also_written_where_asked(finished):
    cwd, _ = finished
    assert (cwd / "kept" / "copy.json").read_text() == (output_of(cwd) / "report.json").read_text()


def test_written_report_has_the_table_and_its_pictures(finished):
    folder = output_of(finished[0])
    text = (folder / "report.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("|") and "zero shot" in line and "wemoe" in line]
    for picture in ("routing.png", "loss.png"):
        assert f"({picture})" in text
        with Image.open(folder / picture) as image:
            assert image.format == "PNG"
            image.load()


def test_config_is_kept_resolved(finished):
    config = yaml.safe_load((output_of(finished[0]) / "config.yaml").read_text())
    assert config["method"]["_target_"] == "fusion_merge.methods.wemoe.WEMoEAlgorithm"
    assert config["method"]["seed"] == config["seed"] == 0
    assert list(config["taskpool"]["tasks"]) == list(TASKS)


def test_log_has_entropy_and_top_class_share_of_every_task_and_step(finished):
    with (output_of(finished[0]) / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 1, 2]
    for row in rows:
        entropies = [float(row[f"entropy/{task}"]) for task in TASKS]
        assert float(row["entropy/mean"]) == pytest.approx(sum(entropies) / len(entropies))
        assert all(0 < float(row[f"top_class_share/{task}"]) <= 1 for task in TASKS)


def test_terminal_shows_configuration_plan_table_and_where_the_report_is(finished):
    cwd, done = finished
    report = report_of(cwd)
    assert "_target_: fusion_merge.methods.wemoe.WEMoEAlgorithm" in done.out
    assert "method     wemoe" in done.out
    (header,) = [line for line in done.out.splitlines() if line.strip().startswith("task ")]
    assert [title.strip() for title in header.split("  ") if title.strip()] == [
        "task",
        "zero shot",
        "fine tuned",
        "task arithmetic",
        "wemoe",
    ]
    for row in (*TASKS, "average"):
        (line,) = [line for line in done.out.splitlines() if line.split()[:1] == [row]]
        shown = [report["baselines"][b] for b in ("zero_shot", "fine_tuned", "task_arithmetic")] + [report]
        assert line.split()[1:] == [f"{100 * column[row]['accuracy']:.1f}" for column in shown]
    assert str(output_of(cwd).relative_to(cwd) / "report.md") in done.out


def test_saved_model_scores_what_the_report_says(finished, pool_dir):
    cwd, _ = finished
    tasks = {task: str(pool_dir / "images" / task) for task in TASKS}
    pool = CLIPVisionModelTaskPool(tasks, clip_model=str(pool_dir / "pretrained"))
    scores = pool.evaluate(MergedCLIPVisionModel.from_pretrained(cwd / "kept" / "merged"))
    assert scores == {key: report_of(cwd)[key] for key in scores}


def test_saved_routers_give_the_same_scores_without_adaptation(finished, pool_dir, tmp_path):
    cwd, _ = finished
    done = run(pool_dir, tmp_path, "method=wemoe", f"method.checkpoint={cwd / 'kept' / 'routers.ckpt'}")
    assert done.code == 0, done.err
    first, second = report_of(cwd), report_of(tmp_path)
    assert second["run"]["adaptation"] is None
    assert {task: second[task] for task in TASKS} == {task: first[task] for task in TASKS}
    assert not (output_of(tmp_path) / "loss.png").exists()


# What the options of a run do


def test_quiet_run_has_no_configuration_and_no_progress_bars(pool_dir, tmp_path):
    cwd = tmp_path / "work"
    fresh = tmp_path / "fresh"  # images that were never opened before
    for task in TASKS:
        for picture in (pool_dir / "images" / task).rglob("*.png"):
            copy = fresh / picture.relative_to(pool_dir / "images")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(picture.read_bytes())
    tasks = [f"taskpool.tasks.{task}={{data: {fresh / task}}}" for task in TASKS]
    done = run(pool_dir, cwd, "method=wemoe", "fast_dev_run=true", "print_config=false", *tasks)
    assert done.code == 0
    assert "_target_" not in done.out
    assert done.err == ""


def test_fast_dev_run_takes_one_step(pool_dir, tmp_path):
    done = run(pool_dir, tmp_path, "method=rankone_moe", "method.rank_k=4", "fast_dev_run=true")
    assert done.code == 0, done.err
    assert report_of(tmp_path)["run"]["adaptation"]["steps"] == 1


def test_dry_run_writes_nothing(pool_dir, tmp_path):
    done = run(pool_dir, tmp_path, "method=wemoe", "method.save_checkpoint=x.ckpt", "dry_run=true")
    assert done.code == 0, done.err
    assert "nothing was computed or written" in done.out
    assert files_in(tmp_path) == []


def test_output_folder_may_be_named(pool_dir, tmp_path):
    done = run(pool_dir, tmp_path, "method=task_arithmetic", "output_dir=here", "baselines=[]")
    assert done.code == 0, done.err
    assert {"report.json", "report.md", "config.yaml"} <= {path.name for path in (tmp_path / "here").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_no_baselines_if_none_are_wanted(pool_dir, tmp_path):
    assert run(pool_dir, tmp_path, "method=task_arithmetic", "baselines=[]").code == 0
    assert report_of(tmp_path)["baselines"] == {}


def test_method_is_not_its_own_baseline(pool_dir, tmp_path):
    assert run(pool_dir, tmp_path, "method=task_arithmetic").code == 0
    assert list(report_of(tmp_path)["baselines"]) == ["zero_shot", "fine_tuned"]


def test_task_arithmetic_beside_a_routed_method_has_its_own_lambda(pool_dir, tmp_path):
    common = [*QUICK, "baselines=[task_arithmetic]"]
    assert run(pool_dir, tmp_path / "a", "method=wemoe", "method.init_lambda=0.7", *common).code == 0
    assert run(pool_dir, tmp_path / "b", "method=task_arithmetic", "method.scaling_factor=0.3").code == 0
    beside, alone = report_of(tmp_path / "a")["baselines"]["task_arithmetic"], report_of(tmp_path / "b")
    assert {task: beside[task] for task in TASKS} == {task: alone[task] for task in TASKS}


def test_static_method_saves_a_tower_that_transformers_reads(pool_dir, tmp_path):
    done = run(pool_dir, tmp_path, "method=task_arithmetic", "baselines=[]", "merged_model_save_path=merged")
    assert done.code == 0, done.err
    tower, info = CLIPVisionModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    tasks = {task: str(pool_dir / "images" / task) for task in TASKS}
    pool = CLIPVisionModelTaskPool(tasks, clip_model=str(pool_dir / "pretrained"))
    assert pool.evaluate(tower)["average"] == report_of(tmp_path)["average"]


def test_dummy_task_pool_reports_the_size_alone(pool_dir, tmp_path):
    data = [f"modelpool.test_datasets.{task}={{data: {pool_dir / 'images' / task}}}" for task in TASKS]
    models = own_pool(pool_dir)[:2]
    done = run_cli(*models, *data, "method=wemoe", *QUICK, "taskpool=dummy", cwd=tmp_path)
    assert done.code == 0, done.err
    report = report_of(tmp_path)
    assert report.keys() == {"model_info", "baselines", "run"}
    assert report["run"]["adaptation"]["steps"] == 3
    assert f"{report['model_info']['all_params']:,} parameters" in done.out


def test_heads_are_made_once_though_both_pools_have_the_images(pool_dir, tmp_path, monkeypatch):
    calls: list[str] = []
    embed = heads.text_embeddings

    def count(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> torch.Tensor:
        calls.append(prompts[0])
        return embed(model, tokenizer, prompts, **options)

    monkeypatch.setattr(heads, "text_embeddings", count)
    data = [f"modelpool.test_datasets.{task}={{data: {pool_dir / 'images' / task}}}" for task in TASKS]
    assert run(pool_dir, tmp_path, *data, "method=wemoe", *QUICK).code == 0
    assert len(calls) == len(TASKS)


def test_fine_tuning_writes_towers_that_can_be_merged(pool_dir, tmp_path):
    data = [f"modelpool.train_datasets.{task}={{data: {pool_dir / 'images' / task}}}" for task in TASKS]
    models = f"modelpool.models={{_pretrained_: {pool_dir / 'pretrained'}}}"
    tasks = [argument for argument in own_pool(pool_dir) if argument.startswith("taskpool.")]
    tuning = ["method=clip_finetune", "method.max_steps=2", "method.batch_size=4", "method.output=tuned"]
    done = run_cli("modelpool=clip_vision", models, *data, *tasks, *tuning, cwd=tmp_path / "a")
    assert done.code == 0, done.err
    tuned = {task: tmp_path / "a" / "tuned" / task for task in TASKS}
    assert run(pool_dir, tmp_path / "b", "method=simple_average", **tuned).code == 0
    first, second = report_of(tmp_path / "a"), report_of(tmp_path / "b")["baselines"]["fine_tuned"]
    assert {task: first[task] for task in TASKS} == {task: second[task] for task in TASKS}


def test_documented_command_loads_routers_and_scores_nothing(finished, pool_dir, tmp_path):
    checkpoint = finished[0] / "kept" / "routers.ckpt"
    options = ["method.batch_size=4", "method.devices=4", "taskpool=dummy"]
    done = run_cli(
        "print_config=false",
        "method=weight_ensembling_moe",
        "method.name=clip_weight_ensembling_moe",
        f"method.checkpoint={checkpoint}",
        *options,
        *own_pool(pool_dir)[:2],
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    assert report_of(tmp_path)["model_info"] == report_of(finished[0])["model_info"]


def test_python_gives_the_same_scores_as_the_command_line(finished, modelpool, taskpool):
    model = WEMoEAlgorithm(max_steps=3, batch_size=4).run(modelpool)
    scores = taskpool.evaluate(model)
    assert scores == {key: report_of(finished[0])[key] for key in scores}


def test_second_run_into_a_folder_leaves_nothing_of_the_first(pool_dir, tmp_path):
    common = ["output_dir=here", "baselines=[]"]
    assert run(pool_dir, tmp_path, "method=wemoe", *QUICK, *common).code == 0
    assert run(pool_dir, tmp_path, "method=task_arithmetic", *common).code == 0
    left = files_in(tmp_path / "here")
    assert "report.json" in left
    assert not {"loss.png", "routing.png", "logs/metrics.csv"} & set(left)


def test_second_run_into_a_folder_has_a_log_of_its_own(pool_dir, tmp_path):
    for steps in (5, 2):
        done = run(pool_dir, tmp_path, "method=wemoe", *QUICK, f"method.max_steps={steps}", "output_dir=here")
        assert done.code == 0, done.err
    assert len((tmp_path / "here" / "logs" / "metrics.csv").read_text().splitlines()) == 1 + 2


def test_mixed_precision_runs(pool_dir, tmp_path):
    done = run(pool_dir, tmp_path, "method=wemoe", *QUICK, "baselines=[]", "fabric.precision=bf16-mixed")
    assert done.code == 0, done.err
    assert 0 < report_of(tmp_path)["average"]["loss"] < 100


def test_double_precision_runs(pool_dir, tmp_path):
    done = run(pool_dir, tmp_path, "method=wemoe", *QUICK, "baselines=[]", "fabric.precision=64-true")
    assert done.code == 0, done.err
    assert 0 < report_of(tmp_path)["average"]["loss"] < 100


def test_mixed_half_precision_is_bfloat16_on_a_cpu(pool_dir, tmp_path):
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU. Using `precision='bf16-mixed'`"):
        Fabric(accelerator="cpu", devices=1, precision="16-mixed")
    for precision in ("16-mixed", "bf16-mixed"):
        options = ["baselines=[]", "fabric.accelerator=cpu", f"fabric.precision={precision}"]
        done = run(pool_dir, tmp_path / precision, "method=wemoe", *QUICK, *options)
        assert done.code == 0, done.err
    half, bfloat = report_of(tmp_path / "16-mixed"), report_of(tmp_path / "bf16-mixed")
    assert {task: half[task] for task in TASKS} == {task: bfloat[task] for task in TASKS}


@pytest.mark.parametrize("dry", [[], ["dry_run=true"]], ids=["run", "dry run"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_routers_in_half_precision_are_refused(pool_dir, tmp_path, precision, dry):
    done = run(pool_dir, tmp_path, "method=wemoe", *QUICK, f"fabric.precision={precision}", *dry)
    assert_refused(done, tmp_path, "`fabric.precision`", precision, "bf16-mixed")


def test_two_processes_share_the_work(finished, pool_dir, tmp_path):
    options = ["method=wemoe", *QUICK, "baselines=[zero_shot]", "fabric.accelerator=cpu", "fabric.devices=2"]
    process = subprocess.run(
        [sys.executable, "-m", "fusion_merge", *own_pool(pool_dir), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    report = report_of(tmp_path)
    assert report["run"]["adaptation"]["steps"] == 3
    alone = report_of(finished[0])["baselines"]["zero_shot"]
    for row in (*TASKS, "average"):
        assert report["baselines"]["zero_shot"][row] == pytest.approx(alone[row], rel=1e-5)


# Seeds


def routers_of(folder: Path) -> dict[str, torch.Tensor]:
    model = MergedCLIPVisionModel.from_pretrained(folder)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("seeds", "same"), [((5, 5), True), ((5, 6), False)])
def test_seed_decides_the_result(pool_dir, tmp_path, seeds, same):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder, seed in zip(folders, seeds, strict=True):
        saving = [f"seed={seed}", "merged_model_save_path=merged", "baselines=[]"]
        assert run(pool_dir, folder, "method=wemoe", *QUICK, *saving).code == 0
    first, second = (routers_of(folder / "merged") for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first) == same


def test_multirun_writes_a_report_a_seed(pool_dir, tmp_path):
    arguments = [*own_pool(pool_dir), "method=wemoe", *QUICK, "seed=3,4", "baselines=[]"]
    done = run_cli("--multirun", *arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    reports = {file.parent.name: json.loads(file.read_text()) for file in output_of(tmp_path).glob("*/report.json")}
    assert {name: report["run"]["seed"] for name, report in reports.items()} == {"0": 3, "1": 4}
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}


def test_multirun_into_a_named_folder_keeps_runs_apart(pool_dir, tmp_path):
    arguments = [*own_pool(pool_dir), "method=task_arithmetic,simple_average", "output_dir=here", "baselines=[]"]
    done = run_cli("--multirun", *arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    methods = {json.loads(f.read_text())["run"]["method"] for f in (tmp_path / "here").glob("*/report.json")}
    assert methods == {"task_arithmetic", "simple_average"}


def test_multirun_keeps_apart_what_its_jobs_write(pool_dir, tmp_path):
    places = ["output_dir=here", "merged_model_save_path=kept/merged", "report_save_path=kept/rep.json"]
    saving = [*places, "method.save_checkpoint=kept/routers.ckpt", "baselines=[]"]
    done = run_cli("--multirun", *own_pool(pool_dir), "method=wemoe", *QUICK, *saving, "seed=3,4", cwd=tmp_path)
    assert done.code == 0, done.err
    assert [path.name for path in sorted((tmp_path / "kept").iterdir())] == [
        "merged",
        "rep-0.json",
        "rep-1.json",
        "routers-0.ckpt",
        "routers-1.ckpt",
    ]
    for job, seed in enumerate((3, 4)):
        assert json.loads((tmp_path / "kept" / f"rep-{job}.json").read_text())["run"]["seed"] == seed
        config = yaml.safe_load((tmp_path / "here" / str(job) / "config.yaml").read_text())
        assert config["merged_model_save_path"] == f"kept/merged/{job}"
        assert config["method"]["save_checkpoint"] == f"kept/routers-{job}.ckpt"
    first, second = (routers_of(tmp_path / "kept" / "merged" / str(job)) for job in (0, 1))
    assert not all(torch.equal(first[name], second[name]) for name in first)


# Bad input: exit code 1, one message that names the value, nothing written


@pytest.fixture
def cwd(tmp_path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("path", ["/no/such/model", "./no_such_model", "no_such_model", "no_such/model"])
def test_missing_model_is_refused(pool_dir, cwd, path):
    assert_refused(run(pool_dir, cwd, "method=wemoe", *QUICK, dogs=path), cwd, "`dogs`", path)


def test_missing_pretrained_model_is_refused(pool_dir, cwd):
    done = run(pool_dir, cwd, "method=wemoe", *QUICK, _pretrained_="/no/such/model")
    assert_refused(done, cwd, "`_pretrained_`", "`/no/such/model` does not exist")


def test_null_where_a_dataset_belongs_is_refused(pool_dir, cwd):
    assert_refused(run(pool_dir, cwd, "method=wemoe", "taskpool.tasks.dogs=null"), cwd, "`dogs`")


def test_missing_images_are_refused(pool_dir, cwd):
    done = run(pool_dir, cwd, "method=wemoe", *QUICK, "taskpool.tasks.dogs={data: /no/such/images}")
    assert_refused(done, cwd, "`/no/such/images` does not exist", "`dogs`")


def test_models_of_different_shapes_are_refused(pool_dir, cwd, tmp_path):
    save_tower(random_tower(1, intermediate_size=32), tmp_path / "wide")
    done = run(pool_dir, cwd, "method=wemoe", *QUICK, dogs=tmp_path / "wide")
    assert_refused(done, cwd, "`dogs`", "`encoder.layers.0.mlp.fc1.", "32", "24")


def test_pretrained_model_without_a_text_tower_is_refused(pool_dir, cwd):
    done = run(pool_dir, cwd, "method=wemoe", *QUICK, _pretrained_=pool_dir / "cats")
    assert_refused(done, cwd, str(pool_dir / "cats"))


def test_unknown_task_key_is_refused(pool_dir, cwd):
    done = run(pool_dir, cwd, "method=wemoe", "taskpool.tasks.dogs.classname=[a,b,c]")
    assert_refused(done, cwd, "`classname`", "`dogs`", "did you mean `classnames`")


def test_model_without_a_task_is_refused(pool_dir, cwd):
    models = [argument for argument in own_pool(pool_dir) if "tasks.dogs" not in argument]
    done = run_cli(*models, "method=wemoe", *QUICK, cwd=cwd)
    assert_refused(done, cwd, "`dogs`")


def test_images_without_labels_are_refused(pool_dir, cwd):
    done = run(pool_dir, cwd, "method=wemoe", f"taskpool.tasks.dogs={{data: {pool_dir}/images/dogs/husky}}")
    assert_refused(done, cwd, "`dogs` has no label column")


def test_more_labels_than_class_names_are_refused(pool_dir, cwd):
    done = run(pool_dir, cwd, "method=wemoe", "taskpool.tasks.dogs.classnames=[hound,curly]")
    assert_refused(done, cwd, "there are 2 class names for `dogs`, but its dataset has 3 classes")


def test_empty_dataset_is_refused(pool_dir, cwd, tmp_path):
    Dataset.from_dict({"image": [], "label": []}).to_parquet(tmp_path / "empty.parquet")
    done = run(pool_dir, cwd, "method=wemoe", f"taskpool.tasks.dogs={{data: {tmp_path / 'empty.parquet'}}}")
    assert_refused(done, cwd, "the dataset of `dogs` is empty")


@pytest.mark.parametrize("dry", [[], ["dry_run=true"]], ids=["run", "dry run"])
def test_empty_dataset_of_the_model_pool_is_refused(pool_dir, cwd, tmp_path, dry):
    Dataset.from_dict({"image": [], "label": []}).to_parquet(tmp_path / "empty.parquet")
    data = [f"modelpool.test_datasets.{task}={{data: {tmp_path / 'empty.parquet'}}}" for task in TASKS]
    assert_refused(run(pool_dir, cwd, "method=wemoe", *data, *dry), cwd, "the dataset of `cats` is empty")


@pytest.mark.parametrize("dry", [[], ["dry_run=true"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("option", "texts"),
    [
        ("method.rank_k=64", ["`rank_k`=64", "1-16", "`encoder.layers.0.mlp.fc1`"]),
        ("method.rank_k=0", ["`rank_k`=0", "1-16"]),
        ("method.select_k=9", ["`select_k`=9", "1-8"]),
        ("method.svd_accelerator=tpux", ["`svd_accelerator`='tpux'"]),
    ],
)
def test_impossible_option_is_refused(pool_dir, cwd, option, texts, dry):
    done = run(pool_dir, cwd, "method=rankone_moe", "method.rank_k=4", option, *QUICK, *dry)
    assert_refused(done, cwd, *texts)


def test_checkpoint_of_another_pool_is_refused(finished, pool_dir, cwd, tmp_path):
    save_tower(random_tower(1), tmp_path / "other")
    checkpoint = f"method.checkpoint={finished[0] / 'kept' / 'routers.ckpt'}"
    done = run(pool_dir, cwd, "method=wemoe", checkpoint, dogs=tmp_path / "other")
    assert_refused(done, cwd, "routers.ckpt", "`fingerprints.dogs`")


def test_checkpoint_of_another_method_is_refused(finished, pool_dir, cwd):
    checkpoint = f"method.checkpoint={finished[0] / 'kept' / 'routers.ckpt'}"
    assert_refused(run(pool_dir, cwd, "method=e_wemoe", checkpoint), cwd, "routers.ckpt", "`method`", "'wemoe'")


@pytest.mark.parametrize("dry", [[], ["dry_run=true"]], ids=["run", "dry run"])
def test_missing_checkpoint_is_refused(pool_dir, cwd, dry):
    done = run(pool_dir, cwd, "method=wemoe", "method.checkpoint=no_such.ckpt", *dry)
    assert_refused(done, cwd, "no_such.ckpt` does not exist")


def test_pool_with_one_model_is_refused(pool_dir, cwd):
    done = run(pool_dir, cwd, "method=wemoe", *QUICK, dogs="null")
    assert_refused(done, cwd, "1 fine-tuned model", "at least 2")


def test_merged_model_of_a_method_that_makes_none_is_refused(pool_dir, cwd):
    data = [f"modelpool.train_datasets.{task}={{data: {pool_dir / 'images' / task}}}" for task in TASKS]
    done = run(pool_dir, cwd, *data, "method=clip_finetune", "method.max_steps=1", "merged_model_save_path=merged")
    assert_refused(done, cwd, "`merged_model_save_path`='merged'", "clip_finetune")


@pytest.mark.parametrize(
    "option", ["output_dir", "merged_model_save_path", "report_save_path", "method.save_checkpoint"]
)
def test_place_that_cannot_be_written_to_is_refused(pool_dir, cwd, tmp_path, option):
    (tmp_path / "file").touch()
    done = run(pool_dir, cwd, "method=wemoe", *QUICK, f"{option}={tmp_path}/file/below")
    assert_refused(done, cwd, f"{tmp_path}/file/below")


@pytest.mark.parametrize("dry", [[], ["dry_run=true"]], ids=["run", "dry run"])
@pytest.mark.parametrize("option", ["report_save_path", "method.save_checkpoint"])
def test_folder_where_a_file_is_to_be_written_is_refused(pool_dir, cwd, tmp_path, option, dry):
    done = run(pool_dir, cwd, "method=wemoe", *QUICK, f"{option}={tmp_path}", *dry)
    assert_refused(done, cwd, f"`{option}`='{tmp_path}'", f"`{tmp_path}` is a folder; name a file")


@pytest.mark.parametrize("dry", [[], ["dry_run=true"]], ids=["run", "dry run"])
@pytest.mark.parametrize("option", ["output_dir", "merged_model_save_path"])
def test_file_where_a_folder_is_to_be_written_is_refused(pool_dir, cwd, tmp_path, option, dry):
    (tmp_path / "file").write_text("precious")
    done = run(pool_dir, cwd, "method=wemoe", *QUICK, f"{option}={tmp_path}/file", *dry)
    assert_refused(done, cwd, f"`{option}`='{tmp_path}/file'", f"`{tmp_path}/file` is a file, not a folder")
    assert (tmp_path / "file").read_text() == "precious"


# Ctrl-C


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupted_adaptation_goes_on_to_a_report(pool_dir, tmp_path):
    arguments = [*own_pool(pool_dir), "method=wemoe", "method.max_steps=1000000", "method.batch_size=4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fusion_merge", *arguments, "output_dir=here", "baselines=[]"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        metrics = tmp_path / "here" / "logs" / "metrics.csv"
        for _ in range(900):
            if process.poll() is not None or (metrics.exists() and metrics.stat().st_size):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    report = json.loads((tmp_path / "here" / "report.json").read_text())
    assert report["run"]["adaptation"]["interrupted"] is True
    assert 0 < report["run"]["adaptation"]["steps"] < 1_000_000
    assert "interrupted after step" in out
    assert "ended early by an interrupt" in (tmp_path / "here" / "report.md").read_text()
    steps = [int(row["step"]) for row in csv.DictReader(metrics.read_text().splitlines())]
    assert steps == list(range(report["run"]["adaptation"]["steps"]))
