"""What Hydra's programs see of fusion_merge: fusion_bench its methods, ours what packages declare, others nothing."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from fusion_merge import presets
from fusion_merge.options import check_options
from fusion_merge.registry import object_from_config
from fusion_merge.schema import register_schema

ROOT = Path(__file__).parents[2]
METHODS = {file.stem for file in (ROOT / "config" / "method").glob("*.yaml")} - {"clip_finetune", "dummy"}
ADAPTER = "fusion_merge.plugins.fusion_bench.FusionMergeAlgorithm"


@pytest.fixture(autouse=True)
def _clean_hydra():
    yield
    GlobalHydra.instance().clear()


@pytest.fixture
def program(tmp_path, only_hydra_s_own_presets, monkeypatch) -> Path:
    """The configuration of a program of somebody else's, with the keys that fusion_bench's has."""
    monkeypatch.delitem(sys.modules, "fusion_bench", raising=False)  # which other tests may have imported
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "dummy.yaml").write_text("_target_: theirs.Dummy\n")
    (tmp_path / "program.yaml").write_text("defaults: [{method: dummy}, _self_]\nseed: null\nfast_dev_run: false\n")
    return tmp_path


@pytest.fixture
def in_fusion_bench(monkeypatch, program):
    monkeypatch.setitem(sys.modules, "fusion_bench", ModuleType("fusion_bench"))


def composed(program: Path, *overrides: str) -> Any:
    with initialize_config_dir(str(program), version_base=None):
        return compose("program", overrides=list(overrides))


def there(program: Path, group: str = "method") -> list[str]:
    """The presets and the groups that a program finds in a group."""
    with initialize_config_dir(str(program), version_base=None):
        return GlobalHydra.instance().config_loader().list_groups(group) + (
            GlobalHydra.instance().config_loader().get_group_options(group)
        )


def test_hydra_finds_the_plugin():
    assert "FusionMergeSearchPath" in {cls.__name__ for cls in Plugins.instance().discover(SearchPathPlugin)}


# In fusion_bench


@pytest.mark.usefixtures("in_fusion_bench")
def test_every_method_that_merges_is_there_and_no_other(program):
    assert there(program) == ["fusion_merge", "dummy"]
    assert {*there(program, "method/fusion_merge")} == METHODS >= {"rankone_moe", "wemoe", "task_arithmetic"}
    assert there(program, "modelpool") == []


@pytest.mark.usefixtures("in_fusion_bench")
@pytest.mark.parametrize("name", ["wemo", "clip_finetune", "dummy", "wemoe/wemoe"])
def test_what_is_not_there_is_refused_with_what_is(name, program):
    with pytest.raises(MissingConfigException, match=r"(?s)method/fusion_merge/.*(rankone_moe|Available options)"):
        composed(program, f"method=fusion_merge/{name}")


@pytest.mark.usefixtures("in_fusion_bench")
@pytest.mark.parametrize("name", sorted(METHODS))
def test_method_there_is_the_method_here_with_the_same_options(name, program):
    theirs = OmegaConf.to_container(composed(program, f"method=fusion_merge/{name}", "seed=3").method, resolve=True)
    register_schema()
    with initialize_config_module("fusion_merge.config", version_base="1.3"):
        ours = OmegaConf.to_container(
            compose("config", overrides=[f"method={name}", "modelpool=clip_vision", "seed=3"]).method, resolve=True
        )
    assert theirs.pop("_target_") == ADAPTER
    assert {"_target_": theirs.pop("algorithm"), **theirs} == ours
    check_options(object_from_config(ours, "method"))


@pytest.mark.usefixtures("in_fusion_bench")
def test_options_of_a_method_are_set_as_in_any_preset(program):
    method = composed(program, "method=fusion_merge/rankone_moe", "method.rank_k=4", "fast_dev_run=true").method
    assert (method.rank_k, method.fast_dev_run, method.seed) == (4, True, None)


@pytest.mark.usefixtures("in_fusion_bench")
def test_preset_of_the_user_s_own_wins(program):
    (program / "method" / "fusion_merge").mkdir()
    (program / "method" / "fusion_merge" / "wemoe.yaml").write_text("_target_: mine.Method\n")
    assert composed(program, "method=fusion_merge/wemoe").method == {"_target_": "mine.Method"}


# In other programs


def test_other_programs_see_nothing(program):
    assert there(program) == ["dummy"]


@pytest.mark.usefixtures("in_fusion_bench")
def test_our_own_program_sees_nothing_of_it():
    register_schema()
    with initialize_config_module("fusion_merge.config", version_base="1.3"):
        assert "fusion_merge" not in GlobalHydra.instance().config_loader().list_groups("method")


@pytest.mark.usefixtures("in_fusion_bench")
def test_error_of_ours_ends_no_program(program, monkeypatch, caplog):
    def broken() -> dict[str, str]:
        raise OSError("the disk is gone")

    monkeypatch.setattr(presets, "merging_presets", broken)
    with caplog.at_level(logging.WARNING):
        assert composed(program).method == {"_target_": "theirs.Dummy"}
    assert "not available: the disk is gone" in caplog.text


def test_other_programs_import_nothing_of_ours_but_the_plugin(program):
    code = f"""if True:
        import json, sys
        from hydra import compose, initialize_config_dir
        with initialize_config_dir({str(program)!r}, version_base=None):
            compose("program")
        print(json.dumps([name for name in sys.modules if "fusion_merge" in name or name == "torch"]))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = json.loads(done.stdout)
    assert "hydra_plugins.fusion_merge_plugin" in imported
    assert [n for n in imported if n.startswith(("fusion_merge.", "torch"))] == []


# Presets of other packages


@pytest.fixture
def package(tmp_path, monkeypatch) -> str:
    """A package of presets, declared as an installed package would."""
    folder = tmp_path / "somebody" / "presets"
    (folder / "method" / "somebody").mkdir(parents=True)
    for place in (folder.parent, folder):
        (place / "__init__.py").write_text("")
    average = {"_target_": "fusion_merge.methods.simple_average.SimpleAverageAlgorithm", "name": None}
    (folder / "method" / "mean.yaml").write_text(yaml.safe_dump(average))
    (folder / "method" / "somebody" / "mean.yaml").write_text("defaults: [/method/mean@_here_]\n")
    (folder / "method" / "wemoe.yaml").write_text(yaml.safe_dump({"_target_": "somebody.Else"}))
    monkeypatch.syspath_prepend(tmp_path)
    declare(monkeypatch, "somebody.presets")
    return "somebody.presets"


def declare(monkeypatch, value: str) -> None:
    class EntryPoint:
        name = "somebody"

    EntryPoint.value = value  # type: ignore[attr-defined]
    monkeypatch.setattr(presets, "entry_points", lambda group: [EntryPoint] if group == presets.ENTRY_POINTS else [])
    presets.other_packages.cache_clear()
    monkeypatch.setattr(presets, "other_packages", presets.other_packages.__wrapped__)


@pytest.mark.usefixtures("package")
def test_preset_of_another_package_is_listed_and_composed():
    assert {"mean", "somebody/mean", "wemoe"} <= {*presets.method_presets()}
    register_schema()
    for name in ("mean", "somebody/mean"):
        with initialize_config_module("fusion_merge.config", version_base="1.3"):
            method = compose("config", overrides=[f"method={name}"]).method
        assert method._target_ == "fusion_merge.methods.simple_average.SimpleAverageAlgorithm"


@pytest.mark.usefixtures("package")
def test_preset_of_ours_stays_ours():
    register_schema()
    with initialize_config_module("fusion_merge.config", version_base="1.3"):
        assert compose("config", overrides=["method=wemoe"]).method._target_.startswith("fusion_merge.")
    assert "fusion_merge.methods.wemoe" in presets.merging_presets()["wemoe"]


@pytest.mark.usefixtures("package", "in_fusion_bench")
def test_preset_of_another_package_is_in_fusion_bench_too(program):
    method = composed(program, "method=fusion_merge/mean").method
    assert method._target_ == ADAPTER
    assert method.algorithm == "fusion_merge.methods.simple_average.SimpleAverageAlgorithm"


def test_package_of_presets_that_is_not_there_is_named(monkeypatch):
    from fusion_merge.errors import ConfigError

    declare(monkeypatch, "no_such_package.presets")
    with pytest.raises(ConfigError, match=r"presets `somebody` of another package \(no_such_package\.presets\)"):
        presets.preset_names("method")
