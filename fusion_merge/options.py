"""Options of methods: dataclass fields that say what they mean and which values are possible."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from typing import Any

from fusion_merge.errors import ConfigError


def option(
    default: Any,
    *,
    help: str,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: Sequence[Any] | None = None,
    shapes_model: bool = False,
) -> Any:
    """Declare an option of a method.

    Args:
        default: its default.
        help: what it means, in a phrase.
        minimum: the smallest value.
        above: what the value must be above.
        maximum: the largest value.
        below: what the value must be below.
        choices: all possible values.
        shapes_model: whether a router checkpoint fits only models built with the same value.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "below": below, "choices": choices}
    metadata = {
        "help": help,
        "shapes_model": shapes_model,
        **{k: v for k, v in limits.items() if v is not None},
    }
    return dataclasses.field(default=default, metadata=metadata)


LARGEST = 2**53
"""The largest whole number that an option may be: what is beyond no seed, size or float can hold exactly."""


def check_options(instance: Any) -> None:
    """Refuse a dataclass instance with a value of the wrong type or out of range.

    Args:
        instance: an instance whose fields were declared with `option`; whole numbers become floats where
            a float is declared.

    Raises:
        ConfigError: names the option, its value, and what would be right.
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        if not field.init:
            continue
        value = getattr(instance, field.name)
        hint = hints[field.name]
        kinds = _kinds(hint)
        if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
            raise ConfigError(
                f"`{field.name}` of {type(instance).__name__} is a number of {value.bit_length()} bits; "
                f"it must be within ±{LARGEST}"
            )
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
            setattr(instance, field.name, value)
        if isinstance(value, list) and list[float] in _parts(hint):
            value = [float(item) if type(item) is int and abs(item) <= LARGEST else item for item in value]
            setattr(instance, field.name, value)
        where = f"`{field.name}`={value!r} of {type(instance).__name__}"
        if not any(_fits(value, part) for part in _parts(hint)):
            alone = any(type(value) in typing.get_args(part) for part in _parts(hint))
            way_out = f"; write [{value}]" if alone else ""
            raise ConfigError(f"{where} is not of type {' or '.join(map(_word, _parts(hint)))}{way_out}")
        if not all(math.isfinite(v) for v in (value if isinstance(value, list) else [value]) if isinstance(v, float)):
            raise ConfigError(f"{where} is not a finite number")
        _check_range(where, value, field.metadata)


def _parts(hint: Any) -> tuple[Any, ...]:
    """Return what a value may be one of."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(part for each in typing.get_args(hint) for part in _parts(each))
    return (hint,)


def _kinds(hint: Any) -> tuple[type, ...]:
    return tuple(typing.get_origin(part) or part for part in _parts(hint))


def _fits(value: Any, part: Any) -> bool:
    """Tell whether a value is of a type; of a list, also whether its items are of theirs."""
    if type(value) is not (typing.get_origin(part) or part):
        return False
    items = typing.get_args(part)
    return not (isinstance(value, list) and items) or all(type(item) is items[0] for item in value)


def _word(part: Any) -> str:
    if typing.get_origin(part) is list and typing.get_args(part):
        return f"list of {typing.get_args(part)[0].__name__}"
    kind = typing.get_origin(part) or part
    return "null" if kind is types.NoneType else str(kind.__name__)


def _check_range(where: str, value: Any, limits: typing.Mapping[str, Any]) -> None:
    if "choices" in limits and value not in limits["choices"]:
        raise ConfigError(f"{where} is not possible; choose {' or '.join(map(str, limits['choices']))}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    checks = (
        ("minimum", lambda limit: value >= limit, "at least"),
        ("above", lambda limit: value > limit, "above"),
        ("maximum", lambda limit: value <= limit, "at most"),
        ("below", lambda limit: value < limit, "below"),
    )
    for name, holds, word in checks:
        if name in limits and not holds(limits[name]):
            raise ConfigError(f"{where} is out of range; it must be {word} {limits[name]}")
