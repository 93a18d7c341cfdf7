"""A saved model is the earlier one or the new one, whenever the save is killed; and it is what was written."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Killed, killed_after, nothing_changes, same_state
from transformers import AutoConfig, AutoModel

from fusion_merge import CLIPVisionModelPool, MergedCLIPVisionModel, RankOneMoEAlgorithm, WEMoEAlgorithm
from fusion_merge.commits import READY, settle
from fusion_merge.errors import CheckpointError, ModelError
from fusion_merge.models.clip import canonical_names, module_state, save_tower
from fusion_merge.models.merged import MergedCLIPVisionConfig
from fusion_merge.models.sources import LazyState, find_files, split_source


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _handle: None)  # it takes most of the time


# A save may be killed at any step

SHARDS = "20KB"


class Whole:
    """A model, how it is saved, and whether a folder holds exactly that."""

    def __init__(self, model: torch.nn.Module, shard_size: str | None = None) -> None:
        self.model, self.shard_size = model, shard_size

    def save(self, folder: Path) -> None:
        if isinstance(self.model, MergedCLIPVisionModel):
            self.model.save_pretrained(folder, max_shard_size=self.shard_size)
        else:
            save_tower(self.model, folder)

    def is_in(self, folder: Path) -> bool:
        files = find_files(str(folder))
        if not isinstance(self.model, MergedCLIPVisionModel):
            if "moe" in files.config:
                return False
            return same_state(dict(LazyState(files.weights, canonical_names, None)), module_state(self.model))
        if "moe" not in files.config or (len(files.weights) > 1) != (self.shard_size is not None):
            return False
        read = MergedCLIPVisionModel.from_pretrained(folder)
        assert AutoConfig.from_pretrained(folder).model_type == "clip_vision_model" or same_state(
            AutoModel.from_pretrained(folder).own_state(), read.own_state()
        )
        return _says(read.config) == _says(self.model.config) and same_state(read.own_state(), self.model.own_state())

    def names(self) -> set[str]:
        if not isinstance(self.model, MergedCLIPVisionModel):
            return {"config.json", "model.safetensors"}
        return {"config.json", "README.md"} | ({"model.safetensors"} if self.shard_size is None else set())


def _says(config: MergedCLIPVisionConfig) -> dict:
    return json.loads(config.to_json_string())


@pytest.fixture(scope="module")
def models(pool_dir) -> dict[str, Whole]:
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained"), "cats": str(pool_dir / "cats")})
    low_rank, dense = RankOneMoEAlgorithm(rank_k=2).build(pool), WEMoEAlgorithm().build(pool)
    other = WEMoEAlgorithm(init_lambda=0.2).build(pool)
    return {
        "low_rank": Whole(low_rank),
        "dense": Whole(dense),
        "other": Whole(other),
        "sharded": Whole(dense, SHARDS),
        "sharded_other": Whole(low_rank, SHARDS),
        "tower": Whole(pool.load_model("cats")),
        "tower_other": Whole(pool.load_pretrained_model()),
    }


CHANGES = [
    ("low_rank", "sharded"),
    ("sharded", "low_rank"),
    ("sharded", "sharded_other"),
    ("dense", "other"),
    ("tower", "sharded"),
    ("sharded", "tower"),
    ("tower", "tower_other"),
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_save_that_is_killed_leaves_the_earlier_model_or_the_new_one(models, tmp_path, before, after):
    earlier, new, last = models[before], models[after], models["dense"]
    seen = []
    for steps in range(100):
        folder = tmp_path / str(steps)
        earlier.save(folder)
        try:
            with killed_after(steps):
                new.save(folder)
            break
        except Killed:
            pass
        with nothing_changes(folder):
            seen.append(new.is_in(folder))
            assert seen[-1] or earlier.is_in(folder)
        last.save(folder)
        assert last.is_in(folder)
        assert {p.name for p in folder.iterdir()} - {"README.md"} == last.names() - {"README.md"}
    assert seen == sorted(seen)
    assert set(seen) == {False, True}
    assert len(seen) > 12


def test_scores_that_are_not_written_whole_are_not_there(models, tmp_path):
    model, seen = models["dense"].model, []
    for steps in range(100):
        folder = tmp_path / str(steps)
        model.config.scores = {}
        model.save_pretrained(folder)
        try:
            with killed_after(steps):
                model.add_scores(folder, {"cats": 0.5})
            break
        except Killed:
            seen.append(MergedCLIPVisionModel.from_pretrained(folder).config.scores)
    model.config.scores = {}
    assert seen[0] == {}
    assert seen[-1] == {"cats": 0.5}
    assert MergedCLIPVisionModel.from_pretrained(folder).config.scores == {"cats": 0.5}


@pytest.fixture
def cut_short(models, tmp_path) -> Path:
    """A folder with an earlier model whose successor, in shards, is saved but not in its place."""
    for steps in range(100):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        models["low_rank"].save(tmp_path / "model")
        with pytest.raises(Killed), killed_after(steps):
            models["sharded"].save(tmp_path / "model")
        if (tmp_path / "model" / READY).exists():
            break
    return tmp_path / "model"


def test_a_file_named_by_itself_is_that_of_the_last_save(cut_short):
    shard = min(file.name for file in (cut_short / READY).iterdir() if file.suffix == ".safetensors")
    assert not (cut_short / shard).exists()
    assert find_files(str(cut_short / shard)).weights == (cut_short / READY / shard,)
    assert (cut_short / "model.safetensors").exists()
    with pytest.raises(ModelError, match=r"model\.safetensors` does not exist"):
        split_source(str(cut_short / "model.safetensors"))


def test_a_passed_configuration_of_an_earlier_model_does_not_win(cut_short, models):
    earlier = AutoConfig.from_pretrained(cut_short)
    assert earlier.method == "rankone_moe"
    assert AutoModel.from_pretrained(cut_short).config.method == "wemoe"
    settle(cut_short)
    assert models["sharded"].is_in(cut_short)


def test_a_damaged_list_of_files_is_an_error(cut_short):
    (cut_short / READY / ".manifest.json").write_text("{")
    for action in (MergedCLIPVisionModel.from_pretrained, lambda f: find_files(str(f / "model.safetensors"))):
        with pytest.raises(ModelError, match="was cut short, and the list of its files cannot be read"):
            action(cut_short)


def test_weights_in_other_files_do_not_stay_beside_those_of_a_new_tower(models, tmp_path):
    models["sharded"].save(tmp_path)
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"):
        (tmp_path / name).write_text("of an earlier model")
    for mine in ("model_backup.safetensors", "optimizer.bin"):
        (tmp_path / mine).write_text("")
    models["tower"].save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        *("config.json", "model.safetensors", "README.md", "model_backup.safetensors", "optimizer.bin")
    }
    assert models["tower"].is_in(tmp_path)


@pytest.mark.parametrize("name", ["dense", "sharded", "tower"])
def test_saved_files_have_the_permissions_that_the_user_asked_for(models, tmp_path, name):
    previous = os.umask(0o027)
    try:
        models[name].save(tmp_path / "saved")
    finally:
        os.umask(previous)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "saved").iterdir()} == {0o640}


ENDLESS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from fusion_merge import MergedCLIPVisionModel

torch.set_num_threads(1)
root = Path(sys.argv[1])
models = [MergedCLIPVisionModel.from_pretrained(root / name) for name in ("a", "b")]
states = [model.own_state() for model in models]
rng, met = random.Random(0), [0, 0, 0]
for _ in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        while True:
            for model, size in zip(models, ("20KB", None), strict=True):
                model.save_pretrained(root / "saved", max_shard_size=size)
    time.sleep((0.0 if (root / "saved" / "config.json").exists() else 0.5) + 0.3 * rng.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    met[2] += (root / "saved" / ".ready").exists()
    read = MergedCLIPVisionModel.from_pretrained(root / "saved")
    which = ["rankone_moe", "wemoe"].index(read.config.method)
    met[which] += 1
    expected, got = states[which], read.own_state()
    if expected.keys() != got.keys() or any(not torch.equal(expected[n], got[n]) for n in got):
        sys.exit("a mixture")
models[0].save_pretrained(root / "saved")
print(*met, *sorted(os.listdir(root / "saved")))
"""


def test_a_process_that_is_killed_leaves_a_whole_model(models, tmp_path):
    models["low_rank"].save(tmp_path / "a")
    models["dense"].save(tmp_path / "b")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENDLESS, str(tmp_path), "20"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    low_rank, dense, _, *names = run.stdout.split()
    assert int(low_rank) + int(dense) == 20
    assert names == ["README.md", "config.json", "model.safetensors"]


# The configuration is what was written


@pytest.fixture
def selecting(tmp_path, pool_dir) -> Path:
    """A saved model that selects experts, with scores."""
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained"), "cats": str(pool_dir / "cats")})
    model = RankOneMoEAlgorithm(rank_k=2, select_k=2).build(pool)
    model.save_pretrained(tmp_path / "merged")
    model.add_scores(tmp_path / "merged", {"cats": 0.25}, "fusion_merge method=rankone_moe")
    return tmp_path / "merged"


def _other(character: str) -> str:
    """Another character of the same class, so that the text stays JSON in most places."""
    for first, last in ("09", "az", "AZ"):
        if first <= character <= last:
            return first if character == last else chr(ord(character) + 1)
    return {"-": "+", ".": ",", "_": "-", "/": "."}.get(character, character)


def test_no_changed_character_of_a_configuration_is_read_in_silence(selecting):
    file = selecting / "config.json"
    text = file.read_text()
    expected = MergedCLIPVisionModel.from_pretrained(selecting).config
    refused = same = 0
    for index, character in enumerate(text):
        if _other(character) == character:
            continue
        file.write_text(text[:index] + _other(character) + text[index + 1 :])
        try:
            config = MergedCLIPVisionModel.from_pretrained(selecting).config
        except (CheckpointError, ModelError):  # ModelError: it is no JSON any more
            refused += 1
            continue
        same += 1
        ours = MergedCLIPVisionConfig().to_dict().keys() - {"transformers_version", "architectures"}
        before, now = _says(expected), _says(config)
        assert {n: now[n] for n in ours & before.keys()} == {n: before[n] for n in ours & before.keys()}
    assert refused > 1000
    assert same < 100  # in what transformers writes at the top


def _changed(folder: Path, *keys: str, value: object) -> None:
    table = config = json.loads((folder / "config.json").read_text())
    for key in keys[:-1]:
        table = table[key]
    assert table[keys[-1]] != value
    table[keys[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


LAYER = ("moe", "encoder.layers.0.mlp")
DAMAGE = {
    "bias_scaling": ((*LAYER, "linears", "fc1", "bias_scaling"), 0.4),
    "routing": ((*LAYER, "routing"), "sample"),
    "selection": ((*LAYER, "selection"), None),
    "task": (("tasks",), ["cat"]),
    "option": (("method_options", "select_k"), 3),
    "score": (("scores", "cats"), 0.75),
    "command": (("command",), ""),
    "epsilon": (("vision_config", "layer_norm_eps"), 1e-4),
    "no_weights_checksum": (("checksum",), ""),
    "weights_checksum": (("checksum",), "00000000"),
    "no_checksum": (("config_checksum",), ""),
    "null": (("config_checksum",), None),
}


@pytest.mark.parametrize("reader", [MergedCLIPVisionModel, AutoModel])
@pytest.mark.parametrize(("keys", "value"), DAMAGE.values(), ids=DAMAGE)
def test_a_changed_configuration_is_refused(selecting, keys, value, reader):
    reader.from_pretrained(selecting)
    _changed(selecting, *keys, value=value)
    with pytest.raises(CheckpointError, match="is damaged: its configuration is not what was written"):
        reader.from_pretrained(selecting)


@pytest.mark.parametrize("name", ["checksum", "config_checksum", "scores"])
def test_a_configuration_that_lacks_something_is_refused(selecting, name):
    config = json.loads((selecting / "config.json").read_text())
    del config[name]
    (selecting / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="its configuration is not what was written"):
        MergedCLIPVisionModel.from_pretrained(selecting)


def test_what_transformers_adds_is_none_of_ours(selecting):
    config = json.loads((selecting / "config.json").read_text())
    added = {"transformers_version": "6.0.0", "dtype": "float32", "architectures": None, "something": {"new": 1}}
    (selecting / "config.json").write_text(json.dumps(config | added, indent=None))
    MergedCLIPVisionModel.from_pretrained(selecting)


def test_a_configuration_is_sealed_however_it_is_written(selecting, tmp_path):
    model = MergedCLIPVisionModel.from_pretrained(selecting)
    before = (selecting / "config.json").read_text()
    model.config.save_pretrained(selecting)
    assert (selecting / "config.json").read_text() == before
    model.config.scores = {"cats": 1.0}
    model.config.save_pretrained(selecting)
    assert MergedCLIPVisionModel.from_pretrained(selecting).config.scores == {"cats": 1.0}
    model.config.to_json_file(selecting / "config.json", use_diff=False)
    assert MergedCLIPVisionModel.from_pretrained(selecting).config.scores == {"cats": 1.0}


def test_a_passed_configuration_is_used_if_somebody_made_it_what_it_is(selecting, models, tmp_path):
    models["low_rank"].save(tmp_path / "other")
    read = MergedCLIPVisionModel.from_pretrained
    own, other = (MergedCLIPVisionConfig.from_pretrained(folder) for folder in (selecting, tmp_path / "other"))
    assert read(selecting, config=own).config is own
    assert read(selecting, config=other).config.to_dict() == own.to_dict()
    own.base_model = "of mine"
    assert read(selecting, config=own).config.base_model == "of mine"
    unsealed = MergedCLIPVisionConfig(**{**other.to_dict(), "config_checksum": "", "command": "by hand"})
    assert read(tmp_path / "other", config=unsealed).config.command == "by hand"


def test_a_passed_configuration_does_not_hide_damage(selecting):
    own = MergedCLIPVisionConfig.from_pretrained(selecting)
    own.checksum = ""
    weights = selecting / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="its weights are not those"):
        MergedCLIPVisionModel.from_pretrained(selecting, config=own)
    _changed(selecting, "command", value="")
    with pytest.raises(CheckpointError, match="its configuration is not what was written"):
        MergedCLIPVisionModel.from_pretrained(selecting, config=own)
