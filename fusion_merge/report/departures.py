"""What in a run's configuration is not what the published row was made with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NO_MATTER = {
    *("command", "seed", "dry_run", "plan", "protocol", "print_config", "baselines", "evaluate_routings"),
    "unknown_task",
    *("output_dir", "report_save_path", "merged_model_save_path", "fabric.accelerator", "fabric.strategy"),
    *("method.name", "method.seed", "method.num_workers", "method.svd_accelerator", "method.use_grad_accumulate"),
    *("method.save_checkpoint", "method.cache_dir", "method.save_every", "method.resume"),
    *("method.inference_batch_reduce", "modelpool.platform", "modelpool.train_datasets", "taskpool.num_workers"),
    "taskpool.dataloader_kwargs.num_workers",
}
"""Options, or tables of them, that no accuracy depends on; published seeds are not known."""

_TABLES = (("modelpool", "models"), ("taskpool", "tasks"), ("taskpool", "test_datasets"))
_DATA = ("data", "path", "data_dir", "data_files", "pretrained_model_name_or_path")
_NOTHING = object()

Key = tuple[str, ...]


@dataclass
class Departures:
    """What differs.

    Attributes:
        changes: options that are not the published recipe's, such as `max_steps=20 instead of 1000`.
        copies: local files that take the place of published ones, and are taken for copies of them.
    """

    changes: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)


def departures(recipe: Mapping[str, Any], config: Mapping[str, Any]) -> Departures:
    """Compare the configuration of a run with that of the published recipe.

    Args:
        recipe: the resolved configuration that the preset alone gives.
        config: that of the run.
    """
    found = Departures()
    published, ours = dict(_leaves(recipe)), dict(_leaves(config))
    skipped = _renamed(published, ours, found)
    if recipe["method"].get("_target_") != config["method"].get("_target_"):
        skipped.append(("method",))
        names = [str(table["method"].get("_target_")).rpartition(".")[2] for table in (config, recipe)]
        found.changes.append(f"method {names[0]} instead of {names[1]}")
    if ours.get(("fast_dev_run",)) != published.get(("fast_dev_run",)):
        skipped += [(part, "fast_dev_run") for part in ("method", "modelpool", "taskpool")]
    for key in dict.fromkeys((*published, *ours)):
        old, new = published.get(key, _NOTHING), ours.get(key, _NOTHING)
        if old == new or _no_matter(key) or any(key[: len(prefix)] == prefix for prefix in skipped):
            continue
        text = f"{_shown_key(key)}={_shown(new)} instead of {_shown(old)}"
        if _is_source(key) and _is_copy(new, old):
            found.copies.append(text)
        else:
            found.changes.append(text)
    return found


def _leaves(table: Mapping[str, Any], above: Key = ()) -> Iterator[tuple[Key, Any]]:
    for name, value in table.items():
        key = (*above, str(name))
        if _is_place(key) and (place := _place(value)) is not None:
            yield key, place
        elif isinstance(value, Mapping):
            yield from _leaves(value, key)
        else:
            yield key, value


def _is_place(key: Key) -> bool:
    """Tell whether a key is that of a model, a processor, or the data of a task."""
    return len(key) > 1 and _is_source(key) and (key[-1] == "data" or key[1] not in ("tasks", "test_datasets"))


def _place(value: Any) -> str | None:
    """Return in one text what a table such as `{path: owner/name, name: …, revision: …}` says, or None."""
    if not isinstance(value, Mapping) or "_target_" in value or not isinstance(value.get("path"), str):
        return None
    words = ", ".join(str(value[key]) for key in value if key != "revision" and value[key] is not None)
    return f"{words}@{value['revision']}" if value.get("revision") else words


def _renamed(published: Mapping[Key, Any], ours: Mapping[Key, Any], found: Departures) -> list[Key]:
    """Say in one line where a table has other names, models or tasks; return the keys of those."""
    skipped: list[Key] = []
    for table in _TABLES:
        old, new = (
            list(dict.fromkeys(key[2] for key in leaves if key[:2] == table and len(key) > 2))
            for leaves in (published, ours)
        )
        gone, added = [n for n in old if n not in new], [n for n in new if n not in old]
        words = [f"{word} {', '.join(names)}" for word, names in (("without", gone), ("with", added)) if names]
        if words:
            found.changes.append(f"{'.'.join(table)} {' and '.join(words)}")
        skipped += [(*table, name) for name in (*gone, *added)]
    return skipped


def _no_matter(key: Key) -> bool:
    return any(".".join(key[:length]) in _NO_MATTER for length in range(1, len(key) + 1))


def _is_source(key: Key) -> bool:
    """Tell whether a key says where a model, a processor or data come from."""
    if key[0] == "modelpool" and key[1] in ("models", "processor"):
        return True
    if key[0] == "taskpool" and key[1] in ("clip_model", "base_model", "processor"):
        return True
    return key[0] in ("modelpool", "taskpool") and key[1] in ("tasks", "test_datasets") and _names_data(key)


def _names_data(key: Key) -> bool:
    return len(key) == 3 or key[-1] in _DATA


def _is_copy(new: Any, old: Any) -> bool:
    """Tell whether a source is something local, or the published hub id at a revision."""
    if not isinstance(new, str | os.PathLike):
        return False
    text = str(new)
    return (isinstance(old, str) and text.partition("@")[0] == old.partition("@")[0]) or _exists(text)


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # too long, or the home of nobody
        return False


def _shown_key(key: Key) -> str:
    return ".".join(key[1:] if key[0] == "method" else key)


def _shown(value: Any) -> str:
    if value is _NOTHING:
        return "nothing"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
