"""The command line: what composes, what is shown, and what is refused. Whole runs are in e2e/test_program.py."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import TASKS
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from lightning_fabric import Fabric
from omegaconf import OmegaConf
from runs import assert_refused, files_in, own_pool, run_cli

from fusion_merge import cli, explanations
from fusion_merge.errors import ConfigError
from fusion_merge.schema import register_schema

PRESETS = Path(str(files("fusion_merge.config")))
YAMLS = sorted(str(file.relative_to(PRESETS)) for file in PRESETS.rglob("*.yaml"))
HERE = [
    file for file in YAMLS if file.startswith(("config", "method", "tuned")) or "tiny" in file or "clip_vision" in file
]
"""The others are those of published pools: see test_presets.py."""


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    register_schema()
    yield
    GlobalHydra.instance().clear()


def composed(*overrides: str) -> dict[str, Any]:
    """The configuration of a command line, as plain values."""
    with initialize_config_module("fusion_merge.config", version_base="1.3"):
        config = compose("config", overrides=list(overrides))
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return plain


def python(code_or_module: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": ""}
    return subprocess.run(
        [sys.executable, *code_or_module], cwd=cwd, capture_output=True, text=True, timeout=120, env=environment
    )


# Presets


@pytest.mark.parametrize(
    ("path", "short", "target"),
    [
        ("rankone_moe/rankone_moe", "rankone_moe", "rankone_moe.RankOneMoEAlgorithm"),
        ("wemoe/weight_ensembling_moe", "wemoe", "wemoe.WEMoEAlgorithm"),
        ("weight_ensembling_moe", "wemoe", "wemoe.WEMoEAlgorithm"),
        ("wemoe/sparse_weight_ensembling_moe", "e_wemoe", "e_wemoe.EWEMoEAlgorithm"),
        ("sparse_weight_ensembling_moe", "e_wemoe", "e_wemoe.EWEMoEAlgorithm"),
    ],
)
@pytest.mark.parametrize("pool", ["tiny8", "clip_vision"])
def test_long_path_is_the_short_one(path, short, target, pool):
    long = composed(f"method={path}", f"modelpool={pool}")["method"]
    assert long["_target_"] == f"fusion_merge.methods.{target}"
    assert long == composed(f"method={short}", f"modelpool={pool}")["method"]


@pytest.mark.parametrize("file", HERE)
def test_every_preset_composes(file):
    group, _, name = file.removesuffix(".yaml").rpartition("/")
    overrides = [f"{group}={name}"] if group else []
    if group.startswith("tuned/"):
        pool, _, method = file.removeprefix("tuned/").removesuffix(".yaml").partition("/")
        overrides = [f"modelpool={pool}", f"method={method}"]
    elif group.startswith("method/"):
        overrides = [f"method={file.removeprefix('method/').removesuffix('.yaml')}"]
    elif group == "dataset":
        overrides = ["modelpool=clip_vision", f"+dataset@modelpool.test_datasets={name}"]
    config = composed(*overrides)
    assert all(config[part]["_target_"] for part in ("method", "modelpool", "taskpool"))


def test_default_job_is_rankone_moe_on_tiny8():
    config = composed()
    assert config["method"]["_target_"].endswith(".RankOneMoEAlgorithm")
    assert config["modelpool"]["models"]["_pretrained_"] == "zoo://tiny8/pretrained"
    assert list(config["taskpool"]["tasks"]) == [n for n in config["modelpool"]["models"] if n != "_pretrained_"]
    assert config["seed"] == 0


TUNED = sorted(
    file.removeprefix("tuned/tiny8/").removesuffix(".yaml") for file in YAMLS if file.startswith("tuned/tiny8")
)


@pytest.mark.parametrize("method", TUNED)
def test_tuned_options_hold_on_tiny8_and_nowhere_else(method):
    tiny8, own = (composed(f"method={method}", f"modelpool={pool}")["method"] for pool in ("tiny8", "clip_vision"))
    tuned = yaml.safe_load((PRESETS / f"tuned/tiny8/{method}.yaml").read_text("utf-8"))
    tuned = {key: float(v) if isinstance(v, str) else v for key, v in tuned.items()}  # 1e-3 is a text in YAML 1.1
    assert {key: tiny8[key] for key in tuned} == tuned
    assert {key for key in own if own[key] != tiny8[key]} == tuned.keys()


def test_every_name_of_a_tuned_method_is_tuned():
    paths = [file.removeprefix("method/").removesuffix(".yaml") for file in YAMLS if file.startswith("method/")]
    tiny8, own = (
        {path: composed(f"method={path}", f"modelpool={pool}")["method"] for path in paths}
        for pool in ("tiny8", "clip_vision")
    )
    others = [(path, method) for path in paths for method in TUNED if path != method and own[path] == own[method]]
    assert {method for _, method in others} >= {"wemoe", "e_wemoe", "rankone_moe", "ties_merging", "iso_c"}
    assert [path for path, method in others if tiny8[path] != tiny8[method]] == []


def test_option_on_the_command_line_beats_a_tuned_one():
    assert composed("method=wemoe", "method.lr=0.5")["method"]["lr"] == 0.5


@pytest.mark.parametrize("method", ["rankone_moe", "wemoe", "e_wemoe", "clip_finetune"])
def test_seed_and_fast_dev_run_of_the_run_reach_the_method(method):
    options = composed(f"method={method}", "seed=7", "fast_dev_run=true")["method"]
    assert (options["seed"], options["fast_dev_run"]) == (7, True)


def test_fast_dev_run_reaches_both_pools():
    config = composed("fast_dev_run=true")
    assert config["modelpool"]["fast_dev_run"] is config["taskpool"]["fast_dev_run"] is True


# What is shown


def test_help_is_quick_and_shows_presets_and_options(tmp_path):
    code = (
        "import sys; from fusion_merge.cli import main\n"
        "try:\n    sys.argv = ['fusion_merge', '--help']; main()\n"
        "finally:\n    sys.exit('torch' in sys.modules)"
    )
    done = python(["-c", code], tmp_path)
    assert done.returncode == 0, "torch was imported" + done.stderr
    for text in ("usage: fusion_merge", "rankone_moe", "tiny8_unseen", "merged_model_save_path", "--multirun"):
        assert text in done.stdout
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["method=wemoe", "--help"], "methods.wemoe.WEMoEAlgorithm"),
        (["-m", "method=e_wemoe,wemoe", "seed=0,1", "-h"], "methods.e_wemoe.EWEMoEAlgorithm"),
        (["method=wemoe", "--cfg", "job", "--help"], "methods.wemoe.WEMoEAlgorithm"),
        (["--config-dir", "own", "method=mine", "--help"], "methods.dummy.DummyAlgorithm"),
        (["--config-dir=own", "method=mine", "--help"], "methods.dummy.DummyAlgorithm"),
        (["--hydra-help"], "--multirun"),
    ],
)
def test_help_is_about_what_was_chosen(tmp_path, arguments, shown):
    (tmp_path / "own" / "method").mkdir(parents=True)
    (tmp_path / "own" / "method" / "mine.yaml").write_text("_target_: fusion_merge.methods.dummy.DummyAlgorithm\n")
    done = run_cli(*arguments, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert shown in done.out
    assert ("mine," in done.out) == any("own" in argument for argument in arguments)


@pytest.mark.parametrize("name", ["préréglages", "a b,'c"])
def test_help_reads_the_folder_of_presets_whatever_its_name(tmp_path, name):
    (tmp_path / name / "method").mkdir(parents=True)
    (tmp_path / name / "method" / "mine.yaml").write_text("_target_: fusion_merge.methods.dummy.DummyAlgorithm\n")
    done = run_cli("--config-dir", name, "--help", "method=mine", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert "methods.dummy.DummyAlgorithm" in done.out


def test_help_with_a_folder_of_presets_that_is_not_there_names_it(tmp_path):
    done = run_cli("--config-dir", "nix", "--help", cwd=tmp_path)
    assert_refused(done, tmp_path, "nix' not found")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--help", "--config-dir"],
        ["--help", "--cfg", "nonsense"],
        ["--help", "--config-dir", "a", "--config-dir", "b"],
        ["--help", "--config-dir", "a", "hydra.searchpath=[file://b]"],
        ["--help", "--config-dir", "nix"],
        ["--help", "--resolve"],
        ["method=glob(*)", "--help"],
    ],
)
def test_help_is_left_to_hydra_where_it_alone_knows(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    for folder in "ab":
        (tmp_path / folder).mkdir()
    assert (cli._help_on(arguments) is None) == (len(arguments) > 1)


def test_config_folder_where_one_works_changes_nothing(tmp_path):
    clean, hostile = tmp_path / "clean", tmp_path / "hostile"
    (hostile / "config" / "method").mkdir(parents=True)
    clean.mkdir()
    (hostile / "config" / "__init__.py").touch()
    (hostile / "config" / "config.yaml").write_text("seed: 99\nmethod: {_target_: builtins.dict}\n")
    (hostile / "config" / "method" / "rankone_moe.yaml").write_text("rank_k: 99\n")
    shown = [python(["-m", "fusion_merge", "--cfg", "job"], folder) for folder in (clean, hostile)]
    assert [done.returncode for done in shown] == [0, 0]
    assert yaml.safe_load(shown[0].stdout)["seed"] == 0
    assert shown[0].stdout == shown[1].stdout


@pytest.mark.parametrize("argument", ["tuned=null", "+tuned=NULL", "tuned="])
def test_tuned_null_leaves_the_options_that_were_tuned_for_a_pool_out(argument, tmp_path):
    tuned, published = (run_cli("method=wemoe", *more, "--cfg", "job", cwd=tmp_path) for more in ([], [argument]))
    assert (published.code, published.err) == (0, "")
    assert "max_steps: 1000" in published.out
    assert "max_steps: 1000" not in tuned.out


def test_cfg_job_shows_the_configuration_and_runs_nothing(tmp_path):
    done = run_cli("method=wemoe", "seed=3", "--cfg", "job", cwd=tmp_path)
    shown = yaml.safe_load(done.out)
    assert done.code == 0
    assert shown["seed"] == 3
    assert shown["method"]["_target_"] == "fusion_merge.methods.wemoe.WEMoEAlgorithm"
    assert files_in(tmp_path) == []


# Names that are accepted


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("rankone_moe/rankone_moe", "clip_rankone_wemoe"),
        ("rankone_moe/rankone_moe", "clip_rankone_moe"),
        ("rankone_moe", "rankone_moe"),
        ("weight_ensembling_moe", "clip_weight_ensembling_moe"),
        ("wemoe", "weight_ensembling_moe"),
        ("wemoe/sparse_weight_ensembling_moe", "sparse_clip_weight_ensembling_moe"),
        ("e_wemoe", "sparse_weight_ensembling_moe"),
    ],
)
def test_documented_method_name_is_accepted(pool_dir, tmp_path, method, name):
    rank = ["method.rank_k=4"] if "rankone" in method else []
    done = run_cli(
        f"method={method}", f"method.name={name}", *rank, *own_pool(pool_dir), "dry_run=true", cwd=tmp_path / "work"
    )
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("taskpool.dataloader_kwargs.batch_size=32", "taskpool.dataloader_kwargs", {"batch_size": 32}),
        ("taskpool.dataloader_kwargs={num_workers: 0}", "taskpool.dataloader_kwargs", {"num_workers": 0}),
        ("modelpool.platform=hf", "modelpool.platform", "hf"),
        ("modelpool.processor={_target_: a.b, c: 1}", "modelpool.processor", {"_target_": "a.b", "c": 1}),
        ("modelpool.processor._target_=a.b", "modelpool.processor", {"_target_": "a.b"}),
        ("taskpool.processor={_target_: a.b}", "taskpool.processor", {"_target_": "a.b"}),
        ("taskpool.clip_model={_target_: a.b, path: c}", "taskpool.clip_model", {"_target_": "a.b", "path": "c"}),
        ("taskpool.clip_model._target_=a.b", "taskpool.clip_model", {"_target_": "a.b"}),
    ],
)
@pytest.mark.parametrize("pool", ["tiny8", "clip_vision"])
def test_documented_option_of_the_pools_is_accepted(tmp_path, pool, argument, key, value):
    models = ["modelpool.models={_pretrained_: x}"] if pool == "clip_vision" else []
    done = run_cli(f"modelpool={pool}", *models, argument, "--cfg", "job", cwd=tmp_path)
    assert done.code == 0, done.err
    part, name = key.split(".")
    assert yaml.safe_load(done.out)[part][name] == value


def test_table_of_tasks_may_be_given_at_once(tmp_path):
    models = ["modelpool=clip_vision", "modelpool.models={_pretrained_: x}"]
    done = run_cli(*models, "taskpool.tasks={cats: {data: x}}", "--cfg", "job", cwd=tmp_path)
    assert done.code == 0, done.err
    assert yaml.safe_load(done.out)["taskpool"]["tasks"] == {"cats": {"data": "x"}}


def test_batch_size_under_fusion_bench_s_name_reaches_the_task_pool(pool_dir, tmp_path):
    options = ["taskpool.dataloader_kwargs.batch_size=3", "modelpool.platform=hf", "dry_run=true"]
    done = run_cli("method=wemoe", *own_pool(pool_dir), *options, cwd=tmp_path)
    assert done.code == 0, done.err


# Sweeps


@pytest.mark.parametrize(
    ("key", "given", "numbered"),
    [
        ("output_dir", "here", "here/7"),
        ("output_dir", "~/a b/", "~/a b/7"),
        ("merged_model_save_path", "kept/merged", "kept/merged/7"),
        ("report_save_path", "rep.json", "rep-7.json"),
        ("report_save_path", "kept/rep.v1.json", "kept/rep.v1-7.json"),
        ("report_save_path", ".", "."),
        ("report_save_path", None, None),
        ("method.save_checkpoint", "/kept/wemoe.ckpt", "/kept/wemoe-7.ckpt"),
        ("method.save_checkpoint", "wemoe", "wemoe-7"),
        ("method.save_checkpoint", False, False),
        ("method.output", "tuned", "tuned/7"),
        ("method.checkpoint", "wemoe.ckpt", "wemoe.ckpt"),
    ],
)
def test_job_of_a_sweep_has_its_number_in_what_it_writes(key, given, numbered):
    part, _, name = key.rpartition(".")
    config: dict[str, Any] = {"method": {}, "output_dir": None}
    table = config[part] if part else config
    table[name] = given
    cli._keep_apart(config, 7)
    assert table[name] == numbered


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["method=wemoe,e_wemoe", "method.zzzzzz=3"], ["`method.zzzzzz` is not an option", "known are"]),
        (["method=rankone_moe,wemoe", "method.rank=3"], ["`method.rank` is not an option", "did you mean `rank_k`"]),
        (["method=choice(rankone_moe/rankone_moe,wemoe)", "method.rank=3"], ["did you mean `rank_k`"]),
        (["method='rankone_moe',wemoe", "method.rank=3"], ["did you mean `rank_k`"]),
        (["method=glob(*)", "method.rank=3"], ["`method.rank`", "--cfg job"]),
        (["method=wemoe", "modelpool=tiny8,clip_vision", "modelpool.model.a=b"], ["did you mean `models`"]),
        (["seed=1,2", "method.rank=3"], ["did you mean `rank_k`"]),
        (["method=wemo,e_wemoe"], ["`method=wemo`", "did you mean `wemoe`"]),
    ],
)
def test_wrong_key_in_a_sweep_is_refused_in_one_line(tmp_path, arguments, texts):
    done = run_cli("--multirun", *arguments, f"hydra.sweep.dir={tmp_path / 'sweep'}", cwd=tmp_path / "work")
    assert_refused(done, tmp_path / "work", *texts)


@pytest.mark.parametrize("broken", [RuntimeError("no presets"), ConfigError("no presets"), KeyError("x")])
def test_explaining_a_wrong_key_never_fails_itself(tmp_path, monkeypatch, broken):
    def fail() -> None:
        raise broken

    monkeypatch.setattr(explanations, "_selected_config", fail)
    assert_refused(run_cli("method.rank=3", cwd=tmp_path), tmp_path, "`method.rank` is not an option")


# What is refused


@pytest.mark.parametrize(
    ("argument", "texts"),
    [
        ("method=wemo", ["`method=wemo`", "did you mean `wemoe`"]),
        ("method=rankone", ["`method=rankone`", "did you mean `rankone_moe`"]),
        ("method=wemoe/weight_ensemblingmoe", ["weight_ensemblingmoe", "did you mean", "weight_ensembling_moe`"]),
        ("modelpool=tiny9", ["`modelpool=tiny9`", "did you mean `tiny8`"]),
        ("taskpool=dumy", ["`taskpool=dumy`", "did you mean `dummy`"]),
        ("method.rank=3", ["`method.rank`", "did you mean `rank_k`"]),
        ("+method.rank=3", ["`method.rank`", "did you mean `rank_k`"]),
        ("sed=1", ["`sed`", "did you mean `seed`"]),
        ("fabric.device=1", ["`fabric.device`", "did you mean `devices`"]),
        ("taskpool.batchsize=3", ["`taskpool.batchsize`", "did you mean `batch_size`"]),
        ("taskpool.dataloader_kwarg.batch_size=3", ["`taskpool.dataloader_kwarg`", "did you mean `dataloader_kwargs`"]),
        ("modelpool.platfrm=hf", ["`modelpool.platfrm` is not an option"]),
        ("modelpool.platform=keras", ["`platform`='keras'", "hf"]),
        ("taskpool.task.cats=x", ["`taskpool.task`", "did you mean `tasks`"]),
        ("modelpool.model.cats=x", ["`modelpool.model`", "did you mean `models`"]),
        ("modelpol.models.cats=x", ["`modelpol`", "did you mean `modelpool`"]),
        ("seed=abc", ["`seed`", "abc"]),
        ("seed=-1", ["`seed`=-1"]),
        ("seed=1.5", ["`seed`", "1.5"]),
        ("dry_run=maybe", ["`dry_run`", "maybe"]),
        ("baselines=[zeroshot]", ["`baselines`", "'zeroshot'", "did you mean `zero_shot`"]),
        ("baselines=zero_shot", ["`baselines`", "zero_shot"]),
        ("method.name=wemoe", ["`name`='wemoe'", "rankone_moe"]),
        ("method.rank_k=many", ["`rank_k`='many'", "int"]),
        ("method.lr=-1", ["`lr`=-1.0", "above 0"]),
        ("method.optimizer=adm", ["`optimizer`='adm'", "adam"]),
        ("method=null", ["`method`"]),
        ("modelpool=null", ["`modelpool`"]),
    ],
)
def test_wrong_argument_is_refused_in_one_line(argument, texts, tmp_path):
    assert_refused(run_cli(argument, cwd=tmp_path), tmp_path, *texts)


@pytest.mark.parametrize(
    ("argument", "text"),
    [("method=wemoe,e_wemoe", "--multirun"), ("taskpool.tasks.cats={data", "{data")],
)
def test_argument_that_cannot_be_read_is_refused_in_hydra_s_words(argument, text, tmp_path):
    done = run_cli(argument, cwd=tmp_path)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert text in done.err
    assert "Traceback" not in done.err
    assert files_in(tmp_path) == []


def test_pool_without_models_is_refused(tmp_path):
    assert_refused(run_cli("modelpool=clip_vision", cwd=tmp_path), tmp_path, "`modelpool.models` has no value")


def test_pool_without_tasks_is_refused(pool_dir, tmp_path):
    models = [argument for argument in own_pool(pool_dir) if argument.startswith("modelpool")]
    assert_refused(run_cli(*models, cwd=tmp_path), tmp_path, "no tasks", "taskpool=dummy")


@pytest.mark.parametrize(
    ("fabric", "texts"),
    [
        ("fabric.accelerator=tpux", ["tpux"]),
        ("fabric.accelerator=cuda", ["cuda"]),
        ("fabric.devices=0", ["devices=0"]),
        ("fabric.precision=8-bit", ["8-bit"]),
        ("fabric.strategy=alone", ["alone"]),
    ],
)
@pytest.mark.parametrize("dry", [[], ["dry_run=true"]], ids=["run", "dry run"])
def test_impossible_hardware_is_refused(pool_dir, tmp_path, fabric, texts, dry):
    assert_refused(run_cli("method=wemoe", *own_pool(pool_dir), fabric, *dry, cwd=tmp_path), tmp_path, *texts)


def test_dry_run_starts_no_processes(pool_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(Fabric, "launch", lambda *_: pytest.fail("processes were started"))
    several = ["fabric.accelerator=cpu", "fabric.devices=2", "dry_run=true"]
    done = run_cli("method=wemoe", *own_pool(pool_dir), *several, cwd=tmp_path)
    assert done.code == 0, done.err


def test_misspelt_flag_is_refused(tmp_path):
    done = run_cli("--multirum", cwd=tmp_path)
    assert done.code != 0
    assert "--multirum" in done.err
    assert files_in(tmp_path) == []


def test_traceback_is_there_for_those_who_ask(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="wemo"):
        run_cli("method=wemo", cwd=tmp_path)


def test_plan_names_method_models_and_tasks(pool_dir, tmp_path):
    done = run_cli("method=wemoe", *own_pool(pool_dir), "dry_run=true", "print_config=false", cwd=tmp_path)
    assert done.code == 0
    for text in ("wemoe", str(pool_dir / "pretrained"), *TASKS, "(12)", "(18)"):
        assert text in done.out
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("argument", "way_out"),
    [
        ("modelpool.models={cats: ~/clip}", 'write texts with spaces or signs in quotes: {cats: "~/cats"}'),
        ("modelpool.models=[1,2", "close all brackets"),
        ("taskpool.tasks.cats.templates=a {} x", """in quotes of its own: 'taskpool.tasks.cats.templates="a {} x"'"""),
        ("taskpool.tasks.cats.templates", "`taskpool.tasks.cats.templates` has no value; write KEY=VALUE"),
        ("seed=int(x)", "is not possible: ValueError while evaluating 'int(x)'"),
        ("seed=nix(3)", "is not possible: HydraException while evaluating 'nix(3)': Unknown function 'nix'"),
        ("modelpool=[a", "close all brackets"),
        ("method lr=3", "`method lr` is not a key; write KEY=VALUE, without a space before or after the `=`"),
        ("method.lr =3", "`method.lr ` is not a key"),
        ("method.lr=1e-3,1e-4", "give `--multirun` to run each, write [1e-3,1e-4] for a list"),
    ],
)
def test_a_value_that_cannot_be_read_is_explained(argument, way_out, tmp_path):
    done = run_cli("modelpool=clip_vision", argument, cwd=tmp_path)
    assert_refused(done, tmp_path, argument.partition("=")[0], way_out)
    assert "hydra" not in done.err


@pytest.mark.parametrize("spaced", ["method = wemoe", "method= wemoe", "method =wemoe", "seed=1 method.lr = 3"])
def test_spaces_around_the_equals_sign_are_refused(spaced, tmp_path):
    done = run_cli(*spaced.split(), cwd=tmp_path)
    assert_refused(done, tmp_path, "write KEY=VALUE, without a space before or after the `=`")


@pytest.mark.parametrize("text", ["a {} x", "it's a {}", 'a "b" {}', '"a photo', "a\\{} b", 'a\\"{}', "a {} b\\"])
def test_the_way_out_for_a_text_with_signs_can_be_pasted(text, tmp_path):
    done = run_cli("modelpool=clip_vision", f"report_save_path={text}", cwd=tmp_path)
    assert_refused(done, tmp_path, f"`report_save_path={text}` cannot be read", "in quotes of its own: ")
    (pasted,) = shlex.split(done.err.partition("in quotes of its own: ")[2])
    assert composed(pasted)["report_save_path"] == text


def test_an_option_of_another_method_is_said_to_be_one(tmp_path):
    done = run_cli("method=wemoe", "method.selection=top_k", cwd=tmp_path)
    assert_refused(done, tmp_path, "`method.selection` is not an option of this method, but one of fusion_moe")
    done = run_cli("method=fusion_moe", "method.threshold=1", cwd=tmp_path)  # which others have, and this one nearly
    assert_refused(done, tmp_path, "did you mean `select_threshold`?")
    done = run_cli("method=wemoe", "method.defaults=1", cwd=tmp_path)
    assert "one of" not in done.err


def test_describe_is_about_one_name(tmp_path):
    for first in ("fusion_moe", "method=fusion_moe"):
        done = run_cli("describe", first, "objective", cwd=tmp_path)
        assert_refused(done, tmp_path, "`objective`: describe is about one name; write `describe fusion_moe`")


def test_a_corruption_that_nothing_looks_at_is_refused(pool_dir, tmp_path):
    done = run_cli("method=dummy", *own_pool(pool_dir), "corruption=contrast", cwd=tmp_path)
    assert_refused(done, tmp_path, "`corruption`='contrast': nothing that is chosen looks at it")


def test_a_task_pool_of_the_user_s_own_goes_with_the_model_pool_of_its_name(pool_dir, tmp_path):
    presets = {"modelpool": f"models: {{_pretrained_: {pool_dir}/pretrained, cats: {pool_dir}/cats}}", "taskpool": "x"}
    presets["taskpool"] = f"tasks: {{cats: {{data: {pool_dir}/images/cats}}}}"
    for group, text in presets.items():
        (tmp_path / "own" / group).mkdir(parents=True)
        (tmp_path / "own" / group / "two.yaml").write_text(f"defaults: [clip_vision]\n{text}\n")
    arguments = ["method=dummy", "modelpool=two", "--config-dir", str(tmp_path / "own"), "dry_run=true"]
    for more in ([], ["taskpool=two"]):
        done = run_cli(*arguments, *more, cwd=tmp_path / "run")
        assert done.code == 0, done.err
        assert "cats (12) images" in done.out


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("rum", "`rum` is neither KEY=VALUE nor a command; did you mean `run`?"),
        ("unknown", "`unknown` is neither KEY=VALUE nor a command; known are: analyse, compare, describe, fetch, plan"),
        ("method", "`method` has no value; write `method=NAME`"),
        ("command=rum", "`rum` is not a command; did you mean `run`?"),
    ],
)
def test_what_is_no_command_is_refused_in_one_line(argument, text, tmp_path):
    assert_refused(run_cli(argument, "method=wemoe", cwd=tmp_path), tmp_path, text)


def test_run_may_be_said(pool_dir, tmp_path):
    done = run_cli("run", "method=wemoe", *own_pool(pool_dir), "dry_run=true", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "dry run: nothing was computed or written" in done.out
