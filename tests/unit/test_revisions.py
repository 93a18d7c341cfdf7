"""Where models and data came from: revisions of the hub, fingerprints, splits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetInfo, NamedSplit
from helpers import TASKS

from fusion_merge import CLIPVisionModelPool, CLIPVisionModelTaskPool
from fusion_merge.methods.wemoe import WEMoEAlgorithm
from fusion_merge.models.revisions import hub_commit
from fusion_merge.models.task_models import TaskModels
from fusion_merge.moe import set_routing
from fusion_merge.pools.revisions import data_origin, data_revision, model_origins
from fusion_merge.report.provenance import machine, provenance, provenance_tables, routing_of, scoring_of

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


def into_cache(cache: Path, hub_id: str, commit: str, source: Path) -> Path:
    """Lay a model out as `huggingface_hub` does: blobs, links to them in the snapshot, and what `main` is."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs" / "main").write_text(commit)
    return snapshot


@pytest.fixture
def cached_pool(pool_dir, tmp_path) -> CLIPVisionModelPool:
    """A pool of a hub id, a hub id at its revision, and a path."""
    into_cache(tmp_path / "hub", "owner/pretrained", COMMIT, pool_dir / "pretrained")
    into_cache(tmp_path / "hub", "owner/cats", OTHER, pool_dir / "cats")
    options = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    models: dict[str, Any] = {
        "_pretrained_": {"path": "owner/pretrained", **options},
        "cats": {"path": "owner/cats", "revision": OTHER, **options},
        "dogs": str(pool_dir / "dogs"),
    }
    return CLIPVisionModelPool(models)


def test_revision_of_a_hub_model_is_the_commit_in_the_cache(cached_pool, pool_dir):
    origins = model_origins(cached_pool)
    assert {name: origin["revision"] for name, origin in origins.items()} == {
        "_pretrained_": COMMIT,
        "cats": OTHER,
        "dogs": None,
    }
    local = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained"), "cats": str(pool_dir / "cats")})
    assert origins["cats"]["fingerprint"] == model_origins(local)["cats"]["fingerprint"]
    assert origins["cats"]["fingerprint"] != origins["dogs"]["fingerprint"]
    assert origins["dogs"]["source"] == str(pool_dir / "dogs")


def test_path_into_the_cache_has_its_revision_too(pool_dir, tmp_path):
    snapshot = into_cache(tmp_path, "owner/cats", COMMIT, pool_dir / "cats")
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained"), "cats": str(snapshot)})
    assert (pool.revision("cats"), pool.revision("_pretrained_")) == (COMMIT, None)


def test_files_of_two_commits_or_of_none_have_no_commit():
    files = [Path(f"models--a--b/snapshots/{commit}/model.safetensors") for commit in (COMMIT, OTHER)]
    assert hub_commit(files) is None
    assert hub_commit(files[:1]) == COMMIT
    assert hub_commit([]) is None
    assert hub_commit([Path("snapshots/not-a-commit/model.safetensors")]) is None


def test_module_in_memory_has_no_revision(modelpool):
    module = modelpool.load_pretrained_model()
    assert CLIPVisionModelPool({"_pretrained_": module}).revision("_pretrained_") is None


# Data


def downloaded(*urls: str, **info: Any) -> Dataset:
    checksums = {url: {"num_bytes": 1, "checksum": None} for url in urls}
    return Dataset.from_dict({"image": ["a"], "label": [0]}, info=DatasetInfo(download_checksums=checksums, **info))


def test_revision_of_a_hub_dataset_is_in_what_it_was_downloaded_from():
    urls = [f"hf://datasets/owner/cats@{COMMIT}/data/{part}.parquet" for part in ("train", "test")]
    assert data_revision(downloaded(*urls)) == COMMIT
    assert data_revision(downloaded(*urls).select([0])) == COMMIT


def test_revision_of_a_dataset_from_the_cache_is_its_folder():
    class Cached:
        cache_files = ({"filename": f"/cache/owner___cats/default/0.0.0/{COMMIT}/cats-test.arrow"},)

    assert data_revision(Cached()) == COMMIT


@pytest.mark.parametrize(
    "data",
    [
        Dataset.from_dict({"label": [0]}),
        downloaded("https://example.org/cats.zip"),
        downloaded("/home/me/cats.parquet"),
        downloaded("hf://datasets/owner/cats@main/test.parquet"),
        [("image", 0)],
        None,
    ],
)
def test_data_that_do_not_tell_have_no_revision(data):
    assert data_revision(data) is None


def test_data_of_two_commits_name_both():
    urls = [f"hf://datasets/owner/{name}@{commit}/a" for name, commit in (("cats", COMMIT), ("dogs", OTHER))]
    assert data_revision(downloaded(*urls)) == f"{COMMIT}, {OTHER}"


def test_source_of_data_is_said_in_words(pool_dir):
    folder = str(pool_dir / "images" / "cats")
    specs: dict[str, Any] = {
        folder: folder,
        f"{folder}/.": {"data": f"{folder}/.", "classnames": ["x", "y"]},
        f"imagefolder {folder}": {"path": "imagefolder", "data_dir": folder},
        "a list": {"data": [("image", 0)], "classnames": ["x"]},
    }
    pool = CLIPVisionModelTaskPool(specs)
    assert [data_origin(pool, name)["source"] for name in specs] == list(specs)


def test_split_is_the_one_that_was_taken(pool_dir, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(pool_dir / "images" / "cats", tmp_path / split)
    named = CLIPVisionModelTaskPool({"cats": {"data": str(tmp_path), "split": "train"}})
    assert data_origin(named, "cats")["split"] == "train"
    whole = CLIPVisionModelTaskPool({"cats": str(tmp_path)}, split="test")
    origin = data_origin(whole, "cats")
    assert (origin["revision"], origin["split"], origin["images"]) == (None, "test", 12)
    picture = str(next((tmp_path / "test").rglob("*.png")))
    data = Dataset.from_dict({"image": [picture], "label": [0]}, split=NamedSplit("validation"))
    own = CLIPVisionModelTaskPool({"cats": {"data": data, "classnames": ["x"]}})
    assert data_origin(own, "cats")["split"] == "validation"


# The whole


def test_provenance_of_a_run_is_complete_and_can_be_shown(cached_pool, taskpool):
    known = provenance(cached_pool, taskpool, {"cats": data_origin(taskpool, "cats")})
    assert known.keys() == {"models", "adapted_on", "scored_on", "machine"}
    assert list(known["scored_on"]) == list(TASKS)
    text = provenance_tables({"provenance": known, "seed": 5, "versions": {"torch": "2"}})
    for part in (COMMIT, OTHER, known["models"]["dogs"]["fingerprint"], "adapted on", "scored on", "Seed 5", "torch 2"):
        assert part in text


def test_machine_says_what_computes():
    about = machine()
    assert about["processor"]
    assert about["cores"] >= 1
    assert about["memory_gb"] is None or about["memory_gb"] > 0.1
    assert isinstance(about["gpus"], list)


def test_routing_of_a_model(modelpool, taskpool):
    model = WEMoEAlgorithm(max_steps=0).run(modelpool, taskpool)
    assert routing_of(model) == "sample"
    set_routing(model, "batch")
    assert scoring_of(model, taskpool, 2) == {"routing": "batch", "batch_size": 128, "processes": 2}
    assert routing_of(modelpool.load_pretrained_model()) is None
    assert routing_of(TaskModels({})) is None


def test_method_knows_what_it_was_adapted_on(modelpool, taskpool, pool_dir):
    method = WEMoEAlgorithm(max_steps=1, batch_size=4, num_workers=0)
    method.run(modelpool, taskpool)
    assert {name: origin["source"] for name, origin in method.adapted_on.items()} == {
        task: str(pool_dir / "images" / task) for task in TASKS
    }
