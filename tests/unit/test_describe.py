"""`describe`: every option of a method and of a pool, from the code itself."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import pytest
from runs import files_in, run_cli

from fusion_merge import CLIPVisionModelPool, CLIPVisionModelTaskPool, DummyTaskPool, get_method, list_methods, registry
from fusion_merge.methods.base import Method
from fusion_merge.options import option
from fusion_merge.presets import chosen_presets, method_presets
from fusion_merge.registry import register_method
from fusion_merge.report.options import REQUIRED, formula, options_of, options_table, shown, source, summary

METHODS = list_methods()


def described(*arguments: str, cwd: Any) -> str:
    done = run_cli("describe", *arguments, cwd=cwd)
    assert (done.code, done.err) == (0, "")
    assert files_in(cwd) == []
    return done.out


def row(text: str, name: str) -> list[str]:
    """The cells of an option's row in a table for a terminal."""
    (line,) = [line for line in text.splitlines() if re.match(rf"{name}\s", line)]
    return re.split(r"\s{2,}", line.strip())


# Tables


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_every_method_has_type_default_and_meaning(name):
    cls = get_method(name)
    options = options_of(cls)
    assert sorted(o.name for o in options) == sorted(f.name for f in dataclasses.fields(cls) if f.init)
    own = [name for name in cls.__annotations__ if name in {o.name for o in options}]
    assert {o.name for o in options[: len(own) + 1]} == {"name", *own}  # its own first
    assert all(o.type and o.meaning for o in options)
    assert summary(cls)
    table = options_table(cls)
    assert all(f"| `{o.name}`" in table for o in options)


@pytest.mark.parametrize("cls", [CLIPVisionModelPool, CLIPVisionModelTaskPool])
def test_every_argument_of_a_pool_has_type_default_and_meaning(cls):
    options = options_of(cls)
    assert all(o.type and o.meaning for o in options)
    assert {o.name: o.default for o in options}["fast_dev_run"] is False
    assert ("models" in {o.name for o in options if o.default == REQUIRED}) == (cls is CLIPVisionModelPool)


def test_a_table_says_types_values_and_defaults():
    cells = {line.split("|")[1].strip(" `"): line for line in options_table(get_method("e_wemoe")).splitlines()}
    assert re.search(r"float\s+\| 0.9\s+\| ≥ 0.0, < 1.0\s+\| share", cells["tv_prune_ratio"])
    assert "0, 1, 2" in cells["router_hidden_layers"]
    assert re.search(r"\| str or null\s+\| null", cells["cache_dir"])
    assert "in Python" not in cells["option"]


def test_a_preset_s_values_are_the_defaults_and_those_of_the_code_stand_beside():
    text = options_table(get_method("wemoe"), {"lr": 1e-3, "seed": 0, "name": None}, style="simple")
    assert row(text, "lr")[:4] == ["lr", "float", "0.001", "0.0001"]
    assert "0.001" not in row(text, "seed")


def test_a_class_without_options_has_no_table():
    assert options_table(DummyTaskPool) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ("x" * 100, "x" * 48 + "…"),
        ({}, "{}"),
        (dict.fromkeys("abcdef"), "{a, b, c, d, …}"),
        ([1, 2], "[1, 2]"),
        (1e-4, "0.0001"),
    ],
)
def test_values_are_shown_as_they_are_written(value, text):
    assert shown(value) == text


def test_docstrings_are_taken_apart():
    assert formula(get_method("simple_average")) == r"\theta = \frac1N \sum_n \theta_n"
    assert source(get_method("simple_average")) == "Wortsman et al., ICML 2022."
    assert r"b = b_0 + \lambda" in formula(get_method("rankone_moe"))
    assert (formula(DummyTaskPool), source(DummyTaskPool)) == ("", "")


# The command


def test_a_method_is_described_with_what_was_tuned_for_the_pool(tmp_path):
    text = described("method=wemoe", cwd=tmp_path)
    assert row(text, "lr")[:4] == ["lr", "float", "0.001", "0.0001"]
    for words in ("Weight-ensembling mixture of experts.", r"W = W_0 + \sum_n g_n \tau_n", "arXiv 2402.00433"):
        assert words in text
    assert "weight_ensembling_moe" in text
    assert "clip_model" not in text


def test_another_pool_has_the_papers_defaults_and_needs_no_models(tmp_path):
    text = described("method=wemoe", "modelpool=clip_vision", cwd=tmp_path)
    assert row(text, "lr")[:3] == ["lr", "float", "0.0001"]
    assert row(text, "models")[2] == REQUIRED


def test_a_task_pool_is_described(tmp_path):
    text = described("taskpool=clip_vision", cwd=tmp_path)
    assert row(text, "batch_size")[:3] == ["batch_size", "int", "128"]
    assert "text tower" in text


def test_without_more_everything_is_listed(tmp_path):
    text = described(cwd=tmp_path)
    assert all(name in text for name in [*METHODS, "options of modelpool", "options of taskpool", "tiny8_unseen"])
    assert "wemoe/weight_ensembling_moe" in method_presets()
    assert chosen_presets()["modelpool"] == sorted(chosen_presets()["modelpool"])


def test_a_method_may_be_named_alone(tmp_path):
    assert described("wemoe", cwd=tmp_path) == described("method=wemoe", cwd=tmp_path)
    assert "`method=wemo` is not a preset; did you mean `wemoe`?" in run_cli("describe", "wemo", cwd=tmp_path).err


@pytest.mark.parametrize("group", ["method", "modelpool", "taskpool"])
def test_an_unknown_name_is_refused_with_the_nearest(tmp_path, group):
    wrong, right = {"method": ("wemo", "wemoe"), "modelpool": ("tiny9", "tiny8")}.get(
        group, ("clip_visio", "clip_vision")
    )
    done = run_cli("describe", f"{group}={wrong}", cwd=tmp_path)
    assert done.code == 1
    assert f"`{group}={wrong}` is not a preset; did you mean `{right}`?" in done.err


@pytest.fixture
def foreign():
    """A method of another package, without a preset."""

    @register_method("foreign")
    @dataclass(kw_only=True)
    class Foreign(Method):
        """Somebody else's."""

        strength: float = option(0.5, help="how much", minimum=0.0)

        def run(self, modelpool: Any, taskpool: Any = None, fabric: Any = None) -> Any:
            raise NotImplementedError

    yield Foreign
    del registry._methods["foreign"]


@pytest.mark.usefixtures("foreign")
def test_a_method_of_another_package_is_described_alike(tmp_path):
    text = described("method=foreign", cwd=tmp_path)
    assert row(text, "strength") == ["strength", "float", "0.5", "≥ 0.0", "how much"]
    assert "Somebody else's." in text
