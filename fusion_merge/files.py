"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fusion_merge.errors import ConfigError, FusionMergeError


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
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise FusionMergeError(f"cannot write `{target}`: {getattr(error, 'strerror', None) or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path | str, what: str) -> None:
    """Refuse a path that could not be written, before work is done that would be lost.

    Args:
        path: a file or folder that need not exist yet.
        what: the option that names it, for the error.

    Raises:
        ConfigError: if what is there already is in the way, or not writable.
    """
    target = Path(path).expanduser().absolute()
    existing = next(p for p in (target, *target.parents) if p.exists())
    if existing != target and not existing.is_dir():
        raise ConfigError(f"`{what}`={str(path)!r} cannot be written: `{existing}` is a file, not a folder")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"`{what}`={str(path)!r} cannot be written: no permission for `{existing}`")


def write_text(path: Path | str, text: str) -> None:
    """Write a text file whole or not at all.

    Args:
        path: where the file will be.
        text: what it will hold.
    """
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
