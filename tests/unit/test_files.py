"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest

from fusion_merge.errors import ConfigError, FusionMergeError
from fusion_merge.files import atomic, check_writable, misspelt, write_text


def _names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_text_is_written_to_folders_that_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "note.txt", "häuser\n")
    assert (tmp_path / "a" / "b" / "note.txt").read_text(encoding="utf-8") == "häuser\n"


def test_nothing_but_the_file_is_left(tmp_path):
    write_text(tmp_path / "note.txt", "x")
    assert _names(tmp_path) == ["note.txt"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "note.txt"
    target.write_text("old")
    with atomic(target) as temporary:
        temporary.write_text("ne")
        assert target.read_text() == "old"
        temporary.write_text("new")
    assert target.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_no_rest(tmp_path, error):
    target = tmp_path / "note.txt"
    target.write_text("old")
    with pytest.raises(error), atomic(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert _names(tmp_path) == ["note.txt"]


def test_an_operating_system_error_while_writing_names_the_file(tmp_path):
    with pytest.raises(FusionMergeError, match=r"note\.txt.*No space left"), atomic(tmp_path / "note.txt"):
        raise OSError(28, "No space left on device")
    assert _names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FusionMergeError, match=r"cannot write `.*note\.txt`"):
        write_text(tmp_path / "file" / "note.txt", "x")


def test_a_folder_in_the_place_of_the_file_is_an_error(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(FusionMergeError, match="taken"):
        write_text(tmp_path / "taken", "x")
    assert _names(tmp_path) == ["taken"]


def test_files_get_the_permissions_that_the_user_asked_for(tmp_path):
    previous = os.umask(0o027)
    try:
        write_text(tmp_path / "note.txt", "x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "note.txt").stat().st_mode) == 0o640


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_text("~/note.txt", "x")
    assert (tmp_path / "note.txt").read_text() == "x"


# What could not be written is refused before work is done


@pytest.fixture
def places(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    return tmp_path


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("file", "file"),
        ("new", "file"),
        ("folder/new", "file"),
        ("new/new", "file"),
        ("folder", "folder"),
        ("new", "folder"),
        ("folder/new/new", "folder"),
    ],
)
def test_place_that_can_be_written_is_accepted_and_left_alone(places, place, kind):
    check_writable(places / place, "output_dir", kind=kind)
    assert _names(places) == ["file", "folder"]
    assert _names(places / "folder") == []
    assert (places / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("place", "kind", "text"),
    [
        ("folder", "file", r"folder` is a folder; name a file"),
        ("file", "folder", r"file` is a file, not a folder; name another place"),
        ("file/below", "file", r"file` is a file, not a folder"),
        ("file/below/it", "folder", r"file` is a file, not a folder"),
    ],
)
def test_place_of_the_wrong_kind_is_refused(places, place, kind, text):
    with pytest.raises(ConfigError, match=rf"`save_here`='.*/{place}' cannot be written: `.*/{text}"):
        check_writable(places / place, "save_here", kind=kind)


def test_place_is_meant_to_be_a_file_unless_told_otherwise(places):
    check_writable(places / "file", "report_save_path")
    with pytest.raises(ConfigError, match="is a folder"):
        check_writable(places / "folder", "report_save_path")


@pytest.mark.parametrize(("place", "locked"), [("file", "."), ("file", "file"), ("new", "."), ("folder/new", "folder")])
def test_place_without_permission_is_refused(places, monkeypatch, place, locked):
    forbidden = places / locked  # the tests may be run by root, who may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != forbidden)
    with pytest.raises(ConfigError, match="no permission for"):
        check_writable(places / place, "report_save_path")


@pytest.mark.parametrize("path", ["x" * 5000, "~nobody_at_all/file", "a\0b"])
def test_a_path_that_no_file_can_have_is_refused(path):
    with pytest.raises(ConfigError, match=r"`here`=.* cannot be written"):
        check_writable(path, "here")


def test_a_path_that_nearly_exists_is_taken_for_a_slip(tmp_path, monkeypatch):
    (tmp_path / "models" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert misspelt("models/catz") == "`models/catz` does not exist; did you mean `models/cats`?"
    for path in ("models/cats", "models/zebra", "openai/clip-vit-base-patch32", "catz"):
        assert misspelt(path) is None
