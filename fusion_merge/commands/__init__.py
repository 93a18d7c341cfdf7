"""What the command line can do: one file a command, each with `run`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, Protocol

from fusion_merge.errors import ConfigError, nearest
from fusion_merge.presets import CHOSEN

COMMANDS = ("run", "plan", "describe", "fetch", "reproduce", "compare", "analyse")
"""The words that may come first on the command line; without one, `run`."""

_SPELLINGS = {"analyze": "analyse"}
"""Other spellings of commands."""

_ABOUT = {"describe": "method", "reproduce": "reproduction", "analyse": "analyse.name"}
"""The option that a bare word after a command is for."""

_SWEPT = {"sparsity": "e_wemoe", "rank": "rankone_moe"}
"""The method that has what an analysis tries values of."""

_FLAGS_WITH_VALUE = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c", "--package", "-p"),
    "--experimental-rerun",
)
"""Hydra's flags after which a value is to come."""


class Command(Protocol):
    """A module of this package."""

    def run(self, config: Mapping[str, Any], output_dir: Path, typed: str) -> int:
        """Do what the command says.

        Args:
            config: the resolved configuration, as in `config/config.yaml`.
            output_dir: where files go, if there are any.
            typed: the command line, for reports.

        Returns:
            The exit code: 0 where all is well.

        Raises:
            FusionMergeError: if the configuration does not hold together.
        """
        ...


def find_command(name: str) -> Command:
    """Return a command; only now is what it needs imported.

    Args:
        name: one of `COMMANDS`.

    Raises:
        ConfigError: if the name is unknown.
    """
    name = _SPELLINGS.get(name, name)
    if name not in COMMANDS:
        raise ConfigError(f"`{name}` is not a command; {nearest(name, COMMANDS)}")
    command: Any = importlib.import_module(f"fusion_merge.commands.{name}")
    return command


def spell_out(arguments: list[str]) -> list[str]:
    """Return the command line as options alone: `plan method=wemoe` is `command=plan method=wemoe`.

    The word after a command may be the name that it is about: `describe wemoe` is `describe method=wemoe`,
    `reproduce NAME` is `reproduce reproduction=NAME`, and `analyse NAME` is `analyse analyse.name=NAME`, with the
    method that the analysis is about unless one is given. `compare A B` is `compare compare.methods=[A,B]`, and so is
    `compare method=[A,B]`.

    Args:
        arguments: what was typed.

    Raises:
        ConfigError: if the first word is not a command.
    """
    _refuse_spaces(arguments)
    if not arguments or "=" in arguments[0] or arguments[0].startswith(("-", "+", "~")):
        return arguments
    word, *rest = arguments
    if word in CHOSEN:
        raise ConfigError(f"`{word}` has no value; write `{word}=NAME`")
    word = _SPELLINGS.get(word, word)
    if word not in COMMANDS:
        raise ConfigError(f"`{word}` is neither KEY=VALUE nor a command; {nearest(word, COMMANDS)}")
    about = _ABOUT.get(word)
    if about is not None or word == "compare":
        rest = _names_first(rest)
    if word == "compare":
        rest = _methods_to_compare(rest)
    elif about is not None:
        rest = _named(word, about, rest)
    return [f"command={word}", *rest]


def _refuse_spaces(arguments: list[str]) -> None:
    """Refuse KEY = VALUE, which comes as three words, or two."""
    for first, second in pairwise(arguments):
        option = not first.startswith("-")
        if option and (second.startswith("=") or (first.endswith("=") and first != "=" and _is_name(second))):
            raise ConfigError(f"`{first} {second}`: write KEY=VALUE, without a space before or after the `=`")


def _named(word: str, about: str, arguments: list[str]) -> list[str]:
    """Return the arguments of a command with the name that it is about as an option."""
    names = list(takewhile(_is_name, arguments))
    if not names:
        return arguments
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{about}=")]
    if others := [*given, *names][1:]:
        raise ConfigError(f"`{others[0]}`: {word} is about one name; write `{word} {[*given, *names][0]}`")
    method = _SWEPT.get(names[0]) if word == "analyse" else None
    chosen = any(argument.startswith("method=") for argument in arguments)
    return [f"{about}={names[0]}", *arguments[1:], *([f"method={method}"] if method and not chosen else [])]


def _names_first(arguments: list[str]) -> list[str]:
    """Return the arguments with bare words, other than the values of Hydra's flags, before all others."""
    after_flag = [False, *(argument in _FLAGS_WITH_VALUE for argument in arguments)]
    names = [_is_name(argument) and not after for argument, after in zip(arguments, after_flag, strict=False)]
    order = sorted(range(len(arguments)), key=lambda index: not names[index])
    return [arguments[index] for index in order]


def _is_name(argument: str) -> bool:
    return "=" not in argument and not argument.startswith(("-", "+", "~"))


def _methods_to_compare(arguments: list[str]) -> list[str]:
    """Return the arguments of `compare` with the methods that are named in them as one option."""
    count = next((i for i, argument in enumerate(arguments) if not _is_name(argument)), len(arguments))
    names, rest = arguments[:count], arguments[count:]
    listed = [a.removeprefix("method=").strip("[]") for a in rest if a.startswith("method=")]
    rest = [a for a in rest if not a.startswith("method=")]
    twice = [argument for argument in rest if argument.startswith("compare.methods=")]
    if (names or listed) and twice:
        raise ConfigError(f"`{twice[0]}` and {', '.join([*names, *listed])}: name the methods in one place")
    if names or listed:
        rest.append(f"compare.methods=[{','.join([*names, *listed])}]")
    return rest


def overrides_first(arguments: list[str]) -> list[str]:
    """Return the command line with KEY=VALUE before all flags, however it was typed: Hydra takes them in a row.

    Args:
        arguments: options and Hydra's flags.
    """
    overrides: list[str] = []
    flags: list[str] = []
    value = False
    for argument in arguments:
        plain = not value and not argument.startswith("-") and ("=" in argument or argument.startswith(("~", "+")))
        (overrides if plain else flags).append(argument)
        value = argument in _FLAGS_WITH_VALUE
    return [*overrides, *flags]
