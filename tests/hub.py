"""Caches of the Hugging Face hub, laid out as its libraries do, so that hub ids are read without a network."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

import datasets
import pytest
from datasets import DatasetDict, load_dataset
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

FIRST, SECOND = "1" * 40, "2" * 40
"""Two commits."""


def use_cache(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Let everything be cached below a folder, and no network be used: even to try is an error."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "hub"))
    monkeypatch.setattr(transformers_hub, "TRANSFORMERS_CACHE", str(root / "hub"), raising=False)  # before 5.0
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "datasets")
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *_: pytest.fail("a network was used"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("a network was used"))


def put_model(root: Path, hub_id: str, folder: Path, commit: str = FIRST, refs: tuple[str, ...] = ("main",)) -> Path:
    """Put a copy of a folder into the cache of models; returns its snapshot."""
    repository = root / "hub" / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        put_file(repository, folder, str(file.relative_to(folder)), commit)
    put_refs(repository, commit, refs)
    return snapshot


def put_file(repository: Path, folder: Path, name: str, commit: str) -> Path:
    """Put a copy of one file of a folder into a repository of the cache; returns where it is read."""
    content = (folder / name).read_bytes()
    blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link = repository / "snapshots" / commit / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(Path(*[".."] * (len(link.relative_to(repository).parts) - 1), "blobs", blob.name))
    return link


def put_refs(repository: Path, commit: str, refs: tuple[str, ...]) -> None:
    for ref in refs:
        file = repository / "refs" / ref
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit)


def put_dataset(
    root: Path, hub_id: str, images: Mapping[str, Path], commit: str = FIRST, refs: tuple[str, ...] = ("main",)
) -> Path:
    """Put folders of images, one a split, into the cache of datasets, as if they came from the hub."""
    owner, _, name = hub_id.partition("/")
    files = {split: str(folder / "**") for split, folder in images.items()}
    made: DatasetDict = load_dataset("imagefolder", data_files=files, cache_dir=str(root / "making" / commit))
    source = Path(next(iter(made.values())).cache_files[0]["filename"]).parent
    target = root / "datasets" / f"{owner}___{name}" / "default" / "0.0.0" / commit
    target.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copy(file, target / file.name.replace("imagefolder", name))
    info = json.loads((target / "dataset_info.json").read_text())
    (target / "dataset_info.json").write_text(json.dumps(info | {"config_name": "default", "dataset_name": name}))
    put_refs(root / "hub" / f"datasets--{owner}--{name}", commit, refs)
    return target
