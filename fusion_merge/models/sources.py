"""Where models come from: folders, files, hub ids and the embedded zoo."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from fusion_merge import zoo
from fusion_merge.commits import pending
from fusion_merge.errors import ModelError, reason
from fusion_merge.files import misspelt
from fusion_merge.models.offline import WAY_OUT, asking_the_hub, is_offline
from fusion_merge.models.tensor_files import HeadedState as HeadedState
from fusion_merge.models.tensor_files import LazyState as LazyState
from fusion_merge.models.tensor_files import fingerprint as fingerprint

_HUB_ID = re.compile(r"^(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?$")
HUB_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only")
"""What may be said of a hub id beside its name; `find_files` takes each."""

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHT_PATTERNS = (*_WEIGHT_FILES, "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
"""The names that the weights of a model have in its folder: what a new model there replaces."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model, or of an adapter of one.

    Attributes:
        origin: where it is, as it was asked for.
        config: the content of `config.json`, or of `adapter_config.json`.
        weights: its weight files.
        is_adapter: whether it is a PEFT adapter, which is no model without its base.
    """

    origin: str
    config: dict[str, Any]
    weights: tuple[Path, ...]
    is_adapter: bool = False


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
    """Find the configuration and the weight files of a model or of a PEFT adapter.

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
        if file.name in _ADAPTER_WEIGHTS:
            return ModelFiles(source, _adapter_config(source, fetch), (file,), is_adapter=True)
        return ModelFiles(source, _model_config(source, fetch), (file,))
    if is_folder := Path(path).is_dir():
        fetch = _local_fetch(Path(path) / subfolder)
    else:
        if meant := misspelt(path):
            raise ModelError(meant)
        fetch = _hub_fetch(path, {"revision": revision, "subfolder": subfolder} | hub_options)
    model, adapter = fetch("config.json"), fetch(_ADAPTER_CONFIG)
    if adapter is not None and _is_adapter(source, fetch):
        return ModelFiles(source, _adapter_config(source, fetch), _adapter_weights(source, fetch), is_adapter=True)
    if model is None and not is_folder:
        raise _not_here(source, "it is not there, or cannot be reached")
    weights = _weight_files(source, fetch, "" if is_folder else " that can be had (offline, or not there)")
    return ModelFiles(source, _model_config(source, fetch), weights)


def find_others(source: str, names: Sequence[str], *, subfolder: str = "", **hub_options: Any) -> list[Path]:
    """Return those of some files that are here, in a model's folder or in the hub's cache; nothing is downloaded.

    Args:
        source: as in `split_source`.
        names: the names of the files.
        subfolder: where in the folder or repository they are.
        **hub_options: others of `HUB_OPTIONS`, for the hub.
    """
    path, revision = split_source(source)
    place = Path(path)
    if place.exists():
        fetch = _local_fetch(place.parent if place.is_file() else place / subfolder)
    else:
        options = {"revision": revision, "subfolder": subfolder} | hub_options
        fetch = _hub_fetch(path, options | {"local_files_only": True, "force_download": False})
    return [file for name in names if (file := fetch(name)) is not None]


Fetch = Callable[[str], Path | None]
"""Returns where a file of a model is here, or None if the model has no such file."""


def _model_config(source: str, fetch: Fetch) -> dict[str, Any]:
    file = fetch("config.json")
    if file is None:
        raise ModelError(f"`{source}` has no `config.json`; it is needed to know the model's shape")
    return _read_json(file)


def _adapter_config(source: str, fetch: Fetch) -> dict[str, Any]:
    file = fetch(_ADAPTER_CONFIG)
    if file is None:
        raise ModelError(f"`{source}` has no `{_ADAPTER_CONFIG}` beside it; it is needed to know what the weights mean")
    return _read_json(file)


def _is_adapter(source: str, fetch: Fetch) -> bool:
    """Return whether a place with the configuration of an adapter holds that alone, and no model."""
    weights = next((name for name in _WEIGHT_FILES if fetch(name) is not None), None)
    adapter = next((name for name in _ADAPTER_WEIGHTS if fetch(name) is not None), None)
    if weights and adapter:
        raise ModelError(
            f"`{source}` holds both a model and an adapter; give one file of the two: {weights}, {adapter}"
        )
    return weights is None


def _adapter_weights(source: str, fetch: Fetch) -> tuple[Path, ...]:
    found = next((file for name in _ADAPTER_WEIGHTS if (file := fetch(name)) is not None), None)
    if found is None:
        raise ModelError(
            f"`{source}` has the configuration of an adapter, but no weights; looked for {', '.join(_ADAPTER_WEIGHTS)}"
        )
    return (found,)


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


def _local_fetch(folder: Path) -> Fetch:
    commit = pending(folder)  # files of a save that was cut short

    def fetch(name: str) -> Path | None:
        try:
            file = folder / name if commit is None else commit.path(name)
            return file if file is not None and file.is_file() else None
        except OSError as error:  # a name that is too long
            raise ModelError(f"cannot look for `{shortened(name)}` in `{folder}`: {error.strerror}") from error

    return fetch


def _not_here(source: str, why: str) -> ModelError:
    folder = Path(source.partition("@")[0]).parent
    if folder.parts and folder.is_dir():
        why = f"there is no such entry in the folder `{folder}`; as a hub id: {why}"
    if is_offline():
        there = f" (nor in the folder `{folder}`, which is here)" if folder.parts and folder.is_dir() else ""
        return ModelError(f"`{source}` is not a folder here{there} and not in the cache; {WAY_OUT}")
    return ModelError(f"`{source}` is not a folder here and cannot be had from the hub: {why}")


def _hub_fetch(hub_id: str, options: Mapping[str, Any]) -> Fetch:
    def fetch(name: str) -> Path | None:
        with asking_the_hub():
            try:
                found = cached_file(hub_id, name, _raise_exceptions_for_missing_entries=False, **options)
            except (OSError, ValueError) as error:
                raise _not_here(hub_id, reason(error)) from error
        return Path(found) if found else None

    return fetch


def _weight_files(source: str, fetch: Fetch, which: str) -> tuple[Path, ...]:
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
    raise ModelError(f"`{source}` has no weights{which}; looked for {', '.join(_WEIGHT_FILES)}")
