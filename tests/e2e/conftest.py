"""A folder like the one that the documentation speaks of."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def home(pool_dir, tmp_path_factory) -> Path:
    """A folder with the models and images that the documentation speaks of, under the names that it gives them."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "models").mkdir()
    for model in ("pretrained", "cats", "dogs"):
        (folder / "models" / model).symlink_to(pool_dir / model)
    (folder / "images").symlink_to(pool_dir / "images")
    return folder
