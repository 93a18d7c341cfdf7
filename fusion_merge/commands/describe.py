"""`fusion_merge describe`: every option of a method or a pool, from the code itself."""

from __future__ import annotations

import logging
import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fusion_merge.commands import COMMANDS, find_command, spell_out
from fusion_merge.methods.base import Method
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.task_pool import TaskPool
from fusion_merge.presets import chosen_presets, method_presets
from fusion_merge.registry import class_from_config, get_method, is_registered, list_methods, names_of
from fusion_merge.report.options import formula, options_table, source, summary

log = logging.getLogger(__name__)

_KINDS: dict[str, type] = {"method": Method, "modelpool": CLIPVisionModelPool, "taskpool": TaskPool}
_WIDTH = 110


def run(config: Mapping[str, Any], output_dir: Path, typed: str) -> int:
    """See `Command.run`: what is named on the command line is described, or else everything in short."""
    named = _named(typed)
    texts = [_described(group, config[group], name) for group, name in named.items()]
    log.info("%s", "\n\n".join(texts or [_overview(config)]))
    return 0


def _named(typed: str) -> dict[str, str | None]:
    """Return the parts that the command line names, with the name of the preset if it gives one."""
    found: dict[str, str | None] = {}
    for argument in spell_out(shlex.split(typed)[1:]):
        key, equals, value = argument.lstrip("+").partition("=")
        group = key.partition(".")[0]
        if equals and group in _KINDS:
            found[group] = value if key == group else found.get(group)
    return found


def _described(group: str, config: Mapping[str, Any], name: str | None) -> str:
    """Describe one part: by its preset, or, where there is none, by the name that a method is registered under."""
    registered = group == "method" and name is not None and name not in method_presets() and is_registered(name)
    cls = get_method(str(name)) if registered else class_from_config(config, group, _KINDS[group])
    preset = None if registered else config
    title = f"{group}={name}" if name is not None else group
    blocks = [f"{title}: {cls.__name__} of {cls.__module__}", _wrapped(summary(cls))]
    if issubclass(cls, Method):
        blocks += [f"names: {', '.join(names_of(cls))}", textwrap.indent(formula(cls), "    ")]
        blocks += [_wrapped(f"Source: {source(cls)}") if source(cls) else ""]
    blocks.append(options_table(cls, preset, style="simple") or "no options")
    return "\n\n".join(block for block in blocks if block)


def _overview(config: Mapping[str, Any]) -> str:
    """Return the methods, the options of both pools, the commands, and all presets."""
    methods = [[name, summary(get_method(name)), ", ".join(names_of(get_method(name))[1:])] for name in list_methods()]
    blocks = [tabulate(methods, headers=["method", "what it is", "other names"], maxcolwidths=[None, 60, 50])]
    for group in ("modelpool", "taskpool"):
        table = options_table(class_from_config(config[group], group, _KINDS[group]), config[group], style="simple")
        blocks.append(f"options of {group}\n\n{table}")
    said = [(name, (find_command(name).__doc__ or "").partition(": ")[2].splitlines()[0]) for name in COMMANDS]
    blocks.append(tabulate(said, headers=["command", "what it does"], maxcolwidths=[None, 90]))
    presets = [[group, ", ".join(names)] for group, names in chosen_presets().items()]
    blocks.append(tabulate(presets, headers=["group", "presets (GROUP=NAME)"], maxcolwidths=[None, 90]))
    blocks.append("every option of one: fusion_merge describe method=NAME, modelpool=NAME or taskpool=NAME")
    return "\n\n".join(blocks)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH)
