"""Options say which values are possible, and hold to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fusion_merge.errors import ConfigError
from fusion_merge.options import check_options, option


@dataclasses.dataclass
class Recipe:
    rate: float = option(0.5, help="a rate", above=0.0, below=1.0)
    share: float = option(1.0, help="a share", minimum=0.0, maximum=1.0)
    steps: int = option(3, help="steps", minimum=1)
    kind: str = option("a", help="a kind", choices=("a", "b"))
    depth: int = option(1, help="a depth", choices=(0, 1, 2))
    flag: bool = option(False, help="a flag")
    path: str | None = option(None, help="a path")
    place: bool | str = option(False, help="a path, or false")
    names: list[str] | None = option(None, help="names")
    weight: float | list[float] = option(1.0, help="a weight, or several")
    state: list[int] = dataclasses.field(default_factory=list, init=False)


def checked(**values: Any) -> Recipe:
    recipe = Recipe(**values)
    check_options(recipe)
    return recipe


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rate": 0.01},
        {"share": 0.0},
        {"share": 1.0},
        {"steps": 1},
        {"kind": "b"},
        {"depth": 0},
        {"flag": True},
        {"path": "x"},
        {"place": "x"},
        {"place": True},
    ],
)
def test_possible_values_are_accepted(values):
    recipe = checked(**values)
    assert {key: getattr(recipe, key) for key in values} == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.0}, r"`rate`=0\.0 of Recipe is out of range; it must be above 0\.0"),
        ({"rate": 1.0}, r"`rate`=1\.0 of Recipe is out of range; it must be below 1\.0"),
        ({"share": -0.1}, r"`share`=-0\.1 .* at least 0\.0"),
        ({"share": 1.1}, r"`share`=1\.1 .* at most 1\.0"),
        ({"steps": 0}, r"`steps`=0 .* at least 1"),
        ({"kind": "c"}, r"`kind`='c' .* choose a or b"),
        ({"depth": 3}, r"`depth`=3 .* choose 0 or 1 or 2"),
        ({"rate": float("nan")}, r"`rate`=nan .* not a finite number"),
        ({"share": float("inf")}, r"`share`=inf .* not a finite number"),
        ({"steps": 1.0}, r"`steps`=1\.0 .* not of type int"),
        ({"steps": "3"}, r"`steps`='3' .* not of type int"),
        ({"steps": True}, r"`steps`=True .* not of type int"),
        ({"rate": True}, r"`rate`=True .* not of type float"),
        ({"rate": "1e-3"}, r"`rate`='1e-3' .* not of type float"),
        ({"flag": 1}, r"`flag`=1 .* not of type bool"),
        ({"kind": None}, r"`kind`=None .* not of type str"),
        ({"path": 3}, r"`path`=3 .* not of type str or null"),
        ({"place": 3}, r"`place`=3 .* not of type bool or str"),
    ],
)
def test_impossible_values_are_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        checked(**values)


def test_whole_number_becomes_a_float_where_one_is_declared():
    value = checked(share=1).share
    assert value == 1.0
    assert isinstance(value, float)


def test_fields_that_are_no_options_are_left_alone():
    recipe = Recipe()
    recipe.state = "anything"
    check_options(recipe)
    assert recipe.state == "anything"


@pytest.mark.parametrize("shapes_model", [True, False])
def test_option_keeps_its_help_and_its_role(shapes_model):
    @dataclasses.dataclass
    class One:
        width: int = option(1, help="how wide", shapes_model=shapes_model)

    (field,) = dataclasses.fields(One)
    assert (field.default, field.metadata["help"], field.metadata["shapes_model"]) == (1, "how wide", shapes_model)


@pytest.mark.parametrize("names", [None, [], ["a", "b"]])
def test_lists_of_names_are_accepted(names):
    assert checked(names=names).names == names


def test_whole_numbers_in_a_list_become_floats_and_the_list_that_was_given_stays():
    given = [1, 0.5]
    found = checked(weight=given).weight
    assert (found, [type(value) for value in found], given) == ([1.0, 0.5], [float, float], [1, 0.5])
    assert type(given[0]) is int


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"names": ["a", 1]}, r"`names`=\['a', 1\].* is not of type list of str or null"),
        ({"names": "a"}, r"`names`='a'.* is not of type list of str or null; write \[a\]"),
        ({"names": ("a",)}, r"is not of type list of str or null"),
        ({"weight": [True]}, r"`weight`=\[True\].* is not of type float or list of float"),
        ({"weight": ["1"]}, r"is not of type float or list of float"),
        ({"weight": [1.0, float("nan")]}, r"`weight`=.* is not a finite number"),
        ({"weight": [10**400]}, r"is not of type float or list of float"),
    ],
)
def test_lists_of_other_things_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        checked(**values)
