"""Several files replaced as one: whenever a save is killed, a reader finds the earlier files or the new ones."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import Killed, killed_after, nothing_changes

from fusion_merge.commits import READY, atomic_files, pending, settle
from fusion_merge.errors import FusionMergeError, ModelError

PATTERNS = ("model*.safetensors*", "pytorch_model*")
FILE, INDEX, TORCH = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
SHARDS = tuple(f"model-{i}-of-3.safetensors" for i in range(1, 4))
SINGLE = {"config.json": "single", FILE: "all"}
SHARDED = {"config.json": "sharded", SHARDS[0]: "first", SHARDS[1]: "second", INDEX: "0 1"}
OTHER = {"config.json": "other", SHARDS[0]: "else", SHARDS[2]: "third", INDEX: "0 2"}
DOUBLE = {"config.json": "double", FILE: "chosen", TORCH: "not chosen"}
CHANGES = {
    "split": (SINGLE, SHARDED),
    "joined": (SHARDED, SINGLE),
    "other": (SHARDED, OTHER),
    "same": (SINGLE, SINGLE | {FILE: "new"}),
    "format": (DOUBLE, SINGLE),
    "first": ({}, SHARDED),
}
changes = pytest.mark.parametrize(("before", "after"), CHANGES.values(), ids=CHANGES)


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _handle: None)


def save(folder: Path, files: dict[str, str]) -> None:
    with atomic_files(folder, replaces=PATTERNS) as place:
        for name, text in files.items():
            (place / name).write_text(text, encoding="utf-8")


def read(folder: Path) -> dict[str, str]:
    """What a reader finds who asks for every name there is."""
    commit = pending(folder)
    paths = {
        name: folder / name if commit is None else commit.path(name)
        for files in (DOUBLE, SHARDED, OTHER, {"note": ""})
        for name in files
    }
    return {name: path.read_text() for name, path in paths.items() if path is not None and path.is_file()}


def kill(folder: Path, files: dict[str, str], steps: int) -> bool:
    """Save and be killed after so many steps; tells whether it was so many."""
    try:
        with killed_after(steps):
            save(folder, files)
    except Killed:
        return True
    return False


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "note").write_text("of mine")
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@changes
def test_files_are_replaced_and_others_stay(folder, before, after):
    save(folder, before)
    save(folder, after)
    assert read(folder) == {"note": "of mine"} | after
    assert names(folder) == {"note"} | after.keys()


@changes
def test_a_kill_at_any_step_leaves_the_earlier_files_or_the_new_ones(tmp_path, before, after):
    outcomes = []
    for steps in range(100):
        folder = tmp_path / str(steps)
        save(folder, before)
        if not kill(folder, after, steps):
            break
        with nothing_changes(folder):
            outcomes.append(read(folder))
        assert outcomes[-1] in (before, after)
        save(folder, OTHER)
        assert read(folder) == OTHER
        assert names(folder) == OTHER.keys()
    assert outcomes == sorted(outcomes, key=lambda files: files == after)  # first the earlier ones, then the new ones
    assert before in outcomes
    assert after in outcomes
    assert len(outcomes) > 12


@changes
def test_a_save_that_goes_on_with_a_killed_one_may_be_killed_too(tmp_path, before, after):
    kills = 0
    for first in range(100):
        for second in range(100):
            folder = tmp_path / f"{first}-{second}"
            save(folder, before)
            more = kill(folder, after, first)
            between = read(folder)
            again = kill(folder, OTHER, second)
            with nothing_changes(folder):
                assert read(folder) in ((between, OTHER) if again else (OTHER,))
            settle(folder)
            settle(folder)
            assert read(folder) in (between, OTHER)
            assert not (folder / READY).exists()
            kills += more and again
            if not again:
                break
        if not more:
            break
    assert kills > 150


def found(folder: Path) -> list[str] | None:
    """What transformers finds, which knows nothing of commits: the first weights that there are, or an error."""
    there = {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}
    weights = [FILE] if FILE in there else [SHARDS[int(i)] for i in there.get(INDEX, "").split()] or [TORCH]
    chosen = ["config.json", *weights]
    return [there[name] for name in chosen] if set(chosen) <= there.keys() else None


@changes
def test_who_knows_nothing_of_commits_finds_no_mixture(tmp_path, before, after):
    ends, seen = [], []
    for files in (before, after):
        save(tmp_path / "whole", files)
        ends.append(found(tmp_path / "whole"))
    for steps in range(100):
        save(tmp_path / str(steps), before)
        if not kill(tmp_path / str(steps), after, steps):
            break
        seen.append(found(tmp_path / str(steps)))
        assert seen[-1] in (None, *ends)
    assert seen[0] == ends[0]
    assert seen[-1] == ends[1]
    assert None in seen


def test_an_error_leaves_the_earlier_files_and_no_rest(folder):
    save(folder, SINGLE)
    with pytest.raises(FusionMergeError, match="No space left"), atomic_files(folder, replaces=PATTERNS) as place:  # noqa: PT012
        (place / FILE).write_text("half")
        raise OSError(28, "No space left on device")
    assert read(folder) == {"note": "of mine"} | SINGLE
    assert names(folder) == {"note"} | SINGLE.keys()


@pytest.mark.parametrize("step", ["mkdir", "fsync", "rename"])
def test_a_folder_that_cannot_be_written_to_keeps_its_files(folder, monkeypatch, step):
    save(folder, SINGLE)

    def refuse(path, *_args, **_kwargs):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(os, step, refuse)
        with pytest.raises(FusionMergeError, match=r"cannot write `.*`: Read-only file system; choose another place"):
            save(folder, SHARDED)
    assert read(folder) == {"note": "of mine"} | SINGLE
    assert names(folder) == {"note"} | SINGLE.keys()


def test_files_that_cannot_be_moved_are_read_from_where_they_are(folder, monkeypatch):
    save(folder, SINGLE)

    def refuse(path, *_args, **_kwargs):
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuse)
        with pytest.raises(FusionMergeError, match=r"cannot put .*\.ready.*: Operation not permitted; the model"):
            save(folder, SHARDED)
    assert read(folder) == {"note": "of mine"} | SHARDED
    save(folder, OTHER)
    assert names(folder) == {"note"} | OTHER.keys()


@pytest.mark.parametrize("name", ["config.json", SHARDS[2]])
def test_a_folder_in_the_place_of_a_file_is_an_error_before_anything_is_replaced(folder, name):
    (folder / name).mkdir()
    with pytest.raises(FusionMergeError, match="a folder has the name of one of the files"):
        save(folder, SINGLE)
    assert names(folder) == {"note", name}


def test_folders_that_killed_saves_left_are_removed(folder):
    (folder / ".saving-old" / "inner").mkdir(parents=True)
    (folder / ".saving-old" / FILE).write_text("half")
    save(folder, SINGLE)
    assert names(folder) == {"note"} | SINGLE.keys()


def test_saves_to_one_folder_wait_for_each_other(folder):
    with atomic_files(folder, replaces=PATTERNS) as place:
        other = threading.Thread(target=save, args=(folder, OTHER))
        other.start()
        other.join(0.2)
        assert other.is_alive()
        (place / FILE).write_text("first")
    other.join(10)
    assert not other.is_alive()
    assert read(folder) == {"note": "of mine"} | OTHER


def test_without_locks_the_folder_of_another_save_is_left_alone(folder, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (folder / ".saving-other").mkdir()
    save(folder, SINGLE)
    assert names(folder) == {"note", ".saving-other"} | SINGLE.keys()


def test_files_and_what_waits_have_the_permissions_that_the_user_asked_for(folder):
    previous = os.umask(0o027)
    try:
        steps = next(n for n in range(100) if kill(folder, SINGLE, n) and (folder / READY).exists())
    finally:
        os.umask(previous)
    assert steps > 0
    assert stat.S_IMODE((folder / READY).stat().st_mode) == 0o750
    settle(folder)
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in SINGLE} == {0o640}


@pytest.fixture
def committed(folder) -> Path:
    """A folder with an earlier model and a newer one that is saved but not in its place."""
    save(folder, SINGLE)
    assert any(kill(folder, SHARDED, n) and (folder / READY).exists() for n in range(100))
    assert read(folder) == {"note": "of mine"} | SHARDED
    return folder


def test_every_changed_character_of_a_manifest_is_noticed(committed):
    manifest = committed / READY / ".manifest.json"
    text = manifest.read_text()
    for index, character in enumerate(text):
        manifest.write_text(text[:index] + chr(ord(character) ^ 1) + text[index + 1 :])
        for action in (pending, settle, lambda folder: save(folder, OTHER)):
            with pytest.raises(ModelError, match=r"was cut short, and the list of its files cannot be read.*\.ready"):
                action(committed)
    manifest.write_text(text)
    assert read(committed) == {"note": "of mine"} | SHARDED


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3, "replaces": [], "checksum": ""}', "[" * 100000])
def test_a_manifest_that_is_none_is_an_error(committed, text):
    (committed / READY / ".manifest.json").write_text(text)
    with pytest.raises(ModelError, match="cut short"):
        pending(committed)


def test_a_lost_manifest_is_an_error_while_files_wait(committed):
    (committed / READY / ".manifest.json").unlink()
    with pytest.raises(ModelError, match=r"cannot be read: .*No such file"):
        pending(committed)


@pytest.mark.parametrize("name", ["../note", "..", "/etc/passwd", "a/b"])
def test_a_manifest_names_files_of_its_folder_alone(committed, name):
    from fusion_merge.commits import _checksum

    about = {"files": [name], "replaces": [], "checksum": _checksum([name], [])}
    (committed / READY / ".manifest.json").write_text(json.dumps(about))
    with pytest.raises(ModelError):
        settle(committed)


ENDLESS = """
import sys
from fusion_merge.commits import atomic_files
sizes = [1, 3, 2]
print("begun", flush=True)
for round in range(10**9):
    with atomic_files(sys.argv[1], replaces=["w*"]) as place:
        for name in ["config", *(f"w-{i}" for i in range(sizes[round % 3]))]:
            (place / name).write_text(f"{round} {sizes[round % 3]}")
"""


def test_a_process_that_is_killed_leaves_whole_sets_of_files(tmp_path):
    rng = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], stdout=subprocess.PIPE)
        try:
            process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.05 + 0.3 * rng.random())
        finally:
            process.kill()
            process.communicate()
        commit = pending(tmp_path)
        every = ["config", *(f"w-{i}" for i in range(3))]
        paths = [tmp_path / name if commit is None else commit.path(name) for name in every]
        texts = [path.read_text() for path in paths if path is not None and path.is_file()]
        assert len(set(texts)) == 1
        assert len(texts) == 1 + int(texts[0].split()[1])
