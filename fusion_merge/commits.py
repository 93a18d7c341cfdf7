"""Several files of a folder replaced as one: whenever a save is killed, all earlier files stand or all new ones do.

New files are written to a folder of their own inside the folder; renaming it to `.ready` is the commit. They are then
moved to their places one by one. Where that is cut short, a manifest in `.ready` tells readers which file is whose, and
the next save goes on with it. A reader that knows nothing of this finds the earlier files, the new ones or too few.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError

from fusion_merge.errors import FusionMergeError, ModelError, reason
from fusion_merge.files import default_mode
from fusion_merge.sealed import text_checksum

if sys.platform != "win32":
    import fcntl

READY = ".ready"
"""The folder of files that are saved but not all in their places."""

_MANIFEST = ".manifest.json"
_TEMPORARY = ".saving-"


@dataclass(frozen=True)
class Commit:
    """Files that were saved and are not all in their places yet."""

    folder: Path
    names: tuple[str, ...]
    replaces: tuple[str, ...]

    def path(self, name: str) -> Path | None:
        """Return where a file is to be read, or None if it was replaced and is no more.

        Args:
            name: its name in the folder.
        """
        if name not in self.names:
            return None if self.is_replaced(name) else self.folder / name
        waiting = self.folder / READY / name
        return waiting if waiting.exists() else self.folder / name

    def is_replaced(self, name: str) -> bool:
        """Tell whether a name is among those that the new files replace.

        Args:
            name: the name of a file in the folder.
        """
        return any(fnmatchcase(name, pattern) for pattern in self.replaces)


@contextmanager
def atomic_files(folder: Path | str, *, replaces: Sequence[str]) -> Iterator[Path]:
    """Give a folder for new files; all of them take their places as one when the context ends without an error.

    Saves to one folder wait for each other, and what killed ones left there is removed; where the file system has no
    locks, neither is done.

    Args:
        folder: where the files will be; it is made.
        replaces: patterns of the names that are removed unless they are among the new ones; other files stay.

    Raises:
        FusionMergeError: if the folder cannot be written to; the earlier files are as they were.
        ModelError: if an earlier save was cut short and what it left is damaged.
    """
    place = Path(folder).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place) as alone:
            settle(place)
            for left in place.glob(f"{_TEMPORARY}*") if alone else ():
                shutil.rmtree(left, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(dir=place, prefix=_TEMPORARY))
            try:
                yield temporary
                _commit(temporary, place, replaces)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            settle(place)
    except (OSError, SafetensorError) as error:
        text = getattr(error, "strerror", None) or error
        raise FusionMergeError(f"cannot write `{place}`: {text}; choose another place") from error


def pending(folder: Path) -> Commit | None:
    """Return what was saved to a folder and is not all in its place, or None, as nearly always.

    Args:
        folder: any folder; nothing in it is changed.

    Raises:
        ModelError: if it cannot be told.
    """
    manifest = folder / READY / _MANIFEST
    try:
        if not manifest.parent.is_dir():
            return None
        if not manifest.exists() and not any(manifest.parent.iterdir()):
            return None
        stored = json.loads(manifest.read_text(encoding="utf-8"))
        commit = Commit(folder, tuple(stored["files"]), tuple(stored["replaces"]))
        if stored["checksum"] != _checksum(commit.names, commit.replaces) or not all(map(_is_plain, commit.names)):
            raise ValueError("its checksum is another")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        if not manifest.parent.is_dir():  # put in place by another process meanwhile
            return None
        raise ModelError(
            f"a save to `{folder}` was cut short, and the list of its files cannot be read: {reason(error)}; "
            f"use another copy, or remove `{manifest.parent}` and save the model again"
        ) from error
    return commit


def settle(folder: Path) -> None:
    """Put in place what a save that was cut short after its commit left; this too may be cut short and repeated.

    Whoever reads meanwhile without `pending` finds no mixture: old weights go before new ones come, and by their names
    `config.json` comes before weights, and the index of shards after them.

    Args:
        folder: any folder.

    Raises:
        FusionMergeError: if files cannot be moved; they can still be read by way of `pending`.
        ModelError: as `pending`.
    """
    commit = pending(folder)
    ready = folder / READY
    try:
        if commit is not None:
            waiting = [name for name in sorted(commit.names) if (ready / name).exists()]
            for old in sorted(os.listdir(folder), reverse=True):  # noqa: PTH208 (names are wanted)
                if commit.is_replaced(old) and (old in waiting or old not in commit.names):
                    (folder / old).unlink()
            for name in waiting:
                (ready / name).replace(folder / name)
            _sync(folder)
            (ready / _MANIFEST).unlink()
        if ready.is_dir():
            ready.rmdir()
    except OSError as error:
        raise FusionMergeError(
            f"cannot put the files of `{ready}` in their places: {error.strerror}; "
            "the model can be read as it is, and the next save to this folder tries again"
        ) from error


def _commit(temporary: Path, folder: Path, replaces: Sequence[str]) -> None:
    names = sorted(file.name for file in temporary.iterdir())
    taken = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    if any(path.name in names or any(fnmatchcase(path.name, p) for p in replaces) for path in taken):
        raise IsADirectoryError(errno.EISDIR, "a folder has the name of one of the files")
    manifest = {"files": names, "replaces": list(replaces), "checksum": _checksum(names, replaces)}
    (temporary / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    for file in temporary.iterdir():
        file.chmod(default_mode(0o666))  # safetensors makes files that nobody else may read
        _sync(file)
    temporary.chmod(default_mode(0o777))
    _sync(temporary)
    temporary.rename(folder / READY)
    _sync(folder)


def _checksum(names: Sequence[str], replaces: Sequence[str]) -> str:
    return text_checksum(json.dumps([list(names), list(replaces)]))


def _is_plain(name: str) -> bool:
    return name == Path(name).name != ".."


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, outlast a power cut; not every system can do that for folders."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not is_folder:
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Wait until nobody else saves to a folder; gives whether that is certain, as not every file system has locks."""
    if sys.platform == "win32":
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            certain = True
        except OSError:
            certain = False
        yield certain
    finally:
        os.close(handle)
