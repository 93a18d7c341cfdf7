"""Where models come from: folders, files, hub ids and the embedded zoo, read lazily, headers first."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from fusion_merge import zoo
from fusion_merge.commits import pending
from fusion_merge.errors import ModelError, reason
from fusion_merge.files import misspelt

_HUB_ID = re.compile(r"^(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?$")
HUB_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only")
"""What may be said of a hub id beside its name; `find_files` takes each."""

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_PATTERNS = (*_WEIGHT_FILES, "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
"""The names that the weights of a model have in its folder: what a new model there replaces."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model: where it is, its configuration, and its weight files."""

    origin: str
    config: dict[str, Any]
    weights: tuple[Path, ...]


def split_source(source: str) -> tuple[str, str | None]:
    """Return what transformers calls a path or hub id, and the revision if one is named.

    Args:
        source: a folder, a file, `zoo://POOL/NAME`, or a hub id such as `openai/clip-vit-base-patch32@main`.

    Raises:
        ModelError: if it is a path that does not exist, or neither a path nor a hub id.
    """
    try:
        if source.startswith(zoo.SCHEME):
            return str(zoo.path(source)), None
        local = Path(source).expanduser()
        there = local.is_dir() or _local_file(local) is not None
    except (OSError, RuntimeError) as error:  # a name that is too long, or the home of nobody
        raise ModelError(f"`{shortened(source)}` cannot be the name of a model: {reason(error)[:200]}") from error
    if there:
        return str(local), None
    match = _HUB_ID.match(source)
    if match is None or source.startswith((".", "~")) or local.suffix in {".safetensors", ".bin", ".pt", ".pth"}:
        raise ModelError(
            f"`{shortened(source)}` does not exist; give a folder, a file, or a hub id such as owner/name@revision"
        )
    return match["id"], match["revision"]


def shortened(text: str, length: int = 200) -> str:
    """Return a text in one line of a bearable length, for errors.

    Args:
        text: what a user wrote.
        length: how many characters are kept.
    """
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return printable if len(printable) <= length else f"{printable[:length]}…"


def find_files(source: str, *, subfolder: str = "", **hub_options: Any) -> ModelFiles:
    """Find the configuration and the weight files of a model.

    Args:
        source: as in `split_source`.
        subfolder: where in the folder or repository the model is.
        **hub_options: others of `HUB_OPTIONS`, for the hub.

    Raises:
        ModelError: if something is missing; the message names it.
    """
    path, revision = split_source(source)
    file = _local_file(Path(path))
    _check_options(source, path, revision, {"subfolder": subfolder, **hub_options})
    if file is not None:
        fetch = _local_fetch(Path(path).parent)
        weights: tuple[Path, ...] = (file,)
    else:
        if Path(path).is_dir():
            fetch = _local_fetch(Path(path) / subfolder)
        else:
            if meant := misspelt(path):
                raise ModelError(meant)
            fetch = _hub_fetch(path, {"revision": revision, "subfolder": subfolder} | hub_options)
            if fetch("config.json") is None:
                raise ModelError(
                    f"`{source}` is not a folder here and cannot be had from the hub (offline, or not there)"
                )
        weights = _weight_files(source, fetch)
    config_file = fetch("config.json")
    if config_file is None:
        raise ModelError(f"`{source}` has no `config.json`; it is needed to know the model's shape")
    return ModelFiles(source, _read_json(config_file), weights)


def _check_options(source: str, path: str, revision: str | None, options: Mapping[str, Any]) -> None:
    """Refuse options that would be left aside in silence."""
    is_file = _local_file(Path(path)) is not None
    if is_file and options.get("subfolder"):
        raise ModelError(f"`{source}` is a file, and has no `subfolder`={options['subfolder']!r}; give the file alone")
    wanted = options.get("revision")
    if wanted and (is_file or Path(path).is_dir()):
        raise ModelError(f"`{source}` is a path here, and has no `revision`={wanted!r}; leave it out, or give a hub id")
    if wanted and revision and wanted != revision:
        raise ModelError(f"`{source}` names another revision than `revision`={wanted!r}; give one of them")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read `{file}`: {reason(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"`{file}` does not hold a table of keys")
    return content


def _local_file(path: Path) -> Path | None:
    """Return where the file that a path names is to be read, or None if it names none."""
    return _local_fetch(path.parent)(path.name) if path.parent.is_dir() and not path.is_dir() else None


def _local_fetch(folder: Path) -> Callable[[str], Path | None]:
    commit = pending(folder)  # files of a save that was cut short

    def fetch(name: str) -> Path | None:
        try:
            file = folder / name if commit is None else commit.path(name)
            return file if file is not None and file.is_file() else None
        except OSError as error:  # a name that is too long
            raise ModelError(f"cannot look for `{shortened(name)}` in `{folder}`: {error.strerror}") from error

    return fetch


def _hub_fetch(hub_id: str, options: Mapping[str, Any]) -> Callable[[str], Path | None]:
    def fetch(name: str) -> Path | None:
        try:
            found = cached_file(hub_id, name, _raise_exceptions_for_missing_entries=False, **options)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"`{hub_id}` is not a folder here and cannot be had from the hub: {reason(error)}"
            ) from error
        return Path(found) if found else None

    return fetch


def _weight_files(source: str, fetch: Callable[[str], Path | None]) -> tuple[Path, ...]:
    for name in _WEIGHT_FILES:
        file = fetch(name)
        if file is None:
            continue
        if not name.endswith(".index.json"):
            return (file,)
        table = _read_json(file).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ModelError(f"`{file}` has no `weight_map` that names the weight files")
        shards = sorted(set(map(str, table.values())))
        files = tuple(fetch(shard) for shard in shards)
        if None in files:
            raise ModelError(f"`{source}` lacks `{shards[files.index(None)]}`, which `{name}` names")
        return tuple(f for f in files if f is not None)
    raise ModelError(f"`{source}` has no weights; looked for {', '.join(_WEIGHT_FILES)}")


class LazyState(Mapping[str, Tensor]):
    """A state whose tensors are read from files when they are asked for, one at a time.

    Args:
        files: the weight files: safetensors, or torch files that hold nothing but tensors.
        names: which names to take, as a function from the files' names to a table of own name → file's name.
        dtype: what floating-point tensors are converted to; None leaves them as they are stored.

    Raises:
        ModelError: if a file cannot be read.
    """

    def __init__(
        self,
        files: tuple[Path, ...],
        names: Callable[[list[str]], dict[str, str]],
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        self._dtype = dtype
        self._readers = {key: reader for file in files for key, reader in _open(file).items()}
        self._names = names(list(self._readers))
        self.shapes = {name: self._readers[key].shape for name, key in self._names.items()}

    def __getitem__(self, name: str) -> Tensor:
        reader = self._readers[self._names[name]]
        try:
            tensor = self._converted(reader.read())
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"cannot read `{self._names[name]}` in `{reader.file}`: {reason(error)}") from error
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(
                f"`{self._names[name]}` in `{reader.file}` holds NaN or infinite values; use another copy of the model"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def check_floating(self) -> None:
        """Refuse a state with a tensor that is not of floating-point numbers, from the headers alone.

        Raises:
            ModelError: names the first such tensor.
        """
        for key in self._names.values():
            reader = self._readers[key]
            if not reader.dtype.startswith(("F", "BF")):
                raise ModelError(
                    f"`{key}` in `{reader.file}` holds {reader.dtype} values; "
                    "give a model whose weights are float32, float16 or bfloat16"
                )

    def first_row(self, name: str) -> Tensor:
        """Return the first row of a tensor, of which nothing else is read.

        Args:
            name: the tensor's name.

        Shape:
            (…, D) → (D,); () → (1,).
        """
        reader = self._readers[self._names[name]]
        try:
            return self._converted(reader.read_first_row())
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"cannot read `{self._names[name]}` in `{reader.file}`: {reason(error)}") from error

    def _converted(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if self._dtype is not None and tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class _Reader:
    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    read_first_row: Callable[[], Tensor]


def _open(file: Path) -> dict[str, _Reader]:
    try:
        return _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file)
    except ModelError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ModelError(f"cannot read weights from `{file}`: {reason(error)}") from error


def _open_safetensors(file: Path) -> dict[str, _Reader]:
    """Read the header alone; values are read when they are asked for, into memory of their own.

    Mapped files would stay in memory for as long as they are open, and end the process where one is cut meanwhile.
    """
    readers = {}
    with file.open("rb") as stream, safe_open(file, framework="pt", device="cpu") as handle:  # which checks the header
        identity = _identity(stream)
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        for key in list(handle.keys()):
            described = handle.get_slice(key)
            shape, name = tuple(described.get_shape()), str(described.get_dtype())  # such as F32, BF16 or I8
            dtype = described[:0].dtype if shape else handle.get_tensor(key).dtype
            start = 8 + length + int(header[key]["data_offsets"][0])
            row = (0,) if 0 in shape else shape[-1:] or (1,)
            read = partial(_read_at, file, identity, start)
            readers[key] = _Reader(file, shape, name, partial(read, shape, dtype), partial(read, row, dtype))
    return readers


def _identity(stream: BufferedReader) -> tuple[int, ...]:
    """Return by what a file is known: another one may take its place."""
    status = os.fstat(stream.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_at(file: Path, identity: tuple[int, ...], start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    memory = memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type] # it is a buffer
    with file.open("rb") as stream:
        if _identity(stream) != identity:
            raise OSError("the file was changed meanwhile; run again")
        stream.seek(start)
        if stream.readinto(memory) != len(memory):
            raise OSError("the file was cut meanwhile")
    return tensor


def _open_torch(file: Path) -> dict[str, _Reader]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # the unpickler raises its own kinds for anything but plain tensors
        raise ModelError(f"`{file}` is not a torch file of plain tensors: {reason(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(n, str) and _is_plain(t) for n, t in state.items()):
        raise ModelError(f"`{file}` does not hold a state dict of tensors, plain ones by name")
    return {
        key: _Reader(file, tuple(t.shape), _dtype_name(t), t.clone, partial(_first_row, t)) for key, t in state.items()
    }


def _dtype_name(tensor: Tensor) -> str:
    """Return the dtype as safetensors would begin to call it."""
    return f"F ({tensor.dtype})" if tensor.is_floating_point() else str(tensor.dtype)


def _is_plain(tensor: Any) -> bool:
    """Tell whether something is a tensor with values of its own, neither sparse nor quantized."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        return False
    return not tensor.is_quantized and tensor.device.type == "cpu"


def _first_row(tensor: Tensor) -> Tensor:
    return tensor.flatten()[: tensor.shape[-1] if tensor.ndim else 1].clone()


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return a short name for the content of a state: its names, shapes, and the first row of each tensor.

    Two models that differ in a whole tensor differ here, whatever file format or key layout they came in.

    Args:
        state: the state; rows are read in float32, and of a `LazyState` nothing else is read.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        shape = state.shapes[name] if isinstance(state, LazyState) else tuple(state[name].shape)
        row = state.first_row(name) if isinstance(state, LazyState) else _first_row(state[name])
        digest.update(f"{name}{shape}".encode())
        digest.update(row.to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
