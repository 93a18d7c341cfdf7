"""Model pools of other packages, as pools of ours."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fusion_merge.errors import ConfigError
from fusion_merge.pools.model_pool import CLIPVisionModelPool

_PLUGINS = "fusion_merge.plugins"


def own_pool(pool: Any) -> CLIPVisionModelPool:
    """Return a model pool as one of ours; one of another package is converted by the plugin of that package's name.

    Nothing of another package is imported for a pool of ours.

    Args:
        pool: a model pool of ours, or of a package that there is a plugin for.

    Raises:
        ConfigError: if it is neither.
    """
    if isinstance(pool, CLIPVisionModelPool):
        return pool
    packages = dict.fromkeys(cls.__module__.partition(".")[0] for cls in type(pool).__mro__)
    for package in packages:
        if find_spec(f"{_PLUGINS}.{package}") is not None:
            converted: CLIPVisionModelPool = import_module(f"{_PLUGINS}.{package}").own_pool(pool)
            return converted
    raise ConfigError(
        f"`modelpool` is a {type(pool).__name__}, not a model pool; give a CLIPVisionModelPool of fusion_merge or of "
        "fusion_bench"
    )
