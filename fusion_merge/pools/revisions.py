"""Where models and data came from, and in which version: what it takes to have the same again."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_merge.pools.images import OnBadImage
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool

log = logging.getLogger(__name__)

_NAMED = 10
"""The most bad images of a task that are named."""

_DOWNLOADED = re.compile(r"^hf://datasets/[^@]+@([0-9a-f]{40})/")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def model_origins(modelpool: CLIPVisionModelPool) -> dict[str, dict[str, str | None]]:
    """Return, for each model, its `source`, its `revision` on the hub (a commit, else None), and its `fingerprint`.

    Args:
        modelpool: the models; only headers and first rows are read.
    """
    fingerprints = modelpool.fingerprints()
    return {
        name: {"source": modelpool.describe(name), "revision": modelpool.revision(name), "fingerprint": fingerprint}
        for name, fingerprint in fingerprints.items()
    }


def data_origin(taskpool: CLIPVisionModelTaskPool, name: str) -> dict[str, Any]:
    """Return a task's `source`, its `revision` on the hub (a commit, else None), its `split`, and how many `images`.

    Args:
        taskpool: the pool that has the task.
        name: the task.
    """
    spec, task = taskpool.specs[name], taskpool.task(name)
    return {
        "source": _described(spec),
        "revision": data_revision(task.data),
        "split": _split(task, spec, taskpool.split),
        "images": len(task),
    }


def adapted_origins(pools: Mapping[str, CLIPVisionModelTaskPool]) -> dict[str, dict[str, Any]]:
    """Return where the images that were adapted on come from, as `data_origin` says.

    Where bad images are left out, also how many were met with and `replaced`; the log names them.

    Args:
        pools: for each task, the pool of its images.
    """
    found = {name: data_origin(pool, name) for name, pool in pools.items()}
    for name, pool in pools.items():
        if pool.on_bad_image is not OnBadImage.SKIP:
            continue
        bad = pool.images(name).bad
        found[name]["replaced"] = len(bad)
        if bad:
            named = "; ".join(list(bad.values())[:_NAMED])
            more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
            log.warning("`%s`: %d bad images were replaced while adapting: %s%s", name, len(bad), named, more)
    return found


def data_revision(data: Any) -> str | None:
    """Return the commit of the hub's dataset that data were downloaded from, as far as they tell, or None.

    Args:
        data: a `datasets.Dataset`, or anything else.
    """
    checksums = getattr(getattr(data, "info", None), "download_checksums", None)
    urls = checksums if isinstance(checksums, Mapping) else ()
    commits = {found[1] for url in urls if (found := _DOWNLOADED.match(str(url)))}
    if not commits:  # data from the cache lie in OWNER___NAME/CONFIG/VERSION/COMMIT
        files = getattr(data, "cache_files", None)
        folders = {Path(str(file["filename"])).parent.name for file in files or () if isinstance(file, Mapping)}
        commits = {folder for folder in folders if _COMMIT.fullmatch(folder)}
    return ", ".join(sorted(commits)) or None


def _described(spec: Any) -> str:
    """Return where data come from, in words."""
    if isinstance(spec, str | Path):
        return str(spec)
    if not isinstance(spec, dict):
        return f"a {type(spec).__name__}"
    if "data" in spec:
        return _described(spec["data"])
    parts = [str(spec[key]) for key in ("path", "name", "data_dir", "revision") if spec.get(key) is not None]
    return " ".join(parts) or str(spec.get("_target_"))


def _split(task: Any, spec: Any, default: str | None) -> str | None:
    """Return the split that was taken: what the task says, or else what was asked for, or else what the data say."""
    named = spec.get("split") if isinstance(spec, dict) else None
    for split in (getattr(task, "split", None), named, default, getattr(task.data, "split", None)):
        if split is not None:
            return str(split)
    return None
