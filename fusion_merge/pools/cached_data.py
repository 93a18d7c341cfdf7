"""Which revision of a hub dataset was read: without the hub, `datasets` takes whichever was cached last."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from fusion_merge.errors import DataError

_COMMIT = re.compile(r"^[0-9a-f]{40}$")


def commit_of(path: Path | str) -> str | None:
    """Return the commit of the hub repository that a file in a cache comes from, or None if its path names none.

    Args:
        path: of a file in the cache of models or in that of datasets.
    """
    return next((part for part in reversed(Path(path).parts) if _COMMIT.match(part)), None)


def cached_files(data: Any) -> list[Path]:
    """Return the files that data lie in, as far as `datasets` cached them.

    Args:
        data: a dataset, several splits of one, or anything else.
    """
    splits = list(data.values()) if isinstance(data, DatasetDict) else [data]
    return [Path(file["filename"]) for split in splits if isinstance(split, Dataset) for file in split.cache_files]


def check_revision(data: Any, hub_id: str, revision: str | None) -> None:
    """Refuse data of another revision than was asked for.

    Args:
        data: what was read.
        hub_id: the dataset.
        revision: a commit, branch or tag; None stands for `main`.

    Raises:
        DataError: names the revision that was asked for and the one that is here.
    """
    files = cached_files(data)
    found = commit_of(files[0]) if files else None
    if found is None:
        return
    wanted = revision if revision and _COMMIT.match(revision) else _known_commit(hub_id, revision or "main")
    if wanted == found or (wanted is None and revision is None):
        return
    name = f"revision {revision}" if revision else f"the last `main` that is known here ({wanted})"
    raise DataError(
        f"{name} of `{hub_id}` cannot be had from the hub, and of the copies in the cache the one of revision {found} "
        f"would be taken; remove `{files[0].parent}` if another one is there, or run where there is a network"
    )


def _known_commit(hub_id: str, revision: str) -> str | None:
    """Return the commit that a branch or tag stood for when the hub was last asked, or None if it never was."""
    folder = repo_folder_name(repo_id=hub_id, repo_type="dataset")
    file = Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None
