"""The plan of what adaptation adds: what a saved model holds, starts from images, and experts that are asked."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TASKS
from plans import RANK, SMALL, planned, random_model, tower_config
from runs import own_pool, run_cli
from torch.profiler import ProfilerActivity, profile

from fusion_merge import FusionMoEAlgorithm, MergedCLIPVisionModel
from fusion_merge.adaptation import experts
from fusion_merge.adaptation.starts import ridge_start
from fusion_merge.planning import machine, plan
from fusion_merge.planning.duration import times
from fusion_merge.planning.geometry import FLOAT, model_size, vision_geometry
from fusion_merge.planning.machine import Speed
from fusion_merge.planning.memory import Phase, memory_phases
from fusion_merge.planning.needs import Images, Load, Training
from fusion_merge.planning.plan import Plan
from fusion_merge.planning.working import CHUNK, at_hand, kept_for_backward, regression, starting
from fusion_merge.pools.loaders import EndlessBatches

FUSION = ["method=fusion_moe", "method.rank_k=4"]
SPEED = Speed(1e10, 1e10, 1e-3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(machine, "_SECONDS", 0.01)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def largest(run: Callable[[], object]) -> int:
    """The peak of the bytes that torch allocates, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    found = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"]))
    return max(e["args"]["Total Allocated"] for e in found) - (
        found[0]["args"]["Total Allocated"] - found[0]["args"]["Bytes"]
    )


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


def start_load(method: FusionMoEAlgorithm, images: int, tasks: int = 4, **changes: Any) -> Load:
    config = tower_config(hidden_size=96, intermediate_size=384, **changes)
    adapted = {str(n): Images(100, FLOAT * 3 * 32 * 32, 0) for n in range(tasks)}
    size = model_size(method, config, tasks)
    return Load(vision_geometry(config), size, tasks, base=10**8, adapted=adapted, start_images=images)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_start_of_routers_takes_the_memory_that_was_planned(activation, depth):
    """Of no more images than a block takes at a time: of more, only what is between blocks grows."""
    method = FusionMoEAlgorithm(rank_k=4, router_hidden_layers=depth)
    load = start_load(method, CHUNK // 4, hidden_act=activation)
    model = random_model(method, tower_config(hidden_size=96, intermediate_size=384, hidden_act=activation), 4)
    images = {str(n): torch.randn(CHUNK // 4, 3, 32, 32) for n in range(4)}
    copied = CHUNK * FLOAT * load.tower.inputs
    expected = copied + starting(load) + regression(load)
    assert largest(lambda: ridge_start(model, images)) == pytest.approx(expected, rel=0.1)


def test_more_images_to_start_from_take_more_memory_and_time_but_not_as_blocks_do():
    method = FusionMoEAlgorithm(rank_k=4)
    few, many = start_load(method, 8), start_load(method, 16)
    token = FLOAT * few.tower.tokens * few.tower.width
    assert starting(many) - starting(few) == 5 * token * (many.started_from - few.started_from)
    slow = Speed(1e8, 1e8, 0.0)
    seconds = [times(load, slow, steps=0, workers=0)["starting routers"] for load in (few, many)]
    assert 1.5 * seconds[0] < seconds[1] < 2.5 * seconds[0]
    assert many.started_from == 64
    assert start_load(method, 1000).started_from == 400  # there are no more


def test_on_a_gpu_the_pass_is_there_and_the_regression_on_the_host():
    phase = next(
        p
        for p in memory_phases(dataclasses.replace(start_load(FusionMoEAlgorithm(rank_k=4), 8), gpu=True))
        if p.name == "starting routers"
    )
    assert {"regression", "images to start from"} <= phase.host.keys()
    assert {"activations", "images to start from", "model"} <= phase.device.keys()
    assert "activations" not in phase.host


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
    ("largest_phase", "way_out"), [("starting routers", "start_images"), ("adapting", "mixed_tasks")]
)
def test_warnings_say_what_makes_the_largest_phase_smaller(largest_phase, way_out):
    phases = [Phase(name, {"x": 2 if name == largest_phase else 1}, {}) for name in ("starting routers", "adapting")]
    (warning,) = plan._warnings(Plan("method", "cpu", phases=phases, available={"host": 1}))
    assert f"`method.{way_out}" in warning


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


def test_asking_takes_as_long_as_there_are_images_that_are_seen():
    load = start_load(FusionMoEAlgorithm(rank_k=4), 0)
    loads = {n: dataclasses.replace(load, training=Training(16, tasks=4, batches=4, asked=n)) for n in (64, 128, 10**6)}
    seconds = [times(load, SPEED, steps=1, workers=0)["asking experts"] for load in loads.values()]
    assert seconds[0] < seconds[1] == seconds[2]  # of 100 images a task


# Steps


@pytest.mark.parametrize("mixed", [True, False])
def test_a_step_takes_the_memory_that_was_planned(mixed):
    config, tasks, batch = tower_config(hidden_size=96, intermediate_size=384), 4, 16
    method = FusionMoEAlgorithm(rank_k=8, mixed_tasks=mixed)
    model = random_model(method, config, tasks)
    batches = [torch.randn(batch, 3, 32, 32) for _ in range(tasks)]
    own = {"tasks": tasks, "together": tasks} if mixed else {}
    training = Training(batch, batches=tasks, batch_routing=False, **own)

    def step() -> None:
        read = [pixels.clone() for pixels in batches]
        for pixels in [torch.cat(read)] if mixed else read:
            model(pixel_values=pixels).pooler_output.square().sum().backward()

    step()  # afterwards gradients are there
    tower, size = vision_geometry(config), model_size(method, config, tasks)
    expected = training.tasks * kept_for_backward(tower, size, training) + at_hand(tower, training)
    assert largest(step) == pytest.approx(expected, rel=0.15)
