"""`fusion_merge fetch`: bring models and datasets into the Hugging Face caches, for a machine without network."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fusion_merge.errors import FusionMergeError, reason
from fusion_merge.models.clip import PROCESSOR_FILES
from fusion_merge.models.offline import WAY_OUT, is_offline
from fusion_merge.models.sources import find_others, shortened, split_source
from fusion_merge.pools.base import DummyTaskPool
from fusion_merge.pools.cached_data import cached_files, commit_of
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.references import Reference
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.program import FusionProgram
from fusion_merge.zoo import SCHEME

log = logging.getLogger(__name__)

_BUILDERS = ("imagefolder", "parquet", "csv", "json", "arrow", "webdataset")
"""What `datasets.load_dataset` takes for a kind of files, not for a place."""

_SLACK = 1.0  # seconds by which the clock of a file system may be behind


@dataclass(frozen=True)
class _Thing:
    """Something that a run reads.

    Attributes:
        kind: what it is.
        name: what the configuration calls it.
        source: where it comes from, in words.
        key: the same for things of one kind that are one and the same.
        local: whether that is a path here.
        bring: brings it here, and returns its files.
    """

    kind: str
    name: str
    source: str
    key: str
    local: bool
    bring: Callable[[], Sequence[Path]]


def run(config: Mapping[str, Any], output_dir: Path, typed: str) -> int:
    """See `Command.run`: what a run would read is read as the run would, but weights only as files."""
    program = FusionProgram(_with_a_task_pool(config), output_dir, typed)
    started = time.time() - _SLACK
    rows, missing, total = [], [], 0
    for thing in _things(program):
        try:
            files = list(thing.bring())
        except FusionMergeError as error:
            why = shortened(reason(error)).replace(f"; {WAY_OUT}", "")  # which is what is done here
            missing.append(f"{thing.kind} `{thing.name}` ({thing.source}): {why}")
            rows.append([thing.kind, thing.name, thing.source, "", "", "missing", ""])
            continue
        size = sum(file.stat().st_size for file in files)
        total += size
        rows.append([thing.kind, thing.name, thing.source, *_described(thing, files, size, started)])
    rows.append(["in all", "", "", "", _in_words(total), "", ""])
    headers = ["what", "name", "from", "revision", "size", "status", "where"]
    log.info("%s", tabulate(rows, headers=headers, disable_numparse=True))
    if missing:
        offline = "offline (`HF_HUB_OFFLINE`), and " if is_offline() else ""
        raise FusionMergeError(f"{offline}{len(missing)} of {len(rows) - 1} not to be had: {'; '.join(missing)}")
    return 0


def _with_a_task_pool(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration that needs no tasks: a pool of models alone is fetched too."""
    taskpool = config["taskpool"]
    tables = (taskpool.get("tasks"), taskpool.get("test_datasets"), config["modelpool"].get("test_datasets"))
    if any(tables) or not {"tasks", "test_datasets"} & {*taskpool}:
        return config
    return {**config, "taskpool": {"_target_": f"{DummyTaskPool.__module__}.{DummyTaskPool.__name__}"}}


def _described(thing: _Thing, files: Sequence[Path], size: int, started: float) -> list[str]:
    """Return revision, size, status and place of something that is here."""
    if not files:
        return ["", "", "local" if thing.local else "made when it is needed", ""]
    new = any(file.stat().st_mtime >= started for file in files)
    status = "local" if thing.local else "fetched" if new else "already there"
    return [(commit_of(files[0]) or "")[:12], _in_words(size), status, str(_folder(files))]


def _folder(files: Sequence[Path]) -> Path:
    """Return the folder that holds all files."""
    folders = [file.parent for file in files]
    return next(f for f in (folders[0], *folders[0].parents) if all(o.is_relative_to(f) for o in folders))


def _in_words(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _things(program: FusionProgram) -> Iterator[_Thing]:
    """Return what a run of the configuration would read, in order, each once."""
    seen: set[tuple[str, str]] = set()
    pools = _task_pools(program.modelpool, program.taskpool)
    for thing in (
        *_models(program.modelpool),
        *(thing for pool in pools for thing in _heads(pool)),
        *(thing for pool in pools for thing in _datasets(pool)),
    ):
        key = (thing.kind, thing.key)
        if key not in seen:
            seen.add(key)
            yield thing


def _task_pools(modelpool: CLIPVisionModelPool, taskpool: object) -> list[CLIPVisionModelTaskPool]:
    own = {"test": modelpool.test_datasets, "train": modelpool.train_datasets}
    scored = [taskpool] if isinstance(taskpool, CLIPVisionModelTaskPool) else []
    return [*scored, *(modelpool.task_pool(split) for split, datasets in own.items() if datasets)]


def _models(modelpool: CLIPVisionModelPool) -> Iterator[_Thing]:
    for name in modelpool.all_model_names:
        reference = modelpool.reference(name)
        if reference is None:
            yield _made("model", name, modelpool.describe(name), lambda name=name: modelpool.config(name))  # type: ignore[misc]
        else:
            yield _referred("model", name, reference, lambda reference=reference: _model_files(reference))  # type: ignore[misc]


def _model_files(reference: Reference) -> list[Path]:
    files = reference.files()
    config = "adapter_config.json" if files.is_adapter else "config.json"
    beside = files.weights[0].parent / config
    return [*files.weights, *([beside] if beside.is_file() else [])]


def _heads(pool: CLIPVisionModelTaskPool) -> Iterator[_Thing]:
    """Return the whole CLIP model, as a model like others, and its processor."""
    clip, processor = pool.clip_source, pool.processor_source
    if isinstance(clip, Reference):
        yield _referred("model", "clip_model", clip, lambda: _model_files(clip))
    elif isinstance(clip, Mapping):
        yield _made("model", "clip_model", str(clip.get("_target_")), lambda: pool.clip_model)
    if isinstance(processor, Reference):
        yield _referred("processor", "processor", processor, lambda: _processor_files(pool, processor))
    elif isinstance(processor, Mapping):
        yield _made("processor", "processor", str(processor.get("_target_")), lambda: pool.processor)


def _processor_files(pool: CLIPVisionModelTaskPool, processor: Reference) -> list[Path]:
    pool.processor  # noqa: B018 (which brings what it is made of, whichever files these are)
    path, options = processor.arguments()
    return find_others(path, PROCESSOR_FILES, **options)


def _referred(kind: str, name: str, reference: Reference, bring: Callable[[], Sequence[Path]]) -> _Thing:
    return _Thing(kind, name, str(reference), repr(reference), _is_here(reference.source), bring)


def _made(kind: str, name: str, what: str, make: Callable[[], object]) -> _Thing:
    """Return something that the user's own code makes: it is made, so that it brings what it needs."""

    def bring() -> list[Path]:
        make()
        return []

    return _Thing(kind, name, what, f"{name}: {what}", False, bring)


def _is_here(source: str) -> bool:
    try:
        return Path(split_source(source)[0]).exists()
    except FusionMergeError:  # which is said where it is brought
        return False


def _datasets(pool: CLIPVisionModelTaskPool) -> Iterator[_Thing]:
    for name in pool.task_names:
        spec = pool.specs[name]
        data = spec["data"] if isinstance(spec, Mapping) and "data" in spec else spec
        source, place = _data_source(data)
        key = json.dumps(data, sort_keys=True, default=repr)
        if place is not None:
            yield _Thing("dataset", name, source, key, True, lambda place=place: _files_below(place))  # type: ignore[misc]
        else:
            bring = lambda name=name: _data_files(pool, name)  # noqa: E731 (one line a thing)
            yield _Thing("dataset", name, source, key, source.startswith(SCHEME), bring)


def _data_files(pool: CLIPVisionModelTaskPool, name: str) -> list[Path]:
    if not isinstance(pool.specs[name], str) or not pool.specs[name].startswith(SCHEME):
        return cached_files(pool.task(name).data)
    return []  # drawn, or read from a package


def _data_source(spec: Any) -> tuple[str, Path | None]:
    """Return where data come from, in words, and as a path if it is one here."""
    if isinstance(spec, Mapping):
        place = spec.get("path", spec.get("dataset_path"))
        if place in _BUILDERS:
            place = next((spec[key] for key in ("data_dir", "data_files") if isinstance(spec.get(key), str)), None)
        words = ", ".join(str(spec[key]) for key in ("path", "name", "data_dir", "data_files") if spec.get(key))
        revision = f"@{spec['revision']}" if spec.get("revision") else ""
        local = Path(str(place)).expanduser()
        found = local if place is not None and local.exists() else None
        return str(found or f"{words}{revision}" or spec.get("_target_")), found
    if not isinstance(spec, str | Path):
        return f"a {type(spec).__name__}", None
    local = Path(spec).expanduser()
    return str(spec), local if local.exists() else None


def _files_below(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
