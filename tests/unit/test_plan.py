"""The plan of a run: what it says against models that are really built, and every problem at once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import TASKS
from plans import RANK, SMALL, planned, random_model, tower_config
from runs import files_in, own_pool, random_tower, run_cli
from transformers import CLIPVisionConfig

from fusion_merge import (
    EWEMoEAlgorithm,
    MergedCLIPVisionModel,
    RankOneMoEAlgorithm,
    SimpleEnsembleAlgorithm,
    SmileAlgorithm,
    WEMoEAlgorithm,
)
from fusion_merge.merging.regression import Regression, input_grams
from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.models.clip import pooled_output, save_tower, vision_backbone
from fusion_merge.models.sources import LazyState
from fusion_merge.models.tensor_names import linear_weights
from fusion_merge.planning import machine, plan
from fusion_merge.planning.duration import times
from fusion_merge.planning.geometry import FLOAT, ModelSize, model_size, plain_size, vision_geometry
from fusion_merge.planning.machine import Speed, available_memory, free_disk, resident_now
from fusion_merge.planning.memory import memory_phases
from fusion_merge.planning.needs import Images, Load, Static, Training
from fusion_merge.planning.text import duration, size
from fusion_merge.planning.working import grams, kept_for_backward
from fusion_merge.pools.datasets import ImageTask
from fusion_merge.pools.task_pool import model_info


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(machine, "_SECONDS", 0.01)


@pytest.fixture
def nothing_is_read(monkeypatch):
    def fail(*_: Any) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(LazyState, "__getitem__", fail)
    monkeypatch.setattr(LazyState, "first_row", fail)
    monkeypatch.setattr(ImageTask, "item", fail)
    monkeypatch.setattr("datasets.features.image.Image.decode_example", fail)


# What is planned


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        (RANK, RankOneMoEAlgorithm(rank_k=4)),
        (["method=wemoe"], WEMoEAlgorithm()),
        (["method=wemoe", "method.expert_dtype=bfloat16"], WEMoEAlgorithm(expert_dtype="bfloat16")),
        (["method=e_wemoe"], EWEMoEAlgorithm()),
    ],
    ids=["rankone", "wemoe", "half", "e_wemoe"],
)
@pytest.mark.usefixtures("nothing_is_read")
def test_sizes_are_those_of_the_model_that_is_built(pool_dir, modelpool, tmp_path, arguments, method, monkeypatch):
    done, values = planned(pool_dir, tmp_path, *arguments, *SMALL)
    monkeypatch.undo()
    built = method.build(modelpool)
    info, model = model_info(built), values["model"]
    slack = 4 if "e_wemoe" in arguments[0] else 0  # a zero in the first place of each of four banks may be stored
    assert model["trainable"] == info["trainable_params"]
    assert 0 <= info["all_params"] - model["parameters"] <= slack
    held = model["head_bytes"] + model["input_bytes"]
    assert abs(sum(t.nbytes for t in built.own_state().values()) + held - model["bytes"]) <= 5 * slack
    assert f"{model['trainable']:,}" in done.out
    assert "no problems: the run can start" in done.out


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        (["method=smile", "method.k=4", "method.gate_k=2"], SmileAlgorithm(k=4, gate_k=2)),
        (["method=smile", "method.k=-1", "method.gate_k=-1"], SmileAlgorithm(k=-1, gate_k=-1)),
        (["method=simple_ensemble"], SimpleEnsembleAlgorithm()),
    ],
    ids=["smile", "full_rank", "ensemble"],
)
@pytest.mark.usefixtures("nothing_is_read")
def test_sizes_of_what_is_not_adapted_are_known_too(pool_dir, modelpool, tmp_path, arguments, method, monkeypatch):
    _, values = planned(pool_dir, tmp_path, *arguments)
    monkeypatch.undo()
    built = method.run(modelpool)
    assert values["can_start"]
    assert values["model"]["parameters"] == model_info(built)["all_params"]
    assert values["model"]["bytes"] - values["model"]["head_bytes"] == sum(p.nbytes for p in built.parameters())
    assert "adapting" not in values["phases"]


@pytest.mark.parametrize("kind", ["task", "layer"])
@pytest.mark.usefixtures("nothing_is_read")
def test_adamerging_is_planned_with_all_task_vectors_in_memory(pool_dir, tmp_path, kind):
    _, values = planned(pool_dir, tmp_path, f"method={kind}_wise_adamerging", *SMALL)
    assert values["can_start"]
    tower = FLOAT * values["model"]["parameters"]
    assert values["phases"]["adapting"]["host"]["task vectors"] == (len(TASKS) + 1) * tower
    assert values["tasks"]["cats"]["adapted"] == 12


def test_ranks_that_no_layer_has_are_among_the_problems(pool_dir, tmp_path):
    _, values = planned(pool_dir, tmp_path, "method=smile")
    assert any("`k`=32 is not in 1-16" in problem for problem in values["problems"])


@pytest.mark.usefixtures("nothing_is_read")
def test_tasks_are_listed_with_images_classes_and_models(pool_dir, tmp_path):
    done, values = planned(pool_dir, tmp_path, *RANK, *SMALL, "taskpool.tasks.dogs.split=test")
    cats = values["tasks"]["cats"]
    assert (cats["classes"], cats["scored"], cats["adapted"]) == (2, 12, 12)
    assert cats["model"] == str(pool_dir / "cats")
    assert str(pool_dir / "cats") in done.out
    assert any("`split`='test' of `dogs`" in problem for problem in values["problems"])
    assert "scored" not in values["tasks"]["dogs"]


def test_what_is_adapted_on_may_be_other_images(pool_dir, tmp_path):
    split = tmp_path / "data"
    for part in ("train", "test"):
        split.mkdir(exist_ok=True)
        (split / part).symlink_to(pool_dir / "images" / "cats")
    more = f"modelpool.test_datasets.cats={{data: {split}, split: train}}"
    _, values = planned(pool_dir, tmp_path / "run", *RANK, *SMALL, more)
    assert (values["tasks"]["cats"]["adapted_on"], values["tasks"]["cats"]["scored_on"]) == ("train", "all")


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(
    "method",
    ["task_arithmetic", "simple_average", "dummy", "ties_merging", "dare", "tsv_m", "iso_c", "iso_cts", "regmean"],
)
def test_static_methods_are_planned_without_training(pool_dir, tmp_path, method):
    _, values = planned(pool_dir, tmp_path, f"method={method}", "merged_model_save_path=merged")
    assert values["can_start"]
    assert "adapting" not in values["phases"]
    assert values["model"]["trainable"] == 0
    assert [w["what"] for w in values["writings"]] == ["reports and logs", "merged model"]


@pytest.mark.usefixtures("nothing_is_read")
def test_regression_is_planned_with_the_images_that_it_looks_at(pool_dir, tmp_path):
    _, values = planned(pool_dir, tmp_path, "method=regmean")
    assert (values["tasks"]["dogs"]["adapted"], values["tasks"]["dogs"]["scored"]) == (18, 18)
    assert "adapting" not in values["seconds"]
    gone = tmp_path / "gone"
    _, values = planned(pool_dir, tmp_path, "method=regmean", f"modelpool.test_datasets.dogs={gone}")
    assert sum(str(gone) in problem for problem in values["problems"]) == 1


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["method=ties_merging", "method.remove_keys=[nothing]"], "`remove_keys` has 'nothing'"),
        (["method=tsv_m", "method.alpha=[1,2,3]"], "`alpha` has 3 numbers for 2 models"),
        (["method=regmean", "method.exclude_param_names_regex=[nothing]"], "which no name of a tensor begins with"),
    ],
)
def test_options_that_do_not_fit_the_models_are_planned_as_problems(pool_dir, tmp_path, arguments, text):
    _, values = planned(pool_dir, tmp_path, *arguments)
    assert sum(text in problem for problem in values["problems"]) == 1


@pytest.mark.usefixtures("nothing_is_read")
def test_fine_tuning_is_planned(pool_dir, tmp_path):
    data = [f"modelpool.train_datasets.{t}={pool_dir / 'images' / t}" for t in TASKS]
    _, values = planned(pool_dir, tmp_path, "method=clip_finetune", "method.output=towers", *data)
    assert values["can_start"]
    assert values["tasks"]["dogs"]["adapted"] == 18
    towers = next(w for w in values["writings"] if w["what"] == "fine-tuned towers")
    assert towers["bytes"] == len(TASKS) * FLOAT * values["model"]["parameters"]


def test_plan_true_is_the_command_and_a_pool_that_scores_nothing_is_planned(pool_dir, tmp_path):
    arguments = [a for a in own_pool(pool_dir) if not a.startswith("taskpool")]
    data = [f"modelpool.test_datasets.{t}={pool_dir / 'images' / t}" for t in TASKS]
    done = run_cli(*arguments, *data, "taskpool=dummy", *RANK, *SMALL, "plan=true", cwd=tmp_path)
    assert done.code == 0, done.err
    assert files_in(tmp_path) == []
    assert "evaluating" not in done.out
    assert "adapting" in done.out


# What is wrong


def test_all_problems_are_listed_at_once(pool_dir, tmp_path):
    save_tower(random_tower(0, hidden_size=8), tmp_path / "narrow")
    missing, nowhere = tmp_path / "no-model", tmp_path / "no-images"
    more = [f"taskpool.tasks.dogs={{data: {nowhere}}}", "method.rank_k=64", "+modelpool.models.birds=x/y/z"]
    more += ["taskpool.tasks.cats.classnames=[animal]", "merged_model_save_path=plan.json/merged"]
    done, values = planned(pool_dir, tmp_path / "run", *RANK[:1], *SMALL, *more, cats=missing, dogs=tmp_path / "narrow")
    assert done.code == 1
    expected = (
        f"model `cats`: `{missing}` does not exist",
        "model `dogs`",
        "model `birds`: `x/y/z` does not exist",
        "`rank_k`=64",
        f"`{nowhere}` does not exist",
        "its dataset has 2 classes",
        "adaptation needs images of `birds`",
    )
    for text in expected:
        assert sum(text in problem for problem in values["problems"]) == 1, (text, values["problems"])
        assert text in " ".join(done.out.split())
    assert len(values["problems"]) == len(set(values["problems"]))
    assert all("\n" not in problem for problem in values["problems"])


def test_with_no_data_at_all_all_problems_are_listed(pool_dir, tmp_path):
    more = [f"taskpool.tasks.{task}={{data: /nowhere/{task}}}" for task in TASKS]
    _, values = planned(pool_dir, tmp_path, *RANK, *SMALL, *more)
    for task in TASKS:
        assert any(f"`/nowhere/{task}` does not exist" in problem for problem in values["problems"])


@pytest.mark.usefixtures("nothing_is_read")
def test_what_has_only_images_to_adapt_on_is_scored_on_them_too(pool_dir, tmp_path):
    arguments = [a for a in own_pool(pool_dir) if not a.startswith("taskpool")]
    data = [f"modelpool.test_datasets.{t}={pool_dir / 'images' / t}" for t in TASKS]
    done = run_cli("plan", *arguments, *data, "report_save_path=plan.json", *RANK, *SMALL, cwd=tmp_path)
    values = json.loads((tmp_path / "plan.json").read_text())
    assert (done.code, values["problems"]) == (0, [])
    assert values["tasks"]["cats"]["scored"] == 12
    assert {"evaluating", "baselines"} <= set(values["phases"])


@pytest.mark.usefixtures("nothing_is_read")
def test_a_protocol_is_planned(pool_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "measure_speed", lambda *_: Speed(1e9, 1e9, 1e-3))
    _, once = planned(pool_dir, tmp_path / "once", *RANK, *SMALL, "method.save_checkpoint=r.ckpt")
    more = ["protocol=robustness", "protocol.corruptions=[contrast,spatter]"]
    done, values = planned(pool_dir, tmp_path / "many", *RANK, *SMALL, "method.save_checkpoint=r.ckpt", *more)
    assert "adapted and scored 3 times" in done.out
    for phase, times_more in {"building": 1, "adapting": 3, "evaluating": 3, "baselines": 3}.items():
        assert values["seconds"][phase] == pytest.approx(times_more * once["seconds"][phase])
    routers = [
        next(w["bytes"] for w in found["writings"] if w["what"] == "router checkpoint") for found in (once, values)
    ]
    assert routers[1] == 3 * routers[0]


@pytest.mark.usefixtures("nothing_is_read")
def test_each_further_routing_is_scored_too(pool_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "measure_speed", lambda *_: Speed(1e9, 1e9, 1e-3))
    _, once = planned(pool_dir, tmp_path / "once", *RANK, *SMALL)
    _, both = planned(pool_dir, tmp_path / "both", *RANK, *SMALL, "evaluate_routings=[sample,batch]")
    assert both["seconds"]["evaluating"] > 1.8 * once["seconds"]["evaluating"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["method.lr=-1"], "`lr`=-1"),
        (["evaluate_routings=[sampel]"], "`evaluate_routings` has 'sampel'"),
        (["protocol=generalization"], "none is unseen"),
        (["protocol=robustness", "protocol.corruptions=[fog]"], "`protocol.corruptions` has 'fog'"),
        (["taskpool.batch_size=0"], "`batch_size`=0"),
        (["modelpool.platform=floppy"], "`platform`='floppy'"),
        (["output_dir=/dev/null/x"], "`output_dir`"),
        (["fabric.accelerator=tpu"], "`fabric`"),
        (["method.checkpoint=gone.ckpt"], "`gone.ckpt` does not exist"),
    ],
)
def test_one_problem_is_told_with_what_else_is_known(pool_dir, tmp_path, arguments, text):
    _, values = planned(pool_dir, tmp_path, *RANK, *SMALL, *arguments)
    assert any(text in problem for problem in values["problems"])


def test_without_the_pretrained_model_the_tasks_are_planned_still(pool_dir, tmp_path):
    done, values = planned(pool_dir, tmp_path, *RANK, *SMALL, _pretrained_=tmp_path / "gone")
    assert values["model"] is None
    assert values["tasks"]["cats"]["scored"] == 12
    assert "1 problem: the run cannot start" in done.out


def test_too_little_memory_and_disk_are_warned_of(pool_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda device: 10**6)
    monkeypatch.setattr("fusion_merge.planning.disk.free_disk", lambda path: 10)
    done, values = planned(pool_dir, tmp_path, *RANK, *SMALL)
    assert done.code == 0
    assert [w.partition(":")[0] for w in values["warnings"]] == ["memory", "disk"]
    assert "warning: memory: the run needs about" in done.out


def test_what_a_machine_does_not_tell_is_left_open(pool_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda device: None)
    monkeypatch.setattr("fusion_merge.planning.disk.free_disk", lambda path: None)
    done, values = planned(pool_dir, tmp_path, *RANK, *SMALL)
    assert (done.code, values["warnings"], values["available"]) == (0, [], {"host": None})


# The machine


def test_the_machine_is_asked(monkeypatch, tmp_path):
    assert resident_now() > 10**7
    assert (available_memory(torch.device("cpu")) or 0) > 0
    assert (free_disk(tmp_path / "not" / "there") or 0) > 0
    for name in ("_STATUS", "_MEMINFO"):
        monkeypatch.setattr(machine, name, tmp_path / "gone")
    monkeypatch.setattr(machine, "_CGROUPS", ())
    monkeypatch.setattr("os.sysconf_names", {})
    assert resident_now() > 10**7
    assert available_memory(torch.device("cpu")) is None


# Memory and time


def really_kept(model: MergedCLIPVisionModel, images: int) -> int:
    """The bytes that a forward pass keeps for the backward pass, each piece of memory once."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = pooled_output(model(pixel_values=torch.randn(images, 3, 32, 32)))
    assert output.requires_grad
    return sum(kept.values())


def cases() -> Iterator[Any]:
    for routing in (True, False):
        for depth in (1, 2):
            options = {"batch_reduce": routing, "router_hidden_layers": depth}
            yield WEMoEAlgorithm(**options)
            yield RankOneMoEAlgorithm(rank_k=4, **options)
            yield EWEMoEAlgorithm(**options)
    yield EWEMoEAlgorithm(position_encoding=True)
    for routing in (True, False):
        yield WEMoEAlgorithm(targets="all", batch_reduce=routing)
        yield RankOneMoEAlgorithm(targets="all", rank_k=4, batch_reduce=routing)
        for targets in ("mlp", "attention", "all"):
            for layers in ([1], [0, 2], [2]):
                yield RankOneMoEAlgorithm(targets=targets, layers=layers, rank_k=4, batch_reduce=routing)
                yield WEMoEAlgorithm(targets=targets, layers=layers, batch_reduce=routing)


@pytest.mark.parametrize(
    "method",
    list(cases()),
    ids=lambda m: f"{m.method_name}-{m.batch_reduce}-{m.router_hidden_layers}-{m.targets}-{m.layers}",
)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_activations_are_those_that_are_kept(method, activation):
    config = tower_config(hidden_act=activation)
    expected = kept_for_backward(
        vision_geometry(config), model_size(method, config, 4), Training(8, batch_routing=method.batch_reduce)
    )
    assert really_kept(random_model(method, config, 4), 8) == pytest.approx(expected, rel=0.06)


def load_of(method: MoEMethod, config: CLIPVisionConfig, tasks: int = 4, **changes: Any) -> Load:
    images = {str(n): Images(100, 3 * 32 * 32 * FLOAT, 100) for n in range(tasks)}
    training = Training(
        method.batch_size, 1 if method.use_grad_accumulate else tasks, tasks, batch_routing=method.batch_reduce
    )
    load = Load(vision_geometry(config), model_size(method, config, tasks), tasks, base=10**8, training=training)
    more = {"adapted": images, "scored": images, "evaluation_batch": 32, "baselines": ("zero_shot", "task_arithmetic")}
    return dataclasses.replace(load, **(more | changes))


def peak(load: Load) -> int:
    return max(phase.host_bytes for phase in memory_phases(load))


@pytest.mark.parametrize("method", [WEMoEAlgorithm(), EWEMoEAlgorithm(), RankOneMoEAlgorithm(rank_k=4)])
def test_more_of_anything_takes_more_memory(method):
    base = peak(load_of(method, tower_config()))
    assert peak(load_of(method, tower_config(num_hidden_layers=6))) > base
    assert peak(load_of(method, tower_config(), tasks=8)) > base
    assert peak(load_of(method, tower_config(intermediate_size=288))) > base
    assert peak(load_of(dataclasses.replace(method, batch_size=64), tower_config())) > base
    assert peak(load_of(method, tower_config(), evaluation_batch=512, scored={"a": Images(512, 12288, 512)})) > base
    both = [dataclasses.replace(method, use_grad_accumulate=flag) for flag in (True, False)]
    assert peak(load_of(both[0], tower_config())) < peak(load_of(both[1], tower_config()))


def static_load(config: CLIPVisionConfig, static: Static | None, tasks: int = 4) -> Load:
    images = {str(n): Images(100, 3 * 32 * 32 * FLOAT, 100) for n in range(tasks)}
    tower = vision_geometry(config)
    return Load(tower, plain_size(tower), tasks, base=10**8, static=static, adapted=images)


def test_gram_matrices_are_those_that_a_regression_keeps(modelpool):
    tower = vision_geometry(modelpool.config())
    load = Load(tower, plain_size(tower), 2, base=0, static=Static(images=4))
    layers = [name.removesuffix(".weight") for name in linear_weights(modelpool.config())]
    backbone = vision_backbone(modelpool.load_model("cats"))
    regression = Regression(0.9)
    found = input_grams(backbone, layers, [torch.zeros(2, 3, 16, 16)])
    regression.add(found, lambda layer: modelpool.state("cats")[f"{layer}.weight"])
    kept = [*{id(gram): gram for gram in found.values()}.values(), *regression._grams.values()]
    assert sum(t.nbytes for t in [*kept, *regression._products.values()]) == grams(load)


def test_more_work_of_a_static_method_takes_more_memory_and_time():
    config, speed = tower_config(), Speed(1e10, 1e10, 1e-3)
    plain, wide = Static(), tower_config(intermediate_size=288)
    building = {
        label: (memory_phases(load)[0].host_bytes, times(load, speed, steps=0, workers=0)["building"])
        for label, load in {
            "plain": static_load(config, plain),
            "wide": static_load(wide, plain),
            "tasks": static_load(config, plain, tasks=8),
            "read": static_load(config, Static(readings=3)),
            "decomposed": static_load(config, Static(decompositions=6)),
            "images": static_load(config, Static(images=64)),
        }.items()
    }
    for label in ("wide", "tasks", "images"):
        assert building[label][0] > building["plain"][0], label
    for label in ("wide", "tasks", "read", "decomposed", "images"):
        assert building[label][1] > building["plain"][1], label


def test_on_a_gpu_the_model_is_there_once_it_is_built():
    phases = {p.name: p for p in memory_phases(load_of(WEMoEAlgorithm(), tower_config(), gpu=True))}
    assert phases["building"].device == {}
    for name in ("adapting", "evaluating"):
        assert "model" in phases[name].device
        assert not {"model", "activations"} & phases[name].host.keys()


def test_images_are_in_memory_where_they_are_few():
    few, many = Images(10, 1000, 10), Images(10**6, 10**6, 10**6)
    assert (few.cached, many.cached) == (10_000, 0)


def test_time_grows_with_the_work_and_falls_with_speed():
    load, fast, slow = load_of(WEMoEAlgorithm(), tower_config()), Speed(1e11, 1e10, 1e-3), Speed(1e10, 1e9, 1e-2)
    short, long = (times(load, fast, steps=n, workers=2)["adapting"] for n in (10, 1000))
    assert 5 * short < long
    sums = [sum(times(load, speed, steps=100, workers=2).values()) for speed in (fast, slow)]
    assert sums[0] < sums[1]


@pytest.mark.parametrize(
    ("number", "text"), [(1, "1 B"), (1500, "1.50 kB"), (25e6, "25 MB"), (2.19e9, "2.19 GB"), (21.9e9, "21.9 GB")]
)
def test_sizes_in_words(number, text):
    assert size(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.1, "1 s"), (72, "72 s"), (600, "10 min"), (9000, "2.5 h")])
def test_times_in_words(seconds, text):
    assert duration(seconds) == text


def test_a_plain_tower_has_no_routers():
    assert ModelSize(1, 0, 0, 4).router_bytes == 0
