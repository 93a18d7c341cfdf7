"""Methods by name: their own, those of other packages, and objects from configs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fusion_merge.methods
from fusion_merge import RankOneMoEAlgorithm, WEMoEAlgorithm, get_method, list_methods, register_method, registry
from fusion_merge.errors import ConfigError, FusionMergeError, nearest
from fusion_merge.methods.base import Method
from fusion_merge.options import option


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    list_methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(registry, "_aliases", dict(registry._aliases))
    monkeypatch.setattr(registry, "_scanned", True)


@dataclass(kw_only=True)
class Mine(Method):
    """A method of another package."""

    strength: float = option(1.0, help="how much")

    def run(self, modelpool: Any, taskpool: Any = None, fabric: Any = None) -> Any:
        return modelpool.load_pretrained_model()


class EntryPoint:
    """What `importlib.metadata` gives for an entry point of another package."""

    name = "mine"
    value = "another_package.mine"

    def __init__(self, problem: Exception | None = None) -> None:
        self._problem = problem

    def load(self) -> type[Method]:
        if self._problem is not None:
            raise self._problem
        return register_method("mine", aliases=("my_method",))(Mine)


def use_entry_point(monkeypatch, entry_point: EntryPoint) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry_point] if group == registry.ENTRY_POINTS else [])
    monkeypatch.setattr(registry, "_scanned", False)


# Names


def test_every_method_file_registers_a_method():
    folder = Path(fusion_merge.methods.__file__).parent
    modules = {file.stem for file in folder.glob("*.py")} - {
        "__init__",
        "base",
        "built_once",
        "adamerging_base",
        "adapted_base",
        "moe_base",
        "rank_one_base",
        "static_base",
    }
    assert {get_method(name).__module__.rpartition(".")[2] for name in list_methods()} == modules


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("rankone_moe", "rankone_moe"),
        ("clip_rankone_moe", "rankone_moe"),
        ("clip_rankone_wemoe", "rankone_moe"),
        ("wemoe", "wemoe"),
        ("weight_ensembling_moe", "wemoe"),
        ("clip_weight_ensembling_moe", "wemoe"),
        ("e_wemoe", "e_wemoe"),
        ("sparse_weight_ensembling_moe", "e_wemoe"),
        ("sparse_clip_weight_ensembling_moe", "e_wemoe"),
    ],
)
def test_method_is_found_by_every_documented_name(name, method):
    assert get_method(name).method_name == method
    assert get_method(name) is get_method(method)


def test_aliases_are_not_listed_twice():
    assert "weight_ensembling_moe" not in list_methods()
    assert len(set(list_methods())) == len(list_methods())


def test_method_knows_all_its_names():
    assert set(registry.names_of(WEMoEAlgorithm)) == {"wemoe", "weight_ensembling_moe", "clip_weight_ensembling_moe"}


@pytest.mark.parametrize(
    ("wrong", "right"), [("wemo", "wemoe"), ("rank_one_moe", "rankone_moe"), ("simple_avg", "simple_average")]
)
def test_unknown_method_is_refused_with_the_nearest(wrong, right):
    with pytest.raises(ConfigError, match=f"method `{wrong}` is unknown; did you mean `{right}`"):
        get_method(wrong)


def test_method_like_no_other_is_refused_with_all_there_are():
    with pytest.raises(ConfigError, match=r"known are: .*rankone_moe.*wemoe"):
        get_method("zzzzzz")


# Registering


def test_registered_method_is_listed_and_found():
    register_method("mine", aliases=("my_method",))(Mine)
    assert "mine" in list_methods()
    assert get_method("my_method") is Mine
    assert Mine.method_name == "mine"


@pytest.mark.parametrize(
    ("name", "aliases"),
    [("wemoe", ()), ("weight_ensembling_moe", ()), ("mine", ("wemoe",)), ("mine", ("weight_ensembling_moe",))],
)
def test_second_method_of_one_name_is_refused_naming_both(name, aliases):
    taken = aliases[0] if aliases else name
    with pytest.raises(
        ConfigError, match=rf"`{taken}` is registered twice: by fusion_merge\.methods\.wemoe .*{__name__}"
    ):
        register_method(name, aliases=aliases)(Mine)
    assert get_method("wemoe") is WEMoEAlgorithm


def test_refused_method_leaves_nothing_behind():
    with pytest.raises(ConfigError):
        register_method("mine", aliases=("free", "wemoe"))(Mine)
    assert "mine" not in list_methods()
    with pytest.raises(ConfigError):
        get_method("free")


def test_same_class_may_be_registered_again():
    register_method("wemoe", aliases=("weight_ensembling_moe",))(WEMoEAlgorithm)
    assert get_method("wemoe") is WEMoEAlgorithm


# Other packages


def test_method_of_another_package_is_found(monkeypatch):
    use_entry_point(monkeypatch, EntryPoint())
    assert "mine" in list_methods()
    assert get_method("my_method")(strength=2).strength == 2.0


def test_broken_package_is_named(monkeypatch):
    use_entry_point(monkeypatch, EntryPoint(ImportError("no module named left_pad")))
    with pytest.raises(FusionMergeError, match=r"`mine`.*another_package.*left_pad"):
        list_methods()


# Objects from configs


def test_object_is_made_of_its_config():
    config = {"_target_": "fusion_merge.methods.rankone_moe.RankOneMoEAlgorithm", "rank_k": 4, "lr": 1}
    method = registry.object_from_config(config, "method")
    assert isinstance(method, RankOneMoEAlgorithm)
    assert (method.rank_k, method.lr) == (4, 1.0)


@pytest.mark.parametrize(
    "config", [{}, {"rank_k": 4}, {"_target_": None}, {"_target_": 3}], ids=["nothing", "no target", "null", "number"]
)
def test_config_without_a_target_is_refused(config):
    with pytest.raises(ConfigError, match="`method` has no `_target_`"):
        registry.object_from_config(config, "method")


@pytest.mark.parametrize("target", ["no_such_package.Thing", "fusion_merge.methods.wemoe.NoSuchClass", "nodots", ""])
def test_target_that_cannot_be_imported_is_refused(target):
    with pytest.raises(ConfigError, match=f"`method._target_`='{target}' cannot be imported"):
        registry.object_from_config({"_target_": target}, "method")


def test_target_that_cannot_be_called_is_refused():
    assert not callable(math.pi)
    with pytest.raises(ConfigError, match=r"`method\._target_`='math\.pi'"):
        registry.object_from_config({"_target_": "math.pi"}, "method")


def test_unknown_key_is_refused_with_the_nearest():
    config = {"_target_": "fusion_merge.methods.rankone_moe.RankOneMoEAlgorithm", "rankk": 4}
    with pytest.raises(
        ConfigError, match=r"`method\.rankk` is not an option of RankOneMoEAlgorithm; did you mean `rank_k`"
    ):
        registry.object_from_config(config, "method")


def test_missing_key_is_refused_by_name():
    config = {"_target_": "fusion_merge.pools.model_pool.CLIPVisionModelPool"}
    with pytest.raises(ConfigError, match=r"`modelpool` cannot be made: .*models"):
        registry.object_from_config(config, "modelpool")


# The nearest name


@pytest.mark.parametrize(
    ("name", "known", "sentence"),
    [
        ("wemo", ["dummy", "wemoe"], "did you mean `wemoe`?"),
        ("zzz", ["b", "a"], "known are: a, b"),
        ("zzz", [], "none are known here"),
    ],
)
def test_nearest_name_is_proposed(name, known, sentence):
    assert nearest(name, known) == sentence
