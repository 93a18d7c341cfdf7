"""The published rows that the package ships: that they compose, and that their figures are whole."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from fusion_merge.registry import object_from_config
from fusion_merge.report.published import published_row
from fusion_merge.schema import register_schema

PRESETS = Path(str(files("fusion_merge.config")))
ROWS = sorted(file.stem for file in (PRESETS / "reproduction").glob("*.yaml"))
SIZES = {"b32": "B/32", "b16": "B/16", "l14": "L/14"}
MODELS = {"b32": "clip-vit-base-patch32", "b16": "clip-vit-base-patch16", "l14": "clip-vit-large-patch14"}
TA8 = ["sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    register_schema()
    yield
    GlobalHydra.instance().clear()


def row_file(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((PRESETS / "reproduction" / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


BY_TASK = [name for name in ROWS if len(row_file(name)["reproduction"]["published"]) > 1]


def pool_of(name: str) -> str:
    """The model pool that a row is made with; it is scored on its own `test_datasets`."""
    chosen = {k: v for entry in row_file(name)["defaults"] if isinstance(entry, dict) for k, v in entry.items()}
    assert "override /taskpool" not in chosen
    return str(chosen["override /modelpool"])


@functools.cache
def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_module("fusion_merge.config", version_base="1.3"):
        plain: Any = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)
    return plain


def test_every_published_row_is_here():
    sizes = ("b32", "b16", "l14")
    names = ("zero_shot", "fine_tuned", "simple_average", "task_arithmetic", "wemoe", "e_wemoe_90", "e_wemoe_99")
    names = (*names, "rankone_k32_all", "rankone_k32_select75", "rankone_k64_select75", "ties_merging", "regmean")
    names = (*names, "layer_wise_adamerging")
    others = {"rankone_depth0_b32", "wemoe_b32_tall20", "rankone_k64_select75_b32_tall20"}
    others |= {"tsv_m_b32", "iso_c_b32", "iso_cts_b32"}
    assert set(ROWS) == {f"{name}_{size}" for name in names for size in sizes} | others


@pytest.mark.parametrize("name", ROWS)
def test_row_composes_and_is_whole(name):
    config = composed(f"reproduction={name}")
    row = published_row(name, config["reproduction"])
    method = object_from_config(config["method"], "method")
    size = next(shown for word, shown in SIZES.items() if word in name.split("_"))
    assert size in row.title
    assert "average" in row.figures
    assert row.evaluated_with == ("batch" if method.routed else None)
    assert (row.evaluated_with in (config["evaluate_routings"] or [])) is method.routed
    assert config["baselines"] == ([row.baseline] if row.baseline else [])
    assert row.tolerance_average < row.tolerance
    assert not config["taskpool"]["tasks"]
    assert not config["taskpool"]["test_datasets"]
    tasks = list(config["modelpool"]["test_datasets"])
    assert set(row.tasks) <= set(tasks)
    assert set(tasks) == {model for model in config["modelpool"]["models"] if not model.startswith("_")}
    assert len(tasks) == (20 if name.endswith("tall20") else 8)


@pytest.mark.parametrize("name", ROWS)
def test_row_names_the_pools_of_its_size(name):
    suite = "TALL20" if name.endswith("tall20") else "TA8"
    model = next(pool for word, pool in MODELS.items() if word in name.split("_"))
    assert pool_of(name) == f"{model}_{suite}"


@pytest.mark.parametrize("name", BY_TASK)
def test_published_average_is_that_of_the_tasks(name):
    figures = dict(row_file(name)["reproduction"]["published"])
    average = figures.pop("average")
    assert sum(figures.values()) / len(figures) == pytest.approx(average, abs=0.08)  # some have one decimal
    assert list(figures)[:8] == TA8


def test_tuned_options_of_a_pool_do_not_reach_a_published_row():
    options = composed("reproduction=wemoe_b32", "modelpool=tiny8", "taskpool=tiny8")["method"]
    assert (options["lr"], options["max_steps"], options["init_lambda"]) == (1e-4, 1000, 0.3)


def test_option_on_the_command_line_beats_a_published_one():
    pools = ("modelpool=tiny8", "taskpool=tiny8")
    assert composed("reproduction=wemoe_b32", *pools, "method.max_steps=20")["method"]["max_steps"] == 20


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wemoe_l14", {"router_hidden_layers": 2, "batch_size": 16, "init_lambda": 0.3}),
        ("e_wemoe_99_b16", {"tv_prune_ratio": 0.99, "shared_gate": True}),
        ("rankone_k64_select75_b32", {"rank_k": 64, "select_k": 384, "router_hidden_layers": 1}),
        ("rankone_k32_all_l14", {"rank_k": 32, "select_k": 256}),
        ("rankone_k64_select75_b32_tall20", {"rank_k": 64, "select_k": 960, "init_lambda": 0.1}),
        ("rankone_depth0_b32", {"router_hidden_layers": 0, "rank_k": 32, "select_k": 192}),
        ("ties_merging_l14", {"scaling_factor": 0.3, "threshold": 20, "merge_func": "sum"}),
        ("regmean_b16", {"num_regmean_examples": 256, "reduce_non_diagonal_ratio": 0.6, "tta_split": "train"}),
        ("iso_cts_b32", {"scaling_factor": 1.0, "common_space_fraction": 0.8}),
    ],
)
def test_row_has_its_published_options(name, expected):
    options = composed(f"reproduction={name}", "modelpool=tiny8", "taskpool=tiny8")["method"]
    assert {key: options[key] for key in expected} == expected
    if "select_k" in expected and "all" not in name.split("_"):
        tasks = 20 if name.endswith("tall20") else 8
        assert options["select_k"] == 0.75 * tasks * options["rank_k"]
