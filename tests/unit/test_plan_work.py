"""What a plan says of the memory and time of single phases, against what is really allocated, and term by term."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from plans import largest, random_model, start_load, tower_config

from fusion_merge import EWEMoEAlgorithm, FusionMoEAlgorithm, WEMoEAlgorithm
from fusion_merge.adaptation.checkpoint import add_coefficients, router_state, save_trained
from fusion_merge.adaptation.starts import CHUNK, ridge_solution, ridge_start
from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.models.clip import empty_tower, pooled_output
from fusion_merge.models.measuring import measure
from fusion_merge.planning.disk import router_checkpoint
from fusion_merge.planning.duration import times
from fusion_merge.planning.geometry import FLOAT
from fusion_merge.planning.machine import Speed
from fusion_merge.planning.memory import Phase, memory_phases
from fusion_merge.planning.needs import Images, Load, Training
from fusion_merge.planning.working import building, reading, regression, starting

SPEED = Speed(1e10, 1e10, 1e-3)
BEFORE = {"interpreter and libraries", "mapped files", "model", "images in memory"}
FREED = "freed, but kept by the allocator"
FUSION = FusionMoEAlgorithm(rank_k=4)


def phase(load: Load, name: str) -> Phase:
    return next(each for each in memory_phases(load) if each.name == name)


def works_with(load: Load, name: str) -> int:
    """All that a phase takes beside what is there before."""
    return sum(size for part, size in phase(load, name).host.items() if part not in BEFORE)


def seconds(load: Load, name: str, speed: Speed = SPEED) -> float:
    return times(load, speed, steps=1, workers=0)[name]


def changed(load: Load, **sizes: Any) -> Load:
    """The load with a model of other sizes."""
    return dataclasses.replace(load, model=dataclasses.replace(load.model, **sizes))


def too_many(load: Load) -> Load:
    """The load with images that are too large to be kept in memory."""
    adapted = {name: dataclasses.replace(images, bytes=10**12) for name, images in load.adapted.items()}
    return dataclasses.replace(load, adapted=adapted)


# The memory of routers that start from images


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu"}, {"image_size": 8, "intermediate_size": 96}])
@pytest.mark.parametrize("each", [CHUNK // 4, CHUNK])
@pytest.mark.parametrize(
    "method",
    [
        FUSION,
        FusionMoEAlgorithm(rank_k=4, router_hidden_layers=2),
        WEMoEAlgorithm(router_start="ridge"),
        WEMoEAlgorithm(router_start="ridge", targets="attention"),
    ],
    ids=["linear", "hidden", "dense", "attention"],
)
def test_the_start_of_routers_takes_the_memory_that_was_planned(method, each, changes):
    """Blocks work with most, or with a small tower and linear routers the regression does."""
    load = start_load(method, each, **changes)
    model = random_model(method, tower_config(**({"hidden_size": 96, "intermediate_size": 384} | changes)), 4)
    side = load.tower.side
    images = {str(n): torch.randn(each, 3, side, side) for n in range(4)}
    read = sum(pixels.nbytes for pixels in images.values())  # which is there already
    assert largest(lambda: ridge_start(model, images)) == pytest.approx(
        works_with(load, "starting routers") - read, rel=0.15 if load.tower.tokens == 2 else 0.05
    )


@pytest.mark.parametrize("images", [8, 100])
def test_a_regression_takes_the_memory_that_was_planned(images):
    """Of few images the covariance is more than their features, and of many less."""
    load = start_load(FUSION, images)
    features, targets = torch.randn(4 * images, 96), torch.eye(4, dtype=torch.float64).repeat(images, 1)
    weights = torch.full((4 * images,), 1 / (4 * images), dtype=torch.float64)
    taken = largest(lambda: ridge_solution(features.double(), targets, weights, 1e-3))
    assert taken == pytest.approx(regression(load), rel=0.15)


@pytest.mark.parametrize("patch", [8, 32])
def test_on_a_gpu_images_are_there_twice_before_the_pass_and_the_regression_is_on_the_host(patch):
    """With a few tokens of large patches images are more than what the pass works with."""
    load = dataclasses.replace(start_load(FUSION, 8, patch_size=patch, intermediate_size=96), gpu=True)
    found = phase(load, "starting routers")
    pixels, passing = FLOAT * 32 * load.tower.inputs, max(starting(load), reading(load))
    assert (pixels > passing) is (patch == 32)
    assert found.host["images to start from"] == found.device["images to start from"] == pixels
    assert found.device["activations"] == max(pixels, passing)
    assert found.host["regression"] == regression(load)
    assert not {"activations", "model"} & found.host.keys()
    assert found.device.keys() == {"CUDA", "model", "images to start from", "activations"}


def test_more_images_to_start_from_take_more_memory_and_time_but_not_as_blocks_do():
    few, many = start_load(FUSION, 8), start_load(FUSION, 16)
    token = FLOAT * few.tower.tokens * few.tower.width
    assert starting(many) - starting(few) == 5 * token * (many.started_from - few.started_from)
    short, long = (seconds(load, "starting routers", Speed(1e8, 1e8, 0.0)) for load in (few, many))
    assert 1.5 * short < long < 2.5 * short
    assert many.started_from == 64
    assert start_load(FUSION, 1000).started_from == 400  # there are no more


# The memory of other phases


def test_an_expert_that_is_asked_takes_the_memory_that_was_planned():
    load = dataclasses.replace(start_load(FUSION, 0), training=Training(16, asked=10**6))
    tower = empty_tower(tower_config(hidden_size=96, intermediate_size=384))

    @torch.no_grad()
    def ask() -> None:
        pooled_output(tower(pixel_values=torch.randn(64, 3, 32, 32)))

    there = sum(p.nbytes for p in tower.parameters())
    assert largest(ask) == pytest.approx(works_with(load, "asking experts") - there, rel=0.05)


@pytest.mark.parametrize("method", [FUSION, WEMoEAlgorithm()], ids=lambda method: method.method_name)
def test_measuring_takes_the_memory_that_was_planned(method):
    load = changed(start_load(method, 0), input_bytes=FLOAT * 4 * 3 * 64 * 97)
    model = random_model(method, tower_config(hidden_size=96, intermediate_size=384), 4)

    def run() -> None:
        measure(model, "0", [torch.randn(64, 3, 32, 32)])

    run()  # afterwards what routers read is there
    assert largest(run) == pytest.approx(works_with(load, "measuring"), rel=0.05)


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
    planned = phase(dataclasses.replace(start_load(method, 0), training=training), "adapting")
    assert largest(step) == pytest.approx(planned.host["activations"], rel=0.15)


@pytest.mark.parametrize(("batch", "together", "gaps"), [(400, 1, True), (400, 4, False), (2000, 1, False)])
def test_blocks_of_a_step_leave_gaps_where_they_are_small_of_all_images_in_a_batch(batch, together, gaps):
    training = Training(batch, tasks=together, together=together, batches=4, batch_routing=False)
    host = phase(dataclasses.replace(start_load(FUSION, 0), training=training), "adapting").host
    assert ("gaps between them" in host) is gaps


def test_what_the_largest_phase_freed_stays_in_the_process_where_its_blocks_were_small():
    found = {}
    for label, images in (("none", 0), ("small", 100), ("large", 2000)):
        load = dataclasses.replace(start_load(FUSION, images), saves=True)
        adapted = {name: Images(2000, FLOAT * 3 * 32 * 32, 0) for name in load.adapted}
        found[label] = phase(dataclasses.replace(load, adapted=adapted), "saving").host[FREED]
        if label == "small":
            assert found[label] == pytest.approx(0.95 * works_with(load, "starting routers"), rel=1e-6)
    assert found["none"] == found["large"] < found["small"]


def test_gradients_are_not_among_what_measuring_freed():
    base = dataclasses.replace(start_load(FUSION, 0), training=Training(1, state=2, batch_routing=False), saves=True)
    without, with_them = (phase(changed(base, router_bytes=n), "saving").host for n in (0, 10**5))
    assert with_them["gradients"] == 10**5
    assert without[FREED] - with_them[FREED] == pytest.approx(0.75 * 10**5, abs=2)  # what saving takes of it


def test_a_checkpoint_of_routers_takes_what_was_planned_with_what_they_read(tmp_path):
    method, config = FusionMoEAlgorithm(rank_k=4), tower_config(hidden_size=96, intermediate_size=384)
    model = random_model(method, config, 4)
    model.task_inputs = torch.randn(4, 3, 64, 97)
    file = tmp_path / "r.ckpt"
    save_trained(file, router_state(model), {})
    add_coefficients(file, model)
    load = changed(start_load(method, 0), input_bytes=model.task_inputs.nbytes)
    assert model.task_inputs.nbytes > 250_000
    assert 0 <= router_checkpoint(load) - file.stat().st_size < 100_000


# The time of each term


@pytest.mark.parametrize("trained", [True, False])
def test_images_to_start_from_are_decoded_and_where_nothing_follows_all_that_are_kept(trained):
    load = dataclasses.replace(start_load(FUSION, 8), training=Training(16, batches=4) if trained else None)
    for each, decoded in ((too_many(load), 4 * 8), (load, 0 if trained else 4 * 100)):
        fast, slow = (seconds(each, "starting routers", Speed(1e10, 1e10, n)) for n in (0.0, 0.5))
        assert slow - fast == pytest.approx(0.5 * decoded)


def test_a_regression_takes_time_for_each_router_by_the_width_of_what_it_reads():
    load = changed(start_load(FUSION, 8), coefficients=0)
    plain = seconds(changed(load, router_widths=()), "starting routers", Speed(1e10, 1e10, 0.0))

    def solving(layers: int, width: int) -> float:
        other = changed(load, router_widths=(0,) * layers, router_inputs=width + 1)
        return seconds(other, "starting routers", Speed(1e10, 1e10, 0.0)) - plain

    assert solving(3, 96) > 0
    assert solving(6, 96) == pytest.approx(2 * solving(3, 96))
    assert 4 * solving(3, 96) < solving(3, 192) < 8 * solving(3, 96)
    assert solving(3, 10**5) == pytest.approx(2 * 3 * 10**15 / 3 / 1e10, rel=0.01)


def test_experts_that_are_asked_are_read_and_see_images_that_are_decoded_where_they_are_not_kept():
    load = dataclasses.replace(start_load(FUSION, 0), training=Training(16, asked=64))
    larger = dataclasses.replace(load.tower, numbers=load.tower.numbers + 175 * 10**6)  # 0.7 GB more, a second each
    more = dataclasses.replace(load, tower=larger)
    assert seconds(more, "asking experts") - seconds(load, "asking experts") == pytest.approx(4)
    for each, decoded in ((too_many(load), 4 * 64), (load, 0)):
        fast, slow = (seconds(each, "asking experts", Speed(1e10, 1e10, n)) for n in (0.0, 0.5))
        assert slow - fast == pytest.approx(0.5 * decoded)


def test_asking_takes_as_long_as_there_are_images_that_are_seen():
    load = start_load(FUSION, 0)
    loads = {n: dataclasses.replace(load, training=Training(16, tasks=4, batches=4, asked=n)) for n in (64, 128, 10**6)}
    found = [seconds(load, "asking experts") for load in loads.values()]
    assert found[0] < found[1] == found[2]  # of 100 images a task


def expert_seconds(method: MoEMethod, name: str) -> float:
    """What experts add to a phase."""
    load = start_load(method, 8)
    scored = {task: dataclasses.replace(images, used=images.count) for task, images in load.adapted.items()}
    training = Training(16, batches=4, batch_routing=False)
    more = {"scored": scored, "adapted": scored, "evaluation_batch": 32, "training": training}
    load = changed(dataclasses.replace(load, **more), router_bytes=0, router_widths=(0,) * 3)
    return seconds(load, name) - seconds(changed(load, mlps=0, attentions=0, experts=0), name)


@pytest.mark.parametrize("name", ["starting routers", "adapting", "measuring", "evaluating"])
@pytest.mark.parametrize(
    "method",
    [FUSION, WEMoEAlgorithm(router_start="ridge"), EWEMoEAlgorithm(router_start="ridge", shared_gate=False)],
    ids=lambda method: method.method_name,
)
def test_experts_take_time_where_they_are(method, name):
    """In the layers that are routed, in MLPs and in the projections of attention."""
    mlp, attention, both, one = (
        expert_seconds(dataclasses.replace(method, **options), name)
        for options in (
            {"targets": "mlp"},
            {"targets": "attention"},
            {"targets": "all"},
            {"targets": "mlp", "layers": [1]},
        )
    )
    assert mlp > 0
    assert both == pytest.approx(mlp + attention)
    assert one == pytest.approx(mlp / 3)
    if method is FUSION:  # U and V have as many numbers as a layer has inputs and outputs
        assert attention == pytest.approx(mlp * 4 * (96 + 96) / (2 * (96 + 384)))
    else:
        assert attention == pytest.approx(mlp * 4 * 96**2 / (2 * 96 * 384), rel=0.05)  # biases are read too


@pytest.mark.parametrize("method", [FUSION, EWEMoEAlgorithm(shared_gate=False)], ids=lambda method: method.method_name)
def test_building_takes_time_for_the_experts_that_are_made(method):
    def making(**options: Any) -> float:
        load = start_load(dataclasses.replace(method, **options), 0)
        return seconds(load, "building") - seconds(changed(load, kind="dense"), "building")  # which only reads

    mlp, attention = making(targets="mlp"), making(targets="attention")
    assert mlp > 0
    assert making(targets="all") == pytest.approx(mlp + attention)
    assert making(targets="mlp", layers=[1]) == pytest.approx(mlp / 3)
    products = (4 * 96**3) / (2 * 96**2 * 384) if method is FUSION else (4 * 96**2) / (2 * 96 * 384)
    assert attention == pytest.approx(mlp * products)


@pytest.mark.parametrize(
    "method", [FUSION, WEMoEAlgorithm(), EWEMoEAlgorithm(shared_gate=False)], ids=lambda method: method.method_name
)
def test_building_holds_one_linear_layer_at_a_time(method):
    def held(**options: Any) -> int:
        return building(start_load(dataclasses.replace(method, **options), 0))

    assert held(targets="mlp", layers=[1]) == pytest.approx(held(targets="mlp"), rel=0.01)
    assert held(targets="all") == pytest.approx(held(targets="mlp"), rel=0.01)  # of the largest
    assert held(targets="attention") == pytest.approx(held(targets="mlp") / 4, rel=0.02)


def test_layers_before_the_first_routed_one_take_no_time_backwards():
    training = Training(16, batches=4, batch_routing=False)
    load = changed(dataclasses.replace(start_load(FUSION, 0), training=training), router_bytes=0)
    plain = changed(load, mlps=0, attentions=0, experts=0)
    found = [seconds(changed(plain, first=first), "adapting", Speed(1e10, 1e10, 0.0)) for first in range(4)]
    steps = [before - after for before, after in itertools.pairwise(found)]
    assert steps == pytest.approx([steps[0]] * 3)
    assert found[0] == pytest.approx(2.1 * found[3])  # a backward pass takes 1.1 times as long as a forward pass
    assert start_load(dataclasses.replace(FUSION, layers=[1, 2]), 0).model.first == 1


@pytest.mark.parametrize(("layers", "count"), [("all", 3), ([0, 2], 2), ([1], 1)])
def test_saving_copies_the_weights_of_routed_mlps(layers, count):
    load = start_load(WEMoEAlgorithm(layers=layers), 0)
    none = phase(dataclasses.replace(changed(load, mlps=0), saves=True), "saving").host_bytes
    assert phase(dataclasses.replace(load, saves=True), "saving").host_bytes - none == count * FLOAT * load.tower.matrix
