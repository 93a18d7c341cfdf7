"""The plan of what adaptation adds: what a saved model holds, starts from images, and experts that are asked."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path

import pytest
from helpers import TASKS
from plans import RANK, SMALL, planned
from runs import own_pool, run_cli

from fusion_merge import MergedCLIPVisionModel
from fusion_merge.adaptation import experts
from fusion_merge.planning import machine, plan
from fusion_merge.planning.geometry import FLOAT
from fusion_merge.planning.machine import Speed
from fusion_merge.planning.memory import Phase
from fusion_merge.planning.needs import Images, Training
from fusion_merge.planning.plan import Plan
from fusion_merge.pools.loaders import EndlessBatches

FUSION = ["method=fusion_moe", "method.rank_k=4"]
SPEED = Speed(1e10, 1e10, 1e-3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(machine, "_SECONDS", 0.01)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


# What a saved model holds


@pytest.mark.parametrize(
    ("arguments", "images"),
    [
        ([*FUSION, "method.start_images=4"], 18),
        ([*FUSION, "method.router_hidden_layers=2", "method.layers=[1]"], 18),
        (["method=wemoe"], 18),
        (["method=wemoe", "method.router_hidden_layers=0"], 0),
        (["method=e_wemoe", "method.position_encoding=true"], 18),
        ([*FUSION, "method.router_start=projection"], 0),
        ([*FUSION, "method.router_start=constant", "method.max_steps=0", "method.warmup_steps=0"], 0),
        (["method=smile", "method.k=4", "method.gate_k=2"], 0),
    ],
    ids=["fusion", "one_block", "wemoe", "constant", "coded", "projection", "no_steps", "smile"],
)
def test_a_saved_model_takes_what_was_planned(pool_dir, tmp_path, arguments, images):
    """Its heads, what its routers read of all 12 and 18 images, and all that describes it, are among that."""
    usual = SMALL if "method=smile" not in arguments else []
    more = [*usual, *arguments, "merged_model_save_path=merged"]
    _, values = planned(pool_dir, tmp_path / "plan", *more)
    done = run_cli(*own_pool(pool_dir), *more, "baselines=[]", "output_dir=out", cwd=tmp_path)
    assert done.code == 0, done.err
    saved = MergedCLIPVisionModel.from_pretrained(tmp_path / "merged")
    inputs = saved.task_inputs
    slack = 20 if "method=e_wemoe" in arguments else 0  # a zero in the first place of each bank may be stored
    assert (0 if inputs is None else inputs.shape[2]) == images
    assert values["model"]["input_bytes"] == (0 if inputs is None else inputs.nbytes)
    assert values["model"]["head_bytes"] == sum(t.nbytes for t in saved.heads.state_dict().values())
    assert abs(values["model"]["bytes"] - sum(t.nbytes for t in saved.own_state().values())) <= slack
    on_disk = next(w["bytes"] for w in values["writings"] if w["what"] == "merged model")
    assert 0 <= on_disk - size_of(tmp_path / "merged") < 100_000


def test_checkpoints_take_what_was_planned_and_tell_what_a_model_made_with_them_holds(pool_dir, tmp_path):
    save = ["method.save_checkpoint=r.ckpt", "method.cache_dir=state", "method.max_steps=2", "method.batch_size=4"]
    _, values = planned(pool_dir, tmp_path / "plan", *FUSION, *save)
    done = run_cli(*own_pool(pool_dir), *FUSION, *save, "baselines=[]", "output_dir=out", cwd=tmp_path)
    assert done.code == 0, done.err
    writings = {w["what"]: w["bytes"] for w in values["writings"]}
    assert 0 <= writings["router checkpoint"] - (tmp_path / "r.ckpt").stat().st_size < 100_000
    assert writings["state of the adaptation"] >= 2 * 4 * values["model"]["router_bytes"]
    load = f"method.checkpoint={tmp_path / 'r.ckpt'}"
    _, loaded = planned(pool_dir, tmp_path / "again", *FUSION, load)
    assert loaded["model"] | {"described": 0} == values["model"] | {"described": 0}  # which the path is part of
    assert loaded["model"]["input_bytes"] > 0
    assert not {"starting routers", "asking experts", "adapting", "measuring"} & loaded["phases"].keys()


def test_class_names_of_any_length_are_counted_on_disk(pool_dir, tmp_path):
    names = [f"{'x' * 60_000}{n}" for n in range(2)]
    found = []
    for labels in (TASKS["cats"], names):
        more = f"taskpool.tasks.cats={{data: {pool_dir / 'images' / 'cats'}, classnames: [{', '.join(labels)}]}}"
        _, values = planned(pool_dir, tmp_path / labels[0][:5], *RANK, *SMALL, more, "merged_model_save_path=merged")
        found.append(next(w["bytes"] for w in values["writings"] if w["what"] == "merged model"))
    assert found[1] - found[0] == sum(len(n) for n in names) - sum(len(n) for n in TASKS["cats"])


def test_without_tasks_to_score_there_are_no_heads(pool_dir, tmp_path):
    arguments = [a for a in own_pool(pool_dir) if not a.startswith("taskpool")]
    data = [f"modelpool.test_datasets.{t}={pool_dir / 'images' / t}" for t in TASKS]
    more = [*arguments, *data, *RANK, *SMALL, "taskpool=dummy", "report_save_path=plan.json"]
    assert run_cli("plan", *more, cwd=tmp_path).code == 0
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["model"]["head_bytes"] == 0
    assert values["model"]["input_bytes"] > 0


def test_memory_counts_what_a_model_holds_from_when_it_holds_it(pool_dir, tmp_path):
    done, values = planned(pool_dir, tmp_path, *FUSION, *SMALL, "merged_model_save_path=merged")
    phases = {name: phase["host"]["model"] for name, phase in values["phases"].items()}
    held = values["model"]["head_bytes"] + values["model"]["input_bytes"]
    before = ("building", "making heads", "starting routers", "asking experts", "adapting")
    assert list(phases) == [*before, "measuring", "saving", "evaluating", "baselines"]
    assert {phases[name] for name in before} == {values["model"]["bytes"] - held}
    assert {phases[name] for name in phases if name not in before} == {values["model"]["bytes"]}
    assert ", of which heads " in done.out
    assert "what routers read" in done.out


# Routers that start from images


def test_only_routers_that_start_from_images_have_that_phase(pool_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "measure_speed", lambda *_: SPEED)
    for start, there in (("ridge", True), ("constant", False), ("projection", False)):
        _, values = planned(pool_dir, tmp_path / start, *FUSION, *SMALL, f"method.router_start={start}")
        assert ("starting routers" in values["phases"]) is there
        assert ("starting routers" in values["seconds"]) is there


def test_without_steps_routers_start_and_are_measured_and_nothing_is_adapted(pool_dir, tmp_path):
    none = ["method.max_steps=0", "method.warmup_steps=0"]
    for name, more in (("none", none), ("dev", [*none, "method.fast_dev_run=true"])):
        _, values = planned(pool_dir, tmp_path / name, *FUSION, "method.cache_dir=state", *more)
        assert {"starting routers", "measuring"} <= values["phases"].keys() & values["seconds"].keys()
        assert not {"adapting", "asking experts"} & (values["phases"].keys() | values["seconds"].keys())
        assert "state of the adaptation" not in [w["what"] for w in values["writings"]]


@pytest.mark.parametrize(
    ("largest_phase", "ways_out", "method"),
    [
        ("starting routers", {"method.start_images"}, "fusion_moe"),
        (
            "adapting",
            {"method.use_grad_accumulate=true", "method.mixed_tasks=false", "method.batch_size"},
            "fusion_moe",
        ),
        ("adapting", {"method.batch_size"}, "clip_finetune"),
        ("evaluating", {"taskpool.batch_size"}, "fusion_moe"),
        ("baselines", {"baselines=[]"}, "fusion_moe"),
        *(
            (name, set(), "fusion_moe")
            for name in ("building", "making heads", "asking experts", "measuring", "saving")
        ),
    ],
)
@pytest.mark.parametrize("where", ["host", "device"])
def test_warnings_say_what_makes_the_largest_phase_smaller_and_nothing_else(largest_phase, ways_out, method, where):
    names = ("building", "making heads", "starting routers", "asking experts", "adapting", "measuring", "saving")
    sizes = {name: {"x": 2 if name == largest_phase else 1} for name in (*names, "evaluating", "baselines")}
    phases = [Phase(name, *((there, {}) if where == "host" else ({}, there))) for name, there in sizes.items()]
    (warning,) = plan._warnings(Plan(method, "cpu", phases=phases, available={where: 1}))
    assert set(re.findall("`(.*?)`", warning)) == ways_out
    assert f"the peak is in {largest_phase}" in warning


@pytest.mark.parametrize(
    ("options", "copies"),
    [(["use_grad_accumulate=true"], 1), (["use_grad_accumulate=false"], len(TASKS)), (["mixed_tasks=true"], 1)],
)
def test_adamerging_keeps_a_merged_state_of_each_pass_that_is_alive(pool_dir, tmp_path, options, copies):
    more = [f"method.{option}" for option in options]
    _, values = planned(pool_dir, tmp_path, "method=task_wise_adamerging", *SMALL, *more)
    tower = FLOAT * values["model"]["parameters"]
    assert values["phases"]["adapting"]["host"]["gradients and optimiser"] == (1 + copies) * tower


# Experts that are asked


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["method=fusion_moe", "method.rank_k=4"], True),
        (["method=fusion_moe", "method.rank_k=4", "method.guard=watch"], True),
        (["method=fusion_moe", "method.rank_k=4", "method.guard=watch", "method.objective=entropy"], False),
        (["method=wemoe", "method.guard=rollback"], True),
        (["method=e_wemoe", "method.objective=expert_labels"], True),
        (["method=task_wise_adamerging", "method.guard=rollback"], True),
        (["method=layer_wise_adamerging", "method.objective=expert_labels"], True),
        (["method=layer_wise_adamerging"], False),
    ],
    ids=lambda value: "-".join(value).replace("method.", "") if isinstance(value, list) else str(value),
)
def test_a_tower_of_an_expert_is_in_memory_where_experts_are_asked(pool_dir, tmp_path, arguments, asked, modelpool):
    _, values = planned(pool_dir, tmp_path, *arguments, *SMALL)
    assert values["can_start"]
    assert ("asking experts" in values["phases"]) is asked
    assert ("asking experts" in values["seconds"]) is asked
    if asked:
        host = values["phases"]["asking experts"]["host"]
        tower = modelpool.load_model("cats")
        assert host["expert"] == sum(p.nbytes for p in tower.parameters())
        assert host["answers of experts"] == FLOAT * (12 * 2 + 18 * 3)  # images, and classes
        vectors = values["phases"]["adapting"]["host"].get("task vectors", 0)
        assert host.get("task vectors", 0) == vectors


@pytest.mark.parametrize("count", [1, 63, 64, 100, 500])
@pytest.mark.parametrize(("batch", "steps"), [(4, 1), (16, 4), (16, 5), (16, 200)])
def test_experts_look_at_as_many_images_as_planned(count, batch, steps):
    seen = chain.from_iterable(EndlessBatches(count, batch, 0))
    batches = experts._batches(seen, range(steps * batch), count)
    training = Training(batch, asked=steps * batch)
    assert training.asked_of(Images(count, 1, count)) == sum(len(each) for each in batches)
