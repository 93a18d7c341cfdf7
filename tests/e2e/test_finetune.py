"""Fine-tuning, as the method that makes the models of a pool: what it stores, and what is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TASKS, copied, same_state
from runs import Finished, assert_refused, files_in, own_pool, run_cli
from safetensors.torch import load_file, save_file

from fusion_merge import CLIPVisionModelPool, CLIPVisionModelTaskPool
from fusion_merge.methods import clip_finetune
from fusion_merge.methods.clip_finetune import CLIPFinetuneAlgorithm
from fusion_merge.models.task_models import TaskModels


def algorithm(**options: Any) -> CLIPFinetuneAlgorithm:
    return CLIPFinetuneAlgorithm(**({"max_steps": 2, "batch_size": 4, "num_workers": 0, "lr": 1e-3} | options))


def tune(pool_dir: Path, cwd: Path, *arguments: str) -> Finished:
    """Fine-tune the pretrained model of `pool_dir` on its images, by the command line."""
    data = [f"modelpool.train_datasets.{task}={{data: {pool_dir / 'images' / task}}}" for task in TASKS]
    models = f"modelpool.models={{_pretrained_: {pool_dir / 'pretrained'}}}"
    tasks = [argument for argument in own_pool(pool_dir) if argument.startswith("taskpool.")]
    options = ["method=clip_finetune", "method.max_steps=2", "method.batch_size=4", "baselines=[]"]
    return run_cli("modelpool=clip_vision", models, *data, *tasks, *options, *arguments, cwd=cwd)


def stored(folder: Path) -> list[str]:
    return [path for path in files_in(folder) if (folder / path).is_file()]


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_steps": 1}, {"max_steps": 2}, {"warmup_steps": 0}])
def test_every_tower_moves(modelpool: CLIPVisionModelPool, options):
    before = copied(modelpool.load_pretrained_model().state_dict())
    towers = algorithm(**options).run(modelpool)
    for task in TASKS:
        after = towers[task].state_dict()
        moved = [name for name in after if not torch.equal(after[name], before[name])]
        assert [name for name in moved if "mlp.fc1.weight" in name], f"`{task}` did not move"


def test_trial_run_leaves_stored_towers_alone(pool_dir, tmp_path):
    assert tune(pool_dir, tmp_path, "method.output=tuned").code == 0
    before = {path: (tmp_path / "tuned" / path).read_bytes() for path in stored(tmp_path / "tuned")}
    done = tune(pool_dir, tmp_path, "method.output=tuned", "method.lr=0.1", "fast_dev_run=true")
    assert done.code == 0, done.err
    assert {path: (tmp_path / "tuned" / path).read_bytes() for path in stored(tmp_path / "tuned")} == before


def test_trial_run_writes_no_towers(modelpool, taskpool, tmp_path):
    towers = algorithm(output=str(tmp_path / "tuned"), fast_dev_run=True).run(modelpool)
    assert files_in(tmp_path) == []
    assert taskpool.evaluate(towers).keys() == {*TASKS, "average"}


def test_towers_are_read_back_from_where_they_were_stored(modelpool, tmp_path):
    towers = algorithm(output=str(tmp_path)).run(modelpool)
    file = tmp_path / "cats" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("mlp.fc1.bias"))
    save_file(weights | {name: torch.full_like(weights[name], 3.0)}, file, metadata={"format": "pt"})
    read = {key: tensor for key, tensor in towers["cats"].state_dict().items() if key.endswith("mlp.fc1.bias")}
    assert [bool((tensor == 3.0).all()) for tensor in read.values()].count(True) == 1


def test_no_tower_is_read_before_it_is_asked_for(modelpool, tmp_path, monkeypatch):
    read: list[str] = []
    find_files = clip_finetune.find_files
    monkeypatch.setattr(clip_finetune, "find_files", lambda path: (read.append(Path(path).name), find_files(path))[1])
    towers = algorithm(output=str(tmp_path)).run(modelpool)
    assert read == []
    assert not next(iter(towers["dogs"].parameters())).is_meta
    assert read == ["dogs"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_towers_kept_in_memory_are_those_that_would_be_stored(modelpool, tmp_path, dtype):
    kept = algorithm(dtype=dtype).run(modelpool)
    read = algorithm(dtype=dtype, output=str(tmp_path)).run(modelpool)
    assert list(kept) == list(read) == list(TASKS)
    for task in TASKS:
        assert same_state(kept[task].state_dict(), read[task].state_dict())


def test_report_scores_what_was_stored(pool_dir, tmp_path, taskpool: CLIPVisionModelTaskPool):
    done = tune(pool_dir, tmp_path, "method.output=tuned", "method.dtype=float16", "output_dir=here")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "here" / "report.json").read_text())
    folders = {task: str(tmp_path / "tuned" / task) for task in TASKS}
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained"), **folders})
    scores = taskpool.evaluate(pool.fine_tuned_models())
    assert {task: report[task] for task in TASKS} == {task: scores[task] for task in TASKS}


@pytest.mark.parametrize("dry", [[], ["dry_run=true"]], ids=["run", "dry run"])
def test_output_that_is_a_file_is_refused(pool_dir, tmp_path, dry):
    (tmp_path / "file").touch()
    work = tmp_path / "work"
    done = tune(pool_dir, work, f"method.output={tmp_path}/file", *dry)
    assert_refused(done, work, "`method.output`", f"`{tmp_path}/file` is a file, not a folder")


def test_asking_for_a_task_loads_no_tower():
    def load() -> torch.nn.Module:
        raise AssertionError("a tower was loaded")

    towers = TaskModels({"cats": load})
    assert "cats" in towers
    assert "dogs" not in towers
    assert len(towers) == 1
