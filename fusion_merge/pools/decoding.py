"""From what a dataset holds of an image to a picture: files, bytes, and pictures that are there already.

Files and bytes are decoded as `datasets` does, and so as the published figures were made: PIL, and turned upright where
the EXIF data say so (`datasets` since 2.18). Truncated files are errors: PIL's `LOAD_TRUNCATED_IMAGES` stays off.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, Value
from PIL import UnidentifiedImageError

from fusion_merge.errors import reason

_BYTES = ("binary", "large_binary")
_TEXTS = ("string", "large_string", "string_view")
_DECODER = Image()


def decoded(value: Any, folder: Path | None = None) -> Any:
    """Return a picture.

    Args:
        value: a path, the bytes of a file, a mapping with `path` or `bytes` as `datasets` stores images, or a picture
            of any kind, which is returned as it is.
        folder: what relative paths are relative to; by default the working directory.

    Raises:
        OSError: if there is no such file, or it is no image; decoders raise errors of other kinds too.
        ValueError: if there is neither a path nor bytes.
    """
    if value is None:
        raise ValueError("there is no image, the value is null")
    if isinstance(value, bytes | bytearray):
        return _DECODER.decode_example({"bytes": bytes(value), "path": None})
    if isinstance(value, str | Path):
        return _decoded_file(absolute(value, folder))
    if not (isinstance(value, Mapping) and {"bytes", "path"} & value.keys()):
        return value
    content, path = value.get("bytes"), value.get("path")
    if content is not None:
        return _DECODER.decode_example({"bytes": content, "path": path})
    if not path:
        raise ValueError("there is no image, neither its bytes nor a path")
    return _decoded_file(absolute(path, folder))


def _decoded_file(path: Path | str) -> Any:
    """Return the picture in a file, which is closed then, whatever is wrong with it."""
    content = path.read_bytes() if isinstance(path, Path) else None
    return _DECODER.decode_example({"bytes": content, "path": str(path)})


def file_name(value: Any, folder: Path | None = None) -> str | None:
    """Return the path, or at least the file name, of an image, if it has one.

    Args:
        value: as `decoded` takes it.
        folder: as `decoded` takes it.
    """
    if isinstance(value, str | Path):
        return str(absolute(value, folder))
    if isinstance(value, Mapping):
        path = value.get("path")
        return str(path if value.get("bytes") is not None else absolute(path, folder)) if path else None
    return str(name) if (name := getattr(value, "filename", None)) else None


def absolute(path: str | Path, folder: Path | None) -> Path | str:
    """Return a path that is relative to a folder; one on the network stays as it is.

    Args:
        path: the path; `~` is the user's own folder.
        folder: the folder; by default the working directory.
    """
    if "://" in str(path):
        return path
    local = Path(path).expanduser()
    return local if folder is None or local.is_absolute() else folder / local


def holds_texts(data: Any, column: str | int) -> bool:
    """Tell whether a column of a dataset holds texts, such as paths or labels.

    Args:
        data: the dataset.
        column: the column.
    """
    return isinstance(data, Dataset) and _is_value(data.features.get(column), _TEXTS)


def holds_images(data: Dataset, column: str) -> bool:
    """Tell whether a column of a dataset holds images, or the bytes of images.

    Args:
        data: the dataset.
        column: the column.
    """
    feature = data.features.get(column)
    if isinstance(feature, Mapping):  # as tables hold them that other libraries than `datasets` wrote
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, Image) or _is_value(feature, _BYTES)


def undecoded(data: Any, image: str | int, label: str | int | None) -> Any:
    """Return a dataset whose images stay as they are stored, so that their paths can be told, and no other column.

    What has a format or a transform of its own, and what is no `datasets.Dataset`, is returned as it is.

    Args:
        data: the dataset.
        image: the column of images.
        label: the column of labels, if there is one.
    """
    if not isinstance(data, Dataset) or data.format["type"] is not None:
        return data
    wanted = [column for column in (image, label) if column is not None]
    data = data.select_columns(wanted)
    feature = data.features[image]
    if isinstance(feature, Image) and feature.decode and feature.mode is None:
        return data.cast_column(image, Image(decode=False))
    return data


def why(error: BaseException) -> str:
    """Return in a few words why an image could not be decoded.

    Args:
        error: what a decoder raised.
    """
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a known format"
    return error.strerror if isinstance(error, OSError) and error.strerror else reason(error)


def is_image_s_fault(error: BaseException) -> bool:
    """Tell whether an error comes from what an image holds, and not from the system, such as a file that is not there.

    Args:
        error: what was raised while an image was read.
    """
    return not isinstance(error, MemoryError) and not (isinstance(error, OSError) and error.errno is not None)


def _is_value(feature: Any, kinds: tuple[str, ...]) -> bool:
    return isinstance(feature, Value) and feature.dtype in kinds
