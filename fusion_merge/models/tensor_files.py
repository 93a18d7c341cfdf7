"""States whose tensors are read from files when they are asked for, headers first."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusion_merge.errors import ModelError, reason


class HeadedState(Mapping[str, Tensor]):
    """A state that can be described without being read.

    Attributes:
        shapes: the shape of each tensor.
    """

    shapes: dict[str, tuple[int, ...]]

    @abstractmethod
    def check_floating(self) -> None:
        """Refuse a state with a tensor that is not of floating-point numbers, from the headers alone.

        Raises:
            ModelError: names the first such tensor.
        """

    @abstractmethod
    def first_row(self, name: str) -> Tensor:
        """Return the first row of a tensor, of which nothing else is read.

        Args:
            name: the tensor's name.

        Shape:
            (…, D) → (D,); () → (1,).
        """


class LazyState(HeadedState):
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
        """See `HeadedState.check_floating`."""
        for key in self._names.values():
            reader = self._readers[key]
            if not reader.dtype.startswith(("F", "BF")):
                raise ModelError(
                    f"`{key}` in `{reader.file}` holds {reader.dtype} values; "
                    "give a model whose weights are float32, float16 or bfloat16"
                )

    def first_row(self, name: str) -> Tensor:
        """See `HeadedState.first_row`."""
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
        state: the state; rows are read in float32, and of a `HeadedState` nothing else is read.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        shape = state.shapes[name] if isinstance(state, HeadedState) else tuple(state[name].shape)
        row = state.first_row(name) if isinstance(state, HeadedState) else _first_row(state[name])
        digest.update(f"{name}{shape}".encode())
        digest.update(row.to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
