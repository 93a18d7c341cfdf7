"""Safetensors files that say what they are and notice when a bit of theirs was changed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusion_merge.errors import CheckpointError, reason
from fusion_merge.files import atomic

_KEY = "fusion_merge"


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of names, dtypes, shapes and values, as eight hexadecimal digits.

    Args:
        tensors: in any order and on any device.
    """
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def text_checksum(text: str) -> str:
    """Return the CRC-32 of a text, as eight hexadecimal digits.

    Args:
        text: what is to be told from anything else.
    """
    return f"{zlib.crc32(text.encode()):08x}"


def write_sealed(path: Path | str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and what they are about, whole or not at all.

    Args:
        path: where; any ending will do.
        tensors: what to write.
        about: plain JSON values.

    Raises:
        FusionMergeError: if the file cannot be written.
    """
    own = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    described = json.dumps(about)
    seal = {"checksum": checksum(own), "about": json.loads(described), "about_checksum": text_checksum(described)}
    metadata = {"format": "pt", _KEY: json.dumps(seal)}
    with atomic(path) as temporary:
        save_file(own, temporary, metadata=metadata)


def read_about(path: Path | str, what: str) -> dict[str, Any]:
    """Return what a file is about, from its header alone.

    Args:
        path: what `write_sealed` wrote.
        what: how errors call the file.

    Raises:
        CheckpointError: if the file is missing, is not such a file, or its description was changed.
    """
    return _read(path, what, tensors=False)[1]


def read_shapes(path: Path | str, what: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors by name, from its header alone.

    Args:
        path: what `write_sealed` wrote.
        what: how errors call the file.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    file = Path(path).expanduser()
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot read {what} `{file}`: {reason(error)}") from error


def read_sealed(path: Path | str, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file and what they are about.

    Args:
        path: what `write_sealed` wrote.
        what: how errors call the file.

    Raises:
        CheckpointError: if the file is missing, is not such a file, or was changed since it was written.
    """
    return _read(path, what, tensors=True)


def _read(path: Path | str, what: str, *, tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    file = Path(path).expanduser()
    if file.is_dir():
        raise CheckpointError(f"`{file}` is a folder, but a {what} is a single file; name that")
    if not file.is_file():
        raise CheckpointError(f"{what} `{file}` does not exist")
    try:
        with safe_open(file, framework="pt") as handle:
            stored = json.loads((handle.metadata() or {}).get(_KEY, "null"))
            found = {name: handle.get_tensor(name) for name in (list(handle.keys()) if tensors else [])}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # RecursionError among them
        raise CheckpointError(f"cannot read {what} `{file}`: {reason(error)}") from error
    if not isinstance(stored, dict) or not isinstance(stored.get("about"), dict):
        raise CheckpointError(f"`{file}` is not a {what}: it does not say what it belongs to")
    if stored.get("about_checksum") != text_checksum(json.dumps(stored["about"])):
        raise CheckpointError(f"{what} `{file}` is damaged: its description is not what was written; use a copy")
    if tensors and stored.get("checksum") != checksum(found):
        raise CheckpointError(f"{what} `{file}` is damaged: its values are not those that were written; use a copy")
    return found, stored["about"]
