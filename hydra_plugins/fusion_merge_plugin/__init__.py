"""What Hydra is told of fusion_merge: methods for fusion_bench's program, presets of other packages for our own.

Hydra imports this file in each program that uses it. Nothing of ours is imported until one of those two runs, and an
error here ends no program.
"""

from __future__ import annotations

import logging
import sys
from functools import cached_property
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
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
            from fusion_merge.presets import merging_presets, other_packages

            if not ours:
                merging_presets()
            places = [f"pkg://{package}" for package in other_packages()] if ours else [f"{MethodPresets.scheme()}://"]
        except Exception as error:  # a program must not end because of what it may not even use
            log.warning("presets of fusion_merge or of its plugins are not available: %s", error)
            return
        for place in places:
            search_path.append("fusion_merge", place)


class MethodPresets(ConfigSource):
    """Our presets of methods in fusion_bench: the class that a preset names is the `algorithm` of our adapter."""

    @staticmethod
    def scheme() -> str:
        """See `ConfigSource`."""
        return "fusion_merge"

    @cached_property
    def _presets(self) -> dict[str, str]:
        from fusion_merge.presets import merging_presets

        return merging_presets()

    def load_config(self, config_path: str) -> ConfigResult:
        """See `ConfigSource`."""
        if not self.is_config(config_path):
            raise ConfigLoadError(f"there is no preset `{config_path}` of fusion_merge")
        text = self._presets[_name(config_path)]
        preset: Any = OmegaConf.create(text)
        if "_target_" in preset:
            target = f"fusion_merge.plugins.{_OTHER}.FusionMergeAlgorithm"
            preset = OmegaConf.merge({"_target_": target, "algorithm": preset.pop("_target_")}, preset)
        elif "defaults" in preset:  # another name of a method
            preset.defaults = [str(part).replace("/method/", f"/{_GROUP}/") for part in preset.defaults]
        return ConfigResult(self.provider, f"{self.scheme()}://", preset, self._get_header_dict(text))

    def is_group(self, config_path: str) -> bool:
        """See `ConfigSource`."""
        return f"{_GROUP}/".startswith(f"{config_path.strip('/')}/") or not config_path.strip("/")

    def is_config(self, config_path: str) -> bool:
        """See `ConfigSource`."""
        folder, _, _ = config_path.strip("/").rpartition("/")
        return folder == _GROUP and _name(config_path) in self._presets

    def available(self) -> bool:
        """See `ConfigSource`."""
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """See `ConfigSource`."""
        inside = config_path.strip("/")
        if inside == _GROUP:
            return [] if results_filter is ObjectType.GROUP else sorted(self._presets)
        if results_filter is ObjectType.CONFIG or not self.is_group(inside):
            return []
        return [_GROUP.removeprefix(inside).strip("/").partition("/")[0]]


def _name(config_path: str) -> str:
    return config_path.rpartition("/")[2].removesuffix(".yaml")
