"""Labels from experts: those of the very images that are adapted on, asked for once."""

from __future__ import annotations

import gc
import weakref
from itertools import chain, islice

import pytest
import torch
from helpers import TASKS

from fusion_merge import FusionMoEAlgorithm, WEMoEAlgorithm
from fusion_merge.adaptation.experts import ExpertLogits, _batches
from fusion_merge.adaptation.runtime import make_fabric
from fusion_merge.adaptation.streams import task_streams
from fusion_merge.errors import ConfigError
from fusion_merge.models.clip import pooled_output
from fusion_merge.pools.images import OnBadImage

OPTIONS = {"batch_size": 4, "seed": 0, "num_workers": 0}
SMALL = {"rank_k": 4, "max_steps": 4, "batch_size": 4, "num_workers": 0, "start_images": 6}


@pytest.fixture
def fabric():
    return make_fabric(accelerator="cpu")


def pools_of(modelpool):
    taskpool = modelpool.task_pool()
    return dict.fromkeys(TASKS, taskpool)


@pytest.mark.parametrize("start", [0, 2])
def test_each_batch_gets_the_logits_of_its_own_images(modelpool, fabric, start):
    pools = pools_of(modelpool)
    streams = task_streams(
        pools, fabric, **OPTIONS, start=start, max_steps=8, load_expert=modelpool.load_model
    )  # 24 images: two epochs of 12
    for name, stream in streams.items():
        expert = modelpool.load_model(name).eval()
        for pixels, positions in islice(stream.batches, 8 - start):
            with torch.no_grad():
                expected = stream.head(pooled_output(expert(pixel_values=pixels)))
            torch.testing.assert_close(stream.expert(positions), expected, atol=1e-4, rtol=1e-4)


def test_an_expert_looks_once_and_is_let_go(modelpool, fabric):
    loaded = []

    def load(name):
        model = modelpool.load_model(name)
        loaded.append((name, weakref.ref(model)))
        return model

    streams = task_streams(pools_of(modelpool), fabric, **OPTIONS, max_steps=4, load_expert=load)
    assert loaded == []
    for stream in streams.values():
        for _, positions in islice(stream.batches, 4):
            stream.expert(positions)
    gc.collect()
    assert [name for name, _ in loaded] == list(TASKS)
    assert all(model() is None for _, model in loaded)


def test_batches_of_an_expert_depend_on_the_order_of_images_alone():
    order = [5, 1, 1, 7, *range(200)]

    def batches(first: int, last: int) -> list[list[int]]:
        return _batches(iter([*order, *order]), range(first, last), 200)

    whole = batches(0, 204)
    assert [len(batch) for batch in whole] == [64, 64, 64, 8]
    assert whole[0][:5] == [5, 1, 7, 0, 2]
    assert sorted(chain.from_iterable(whole)) == list(range(200))
    assert batches(0, 3) == whole[:1]  # what is to come does not change them
    assert batches(100, 140) == whole[1:3]  # nor where it was begun
    assert batches(100, 101) == whole[1:2]
    assert batches(7, 7) == []


def test_an_image_that_was_not_announced_is_an_error(modelpool, fabric):
    pool = modelpool.task_pool()
    images, head = pool.images("cats"), pool.head("cats")
    expert = ExpertLogits(lambda: modelpool.load_model("cats"), head, images, iter(()), range(0), fabric=fabric)
    with pytest.raises(KeyError):
        expert(torch.tensor([3]))


def test_the_label_of_an_image_that_takes_a_bad_one_s_place_is_its_own(modelpool, fabric):
    pools = pools_of(modelpool)
    images = pools["cats"].images("cats")
    images.on_bad_image = OnBadImage.SKIP
    images.bad[3] = "made bad by the test"
    streams = task_streams(pools, fabric, **OPTIONS, max_steps=3, load_expert=modelpool.load_model)
    stream, expert = streams["cats"], modelpool.load_model("cats").eval()
    seen = []
    for pixels, positions in islice(stream.batches, 3):
        seen += positions.tolist()
        with torch.no_grad():
            expected = stream.head(pooled_output(expert(pixel_values=pixels)))
        torch.testing.assert_close(stream.expert(positions), expected, atol=1e-4, rtol=1e-4)
    assert 3 in seen


def test_adaptation_brings_the_model_nearer_to_its_experts(modelpool):
    method = FusionMoEAlgorithm(**SMALL | {"max_steps": 30, "lr": 0.02, "batch_size": 12})
    method.run(modelpool)
    assert method.record.measure == "loss"
    first, last = (sum(values[i] for values in method.record.losses.values()) for i in (0, -1))
    assert last < first


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "entropy"},
        {"mixed_tasks": False, "guard": "watch"},
        {"batch_size": 1, "start_images": 2},  # after which not all images are seen again
    ],
)
def test_a_run_that_was_broken_off_ends_in_the_same_bits(modelpool, tmp_path, monkeypatch, options):
    options = SMALL | {"max_steps": 9, "lr": 0.02, "cache_dir": str(tmp_path), "save_every": 1} | options
    whole = FusionMoEAlgorithm(**options | {"cache_dir": None}).run(modelpool)
    broken = FusionMoEAlgorithm(**options)
    with monkeypatch.context() as patch:
        patch.setattr("fusion_merge.adaptation.loop._tell", _killed_after(6))
        with pytest.raises(KeyboardInterrupt):
            broken.run(modelpool)
    again = FusionMoEAlgorithm(**options, resume=True)
    resumed = again.run(modelpool)
    assert again.record.resumed_at == 6
    ours, theirs = (dict(model.named_parameters()) for model in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _killed_after(steps):
    def tell(_bar, _measure, _value, done, *_rest):
        if done > steps:  # the state of this step is not saved yet
            raise KeyboardInterrupt

    return tell


def test_another_end_of_a_falling_learning_rate_is_another_course(modelpool, tmp_path):
    options = SMALL | {"cache_dir": str(tmp_path), "save_every": 1}
    FusionMoEAlgorithm(**options).run(modelpool)
    further = FusionMoEAlgorithm(**options | {"max_steps": 6}, resume=True)
    further.run(modelpool)
    assert further.record.resumed_at == 0


@pytest.mark.parametrize("mixed", [True, False])
def test_mixed_batches_give_the_gradient_of_separate_ones(modelpool, mixed):
    options = SMALL | {"max_steps": 1, "guard": "watch", "optimizer": "sgd", "lr": 1.0, "warmup_steps": 0}
    start = FusionMoEAlgorithm(**options | {"max_steps": 0}).run(modelpool)
    moved = FusionMoEAlgorithm(**options, mixed_tasks=mixed).run(modelpool)
    reference = FusionMoEAlgorithm(**options, mixed_tasks=False, use_grad_accumulate=False).run(modelpool)
    steps = [
        {n: p - dict(start.named_parameters())[n] for n, p in model.named_parameters() if ".router." in n}
        for model in (moved, reference)
    ]
    assert max(step.abs().max() for step in steps[0].values()) > 1e-4
    for name, step in steps[0].items():
        torch.testing.assert_close(step, steps[1][name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("objective", ["infomax", "tsallis", "entropy+0.5*infomax", "expert_labels+0.1*tsallis"])
def test_published_methods_take_other_objectives(modelpool, objective):
    method = WEMoEAlgorithm(objective=objective, max_steps=2, batch_size=4, num_workers=0)
    method.run(modelpool)
    assert method.record.steps == 2
    assert method.record.measure == "loss"


def test_patience_without_a_guard_that_acts_is_refused():
    with pytest.raises(ConfigError, match="`patience`=5 is that of a guard that acts; choose `guard`=rollback"):
        WEMoEAlgorithm(patience=5)


def test_infomax_of_single_images_is_refused_where_there_is_one_process():
    WEMoEAlgorithm(objective="entropy+infomax", batch_size=1, devices=2)
    with pytest.raises(ConfigError, match="`batch_size`=1 makes infomax zero in one process"):
        WEMoEAlgorithm(objective="entropy+infomax", batch_size=1)


@pytest.mark.parametrize("options", [{"selection": "top_k"}, {"select_k": 3}, {"selection": "top_p", "select_k": 3}])
def test_a_number_to_keep_goes_with_the_selections_that_keep_so_many(options):
    with pytest.raises(ConfigError, match=r"`selection`=.* and `select_k`=.* do not go together"):
        FusionMoEAlgorithm(**options)


def test_recurrent_routers_do_not_start_by_ridge():
    with pytest.raises(ConfigError, match="`router_state_width`=8 makes recurrent routers"):
        FusionMoEAlgorithm(router_state_width=8)


@pytest.mark.parametrize(
    "options",
    [
        {"selection": "soft_top_k", "select_k": 4},
        {"selection": "top_k", "select_k": 2},
        {"selection": "top_p"},
        {"selection": "tsallis_top_p"},
        {"coefficient_bounds": [0.0, 1.0]},
        {"router_state_width": 8, "router_start": "constant"},
        {"router_hidden_layers": 2},
        {"router_start": "projection"},
        {"layers": "critical:1", "targets": "attention"},
    ],
)
def test_what_selections_and_routers_make_is_saved_and_read_again(modelpool, tmp_path, options):
    model = FusionMoEAlgorithm(**SMALL | options).run(modelpool)
    pixels = torch.randn(3, 3, 16, 16)
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    assert torch.equal(again(pixels).pooler_output, model(pixels).pooler_output)
