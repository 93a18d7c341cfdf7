"""The real program of fusion_bench runs our methods, and scores them as our own program does.

Its task pool needs transformers 4: `make test-transformers4`. What it can do with transformers 5 is run with both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shlex
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import transformers
import upstream
from datasets import load_from_disk
from documents import commands
from helpers import write_processor
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from runs import assert_same_bits, random_tower, run_cli, tensors_of
from transformers import CLIPConfig, CLIPModel

from fusion_merge import CLIPVisionModelTaskPool, MergedCLIPVisionModel, WEMoEAlgorithm, get_method
from fusion_merge.models.clip import save_tower
from fusion_merge.presets import merging_presets
from fusion_merge.registry import is_registered

ROOT = Path(__file__).parents[2]
MERGING = [n for n, text in merging_presets().items() if "_target_" in text and get_method(n).makes_tower]
QUICK = ("method.max_steps=5", "method.batch_size=8", "seed=0")


pytestmark = pytest.mark.usefixtures("only_hydra_s_own_presets")


@pytest.fixture(scope="module", autouse=True)
def _fusion_bench() -> None:
    upstream.import_plugin()


@pytest.fixture(scope="module")
def scoring(_fusion_bench) -> None:
    """For tests that need the task pool of fusion_bench."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import_module("fusion_bench.taskpool.clip_vision.taskpool")
        except ImportError as error:
            pytest.skip(f"fusion_bench cannot score CLIP models with transformers {transformers.__version__}: {error}")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return upstream.write_images(tmp_path_factory.mktemp("images"))


def pools(images: Path, taskpool: str = "CLIPVisionModelTaskPool/_template") -> list[str]:
    """What a user of fusion_bench types for models and images in folders."""
    datasets = ", ".join(
        f"{n}: {{_target_: {c['_target_']}, dataset_path: {c['dataset_path']}}}"
        for n, c in upstream.datasets_config(images).items()
    )
    arguments = [
        "modelpool=CLIPVisionModelPool/_template",
        f"modelpool.models={{{', '.join(f'{name}: {place}' for name, place in upstream.sources().items())}}}",
        f"modelpool.processor={upstream.sources()['_pretrained_']}",
        f"modelpool.test_datasets={{{datasets}}}",
        f"taskpool={taskpool}",
    ]
    if taskpool == "dummy":
        return arguments
    return [
        *arguments,
        "taskpool.test_datasets=${modelpool.test_datasets}",
        f"taskpool.base_model={upstream.sources()['_pretrained_']}",
        "taskpool.dataloader_kwargs.num_workers=0",
    ]


def type_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command `fusion_bench` in a process of its own."""
    command = Path(sys.executable).with_name("fusion_bench")
    places = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(command), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def run_program(*arguments: str, cwd: Path) -> dict[str, Any]:
    """Run the program of fusion_bench in this process, in the folder `cwd`; return its report."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    arguments = (*arguments, "print_config=false", "print_function_call=false", "report_save_path=kept/report.json")
    try:
        with (
            contextlib.chdir(cwd),  # before its program is imported: it looks for its presets in the working directory
            mock.patch.object(sys, "argv", ["fusion_bench", *arguments]),
            mock.patch.dict(os.environ, HYDRA_FULL_ERROR="1"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            from fusion_bench.scripts.cli import _hydra_main

            _hydra_main()
    finally:
        for handler in {*root.handlers} - {*handlers}:
            handler.close()
        root.handlers, root.level = handlers, level
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
    report: dict[str, Any] = json.loads((cwd / "kept" / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def home(images, tmp_path_factory) -> Path:
    """A folder with the models and images that the documentation speaks of; published prompts are long."""
    folder = tmp_path_factory.mktemp("documents")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = sizes | {"vocab_size": 600, "max_position_embeddings": 200}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = sizes | {"num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    clip.save_pretrained(folder / "models" / "pretrained")
    write_processor(folder / "models" / "pretrained", size=16)
    for seed, name in enumerate(("mnist", "svhn")):
        save_tower(random_tower(seed), folder / "models" / name)
    (folder / "images").symlink_to(images)
    (folder / "published").mkdir()
    load_from_disk(str(images / "mnist")).select(range(40)).to_parquet(folder / "published" / "test.parquet")
    return folder


def on_local_copies(arguments: list[str], home: Path) -> list[str]:
    """What a user adds who has copies of the published models and images in folders: here the same for all."""
    if not any("_TA8" in argument for argument in arguments):
        return []
    names = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
    pools = ["modelpool", *(["taskpool"] if "taskpool=dummy" not in arguments else [])]
    place = "{pool}.test_datasets.{name}.path={folder}"
    places = {"svhn": "{pool}.test_datasets.{name}._args_=[{folder}]"}  # as fusion_bench has it
    added = [f"modelpool.models.{name}={home / 'models' / 'mnist'}" for name in names]
    added += [places.get(n, place).format(pool=p, name=n, folder=home / "published") for p in pools for n in names]
    added += [f"modelpool.{key}={home / 'models' / 'pretrained'}" for key in ("models._pretrained_", "processor")]
    return [*added, *(f"{p}.base_model={home / 'models' / 'pretrained'}" for p in pools[1:])]


PAGE = (ROOT / "docs" / "fusion-bench.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", commands(PAGE, "fusion_bench"))
def test_command_of_the_documentation_runs(command, home, request):
    arguments = shlex.split(command)[1:]
    if not {"--help", "--cfg", "taskpool=dummy"} & {*arguments}:
        request.getfixturevalue("scoring")
    if {"--help", "--cfg"} & {*arguments}:
        shown = type_command(*arguments, cwd=home).stdout
        ours = f"method/fusion_merge: {', '.join(merging_presets())}"  # and what is fusion_bench's is there too
        assert {ours, "fabric: auto, llama_ddp, llama_fsdp, llama_peft_fsdp"} <= {
            *shown.splitlines()
        } or "--cfg" in arguments
        assert "FusionMergeAlgorithm" in shown or "--help" in arguments
        return
    ranks = ["method.rank_k=4"] if "method=fusion_merge/rankone_moe" in arguments else []  # the copies are narrow
    quick = [*ranks, "fast_dev_run=true", f"path.output_dir={home / 'outputs'}"]
    quick += ["taskpool.dataloader_kwargs.num_workers=0"] if "taskpool=dummy" not in arguments else []
    report = run_program(*arguments, *on_local_copies(arguments, home), *quick, cwd=home)
    assert "model_info" in report


def accuracies(report: dict[str, Any]) -> dict[str, float]:
    return {name: pytest.approx(report[name]["accuracy"], abs=1e-6) for name in (*upstream.TASKS, "average")}


@pytest.mark.usefixtures("scoring")
def test_command_of_fusion_bench_scores_a_method_as_our_command_does(images, tmp_path):
    options = ["method.rank_k=8", "method.max_steps=20", "seed=0", "merged_model_save_path=kept/merged"]
    done = type_command(
        "method=fusion_merge/rankone_moe", *options, "report_save_path=kept/report.json", *pools(images), cwd=tmp_path
    )
    theirs = json.loads((tmp_path / "kept" / "report.json").read_text())
    tables = [f"taskpool.tasks.{n}={{data: {images / n}, prompts: {n}}}" for n in upstream.TASKS]
    models = ", ".join(f"{name}: {place}" for name, place in upstream.sources().items())
    ours = run_cli(
        "method=rankone_moe",
        *options,
        "modelpool=clip_vision",
        f"modelpool.models={{{models}}}",
        *tables,
        "baselines=[]",
        "output_dir=run",
        cwd=tmp_path / "ours",
    )
    assert ours.code == 0, ours.err
    assert accuracies(theirs) == accuracies(json.loads((tmp_path / "ours" / "run" / "report.json").read_text()))
    assert "entropy" in done.stdout  # the adaptation speaks through fusion_bench's log
    saved = MergedCLIPVisionModel.from_pretrained(tmp_path / "kept" / "merged")
    own = MergedCLIPVisionModel.from_pretrained(tmp_path / "ours" / "kept" / "merged")
    assert own.heads is not None
    assert saved.heads is None  # fusion_bench's task pool has the heads, and its program tells methods nothing of them
    towers = [{n: t for n, t in tensors_of(m).items() if not n.startswith("heads.")} for m in (saved, own)]
    assert_same_bits(*towers)


@pytest.mark.usefixtures("scoring")
@pytest.mark.parametrize("name", MERGING)
def test_every_method_scores_in_fusion_bench_what_it_scores_here(name, images, tmp_path):
    assert is_registered(name)
    known = {field.name for field in dataclasses.fields(get_method(name))}
    options = {key: value for key, value in {"max_steps": 5, "batch_size": 8, "rank_k": 8}.items() if key in known}
    arguments = [f"method.{key}={value}" for key, value in options.items()]
    theirs = run_program(f"method=fusion_merge/{name}", *arguments, *pools(images), cwd=tmp_path)
    tasks = CLIPVisionModelTaskPool(upstream.tasks(images), clip_model=upstream.sources()["_pretrained_"])
    ours = tasks.evaluate(get_method(name)(**options).run(upstream.own_pool(images)))
    assert accuracies(theirs) == accuracies(ours)


def test_program_makes_and_saves_a_model_even_where_it_cannot_score(images, tmp_path):
    type_command(
        "method=fusion_merge/wemoe",
        *QUICK,
        "merged_model_save_path=kept/merged",
        *pools(images, "dummy"),
        cwd=tmp_path,
    )
    expected = WEMoEAlgorithm(max_steps=5, batch_size=8).run(upstream.own_pool(images))
    saved = MergedCLIPVisionModel.from_pretrained(tmp_path / "kept" / "merged")
    assert_same_bits(tensors_of(saved), tensors_of(expected))
