"""`fusion_merge fetch`, and all that it stands for: hub ids read from caches alone, without any network."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TASKS, same_state
from hub import FIRST, SECOND, put_dataset, put_file, put_model, put_refs, use_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from runs import Finished, run_cli
from safetensors.torch import save_file
from transformers import CLIPModel
from transformers.utils import hub as transformers_hub

from fusion_merge import CLIPVisionModelPool, MergedCLIPVisionModel, WEMoEAlgorithm
from fusion_merge.errors import DataError, ModelError
from fusion_merge.models import offline
from fusion_merge.models.clip import load_clip, load_processor
from fusion_merge.models.sources import LazyState, find_files
from fusion_merge.pools import reading
from fusion_merge.pools.datasets import make_task
from fusion_merge.pools.model_pool import PRETRAINED

HUB = [
    "modelpool=clip_vision",
    "modelpool.models={_pretrained_: some/clip, cats: some/cats@v1, dogs: some/dogs}",
    "taskpool.tasks.cats=some/cat_pictures",
    "taskpool.tasks.dogs={data: {path: some/dog_pictures, revision: main}}",
]
QUICK = ["method=wemoe", "method.max_steps=1", "method.batch_size=2", "fast_dev_run=true", "fabric.accelerator=cpu"]


@pytest.fixture
def root(pool_dir, tmp_path, monkeypatch) -> Path:
    """Caches with all that `HUB` names, written an hour ago."""
    root = tmp_path / "cache"
    use_cache(monkeypatch, root)
    put_model(root, "some/clip", pool_dir / "pretrained")
    put_model(root, "some/cats", pool_dir / "cats", FIRST, ("v1",))
    put_model(root, "some/cats", pool_dir / "dogs", SECOND, ("main",))
    put_model(root, "some/dogs", pool_dir / "dogs")
    for task in TASKS:
        put_dataset(root, f"some/{task[:-1]}_pictures", {"test": pool_dir / "images" / task})
    age(root)
    return root


def age(root: Path) -> None:
    for file in root.rglob("*"):
        os.utime(file, (time.time() - 3600,) * 2)


def table(done: Finished) -> list[list[str]]:
    """The cells of the printed table."""
    lines = [line for line in done.out.splitlines() if line.startswith(("model ", "processor ", "dataset ", "in all"))]
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


@pytest.mark.usefixtures("root")
def test_what_is_in_the_caches_is_listed_and_nothing_is_written(tmp_path):
    done = run_cli("fetch", *HUB, cwd=tmp_path / "run")
    assert (done.code, done.err) == (0, "")
    rows = table(done)
    assert [row[:4] for row in rows[:-1]] == [
        ["model", "_pretrained_", "some/clip", FIRST[:12]],
        ["model", "cats", "some/cats@v1", FIRST[:12]],
        ["model", "dogs", "some/dogs", FIRST[:12]],
        ["processor", "processor", "some/clip", FIRST[:12]],
        ["dataset", "cats", "some/cat_pictures", FIRST[:12]],
        ["dataset", "dogs", "some/dog_pictures@main", FIRST[:12]],
    ]
    assert {row[5] for row in rows[:-1]} == {"already there"}
    assert all(re.fullmatch(r"0\.\d\d MB", row[4]) for row in rows[:-1])
    assert list((tmp_path / "run").iterdir()) == []


def test_sizes_are_those_of_the_files(root, tmp_path):
    weights = root / "hub" / "models--some--dogs" / "snapshots" / FIRST / "model.safetensors"
    size = 5_000_000
    real = weights.resolve()
    with real.open("r+b") as file:
        file.truncate(size)
    rows = table(run_cli("fetch", *HUB, cwd=tmp_path / "run"))
    assert next(row for row in rows if row[1] == "dogs")[4] == "5.00 MB"
    assert Path(next(row for row in rows if row[1] == "dogs")[6]) == weights.parent


def test_everything_that_is_missing_is_named_in_one_error(root, tmp_path):
    shutil.rmtree(root / "hub" / "models--some--dogs")
    (root / "hub" / "models--some--cats" / "refs" / "v1").unlink()
    (root / "hub" / "models--some--clip" / "snapshots" / FIRST / "vocab.json").unlink()
    (root / "hub" / "models--some--clip" / "snapshots" / FIRST / "preprocessor_config.json").unlink()
    shutil.rmtree(root / "datasets" / "some___cat_pictures")
    done = run_cli("fetch", *HUB, cwd=tmp_path / "run")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: offline (`HF_HUB_OFFLINE`), and 4 of 6 not to be had: model `cats` (some/cats@v1): ")
    for part in ("; model `dogs` (some/dogs): ", "; processor `processor` (some/clip): ", "; dataset `cats` (some/cat"):
        assert part in line
    assert [row[1] for row in table(done) if "missing" in row] == ["cats", "dogs", "processor", "cats"]


@pytest.mark.usefixtures("root")
def test_what_differs_in_its_options_alone_is_fetched_each(pool_dir, tmp_path, monkeypatch):
    (tmp_path / "own_code.py").write_text(
        "from datasets import load_dataset\n"
        f"def pictures(which): return load_dataset('imagefolder', data_dir=f'{pool_dir}/images/{{which}}')['train']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = {task: f"{{data: {{_target_: own_code.pictures, which: {which}}}}}" for task, which in OWN.items()}
    done = run_cli("fetch", *HUB[:2], *(f"taskpool.tasks.{t}={d}" for t, d in data.items()), cwd=tmp_path / "run")
    assert [row[1] for row in table(done) if row[0] == "dataset"] == ["cats", "dogs"]
    assert done.code == 1
    assert "1 of 6 not to be had: dataset `dogs`" in done.err


@pytest.mark.usefixtures("root")
def test_models_alone_are_fetched(tmp_path):
    done = run_cli("fetch", *HUB[:2], cwd=tmp_path / "run")
    assert (done.code, done.err) == (0, "")
    assert [row[1] for row in table(done)[:-1]] == ["_pretrained_", "cats", "dogs"]


OWN = {"cats": "cats", "dogs": "nowhere"}


@pytest.mark.parametrize("gone", ["models--some--dogs", "models--some--clip"])
def test_a_plan_asks_no_hub(root, tmp_path, monkeypatch, gone):
    for module, name in offline._SWITCHES:
        monkeypatch.setattr(module, name, False, raising=False)
    assert run_cli("plan", *QUICK, *HUB, cwd=tmp_path / "run").code == 0
    shutil.rmtree(root / "hub" / gone)
    shutil.rmtree(root / "datasets" / "some___cat_pictures")
    done = run_cli("plan", *QUICK, *HUB, cwd=tmp_path / "run")  # where a network would be an error
    assert done.code == 1
    hub_id = "some/" + gone.rpartition("--")[2]
    assert f"`{hub_id}` is not a folder here and not in the cache; bring it there with `fusion_merge fetch`" in done.out
    assert "the dataset of `cats` from `some/cat_pictures`: it is not here and not in the cache; bring it" in done.out
    assert not offline.is_offline()


@pytest.fixture
def remote(pool_dir, tmp_path, monkeypatch) -> Iterator[dict[str, Path]]:
    """The models of `HUB` as a hub has them, and empty caches; while it is there, what is asked for is downloaded."""
    use_cache(monkeypatch, tmp_path / "cache")
    models = {"some/clip": pool_dir / "pretrained", "some/cats": pool_dir / "cats", "some/dogs": pool_dir / "dogs"}
    there = dict(models)

    def download(hub_id: str, filename: str, *, revision: str | None = None, **_: Any) -> str:
        if hub_id not in there or not (there[hub_id] / filename).is_file():
            raise LocalEntryNotFoundError(f"{hub_id} has no {filename}")
        repository = tmp_path / "cache" / "hub" / f"models--{hub_id.replace('/', '--')}"
        put_refs(repository, SECOND, (revision or "main",))
        file = repository / "snapshots" / SECOND / filename
        return str(file if file.exists() else put_file(repository, there[hub_id], filename, SECOND))

    def load_dataset(hub_id: str = "", path: str = "", **options: Any) -> Any:
        name = hub_id or path
        if there and not list((tmp_path / "cache" / "datasets").glob(f"{name.replace('/', '___')}*")):
            images = pool_dir / "images" / f"{name.removeprefix('some/').partition('_')[0]}s"
            put_dataset(tmp_path / "cache", name, {"test": images}, SECOND)
        return real_load(name, **options)

    real_load = reading.load_dataset
    with monkeypatch.context() as patched:
        patched.setattr(transformers_hub, "hf_hub_download", download)
        patched.setattr(reading, "load_dataset", load_dataset)
        yield there


def test_what_is_fetched_is_all_that_a_run_without_network_needs(remote, tmp_path):
    done = run_cli("fetch", *HUB, cwd=tmp_path / "run")
    assert (done.code, done.err) == (0, "")
    rows = table(done)[:-1]
    assert {(row[3], row[5]) for row in rows} == {(SECOND[:12], "fetched")}
    remote.clear()  # the network is gone
    age(tmp_path / "cache")
    rows = table(run_cli("fetch", *HUB, cwd=tmp_path / "run"))[:-1]
    assert {row[5] for row in rows} == {"already there"}
    done = run_cli(*QUICK, *HUB, "merged_model_save_path=merged", cwd=tmp_path / "run")
    assert done.code == 0, done.err


def test_what_is_fetched_is_read_no_further_than_headers(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(LazyState, "__init__", lambda *_: pytest.fail("weights were opened"))
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was made"))
    assert run_cli("fetch", *HUB, cwd=tmp_path / "run").code == 0
    assert remote


def test_local_paths_are_listed_as_local(pool_dir, tmp_path, monkeypatch):
    use_cache(monkeypatch, tmp_path / "cache")
    done = run_cli(
        "fetch",
        "modelpool=clip_vision",
        f"modelpool.models={{_pretrained_: {pool_dir}/pretrained, cats: {pool_dir}/cats/model.safetensors}}",
        f"taskpool.tasks.cats={{data: {{path: imagefolder, data_dir: {pool_dir / 'images' / 'cats'}}}}}",
        f"taskpool.tasks.dogs={pool_dir / 'images' / 'dogs'}",
        "taskpool.tasks.dots=zoo://tiny8/dots",
        cwd=tmp_path / "run",
    )
    assert (done.code, done.err) == (0, "")
    assert all("local" in row for row in table(done)[:-1])
    assert not (tmp_path / "cache").exists()


def test_a_local_path_that_is_not_there_is_missing(pool_dir, tmp_path):
    done = run_cli(
        "fetch",
        "modelpool=clip_vision",
        f"modelpool.models={{_pretrained_: {pool_dir / 'pretrained'}, cats: {pool_dir / 'no_cats'}}}",
        "taskpool.tasks.cats=/no/such/images",
        cwd=tmp_path / "run",
    )
    assert done.code == 1
    assert "2 of 4 not to be had: model `cats`" in done.err
    assert "dataset `cats` (/no/such/images): task `cats`: `/no/such/images` does not exist" in done.err


def test_the_pool_s_own_datasets_and_another_clip_are_fetched_too(root, pool_dir, tmp_path):
    put_model(root, "other/clip", pool_dir / "pretrained", SECOND)
    done = run_cli(
        "fetch",
        "modelpool=clip_vision",
        "modelpool.models={_pretrained_: some/clip, cats: some/cats@v1}",
        "modelpool.test_datasets={cats: some/cat_pictures}",
        "taskpool=clip_vision",
        "taskpool.clip_model=other/clip@main",
        "taskpool.tasks={dogs: some/dog_pictures}",
        cwd=tmp_path / "run",
    )
    assert (done.code, done.err) == (0, "")
    assert [row[:3] for row in table(done)[:-1]] == [
        ["model", "_pretrained_", "some/clip"],
        ["model", "cats", "some/cats@v1"],
        ["model", "clip_model", "other/clip@main"],
        ["processor", "processor", "other/clip@main"],
        ["processor", "processor", "some/clip"],
        ["dataset", "dogs", "some/dog_pictures"],
        ["dataset", "cats", "some/cat_pictures"],
    ]


# Revisions


@pytest.mark.parametrize(
    ("source", "same_as"),
    [
        ("some/cats", "dogs"),
        ("some/cats@main", "dogs"),
        ("some/cats@v1", "cats"),
        (f"some/cats@{FIRST}", "cats"),
        (f"some/cats@{SECOND}", "dogs"),
        ({"path": "some/cats", "revision": "v1"}, "cats"),
        ({"path": "some/cats", "revision": SECOND}, "dogs"),
    ],
)
@pytest.mark.usefixtures("root")
def test_each_revision_of_a_hub_model_is_its_own(source, same_as, pool_dir):
    found = CLIPVisionModelPool({PRETRAINED: source}).fingerprints()
    assert found == CLIPVisionModelPool({PRETRAINED: str(pool_dir / same_as)}).fingerprints()


@pytest.mark.parametrize("revision", ["v2", "3" * 40])
@pytest.mark.usefixtures("root")
def test_a_revision_that_is_not_in_the_cache_is_refused(revision):
    with pytest.raises(ModelError, match=r"model `_pretrained_`: `some/cats(@.*)?` is not a folder here"):
        CLIPVisionModelPool({PRETRAINED: f"some/cats@{revision}"}).check(0)


def test_weights_that_are_not_in_the_cache_are_not_said_to_be_nowhere(root):
    (root / "hub" / "models--some--dogs" / "snapshots" / FIRST / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"`some/dogs` has no weights that can be had \(offline, or not there\); looked"
    ):
        CLIPVisionModelPool({PRETRAINED: "some/dogs"}).check(0)


def test_a_merged_model_is_read_from_the_cache(root, pool_dir, tmp_path):
    models = {PRETRAINED: "some/clip", "cats": "some/cats@v1", "dogs": "some/dogs"}
    model = WEMoEAlgorithm(max_steps=0).run(CLIPVisionModelPool(models))
    model.save_pretrained(tmp_path / "merged")
    put_model(root, "some/merged", tmp_path / "merged", SECOND)
    found = MergedCLIPVisionModel.from_pretrained("some/merged@main")
    assert same_state(found.state_dict(), model.state_dict())


def test_an_adapter_is_read_from_the_cache(root, tmp_path):
    (tmp_path / "adapter").mkdir()
    name = "base_model.model.encoder.layers.0.mlp.fc1"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(24, 2)}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "some/clip"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    put_model(root, "some/adapter", tmp_path / "adapter", SECOND)
    pool = CLIPVisionModelPool({PRETRAINED: "some/clip", "cats": "some/adapter@main"})
    pool.check()
    key = "encoder.layers.0.mlp.fc1.weight"
    torch.testing.assert_close(pool.state("cats")[key], pool.state(PRETRAINED)[key] + 6)
    done = run_cli(
        "fetch",
        "modelpool=clip_vision",
        "modelpool.models={_pretrained_: some/clip, cats: some/adapter}",
        "taskpool=dummy",
        cwd=tmp_path / "run",
    )
    assert table(done)[1][:4] == ["model", "cats", "some/adapter", SECOND[:12]]


def test_a_subfolder_of_a_hub_repository_is_read(root, pool_dir, tmp_path):
    shutil.copytree(pool_dir / "dogs", tmp_path / "both" / "dogs")
    put_model(root, "some/both", tmp_path / "both")
    source = {"path": "some/both", "subfolder": "dogs"}
    found = CLIPVisionModelPool({PRETRAINED: source}).fingerprints()
    assert found == CLIPVisionModelPool({PRETRAINED: str(pool_dir / "dogs")}).fingerprints()


FORMS = {
    "word": lambda revision: f"some/cat_pictures@{revision}",
    "table": lambda revision: {"path": "some/cat_pictures", "revision": revision},
    "target": lambda revision: {
        "_target_": "datasets.load_dataset",
        "path": "some/cat_pictures",
        "revision": revision,
        "split": "test",
    },
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.usefixtures("root")
def test_a_dataset_of_the_wanted_revision_is_read(form):
    for revision in (FIRST, "main"):
        assert len(make_task("cats", FORMS[form](revision))) == 12


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("revision", [SECOND, "v2"])
@pytest.mark.usefixtures("root")
def test_a_dataset_of_another_revision_is_not_taken_for_the_wanted_one(form, revision):
    with pytest.raises(
        DataError, match=rf"revision {revision} of `some/cat_pictures` cannot be had .* {FIRST} would be"
    ):
        make_task("cats", FORMS[form](revision))


def test_a_dataset_that_was_cached_later_is_not_taken_for_main(root, pool_dir):
    newer = put_dataset(root, "some/cat_pictures", {"test": pool_dir / "images" / "dogs"}, SECOND, ("v2",))
    with pytest.raises(DataError, match=rf"the last `main` that is known here \({FIRST}\).*; remove `{newer}`"):
        make_task("cats", "some/cat_pictures")
    assert len(make_task("cats", "some/cat_pictures@v2")) == 18


def test_a_dataset_cache_that_was_copied_alone_is_read(root):
    shutil.rmtree(root / "hub" / "datasets--some--cat_pictures")
    assert len(make_task("cats", "some/cat_pictures")) == 12


# Without a network, and without being told so


@pytest.fixture
def no_network(monkeypatch) -> Iterator[list[str]]:
    """A machine that knows no other; the names that are looked up."""
    asked: list[str] = []

    def look_up(host: str, *_: object) -> None:
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    for module, name in offline._SWITCHES:
        if hasattr(module, name):
            monkeypatch.setattr(module, name, False)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(offline, "getproxies", dict)
    offline._is_known.cache_clear()
    yield asked
    offline._is_known.cache_clear()


def test_where_the_hub_is_unknown_it_is_not_asked(no_network, caplog):
    for _ in range(2):
        with offline.asking_the_hub("some/model"):
            assert offline.is_offline()
        assert not offline.is_offline()
    assert no_network == ["huggingface.co"]  # once for a while
    assert caplog.messages == ["no network: `huggingface.co` is not known here, and only the caches are looked in"]


def test_what_is_here_needs_no_network(no_network, tmp_path):
    with offline.asking_the_hub(str(tmp_path)):
        assert not offline.is_offline()
    assert no_network == []


def test_what_can_be_no_path_is_no_path_that_is_here(no_network):
    for text in ("a/" * 3000, "x" * 3000, "\0"):
        with offline.asking_the_hub(text):
            assert offline.is_offline()
    assert no_network == ["huggingface.co"]


def test_a_proxy_may_know_the_hub(no_network, monkeypatch):
    monkeypatch.setattr(offline, "getproxies", lambda: {"https": "http://proxy:3128"})
    with offline.asking_the_hub("some/model"):
        assert not offline.is_offline()
    assert no_network == []


def test_a_known_hub_is_asked(no_network, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    with offline.asking_the_hub("some/model"):
        assert not offline.is_offline()


def test_models_processors_and_images_that_are_not_here_are_told_at_once(no_network):
    with pytest.raises(ModelError, match="`some/model` is not a folder here"):
        find_files("some/model")
    with pytest.raises(ModelError, match="cannot read `x` as a CLIP model"):
        load_clip("some/model", where="`x`")
    with pytest.raises(ModelError, match="the CLIP processor of `x` is not in the cache; bring it there"):
        load_processor("some/model", where="`x`")
    for data in ("some/images", {"path": "some/images"}):
        with pytest.raises(DataError, match="it is not here and not in the cache; bring it there"):
            make_task("cats", data)
    with pytest.raises(DataError, match="OfflineModeIsEnabled"):
        make_task("cats", {"_target_": "datasets.load_dataset", "path": "some/images"})
    assert no_network == ["huggingface.co"]  # by us, and by no library, which would try again and again
