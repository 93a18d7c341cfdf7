"""What a user writes to name a model or a processor: a path, a hub id, or a config that calls `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion_merge.errors import ConfigError, ModelError, nearest
from fusion_merge.models.sources import HUB_OPTIONS, ModelFiles, find_files, split_source

MODELS = ("CLIPModel", "CLIPVisionModel")
_LORA, _FFT = "load_lora_vision_model_hf", "load_fft_vision_model_hf"
PROCESSORS = ("CLIPProcessor", "AutoProcessor")
"""The classes whose `from_pretrained` a config may call to say where a model or a processor is."""

_PATHS = ("path", "pretrained_model_name_or_path")
_FUSION_BENCH = {
    _FFT: ("model_name", "return_vision_model"),
    _LORA: ("peft_name", "base_model_name", "merge_and_unload", "return_vision_model"),
}
"""fusion_bench's loaders of CLIP towers and of LoRA adapters, and their options, that of the place first."""
_HYDRA = ("_target_", "_recursive_", "_convert_")


@dataclass(frozen=True)
class Reference:
    """Where a model or a processor is.

    Attributes:
        source: a folder, a file, `zoo://…`, or a hub id, perhaps with `@revision`.
        options: those of `HUB_OPTIONS` that were given.
        base: of an adapter, the model that it is to be added to, where one was named.
    """

    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None

    def __str__(self) -> str:
        """Return it in words."""
        revision, subfolder = (self.options.get(key) for key in ("revision", "subfolder"))
        return self.source + (f"@{revision}" if revision else "") + (f" ({subfolder})" if subfolder else "")

    def files(self, **options: Any) -> ModelFiles:
        """Find the files of a model or of an adapter; see `find_files`.

        Args:
            **options: of `HUB_OPTIONS`, beside those that were given.
        """
        return find_files(self.source, **{**self.options, **options})

    def config(self) -> dict[str, Any]:
        """Return the content of a model's `config.json`.

        Raises:
            ModelError: if it cannot be had, or this is an adapter.
        """
        files = self.files()
        if files.is_adapter:
            raise ModelError(f"`{self}` is an adapter; give the whole CLIP model that it was made for")
        return files.config

    def arguments(self) -> tuple[str, dict[str, Any]]:
        """Return what `from_pretrained` takes: a folder (of a file, that around it) or hub id, and options."""
        path, revision = split_source(self.source)
        folder = str(Path(path).parent) if Path(path).is_file() else path
        return folder, {**({"revision": revision} if revision else {}), **self.options}


def reference_of(source: Any, what: str, classes: tuple[str, ...] = MODELS) -> Reference | None:
    """Return what a source refers to, or None where it is an object, or a config that calls something else.

    Args:
        source: a path, a hub id, a mapping with `path` or `pretrained_model_name_or_path`, or anything else.
        what: which option it is, for errors.
        classes: the classes whose `from_pretrained` a mapping may call.

    Raises:
        ConfigError: if a mapping has a key that cannot be passed on, or no path.
    """
    if isinstance(source, Reference):
        return source
    if isinstance(source, str | Path):
        return Reference(str(source))
    if not isinstance(source, Mapping):
        return None
    target = source.get("_target_")
    loader = str(target).rpartition(".")[2]
    if classes is MODELS and loader in _FUSION_BENCH:
        return _fusion_bench_reference(source, what, loader)
    if target is not None and not str(target).endswith(tuple(f"{name}.from_pretrained" for name in classes)):
        return None
    known = (*_PATHS, *HUB_OPTIONS)
    for key in source:
        if key not in known and key not in _HYDRA:
            raise ConfigError(f"`{key}` is not an option of {what}; {nearest(str(key), known)}")
    paths = [source[key] for key in _PATHS if source.get(key) is not None]
    if len(paths) != 1:
        raise ConfigError(f"{what} is {dict(source)!r}; give one of `path` and `pretrained_model_name_or_path`")
    options = {key: source[key] for key in HUB_OPTIONS if source.get(key) is not None}
    return Reference(str(paths[0]), options)


def _fusion_bench_reference(source: Mapping[str, Any], what: str, loader: str) -> Reference:
    """Return what one of fusion_bench's loaders is told of; it is not called."""
    known = _FUSION_BENCH[loader]
    for key in source:
        if key not in known and key not in _HYDRA:
            raise ConfigError(f"`{key}` is not an option of {what}; {nearest(str(key), known)}")
    place = source.get(known[0])
    if not isinstance(place, str | Path):
        raise ConfigError(f"{what} is {dict(source)!r}; give `{known[0]}`, a folder or a hub id")
    base = source.get("base_model_name")
    return Reference(str(place), base=str(base) if base is not None else None)


def check_table(value: Any, option: str, example: str) -> None:
    """Refuse what is not a table of names.

    Args:
        value: what was given; None is an empty table.
        option: which option it is.
        example: what would be right.

    Raises:
        ConfigError: if it is no mapping.
    """
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"`{option}`={value!r} is not a table of names; write `{option}={example}`")
