"""Small random CLIP models and image folders, made once a session: no test needs a network or a GPU."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

_cache = tempfile.TemporaryDirectory(prefix="fusion_merge_tests_")
os.environ["HF_DATASETS_CACHE"] = _cache.name  # before `datasets` is imported; the user's own cache stays as it is
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# ruff: noqa: E402
import numpy as np
import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

pytest.register_assert_rewrite("helpers", "hub", "plans", "runs")

from helpers import TASKS, write_processor
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from fusion_merge import CLIPVisionModelPool, CLIPVisionModelTaskPool
from fusion_merge.models.clip import build_tower, module_config, module_state, save_tower


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # the models are tiny


@pytest.fixture
def only_hydra_s_own_presets(monkeypatch):
    """Take away what our command line stored with Hydra in this process: as in a process of another program."""
    Plugins.instance().discover()  # Hydra's own plugins store theirs when they are imported, and only then
    store = ConfigStore.instance()
    own = {name: node for name, node in store.repo.items() if name == "hydra" or name.startswith("_")}
    monkeypatch.setattr(store, "repo", copy.deepcopy(own))


@pytest.fixture(scope="session")
def pool_dir(tmp_path_factory) -> Path:
    """A folder with a random pretrained CLIP model, two towers fine-tuned by noise, and images of two tasks."""
    root = tmp_path_factory.mktemp("pool")
    torch.manual_seed(0)
    widths = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    vision = widths | {"num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    text = widths | {"num_hidden_layers": 1, "vocab_size": 600, "max_position_embeddings": 24}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    model.save_pretrained(root / "pretrained")
    write_processor(root / "pretrained", size=16)
    state = module_state(model)
    generator = torch.Generator().manual_seed(1)
    for task in TASKS:
        tuned = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
        save_tower(build_tower(module_config(model), tuned, where=task), root / task)
    rng = np.random.default_rng(0)
    for task, names in TASKS.items():
        for label, name in enumerate(names):
            folder = root / "images" / task / name
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 120, (20, 18, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def modelpool(pool_dir) -> CLIPVisionModelPool:
    models = {"_pretrained_": str(pool_dir / "pretrained")} | {t: str(pool_dir / t) for t in TASKS}
    data = {task: str(pool_dir / "images" / task) for task in TASKS}
    return CLIPVisionModelPool(models=models, test_datasets=data, train_datasets=data)


@pytest.fixture
def taskpool(pool_dir) -> CLIPVisionModelTaskPool:
    tasks = {task: str(pool_dir / "images" / task) for task in TASKS}
    return CLIPVisionModelTaskPool(tasks, clip_model=str(pool_dir / "pretrained"))
