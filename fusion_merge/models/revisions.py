"""Which version of a model on the hub its files are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers.utils.hub import extract_commit_hash


def hub_commit(files: Iterable[Path]) -> str | None:
    """Return the commit that files in the cache of the hub belong to, or None where they are from elsewhere.

    The cache keeps each version of a repository in a folder of its own, `models--OWNER--NAME/snapshots/COMMIT`.

    Args:
        files: the files of one model, as they were found, links not followed.
    """
    commits = {extract_commit_hash(str(file), None) for file in files}
    return commits.pop() if len(commits) == 1 else None
