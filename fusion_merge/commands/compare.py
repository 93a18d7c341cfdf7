"""`fusion_merge compare`: several methods on one model pool with one seed, in one report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_merge.commands.plan import plan_of
from fusion_merge.composition import composed, given_overrides, preset_files
from fusion_merge.errors import ConfigError, nearest
from fusion_merge.methods.base import Method
from fusion_merge.models.offline import without_network
from fusion_merge.planning.text import plan_text
from fusion_merge.presets import method_presets
from fusion_merge.protocols.comparison import Comparison
from fusion_merge.registry import class_from_config

log = logging.getLogger(__name__)

_INTERRUPTED = 130
_MISSING = "???"


def run(config: Mapping[str, Any], output_dir: Path, typed: str) -> int:
    """See `Command.run`: 1 if any method failed, 130 after Ctrl-C; what was done by then is written."""
    for given in ("protocol", "evaluate_routings", "unknown_task"):
        if config[given] in (None, False):
            continue
        raise ConfigError(f"`{given}` is for runs of one method, and `compare` makes one of each; leave it out")
    configs = compared_configs(config["compare"])
    if config["plan"]:
        return _plan(configs, output_dir)
    comparison = Comparison(configs, output_dir, typed)
    if config["dry_run"]:
        comparison.check()
        log.info("%s\ndry run: nothing was computed or written", comparison.plan())
        return 1 if comparison.problems else 0
    outcome = comparison.run()
    return _INTERRUPTED if outcome.interrupted else int(outcome.failed)


def compared_configs(compare: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, for each method, the configuration that a run of it would have with the same pools and options.

    Args:
        compare: the part `compare` of the configuration.

    Raises:
        ConfigError: if a method or an option is unknown, given twice, or given in a way that would be for all.
    """
    common = _common_overrides()
    named = compare["methods"]
    if named is not None and not named:
        raise ConfigError("`compare.methods`=[] leaves nothing to compare; name some, or leave it out for all")
    configs = _chosen(named, common) if named is not None else _all_that_merge(common)
    for name, options in compare["options"].items():
        if name not in configs:
            raise ConfigError(f"`compare.options.{name}`: that method is not compared; {nearest(str(name), configs)}")
        _give(configs[name]["method"], name, options)
    for name, config in configs.items():
        if missing := [key for key, value in config["method"].items() if value == _MISSING]:
            raise ConfigError(f"`{name}` needs `{missing[0]}`; give it as `compare.options.{name}.{missing[0]}=…`")
    return configs


def _common_overrides() -> list[str]:
    """Return the overrides of the command line: all hold for every method."""
    overrides = given_overrides()
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key == "method":
            raise ConfigError(f"`{override}`: `compare` takes several; write `compare.methods=[NAME,NAME]`")
        if key.startswith("method."):
            option = override.lstrip("+~").removeprefix("method.")
            raise ConfigError(f"`{override}`: say of which method, as `compare.options.NAME.{option}`")
    return overrides


def _chosen(names: Sequence[str], common: Sequence[str]) -> dict[str, dict[str, Any]]:
    known = [*preset_files("method"), *method_presets()]
    configs: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(names):
        if name not in known:
            raise ConfigError(f"`compare.methods` has {name!r}, which is not a method; {nearest(str(name), known)}")
        config = composed(*common, f"method={name}")
        if not _merges(config["method"]):
            raise ConfigError(f"`compare.methods` has {name!r}, which merges nothing; leave it out")
        for other, earlier in configs.items():
            if earlier["method"] == config["method"]:
                raise ConfigError(f"`compare.methods` has {name!r}, another name of `{other}`; leave one of them out")
        configs[name] = config
    return configs


def _all_that_merge(common: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return every method that has a preset and merges fine-tuned models, each once: other names come last."""
    presets = preset_files("method")
    names = sorted(presets, key=lambda name: ("_target_" not in presets[name], name))
    configs: dict[str, dict[str, Any]] = {}
    for name in names:
        config = composed(*common, f"method={name}")
        method = config["method"]
        if "_target_" in method and _merges(method) and all(c["method"] != method for c in configs.values()):
            configs[name] = config
    return configs


def _merges(method: Mapping[str, Any]) -> bool:
    cls: type[Method] = class_from_config(method, "method", Method)
    return cls.min_models > 0


def _give(method: dict[str, Any], name: str, options: Any) -> None:
    """Change a method's options to those that the command line gives for it alone."""
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"`compare.options.{name}`={options!r} is not a table; give `compare.options.{name}.KEY=VALUE`"
        )
    known = [key for key in method if not key.startswith("_")]
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"`compare.options.{name}.{key}` is not an option; {nearest(str(key), known)}")
        if key == "devices":
            raise ConfigError(f"`compare.options.{name}.devices`={value!r}: all share them; give `fabric.devices`")
        method[key] = value


def _plan(configs: Mapping[str, Mapping[str, Any]], output_dir: Path) -> int:
    """Show what each method would need, and what is wrong with it."""
    problems = False
    with without_network():
        for name, config in configs.items():
            plan = plan_of(config, output_dir / name.replace("/", "_"))
            problems = problems or bool(plan.problems)
            log.info("== %s ==\n%s\n", name, plan_text(plan))
    return 1 if problems else 0
