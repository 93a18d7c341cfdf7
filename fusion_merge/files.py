"""Files that are written whole or not at all."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from fusion_merge.errors import ConfigError, FusionMergeError, reason


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path`; it takes its place when the context ends without an error.

    Args:
        path: where the file will be; its folder is made.

    Raises:
        FusionMergeError: if the folder cannot be made or written to.
    """
    target = Path(path).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise FusionMergeError(f"cannot write `{target}`: {error.strerror}; choose another place") from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(default_mode(0o666))
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise FusionMergeError(f"cannot write `{target}`: {getattr(error, 'strerror', None) or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path | str, what: str, *, kind: Literal["file", "folder"] = "file") -> None:
    """Refuse a path that could not be written, before work is done that would be lost.

    Args:
        path: a file or folder that need not exist yet.
        what: the option that names it, for the error.
        kind: which of the two it is meant to be.

    Raises:
        ConfigError: if what is there already is of the other kind, in the way, or not writable.
    """
    wrong = f"`{what}`={str(path)[:200]!r} cannot be written:"
    try:
        target = Path(path).expanduser().absolute()
        target.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, RuntimeError, ValueError) as error:  # too long, the home of nobody, or a zero byte
        raise ConfigError(f"{wrong} {reason(error)[:100]}; name another place") from error
    existing = next(p for p in (target, *target.parents) if p.exists())
    if existing == target and kind == "file" and target.is_dir():
        raise ConfigError(f"{wrong} `{target}` is a folder; name a file, for example one in that folder")
    if not existing.is_dir() and (existing != target or kind == "folder"):
        raise ConfigError(f"{wrong} `{existing}` is a file, not a folder; name another place")
    folder = existing if existing.is_dir() else existing.parent  # where a new file takes the place of the old one
    if not (os.access(existing, os.W_OK) and os.access(folder, os.W_OK | os.X_OK)):
        raise ConfigError(f"{wrong} no permission for `{existing}`; name another place")


def misspelt(path: Path | str) -> str | None:
    """Return what a path that does not exist was meant to be, if something beside it has nearly its name.

    Args:
        path: a path, or what may be a hub id.
    """
    place = Path(path).expanduser()
    if place.exists() or place.parent == Path() or not place.parent.is_dir():
        return None
    close = difflib.get_close_matches(place.name, sorted(p.name for p in place.parent.iterdir()), n=1)
    return f"`{path}` does not exist; did you mean `{place.parent / close[0]}`?" if close else None


def write_text(path: Path | str, text: str) -> None:
    """Write a text file whole or not at all.

    Args:
        path: where the file will be.
        text: what it will hold.
    """
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def default_mode(mode: int) -> int:
    """Return the permissions that something new has here.

    Args:
        mode: those that it is made with, as 0o666 for files.
    """
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask
