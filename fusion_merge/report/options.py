"""The options of a method or a pool, as a table: from its own code, so that it is never out of date."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

REQUIRED = "???"
"""The value of an option that has to be given."""

_HEADERS = ("option", "type", "default", "in Python", "values", "meaning")
_WIDTH = 70
_LONGEST = 48
_ITEMS = 4


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: of the option.
        type: what its value may be, in words.
        default: what the code takes without it; `REQUIRED` if it has to be given.
        values: which values are possible, in words.
        meaning: what it is.
    """

    name: str
    type: str
    default: Any
    values: str
    meaning: str


def options_table(cls: type, preset: Mapping[str, Any] | None = None, *, style: str = "github") -> str:
    """Return the options of a method or a pool as a table; empty where there are none.

    Args:
        cls: a method class, whose fields were declared with `option`, or any class whose docstring has `Args`.
        preset: the values of a preset: they are the defaults then; where the code's differ, they stand beside.
        style: a format of tabulate, such as `github` for Markdown, or `simple` for a terminal.
    """
    rows = []
    for option in options_of(cls):
        own = shown(option.default)
        chosen = own if preset is None or option.name not in preset else shown(preset[option.name])
        other = own if chosen != own else ""
        rows.append([option.name, option.type, chosen, other, option.values, option.meaning])
    columns = {name: [row[i] for row in rows] for i, name in enumerate(_HEADERS)}
    for name in ("in Python", "values"):
        if not any(columns[name]):
            del columns[name]
    if style == "github":
        columns = {name: [cell.replace("|", "\\|") for cell in column] for name, column in columns.items()}
        columns["option"] = [f"`{name}`" for name in columns["option"]]
    else:
        columns["meaning"] = [textwrap.fill(cell, _WIDTH) for cell in columns["meaning"]]
    return tabulate(columns, headers="keys", tablefmt=style, disable_numparse=True) if rows else ""


def options_of(cls: type) -> list[Option]:
    """Return the options of a method or a pool, in order.

    Args:
        cls: as in `options_table`.
    """
    return list(_fields(cls) if dataclasses.is_dataclass(cls) else _arguments(cls))


def summary(cls: type) -> str:
    """Return the first sentence of a class's docstring, or nothing.

    Args:
        cls: the class.
    """
    return _docstring(cls).partition("\n\n")[0].replace("\n", " ")


def formula(cls: type) -> str:
    """Return the formulas of a class's docstring in LaTeX, or nothing.

    Args:
        cls: the class.
    """
    blocks = re.findall(r"^\.\. math::(.*(?:\n[ \t]+\S.*)*)", _docstring(cls), re.MULTILINE)
    return "\n".join("\n".join(line.strip() for line in block.strip().splitlines()) for block in blocks)


def source(cls: type) -> str:
    """Return where a method comes from and how it differs, as its docstring says, or nothing.

    Args:
        cls: the class.
    """
    found = re.search(r"^Source: ((?:.+\n?)+)", _docstring(cls), re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def shown(value: Any) -> str:
    """Return a value as it is written on the command line, shortened.

    Args:
        value: a plain value.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        names = [str(name) for name in value]
        return "{}" if not names else f"{{{_shortened(names)}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{_shortened([str(item) for item in value])}]"
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _shortened(items: list[str]) -> str:
    return ", ".join([*items[:_ITEMS], *(["…"] if len(items) > _ITEMS else [])])


def _docstring(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "")  # not that of a parent


def _fields(cls: type) -> Iterator[Option]:
    hints = _hints(cls)
    declared = [vars(parent).get("__annotations__", {}) for parent in cls.__mro__]  # its own first, then its parents'
    order = {name: index for index, names in reversed(list(enumerate(declared))) for name in names} | {"name": -1}
    for field in sorted(dataclasses.fields(cls), key=lambda field: order[field.name]):
        if not field.init:
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = REQUIRED if field.default_factory is dataclasses.MISSING else field.default_factory()
        help_text = str(field.metadata.get("help", ""))
        yield Option(field.name, _type(hints.get(field.name, field.type)), default, _values(field.metadata), help_text)


def _arguments(cls: type) -> Iterator[Option]:
    constructor: Any = cls
    hints, meanings = _hints(constructor.__init__), _documented(cls)
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        default = REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default
        yield Option(
            name, _type(hints.get(name, parameter.annotation)), default, "", meanings.get(name, "").removesuffix(".")
        )


def _hints(of: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(of)
    except Exception:  # a name that only type checkers see; what was written is shown then
        return {}


def _documented(cls: type) -> dict[str, str]:
    """Return what the section `Args` of a docstring says of each argument."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", _docstring(cls), re.MULTILINE)
    text = inspect.cleandoc(section[1]) if section else ""
    found = re.findall(r"^\*{0,2}(\w+)(?: \([^)]*\))?: (.*(?:\n[ \t]+.*)*)", text, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in found}


def _type(hint: Any) -> str:
    if hint is inspect.Parameter.empty or hint is Any:
        return "any"
    if isinstance(hint, str):
        return hint
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        words = list(dict.fromkeys(_type(part) for part in typing.get_args(hint)))
        if "null" in words:  # last
            words.remove("null")
            words.append("null")
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    plain = typing.get_origin(hint) or hint
    if plain is types.NoneType:
        return "null"
    if isinstance(plain, type) and issubclass(plain, Mapping):
        return "table"
    if plain is list and typing.get_args(hint):
        return f"list of {_type(typing.get_args(hint)[0])}"
    return str(getattr(plain, "__name__", plain))


def _values(limits: Mapping[str, Any]) -> str:
    if "choices" in limits:
        return ", ".join(shown(choice) for choice in limits["choices"])
    signs = {"minimum": "≥", "above": ">", "maximum": "≤", "below": "<"}
    return ", ".join(f"{sign} {shown(limits[key])}" for key, sign in signs.items() if key in limits)
