"""The embedded pools: there and small, as their recipes make them; tiny20's tasks are sound, and tiny8_hard is hard."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from runs import run_cli
from safetensors import safe_open

from fusion_merge import zoo
from fusion_merge.errors import DataError, ModelError
from fusion_merge.pools.datasets import make_task
from fusion_merge.zoo import tiny8, tiny20
from fusion_merge.zoo.tasks import Script, folder

RECIPES = Path(__file__).parents[2] / "examples" / "zoo"
TOWERS = {"tiny8": tiny8.TASKS, "tiny8_hard": tiny8.TASKS, "tiny20": tiny20.TASKS}
NEW_TASKS = [task for task in tiny20.TASKS if task not in tiny8.TASKS]
EVERY_TASK = {**tiny8.TABLE, **tiny20.TABLE}
SCRIPTS = {task: made.make for task, made in EVERY_TASK.items() if isinstance(made.make, Script)}


# Models


def test_every_pool_has_a_pretrained_model_and_one_a_task():
    assert zoo.names() == sorted(f"{pool}/{name}" for pool, tasks in TOWERS.items() for name in ("pretrained", *tasks))


@pytest.mark.parametrize(("pool", "megabytes"), [("tiny8", 12), ("tiny8_hard", 5), ("tiny20", 11)])
def test_weights_are_stored_in_half_precision_and_take_little_room(pool, megabytes):
    files = [zoo.path(f"zoo://{name}") / "model.safetensors" for name in zoo.names() if name.startswith(f"{pool}/")]
    assert sum(file.stat().st_size for file in files) < megabytes * 1e6
    for file in files:
        with safe_open(file, "pt") as handle:
            kinds = {handle.get_slice(key).get_dtype() for key in handle.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "BF16", "I64"}


def test_unknown_model_is_refused_with_the_nearest():
    with pytest.raises(ModelError, match="`zoo://tiny8/digit` is not in the zoo; did you mean `tiny8/digits`"):
        zoo.path("zoo://tiny8/digit")


@pytest.mark.parametrize("pool", ["tiny8_hard", "tasks", "drawing"])
def test_what_has_no_tasks_of_its_own_is_refused(pool):
    with pytest.raises(DataError, match=rf"`zoo://{pool}/dots` is not in the zoo: there is no pool `{pool}`"):
        make_task("dots", f"zoo://{pool}/dots")


# Recipes


@pytest.fixture
def pretrain(monkeypatch) -> Any:
    """The module of the recipes."""
    monkeypatch.syspath_prepend(str(RECIPES))
    import pretrain

    yield pretrain
    for name in ("pretrain", "recipes"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("pool", TOWERS)
def test_recipe_makes_the_tokenizer_that_is_shipped(pretrain, tmp_path, pool):
    tokenizer = pretrain.make_tokenizer(pretrain.RECIPES[pool])
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pretrain.write_vocabulary(tmp_path, bpe["vocab"], bpe["merges"])
    shipped = zoo.path(f"zoo://{pool}/pretrained")
    for file in ("vocab.json", "merges.txt"):
        assert (tmp_path / file).read_bytes() == (shipped / file).read_bytes()


@pytest.mark.parametrize("pool", TOWERS)
def test_recipe_makes_a_model_of_the_shape_that_is_shipped(pretrain, pool):
    recipe = pretrain.RECIPES[pool]
    made = pretrain.make_model(recipe, pretrain.make_tokenizer(recipe)).state_dict()
    with safe_open(zoo.path(f"zoo://{pool}/pretrained") / "model.safetensors", "pt") as shipped:
        shapes = {key: tuple(shipped.get_slice(key).get_shape()) for key in shipped.keys()}  # noqa: SIM118
        scale = float(shipped.get_tensor("logit_scale").float().exp())
    assert {key: shapes.get(key) for key in made if "position_ids" not in key} == {
        key: tuple(tensor.shape) for key, tensor in made.items() if "position_ids" not in key
    }
    assert scale == pytest.approx(recipe.final_logit_scale, rel=1e-3)


# Tasks


@pytest.mark.parametrize("task", NEW_TASKS)
def test_task_is_the_same_every_time_labelled_and_balanced(task):
    first, second = tiny20.load_task(task, "test"), tiny20.load_task(task, "test")
    assert first["label"] == second["label"]
    assert all(np.array_equal(a, b) for a, b in zip(first["image"], second["image"], strict=True))
    assert first.features["label"].names == tiny20.classnames(task)
    counts = Counter(first["label"])
    assert counts.keys() == set(range(len(tiny20.classnames(task))))
    assert len(set(counts.values())) == 1
    assert {(image.mode, image.size) for image in first["image"]} == {("RGB", (32, 32))}
    assert first["label"] != sorted(first["label"])


@pytest.mark.parametrize("task", NEW_TASKS)
def test_training_and_test_images_differ(task):
    seen, unseen = (
        {image.tobytes() for image in tiny20.load_task(task, split)["image"]} for split in ("train", "test")
    )
    assert len(seen) >= 1000
    assert not seen & unseen


def test_the_large_pool_has_the_images_of_the_small_one():
    for split in ("train", "test"):
        ours, theirs = (module.load_task("shapes", split) for module in (tiny20, tiny8))
        assert ours["label"] == theirs["label"]
        assert all(np.array_equal(a, b) for a, b in zip(ours["image"], theirs["image"], strict=True))


def test_no_two_classes_of_a_task_have_one_prompt():
    for task in tiny20.TASKS:
        for template in tiny20.templates(task):
            assert template.count("{}") == 1
            prompts = [template.format(name).lower() for name in tiny20.classnames(task)]
            assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("task", SCRIPTS)
def test_every_font_has_every_character(task):
    from matplotlib.ft2font import FT2Font

    fonts = folder("matplotlib") / "mpl-data" / "fonts" / "ttf"
    made = SCRIPTS[task]
    for name in (*made.train_fonts, *made.test_fonts):
        known = FT2Font(str(fonts / f"{name}.ttf")).get_charmap()
        assert [c for c in made.characters if ord(c) not in known] == []
    assert not set(made.train_fonts) & set(made.test_fonts)


@pytest.mark.parametrize(("task", "split"), [("digit", "test"), ("clocks", "validation")])
def test_unknown_task_or_split_is_refused(task, split):
    with pytest.raises(ValueError, match=f"{task if split == 'test' else split}.*tiny20"):
        tiny20.load_task(task, split)


# Presets


@pytest.mark.parametrize(("pool", "module"), [("tiny8_hard", tiny8), ("tiny20", tiny20)])
def test_a_pool_is_scored_on_its_own_tasks_by_default(tmp_path, pool, module):
    done = run_cli(
        "method=wemoe", f"modelpool={pool}", "fast_dev_run=true", "baselines=[]", "output_dir=here", cwd=tmp_path
    )
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "here" / "report.json").read_text())
    assert [name for name in report if name in module.TASKS] == list(module.TASKS)
    config = yaml.safe_load((tmp_path / "here" / "config.yaml").read_text())
    assert config["method"]["lr"] == 1e-4  # the papers' defaults: nothing is tuned for these pools


# What the pools are for


def scores(report: dict[str, Any]) -> dict[str, float]:
    return {task: report[task]["accuracy"] for task in (*tiny20.TASKS, "average") if task in report}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> dict[str, Any]:
    """RankOne-MoE on tiny8_hard: few steps, each thirty times as long."""
    home = tmp_path_factory.mktemp("hard")
    shorter = ["method.lr=3e-3", "method.max_steps=40"]
    done = run_cli("method=rankone_moe", "modelpool=tiny8_hard", *shorter, "output_dir=here", cwd=home)
    assert done.code == 0, done.err
    report: dict[str, Any] = json.loads((home / "here" / "report.json").read_text())
    return report


def test_hard_experts_are_weak_but_worth_having(adapted):
    zero_shot, fine_tuned = (scores(adapted["baselines"][name]) for name in ("zero_shot", "fine_tuned"))
    assert 0.5 < zero_shot["average"] < 0.6
    assert 0.7 < fine_tuned["average"] < 0.82
    assert min(fine_tuned[task] - zero_shot[task] for task in tiny8.TASKS) > 0.12


def test_hard_task_vectors_interfere(adapted):
    zero_shot, fine_tuned, merged = (
        scores(adapted["baselines"][name])["average"] for name in ("zero_shot", "fine_tuned", "task_arithmetic")
    )
    assert merged < zero_shot - 0.03
    assert merged < fine_tuned - 0.25


def test_entropy_minimisation_collapses_on_the_hard_pool(adapted):
    found, before = scores(adapted), scores(adapted["baselines"]["task_arithmetic"])
    assert found["average"] < before["average"] - 0.1
    assert adapted["run"]["adaptation"]["collapsed"]
    assert sum(found[task] < before[task] - 0.1 for task in tiny8.TASKS) >= 3
    assert min(found[task] * len(tiny8.classnames(task)) for task in tiny8.TASKS) < 2  # next to chance


def test_fine_tuning_moved_the_attention_of_the_hard_pool():
    """So that experts of MLPs alone cannot bring all of it back."""

    def weights(pool: str, name: str) -> dict[str, np.ndarray[Any, Any]]:
        with safe_open(zoo.path(f"zoo://{pool}/{name}") / "model.safetensors", "np") as file:
            keys = [k for k in file.keys() if "self_attn" in k and k.endswith(("q_proj.weight", "v_proj.weight"))]  # noqa: SIM118
            return {k[k.index("encoder") :]: file.get_tensor(k).astype(float) for k in keys if "text" not in k}

    def moved(pool: str) -> float:
        base, tuned = (weights(pool, name) for name in ("pretrained", "letters"))
        assert base.keys() == tuned.keys() != set()
        return float(np.mean([np.linalg.norm(tuned[k] - base[k]) / np.linalg.norm(base[k]) for k in base]))

    assert moved("tiny8_hard") > 2 * moved("tiny8")


def test_twenty_experts_are_strong_and_interfere(tmp_path):
    done = run_cli("method=simple_average", "modelpool=tiny20", "output_dir=here", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "here" / "report.json").read_text())
    zero_shot, fine_tuned, merged = (
        scores(report["baselines"][name]) for name in ("zero_shot", "fine_tuned", "task_arithmetic")
    )
    assert 0.65 < zero_shot["average"] < 0.87
    assert fine_tuned["average"] > 0.9
    assert fine_tuned["average"] > zero_shot["average"] + 0.08
    assert min(fine_tuned[task] - zero_shot[task] for task in tiny20.TASKS) >= 0
    assert merged["average"] < zero_shot["average"]


@pytest.mark.parametrize("pool", ["tiny8", "tiny8_hard"])
def test_fusion_moe_starts_right_where_adaptation_collapses(pool, tmp_path):
    """Without a single step: far above task arithmetic, and no task below the pretrained model."""
    arguments = ["method=fusion_moe", "method.max_steps=0", f"modelpool={pool}", f"output_dir={tmp_path / 'run'}"]
    done = run_cli(*arguments, "baselines=[zero_shot,fine_tuned]", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    ours, zero_shot, tuned = (
        {task: scores[task]["accuracy"] for task in (*tiny8.TASKS, "average")}
        for scores in (report, report["baselines"]["zero_shot"], report["baselines"]["fine_tuned"])
    )
    gained = (ours["average"] - zero_shot["average"]) / (tuned["average"] - zero_shot["average"])
    assert gained > 0.7
    assert all(ours[task] >= zero_shot[task] for task in tiny8.TASKS)
