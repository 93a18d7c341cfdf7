"""Folders and files of images: which belong to which split, and to which class."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from fusion_merge.errors import DataError
from fusion_merge.pools.classnames import in_order
from fusion_merge.pools.tables import DELIMITERS, read_tables

_DISK_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")
_KINDS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".arrow": "arrow",
    **dict.fromkeys(DELIMITERS, "csv"),
}
_TABLES = (*DELIMITERS, ".json", ".jsonl")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_ENDINGS = frozenset(ImageFolder.EXTENSIONS)
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLIT_NAMES.items() for word in words}


def split_called(word: str) -> str | None:
    """Return `train`, `validation` or `test` if a word is a name of it, as `val` and `dev` are of `validation`.

    Args:
        word: the name of a folder or a split, or a word of a file's name; capitals do not matter.
    """
    return _SPLIT_OF.get(word.lower())


def read_file(file: Path) -> Dataset | DatasetDict:
    """Read one file of images; a split that its name tells is kept.

    Args:
        file: parquet, JSON, CSV, TSV or Arrow.

    Raises:
        DataError: if it is of another kind.
    """
    kind = _KINDS.get(file.suffix.lower())
    if kind is None:
        raise DataError(f"`{file}` is of no known kind; known are {', '.join(_KINDS)}, or a folder")
    return _read_files(kind, file.parent, [PurePath(file.name)])


def read_folder(folder: Path) -> Dataset | DatasetDict:
    """Read a folder: a saved dataset, parquet files, or images.

    Parquet files belong to the split that a word of their name or a folder above them names. Images are in splits
    only where every top-level folder is named as a split (`train`, `val`, `test`, …); otherwise the top-level folders
    are the classes. Images without folders have no labels.

    Args:
        folder: the folder.

    Raises:
        DataError: if there are no images, or it is not clear which split or class one belongs to.
    """
    if any((folder / mark).is_file() for mark in _DISK_MARKS):
        return _from_disk(folder)
    files = _files(folder)
    parquet = [f for f in files if f.suffix == ".parquet" and f.name not in _METADATA]
    if parquet:
        return _read_files("parquet", folder, parquet)
    images = [f for f in files if f.suffix.lower() in _ENDINGS]
    if not images:
        raise DataError(f"`{folder}` has no images and no parquet files in it")
    metadata = [f for f in files if f.name in _METADATA]
    tables = [] if metadata else [f for f in files if len(f.parts) == 1 and f.suffix.lower() in _TABLES]
    if tables:
        raise DataError(
            f"`{folder}` has images and a table, `{tables[0]}`; give `{folder / tables[0]}` if it has their labels, "
            "or take it away if the folders are the classes"
        )
    return _read_metadata(folder, images, metadata) if metadata else _read_images(folder, images)


def _from_disk(folder: Path) -> Dataset | DatasetDict:
    try:
        return load_from_disk(str(folder))
    except IndexError:  # what `datasets` makes of a saved dataset without rows
        return Dataset.from_dict({})


def _files(folder: Path) -> list[PurePath]:
    """Return every file below a folder, relative to it and in order; hidden ones and `__MACOSX` do not count."""
    if folder.resolve().parent == folder.resolve():
        raise DataError(f"`{folder}` is the root of all files; give the folder of the images alone")
    found = []
    above = {str(folder): {folder.resolve()}}  # a link to one of these would lead round in circles
    for where, folders, names in os.walk(folder, followlinks=True):
        real = {f: (Path(where) / f).resolve() for f in folders if not f.startswith((".", "__"))}
        folders[:] = [f for f, place in real.items() if place not in above[where]]
        above |= {os.path.join(where, f): above[where] | {real[f]} for f in folders}  # noqa: PTH118 (as `walk` does)
        found += [(Path(where) / name).relative_to(folder) for name in names if not name.startswith(".")]
    return sorted(found)


def _read_files(kind: str, folder: Path, files: Sequence[PurePath]) -> Dataset | DatasetDict:
    splits: dict[str | None, list[str]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(str(folder / file))
    nameless = splits.pop(None, [])
    if kind == "csv":
        tables = {split: read_tables([Path(f) for f in paths]) for split, paths in splits.items()}
        return DatasetDict(tables) if tables else read_tables([Path(f) for f in nameless])
    if not splits:
        return load_dataset(kind, data_files=nameless, split="train")  # what `datasets` calls a split without a name
    if nameless:
        split, named = next(iter(splits.items()))
        raise DataError(
            f"`{nameless[0]}` tells no split by its name, but `{named[0]}` belongs to `{split}`; "
            "name every file or its folder after its split, or give one file"
        )
    return load_dataset(kind, data_files=splits)


def _split_of(file: PurePath) -> str | None:
    """Return the split that a word of a file's name tells, or else the nearest folder above it."""
    for words in (re.split(r"[^a-z]+", file.stem.lower()), *([part] for part in reversed(file.parts[:-1]))):
        found = {split for word in words if (split := split_called(word))}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _read_images(folder: Path, images: Sequence[PurePath]) -> Dataset | DatasetDict:
    splits = _split_folders(folder, images)
    if splits is None:
        return _label({"all": (folder, images)})["all"]
    return _label(
        {
            split: (folder / top, [f.relative_to(top) for f in images if f.parts[0] == top])
            for split, top in splits.items()
        }
    )


def _split_folders(folder: Path, images: Sequence[PurePath]) -> dict[str, str] | None:
    """Return the top-level folder of each split, or None where the top-level folders are no splits."""
    tops = sorted({f.parts[0] for f in images if len(f.parts) > 1})
    named = [top for top in tops if split_called(top)]
    if not named or len(named) < len(tops) or any(len(f.parts) == 1 for f in images):
        for top in named:
            if all(len(f.parts) > 2 for f in images if f.parts[0] == top):
                raise DataError(
                    f"`{folder / top}` looks like a split with class folders of its own, but not everything in "
                    f"`{folder}` is in splits; leave only folders of splits there, or only folders of classes"
                )
        return None
    splits: dict[str, str] = {}
    for top in tops:
        split = split_called(top) or top
        if split in splits:
            raise DataError(f"`{folder}` has two folders for the split `{split}`: `{splits[split]}` and `{top}`")
        splits[split] = top
    return splits


def _label(splits: Mapping[str, tuple[Path, Sequence[PurePath]]]) -> DatasetDict:
    """Make datasets of images, labelled by the folder that they are in; the classes are those of all splits."""
    classes = {split: _classes(folder, images) for split, (folder, images) in splits.items()}
    names = in_order({name for own in classes.values() for name in own or ()})
    number = {name: i for i, name in enumerate(names)}
    made = {}
    for split, (folder, images) in splits.items():
        columns: dict[str, list[Any]] = {"image": [str(folder.absolute() / f) for f in images]}
        features: dict[str, Any] = {"image": Image()}
        own = classes[split]
        if own is not None:
            columns["label"] = [number[name] for name in own]
            features["label"] = ClassLabel(names=names)
        made[split] = Dataset.from_dict(columns, features=Features(features))
        made[split].info.builder_name = "imagefolder"  # as `datasets` would call it
    return DatasetDict(made)


def _classes(folder: Path, images: Sequence[PurePath]) -> list[str] | None:
    """Return the class of each image, or None where the images are in no class folders."""
    loose = [f for f in images if len(f.parts) == 1]
    if len(loose) == len(images):
        return None
    if loose:
        raise DataError(f"`{folder / loose[0]}` lies beside the class folders; put every image into one of them")
    classes = [f.parts[0] for f in images]
    deeper = {f.parts[1] for f in images if len(f.parts) > 2}
    if len(set(classes)) == 1 and len(deeper) > 1 and all(len(f.parts) > 2 for f in images):
        raise DataError(
            f"`{folder}` has the one class `{classes[0]}`, with folders in it; if those are the classes, "
            f"give `{folder / classes[0]}`"
        )
    return classes


def _read_metadata(folder: Path, images: Sequence[PurePath], metadata: Sequence[PurePath]) -> Dataset | DatasetDict:
    """Read images that a table describes, as `datasets` does, and refuse one that leaves images out."""
    splits = _split_folders(folder, images)
    common = [str(folder / f) for f in metadata if len(f.parts) == 1]
    patterns = {split: [str(folder / top / "**"), *common] for split, top in (splits or {"train": "."}).items()}
    loaded = load_dataset("imagefolder", data_files=patterns)
    count = sum(map(len, loaded.values()))
    if count < len(images):
        raise DataError(
            f"`{folder}` has {len(images)} images, but `{metadata[0]}` describes {count} of them; "
            "describe them all, or move the others away"
        )
    return loaded if splits else loaded["train"]
