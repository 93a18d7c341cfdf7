"""A published pool from its hub ids alone, offline: small models and images lie in the caches that the hub's would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Image, load_dataset_builder
from huggingface_hub import constants
from PIL import Image as PILImage
from runs import run_cli
from transformers.utils import hub as transformers_hub

POOL = "clip-vit-base-patch32_svhn_and_mnist"
MODELS = {
    "openai/clip-vit-base-patch32": "pretrained",
    "tanganke/clip-vit-base-patch32_svhn": "cats",
    "tanganke/clip-vit-base-patch32_mnist": "dogs",
}
LABELS = [4, 9, 0, 7, 1, 2, 3, 5, 6, 8, 0, 9]


def publish_model(hub: Path, hub_id: str, folder: Path) -> None:
    """Put a model where the hub's cache has it."""
    root = hub / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / "0123abc")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abc")


def publish_data(cache: Path, work: Path, hub_id: str, config: str, columns: tuple[str, str]) -> None:
    """Put images of ten classes where `datasets` keeps what it has had from the hub."""
    rng = np.random.default_rng(len(hub_id))
    names = datasets.ClassLabel(names=[f"digit {i}" for i in range(10)])  # not as the published prompts spell them
    features = datasets.Features({columns[0]: Image(), columns[1]: names})
    parquet = {}
    for split in ("train", "test"):
        images = [PILImage.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in LABELS]
        data = datasets.Dataset.from_dict({columns[0]: images, columns[1]: LABELS}, features=features)
        parquet[split] = str(work / f"{config}-{split}.parquet")
        data.to_parquet(parquet[split])
    builder = load_dataset_builder("parquet", data_files=parquet, cache_dir=str(work / "built"))
    builder.download_and_prepare()
    owner, name = hub_id.split("/")
    target = cache / f"{owner}___{name}" / config / "0.0.0" / "0123abc"
    shutil.copytree(builder.cache_dir, target)
    for file in target.glob("parquet-*.arrow"):
        file.rename(file.with_name(file.name.replace("parquet-", f"{name}-")))
    info = json.loads((target / "dataset_info.json").read_text())
    info |= {"config_name": config, "dataset_name": name}
    (target / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture
def published(pool_dir, tmp_path, monkeypatch):
    hub, cache = tmp_path / "hub", tmp_path / "datasets"
    for hub_id, folder in MODELS.items():
        publish_model(hub, hub_id, pool_dir / folder)
    publish_data(cache, tmp_path, "ufldl-stanford/svhn", "cropped_digits", ("image", "label"))
    publish_data(cache, tmp_path, "ylecun/mnist", "mnist", ("image", "label"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(transformers_hub, "TRANSFORMERS_CACHE", str(hub), raising=False)  # before 5.0
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))


@pytest.mark.usefixtures("published")
def test_published_pool_runs_from_its_hub_ids_alone(tmp_path):
    work = tmp_path / "work"
    options = ["method=rankone_moe", "method.rank_k=2", "method.max_steps=2", "method.batch_size=4"]
    done = run_cli(*options, f"modelpool={POOL}", "output_dir=out", cwd=work)
    assert done.code == 0, done.err
    report = json.loads((work / "out" / "report.json").read_text())
    assert report["run"]["models"] == dict(zip(("_pretrained_", "svhn", "mnist"), MODELS, strict=True))
    assert report["run"]["adaptation"]["steps"] == 2
    assert {"svhn", "mnist", "average"} <= set(report)
    assert set(report["baselines"]["fine_tuned"]) == {"svhn", "mnist", "average"}


@pytest.mark.usefixtures("published")
def test_published_tasks_may_be_local_copies(pool_dir, tmp_path):
    local = [f"modelpool.models.svhn={pool_dir / 'dogs'}", f"modelpool.test_datasets.mnist.data={tmp_path / 'mnist'}"]
    for label in range(10):
        (tmp_path / "mnist" / f"n{label}").mkdir(parents=True)
        PILImage.new("L", (16, 16), 20 * label).save(tmp_path / "mnist" / f"n{label}" / "0.png")
    done = run_cli(
        "method=dummy", f"modelpool={POOL}", "taskpool=clip_vision", *local, "dry_run=true", cwd=tmp_path / "w"
    )
    assert done.code == 0, done.err
    assert "svhn (12), mnist (10) images" in done.out
