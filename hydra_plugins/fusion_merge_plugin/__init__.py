"""What Hydra is told of fusion_merge: methods for fusion_bench's program, presets of other packages for our own.

Hydra imports this file in each program that uses it. Nothing of ours is imported until one of those two runs, and an
error here ends no program.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

log = logging.getLogger(__name__)

_OURS = "pkg://fusion_merge.config"
_OTHER = "fusion_bench"
_GROUP = "method/fusion_merge"


class FusionMergeSearchPath(SearchPathPlugin):
    """Adds to what Hydra finds: `method/fusion_merge/…` in fusion_bench, in fusion_merge what packages declare."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """See `SearchPathPlugin`.

        Args:
            search_path: where Hydra looks for presets; the program's own are first.
        """
        ours = any(element.path == _OURS for element in search_path.get_path())
        if not ours and _OTHER not in sys.modules:
            return
        try:
            _add_packages(search_path) if ours else _add_methods()
        except Exception as error:  # a program must not end because of what it may not even use
            log.warning("presets of fusion_merge or of its plugins are not available: %s", error)


def _add_packages(search_path: ConfigSearchPath) -> None:
    from fusion_merge.presets import other_packages

    for package in other_packages():
        search_path.append("fusion_merge", f"pkg://{package}")


def _add_methods() -> None:
    """Store each method's preset under the other program's names: what it says of a class becomes `algorithm`."""
    from fusion_merge.presets import merging_presets

    for name, text in merging_presets().items():
        preset: Any = OmegaConf.create(text)
        if "_target_" in preset:
            target = f"fusion_merge.plugins.{_OTHER}.FusionMergeAlgorithm"
            preset = OmegaConf.merge({"_target_": target, "algorithm": preset.pop("_target_")}, preset)
        elif "defaults" in preset:  # another name of a method
            preset.defaults = [str(part).replace("/method/", f"/{_GROUP}/") for part in preset.defaults]
        ConfigStore.instance().store(group=_GROUP, name=name, node=preset)
