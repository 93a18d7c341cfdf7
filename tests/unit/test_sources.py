"""Where models come from."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers import same_state
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers.utils import hub as transformers_hub

from fusion_merge import zoo
from fusion_merge.errors import ModelError
from fusion_merge.models import tensor_files
from fusion_merge.models.clip import canonical_names
from fusion_merge.models.sources import LazyState, find_files, fingerprint, split_source

REVISION = "0123456789abcdef0123456789abcdef01234567"


def _all_names(names: list[str]) -> dict[str, str]:
    return {name: name for name in names}


def _read(source) -> dict[str, torch.Tensor]:
    return dict(LazyState(find_files(str(source)).weights, _all_names))


@pytest.fixture
def tower(pool_dir) -> dict[str, torch.Tensor]:
    return load_file(pool_dir / "cats" / "model.safetensors")


@pytest.fixture
def folder(pool_dir, tmp_path) -> Path:
    """A folder of its own with a tower."""
    return shutil.copytree(pool_dir / "cats", tmp_path / "cats")


def _as_torch_file(folder: Path, name: str = "pytorch_model.bin", **options) -> Path:
    torch.save(load_file(folder / "model.safetensors"), folder / name, **options)
    (folder / "model.safetensors").unlink()
    return folder / name


def _as_shards(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({n: state[n] for n in part}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, part in halves.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def hub(folder, tmp_path, monkeypatch) -> Path:
    """A local hub cache with the model `someone/cats`; returns its snapshot."""
    model = tmp_path / "hub" / "models--someone--cats"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(REVISION)
    snapshot = shutil.copytree(folder, model / "snapshots" / REVISION)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(transformers_hub, "TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)  # before 5.0
    return snapshot


def test_a_folder_is_read(folder, tower):
    assert same_state(_read(folder), tower)


def test_a_weight_file_is_read_with_the_configuration_beside_it(folder, tower):
    files = find_files(str(folder / "model.safetensors"))
    assert files.config["model_type"] == "clip_vision_model"
    assert same_state(_read(folder / "model.safetensors"), tower)


def test_a_tilde_is_the_home_folder(folder, tower, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert same_state(_read("~/cats"), tower)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_torch_1_6"])
def test_a_torch_file_is_read(folder, tower, zipped):
    _as_torch_file(folder, _use_new_zipfile_serialization=zipped)
    assert same_state(_read(folder), tower)


def test_sharded_safetensors_are_read(folder, tower):
    _as_shards(folder)
    assert same_state(_read(folder), tower)


def test_sharded_torch_files_are_read(folder, tower):
    _as_torch_file(folder, "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": dict.fromkeys(tower, "pytorch_model-00001-of-00001.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same_state(_read(folder), tower)


def test_safetensors_come_before_torch_files(folder, tower):
    torch.save({"other": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert same_state(_read(folder), tower)


def test_a_missing_shard_is_named(folder):
    _as_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks `model-00002-of-00002\.safetensors`"):
        find_files(str(folder))


@pytest.mark.parametrize("text", ["{", "{}", "[]"], ids=["truncated", "no_map", "list"])
def test_an_index_that_is_none_is_an_error_that_names_it(folder, text):
    _as_shards(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        find_files(str(folder))


@pytest.mark.parametrize("text", ["{", "[]"], ids=["truncated", "list"])
def test_a_configuration_that_is_none_is_an_error_that_names_it(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        find_files(str(folder))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=missing):
        find_files(str(folder))


def test_a_truncated_safetensors_file_is_an_error_that_names_it(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"cannot read weights from .*model\.safetensors"):
        _read(folder)


def test_a_truncated_torch_file_is_an_error_that_names_it(folder):
    file = _as_torch_file(folder)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        _read(folder)


def test_an_empty_file_is_an_error_that_names_it(folder):
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        _read(folder)


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("write", [lambda o, f: torch.save(o, f), lambda o, f: f.write_bytes(pickle.dumps(o))])
def test_a_pickle_with_code_is_refused_and_not_run(folder, tmp_path, write):
    mark = tmp_path / "code_was_run"
    file = _as_torch_file(folder)
    write({"weight": torch.zeros(1), "bomb": _Bomb(mark)}, file)
    with pytest.raises(ModelError, match="not a torch file of plain tensors"):
        _read(folder)
    assert not mark.exists()


@pytest.mark.parametrize("content", [{"state_dict": {"weight": torch.zeros(1)}}, [torch.zeros(1)], torch.zeros(1)])
def test_a_torch_file_of_something_else_than_a_state_is_refused(folder, content):
    torch.save(content, _as_torch_file(folder))
    with pytest.raises(ModelError, match="does not hold a state dict of tensors"):
        _read(folder)


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "~/nowhere", "a/b/c", "weights.safetensors", "a b"])
def test_a_path_that_does_not_exist_is_an_error(source):
    with pytest.raises(ModelError, match=f"`{source}` does not exist"):
        find_files(source)


def test_a_hub_id_may_name_a_revision():
    assert split_source("openai/clip-vit-base-patch32@refs/pr/3") == ("openai/clip-vit-base-patch32", "refs/pr/3")
    assert split_source("openai/clip-vit-base-patch32") == ("openai/clip-vit-base-patch32", None)


def test_a_folder_comes_before_a_hub_id_of_the_same_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert split_source("cats") == ("cats", None)
    assert find_files("cats").weights == (Path("cats") / "model.safetensors",)


@pytest.mark.parametrize("source", ["someone/cats", "someone/cats@main", f"someone/cats@{REVISION}"])
@pytest.mark.usefixtures("hub")
def test_a_hub_id_is_read_from_the_local_cache(source, tower):
    assert find_files(source).config["model_type"] == "clip_vision_model"
    assert same_state(_read(source), tower)


def test_a_hub_model_of_torch_files_is_read_from_the_local_cache(hub, tower):
    _as_torch_file(hub)
    assert same_state(_read("someone/cats"), tower)


def test_a_sharded_hub_model_is_read_from_the_local_cache(hub, tower):
    _as_shards(hub)
    assert same_state(_read("someone/cats"), tower)


@pytest.mark.parametrize("source", ["someone/dogs", "someone/cats@other"])
@pytest.mark.usefixtures("hub")
def test_a_hub_model_that_cannot_be_had_is_an_error_that_names_it(source):
    with pytest.raises(ModelError, match=source.split("@")[0]):
        find_files(source)


def test_a_zoo_name_is_read():
    files = find_files("zoo://tiny8/pretrained")
    assert canonical_names(LazyState(files.weights, _all_names))


@pytest.mark.parametrize(
    ("name", "answer"),
    [("tiny8/pretraind", "tiny8/pretrained"), ("tiny8/digit", "tiny8/digits"), ("xyz", "tiny8/mnist")],
)
def test_an_unknown_zoo_name_proposes_the_nearest(name, answer):
    with pytest.raises(ModelError, match=f"`zoo://{name}` is not in the zoo; .*{answer}"):
        find_files(f"zoo://{name}")


def test_all_zoo_names_can_be_found():
    assert "tiny8/pretrained" in zoo.names()
    assert all(zoo.path(zoo.SCHEME + name).is_dir() for name in zoo.names())


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """How many numbers were read at a time of tensors in safetensors files."""
    counts: list[int] = []
    read_at = tensor_files._read_at

    def counted(file, identity, start, shape, dtype):
        counts.append(math.prod(shape))
        return read_at(file, identity, start, shape, dtype)

    monkeypatch.setattr(tensor_files, "_read_at", counted)
    return counts


def test_a_lazy_state_reads_headers_alone_until_it_is_asked(folder, reads):
    state = LazyState(find_files(str(folder)).weights, canonical_names)
    assert state.shapes["pre_layrnorm.weight"] == (16,)
    assert len(state) > 10
    assert reads == []
    assert state["pre_layrnorm.weight"].shape == (16,)
    assert reads == [16]


def test_a_fingerprint_reads_one_row_of_each_tensor(folder, reads, tower):
    expected = fingerprint({n.removeprefix("vision_model."): t for n, t in tower.items()})
    state = LazyState(find_files(str(folder)).weights, canonical_names)
    assert fingerprint(state) == expected
    assert reads == [shape[-1] for _, shape in sorted(state.shapes.items())]


@pytest.mark.parametrize("how", ["cut", "replaced"])
def test_a_file_that_is_changed_after_it_was_opened_is_a_clear_error(folder, how):
    (file,) = find_files(str(folder)).weights
    state = LazyState((file,), canonical_names)
    if how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        other = {name: tensor + 1 for name, tensor in load_file(file).items()}
        save_file(other, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
    with pytest.raises(ModelError, match=r"cannot read `.*` in `.*`: the file was changed meanwhile; run again"):
        dict(state)


def test_a_default_device_does_not_matter(folder):
    (file,) = find_files(str(folder)).weights
    with torch.device("meta"):
        state = dict(LazyState((file,), canonical_names))
    assert all(tensor.device.type == "cpu" for tensor in state.values())


def test_an_empty_tensor_has_an_empty_first_row(tmp_path):
    save_file({"empty": torch.zeros(0, 3), "full": torch.ones(4)}, tmp_path / "x.safetensors")
    assert LazyState((tmp_path / "x.safetensors",), _all_names).first_row("empty").shape == (0,)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_the_first_row_is_that_of_the_whole_tensor(tmp_path, shape, ending):
    tensor, file = torch.randn(shape).half(), tmp_path / f"x.{ending}"
    (save_file if ending == "safetensors" else torch.save)({"w": tensor}, file)
    row = LazyState((file,), _all_names).first_row("w")
    assert torch.equal(row, tensor.float().flatten()[: shape[-1] if shape else 1])


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("cats", {"revision": "v1"}, "is a path here, and has no `revision`='v1'"),
        ("cats/model.safetensors", {"subfolder": "x"}, "is a file, and has no `subfolder`='x'"),
        ("someone/cats@v1", {"revision": "v2"}, "names another revision than `revision`='v2'"),
    ],
)
def test_options_that_would_be_left_aside_are_refused(folder, monkeypatch, source, options, message):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ModelError, match=message):
        find_files(source, **options)


@pytest.mark.usefixtures("hub")
def test_a_revision_may_be_an_option():
    assert find_files("someone/cats", revision=REVISION).config["model_type"] == "clip_vision_model"


def test_a_model_may_be_in_a_subfolder(folder, tower):
    files = find_files(str(folder.parent), subfolder="cats")
    assert same_state(dict(LazyState(files.weights, _all_names)), tower)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, torch.float32), (None, torch.float16)])
def test_a_lazy_state_converts_floating_point_alone(tmp_path, dtype, expected):
    save_file(
        {"w": torch.ones(2, dtype=torch.float16), "n": torch.ones(2, dtype=torch.int64)}, tmp_path / "x.safetensors"
    )
    state = LazyState((tmp_path / "x.safetensors",), _all_names, dtype)
    assert (state["w"].dtype, state["n"].dtype) == (expected, torch.int64)


def test_a_tensor_from_a_torch_file_is_a_copy(folder):
    state = LazyState((_as_torch_file(folder),), canonical_names)
    state["pre_layrnorm.weight"].zero_()
    assert state["pre_layrnorm.weight"].any()


def test_fingerprints_do_not_depend_on_file_format_or_key_layout(folder, pool_dir):
    flat = {n.removeprefix("vision_model."): t for n, t in load_file(folder / "model.safetensors").items()}
    torch.save(flat, folder / "flat.bin")
    states = [LazyState((f,), canonical_names) for f in (pool_dir / "cats" / "model.safetensors", folder / "flat.bin")]
    assert len({fingerprint(s) for s in states}) == 1


def test_fingerprints_differ_where_one_tensor_does(tower):
    for name in tower:
        assert fingerprint(tower | {name: tower[name] + 1e-3}) != fingerprint(tower)
