"""The embedded pools: small models and tasks that need no network."""

from __future__ import annotations

from pathlib import Path

from fusion_merge.errors import ModelError, nearest

SCHEME = "zoo://"

TASK_POOLS: tuple[str, ...] = ("tiny8", "tiny20")
"""The pools with tasks of their own; the models of `tiny8_hard` have the tasks of `tiny8`."""

_WEIGHTS = Path(__file__).parent / "weights"


def path(source: str) -> Path:
    """Return the folder of an embedded model.

    Args:
        source: `zoo://POOL/NAME`, for example `zoo://tiny8/pretrained`.

    Raises:
        ModelError: if there is no such model; the message proposes the nearest.
    """
    name = source.removeprefix(SCHEME)
    folder = _WEIGHTS / name
    if not (folder / "config.json").is_file():
        raise ModelError(f"`{source}` is not in the zoo; {nearest(name, names())}")
    return folder


def names() -> list[str]:
    """Return the names of all embedded models, as `POOL/NAME`."""
    return sorted(str(f.parent.relative_to(_WEIGHTS)) for f in _WEIGHTS.glob("*/*/config.json"))
