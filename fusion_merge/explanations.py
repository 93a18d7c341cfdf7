"""What is wrong with a command line, in one clear message with the nearest right name."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusion_merge.errors import FusionMergeError, nearest
from fusion_merge.presets import LONG_PATHS, merging_presets, preset_names

_KEY = re.compile(r"[+~]*[\w.@:/$-]+")
"""What may stand before the `=` of an override."""

_CLOSE = 0.7
"""From so much likeness on, of 1, a wrong name is taken for a slip."""

GROUPS = ("method", "modelpool", "taskpool")
"""The groups of presets that every run chooses from."""


def explain(error: Exception) -> str:
    """Return one clear message, with the nearest right name where a name was wrong.

    Args:
        error: what Hydra, OmegaConf or fusion_merge raised.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _explain_preset(*str(error.missing_cfg_file).partition("/")[::2], error.options or [])
    if isinstance(error, OmegaConfBaseException) and isinstance(error.__cause__, FusionMergeError):
        return str(error.__cause__)  # of a resolver of our own
    if isinstance(error, OverrideParseException):
        return _explain_grammar(error)
    if found := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", str(error)):
        return (
            f"`{found[1]}={found[2]}` has several values; give `--multirun` to run each, write [{found[2]}] for a "
            "list, or put a text in quotes of its own"
        )
    if found := re.search(r"Could not override '([^']+)'", str(error)):
        return _explain_key(found[1])
    cause = error.__cause__
    messages = [str(error)]
    if isinstance(cause, Exception) and not isinstance(error, FusionMergeError) and str(cause) not in messages[0]:
        messages.append(str(cause))
    if found := re.match(r"Error merging override ([^=\s]+)=(\S*)", messages[0]):
        messages = [f"`{found[1]}`={found[2]} is not possible:", *messages[1:]]
    lines = [line for message in messages for line in message.splitlines()]
    details = ("full_key:", "object_type=", "reference_type=")
    return " ".join(line.strip() for line in lines if line.strip() and not line.strip().startswith(details))


def _explain_grammar(error: OverrideParseException) -> str:
    """Return what is wrong with an override that Hydra cannot take apart, and how to write it."""
    given = error.override.removeprefix("++")  # where it is we who added them
    key, equals, value = given.partition("=")
    if not equals:
        return f"`{given}` has no value; write KEY=VALUE"
    if not _KEY.fullmatch(key):
        return f"`{key}` is not a key; write KEY=VALUE, without a space before or after the `=`"
    first, *others = str(error).splitlines()
    if first.startswith("Error parsing override"):  # it was understood, and is not possible
        return f"`{given}` is not possible: {others[0] if others else first}"
    why = "" if first.startswith("LexerNoViableAlt") else f" ({first})"
    if value.startswith(("[", "{")):
        way_out = 'close all brackets, and write texts with spaces or signs in quotes: {cats: "~/cats"}, ["a {}"]'
    else:
        # within quotes, backslashes count only before a quote
        quoted = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), value)
        way_out = f"""write a text with spaces or signs in quotes of its own: {shlex.quote(f'{key}="{quoted}"')}"""
    return f"`{given}` cannot be read{why}; {way_out}"


def _explain_preset(group: str, name: str, options: Sequence[str]) -> str:
    """Return what is near a preset that does not exist; Hydra lists the short names alone."""
    folder = LONG_PATHS.get(group, "")
    if folder and name.startswith(f"{folder}/"):
        options = [f"{folder}/{option}" for option in preset_names(group)]
    return f"`{group}={name}` is not a preset; {nearest(name, options)}"


def _explain_key(key: str) -> str:
    """Return what is wrong with the key of an override: the first part that does not exist, and the nearest."""
    try:
        config = _selected_config()
    except Exception:  # the presets may fail in any way of their own; what is to be explained came first
        return f"`{key}` is not an option; see `--cfg job` for what is"
    parts = key.lstrip("+~").split(".")
    for depth, part in enumerate(parts):
        node = OmegaConf.select(config, ".".join(parts[:depth])) if depth else config
        if not isinstance(node, DictConfig):
            break
        if part not in node:
            owner = next(
                (g for g in (*GROUPS, "protocol", "fabric") if not depth and part in (node.get(g) or {})), None
            )
            if owner is not None:
                return f"`{part}` is not an option; did you mean `{owner}.{part}`?"
            others = _methods_with(part) if parts[:depth] == ["method"] else []
            if others and not get_close_matches(part, map(str, node), cutoff=_CLOSE):
                return f"`method.{part}` is not an option of this method, but one of {', '.join(others)}"
            return f"`{'.'.join(parts[: depth + 1])}` is not an option; {nearest(part, map(str, node))}"
    return f"`{key}` cannot be set; see `--cfg job` for what can"


def _methods_with(option: str) -> list[str]:
    """Return the presets of the methods that have an option."""
    presets: dict[str, Any] = {}
    for name, text in merging_presets().items():
        with suppress(yaml.YAMLError):  # another package's may be broken
            presets[name] = yaml.safe_load(text)
    known = {name: preset for name, preset in presets.items() if isinstance(preset, dict)}
    return [name for name, preset in known.items() if option in preset.keys() - {"defaults", "_target_"}]


def _selected_config() -> DictConfig:
    """Return the configuration that the presets on the command line give, before other overrides."""
    GlobalHydra.instance().clear()
    presets = [first_choice(a) for a in sys.argv[1:] if a.partition("=")[0] in (*GROUPS, "protocol", "reproduction")]
    with initialize_config_module("fusion_merge.config", version_base="1.3"):
        return compose("config", overrides=presets)


def choices(preset: str) -> list[str]:
    """Return the names that an override chooses, several where it is swept; none where Hydra is to search for them.

    Args:
        preset: an override such as `modelpool=tiny8,mine`.
    """
    (override,) = OverridesParser.create().parse_overrides([preset])
    if not override.is_sweep_override():
        return [str(override.value())]
    found = override.sweep_string_iterator() if override.is_discrete_sweep() else ()
    return [str(name).strip("'\"") for name in found]


def first_choice(preset: str) -> str:
    """Return the first choice of a preset that is swept, and any other as it is.

    Args:
        preset: an override such as `method=wemoe,e_wemoe`.
    """
    (override,) = OverridesParser.create().parse_overrides([preset])
    if not override.is_sweep_override():
        return preset
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
