"""What tests of whole pools and whole runs share: pools of random models, and the command line in this process."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helpers import TASKS
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_merge import CLIPVisionModelPool
from fusion_merge.cli import main
from fusion_merge.models.clip import build_tower, canonical_names, load_clip
from fusion_merge.models.sources import LazyState, find_files
from fusion_merge.models.task_models import TaskModels
from fusion_merge.pools.model_pool import PRETRAINED


@dataclass(frozen=True)
class Finished:
    """What a command left behind: its exit code, its output, and its errors."""

    code: int
    out: str
    err: str


def run_cli(*arguments: str, cwd: Path) -> Finished:
    """Run the command line in this process, in the folder `cwd`, and put everything it touches back."""
    cwd.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    out, err = io.StringIO(), io.StringIO()
    code = 0
    torch.set_num_threads(1)
    try:
        with (
            contextlib.chdir(cwd),
            mock.patch.object(sys, "argv", ["fusion_merge", *arguments]),
            mock.patch.dict(os.environ),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        root.handlers, root.level = handlers, level
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
    return Finished(code, out.getvalue(), err.getvalue())


def assert_refused(done: Finished, cwd: Path, *texts: str) -> None:
    """Check that a command ended with code 1 and one line that has all the texts, and wrote nothing in `cwd`."""
    assert done.code == 1, f"exit code {done.code}: {done.err}"
    assert done.err.startswith("error: "), done.err
    assert len(done.err.splitlines()) == 1, f"more than one line: {done.err}"
    for text in texts:
        assert text in done.err, f"{text!r} is not in {done.err!r}"
    assert files_in(cwd) == [], f"something was written: {files_in(cwd)}"


def own_pool(pool_dir: Path, **models: Path | str) -> list[str]:
    """Return the arguments that a user types to merge the models of `pool_dir`, some of them replaced."""
    paths = {"_pretrained_": pool_dir / "pretrained"} | {task: pool_dir / task for task in TASKS} | models
    table = ", ".join(f"{name}: {path}" for name, path in paths.items())
    tasks = [f"taskpool.tasks.{task}={{data: {pool_dir / 'images' / task}}}" for task in TASKS]
    return ["modelpool=clip_vision", f"modelpool.models={{{table}}}", *tasks]


def files_in(folder: Path) -> list[str]:
    """Return every file and folder below `folder`, by its relative path."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def random_tower(seed: int, **changes: Any) -> CLIPVisionModel:
    """Make a small random vision tower like those of `pool_dir`, or one of another shape."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPVisionConfig(**(sizes | {"image_size": 16, "patch_size": 8} | changes))
    torch.manual_seed(seed)
    return CLIPVisionModel(config).eval()


def module_pool(pool_dir: Path, **options: Any) -> CLIPVisionModelPool:
    """Make a model pool of modules in memory from the files of `pool_dir`."""
    data = {task: str(pool_dir / "images" / task) for task in TASKS}
    models: dict[str, Any] = {PRETRAINED: load_clip(str(pool_dir / "pretrained"), where="the pretrained model")}
    for task in TASKS:
        files = find_files(str(pool_dir / task))
        state = LazyState(files.weights, canonical_names)
        models[task] = build_tower(CLIPVisionConfig.from_dict(files.config), state, where=task)
    options = {"processor": str(pool_dir / "pretrained"), "test_datasets": data, "train_datasets": data} | options
    return CLIPVisionModelPool(models, **options)


def tensors_of(model: nn.Module | TaskModels) -> dict[str, torch.Tensor]:
    """Return copies of all tensors of a merged model, or of each of several task models, by name."""
    if isinstance(model, TaskModels):
        return {f"{task}/{n}": t.clone() for task, tower in model.items() for n, t in tower.state_dict().items()}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    """Check that two states have the same names and, bit for bit, the same tensors."""
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing, f"other values in {differing}"
