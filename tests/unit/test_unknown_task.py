"""Heads that belong to a model, and images whose task it has to find."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import same_state
from safetensors.torch import load_file

from fusion_merge import (
    EWEMoEAlgorithm,
    MergedCLIPVisionModel,
    RankOneMoEAlgorithm,
    SmileAlgorithm,
    WEMoEAlgorithm,
    set_routing,
)
from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.models import heads as models_heads
from fusion_merge.models.clip import pooled_output
from fusion_merge.models.heads import TaskHeads
from fusion_merge.models.merged_config import MergedCLIPVisionConfig
from fusion_merge.pools import heads as pools_heads

METHODS = {
    "dense": WEMoEAlgorithm(),
    "sparse": EWEMoEAlgorithm(tv_prune_ratio=0.5),
    "low_rank": RankOneMoEAlgorithm(rank_k=3, targets="all"),
}


def _pixels(task: int, count: int = 12) -> torch.Tensor:
    """Images whose task can be told: each task has its own picture, and noise over it."""
    picture = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(50 + task))
    return picture + 0.3 * torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(task))


@pytest.fixture(params=METHODS)
def model(request, modelpool) -> MergedCLIPVisionModel:
    model = METHODS[request.param].build(modelpool)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 2:
            parameter.data *= 20  # routers that tell samples apart
    set_routing(model, "sample")
    return model


def _with_heads(model, taskpool) -> MergedCLIPVisionModel:
    names = model.config.tasks
    model.set_heads({t: taskpool.head(t) for t in names}, {t: taskpool.task(t).classnames for t in names})
    return model


def _with_everything(model, taskpool) -> MergedCLIPVisionModel:
    for task, name in enumerate(model.config.tasks):
        model.measure(name, [_pixels(task)])
    return _with_heads(model, taskpool)


def test_the_head_is_one_class_wherever_it_is_imported_from():
    assert pools_heads.ZeroShotHead is models_heads.ZeroShotHead


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_heads_and_measurements_come_back_bit_for_bit(model, taskpool, tmp_path, dtype):
    model = _with_everything(model, taskpool).to(dtype)
    model.save_pretrained(tmp_path)
    again = MergedCLIPVisionModel.from_pretrained(tmp_path)
    assert same_state(again.own_state(), model.own_state())
    assert again.heads.classnames == {"cats": ["siamese", "tabby"], "dogs": ["beagle", "husky", "poodle"]}
    first, second = model.predict(_pixels(0)), again.predict(_pixels(0))
    assert torch.equal(first.scores, second.scores)
    assert all(torch.equal(a, b) for a, b in zip(first.probabilities, second.probabilities, strict=True))
    again.save_pretrained(tmp_path / "again")
    third = MergedCLIPVisionModel.from_pretrained(tmp_path / "again")
    assert third.config.to_dict() == again.config.to_dict()


def test_what_all_heads_share_is_stored_once_and_what_differs_is_not_lost(model, taskpool, tmp_path):
    _with_heads(model, taskpool).save_pretrained(tmp_path / "shared")
    stored = load_file(tmp_path / "shared" / "model.safetensors")
    assert sorted(n for n in stored if n.startswith("heads.")) == [
        *("heads.embeddings_0", "heads.embeddings_1", "heads.logit_scale_0", "heads.projection_0")
    ]
    heads = {t: taskpool.head(t) for t in model.config.tasks}
    other = models_heads.ZeroShotHead(2 * heads["dogs"].projection, heads["dogs"].logit_scale, heads["dogs"].embeddings)
    model.set_heads({**heads, "dogs": other}, {t: taskpool.task(t).classnames for t in heads})
    model.save_pretrained(tmp_path / "own")
    again = MergedCLIPVisionModel.from_pretrained(tmp_path / "own").heads
    assert torch.equal(again.head("dogs").projection, 2 * heads["dogs"].projection)
    assert torch.equal(again.head("cats").projection, heads["cats"].projection)


def test_the_order_of_heads_is_not_that_of_their_names(model, taskpool, tmp_path):
    names = ["dogs", "cats"]
    model.set_heads({t: taskpool.head(t) for t in names}, {t: taskpool.task(t).classnames for t in names})
    model.save_pretrained(tmp_path)
    again = MergedCLIPVisionModel.from_pretrained(tmp_path).heads
    assert again.tasks == names
    assert all(same_state(again.head(t).state_dict(), taskpool.head(t).state_dict()) for t in names)


def test_a_model_without_heads_and_measurements_is_stored_as_before(model, tmp_path):
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [n for n in stored if n.startswith(("heads", "task_inputs"))]
    table = json.loads((tmp_path / "config.json").read_text())
    older = {k: v for k, v in table.items() if k not in ("heads", "measured_inputs", "config_checksum")}
    config = MergedCLIPVisionConfig.from_dict(older)  # of a version that knew neither
    assert (config.heads, config.measured_inputs) == ([], None)
    assert MergedCLIPVisionModel.from_pretrained(tmp_path).heads is None


@pytest.mark.parametrize("task", ["cats", "dogs"])
def test_a_named_task_is_answered_by_its_head(model, taskpool, task):
    answer = _with_heads(model, taskpool).predict(_pixels(0), task)  # nothing was measured, nor need be
    with torch.no_grad():
        logits = taskpool.head(task)(pooled_output(model(_pixels(0))))
    assert torch.equal(answer.labels, logits.argmax(dim=1))
    torch.testing.assert_close(torch.stack(answer.probabilities), logits.softmax(dim=1))
    assert answer.names == [taskpool.task(task).classnames[label] for label in answer.labels]
    assert (answer.tasks, answer.scores) == ([task] * 12, None)


@pytest.mark.parametrize("head", ["found", "named"])
def test_an_answer_takes_one_forward_pass(model, taskpool, head):
    _with_everything(model, taskpool)
    calls = []
    handle = model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    model.predict(_pixels(0), None if head == "found" else "cats")
    handle.remove()
    assert calls == [1]


@pytest.mark.parametrize("by", ["agreement", "projection"])
def test_an_image_gets_the_head_that_identify_chooses_whatever_its_batch_mates(model, taskpool, by):
    _with_everything(model, taskpool)
    pixels = torch.cat([_pixels(0, 5), _pixels(1, 5)])
    scores = model.identify(pixels, by)
    assert scores.shape == (10, 2)
    answer = model.predict(pixels, by=by)
    assert answer.tasks == [model.config.tasks[i] for i in scores.argmax(dim=1)]
    for place, image in enumerate(pixels):
        alone = model.predict(image.unsqueeze(0), answer.tasks[place])
        assert alone.names == [answer.names[place]]
        torch.testing.assert_close(alone.probabilities[0], answer.probabilities[place])
        torch.testing.assert_close(model.identify(image.unsqueeze(0), by)[0], scores[place], atol=1e-3, rtol=1e-3)


def test_images_agree_with_their_own_task(model, taskpool):
    _with_everything(model, taskpool)
    for task in range(2):
        fresh = _pixels(task, 40)[12:]  # others than were measured
        assert (model.identify(fresh).argmax(dim=1) == task).float().mean() > 0.9


def test_means_alone_are_enough_to_agree_with(model, taskpool):
    _with_everything(model, taskpool)
    model.task_inputs = None
    for task in range(2):
        assert (model.identify(_pixels(task)).argmax(dim=1) == task).float().mean() > 0.9


def test_projection_finds_the_task_whose_experts_read_what_is_there(modelpool):
    model = RankOneMoEAlgorithm(rank_k=4).build(modelpool)
    set_routing(model, "sample")
    block = model.vision_model.encoder.layers[0].mlp
    second = model.vision_model.encoder.layers[1].mlp
    tokens = {}
    for task in range(2):
        handles = [
            b.register_forward_pre_hook(lambda _m, args, key=(task, n): tokens.__setitem__(key, args[0]))
            for n, b in enumerate((block, second))
        ]
        with torch.no_grad():
            model(_pixels(task))
        for handle in handles:
            handle.remove()
    for n, b in enumerate((block, second)):
        for task in range(2):  # each task's experts read the leading directions of its own tokens
            other = tokens[1 - task, n].flatten(0, 1)
            own = tokens[task, n].flatten(0, 1) - other.mean(dim=0)
            b.fc1.experts.right.data[4 * task : 4 * task + 4] = torch.linalg.svd(own).Vh[:4]
    hits = [(model.identify(_pixels(t), "projection").argmax(dim=1) == t).float().mean() for t in range(2)]
    assert min(hits) > 0.9


# What cannot be answered


def test_without_heads_a_prediction_says_how_to_get_them(model):
    with pytest.raises(ModelError, match="set_heads"):
        model.predict(_pixels(0))


def test_a_task_without_a_head_is_named(model, taskpool):
    model.set_heads({"cats": taskpool.head("cats")}, {"cats": ["a", "b"]})
    assert model.predict(_pixels(0), "cats").names[0] in ("a", "b")
    for task in (None, "dogs"):
        with pytest.raises(ModelError, match="no head of `dogs`"):
            model.predict(_pixels(0), task)


def test_what_is_not_measured_is_said(model):
    with pytest.raises(ModelError, match=r"measure\('cats', batches\).*projection"):
        model.identify(_pixels(0))


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 16, 16), torch.zeros(2, 3, 8, 8), "cats.png", [torch.zeros(3, 16, 16)]]
)
def test_what_is_no_batch_of_images_is_refused(model, taskpool, images):
    _with_everything(model, taskpool)
    for ask in (model.predict, model.identify):
        with pytest.raises(ModelError, match=r"images are .*, not a tensor \(B, 3, 16, 16\) of preprocessed images"):
            ask(images)


def test_an_empty_batch_is_refused(model, taskpool):
    _with_everything(model, taskpool)
    with pytest.raises(ModelError, match="no image in the batch"):
        model.predict(torch.zeros(0, 3, 16, 16))


def test_unknown_names_are_refused(model, taskpool):
    _with_everything(model, taskpool)
    with pytest.raises(ModelError, match="did you mean `cats`"):
        model.predict(_pixels(0), "cat")
    with pytest.raises(ConfigError, match="did you mean `agreement`"):
        model.identify(_pixels(0), "agreemint")
    with pytest.raises(ModelError, match="did you mean `dogs`"):
        model.set_heads({"dog": taskpool.head("dogs")}, {"dog": ["a"]})


def test_heads_and_names_have_to_fit(taskpool):
    with pytest.raises(ModelError, match="no class names of `cats`"):
        TaskHeads({"cats": taskpool.head("cats")}, {})
    with pytest.raises(ModelError, match="no head of `cats`"):
        TaskHeads({}, {"cats": ["a"]})
    with pytest.raises(ModelError, match="has 2 classes and there are 1 names"):
        TaskHeads({"cats": taskpool.head("cats")}, {"cats": ["a"]})
    with pytest.raises(ModelError, match="is a Linear"):
        TaskHeads({"cats": torch.nn.Linear(2, 2)}, {"cats": ["a"]})


def test_a_whole_batch_has_no_task(model, taskpool):
    _with_everything(model, taskpool)
    set_routing(model, "batch")
    with pytest.raises(ModelError, match="set_routing"):
        model.identify(_pixels(0))


def test_coefficients_that_ignore_the_image_tell_no_task(modelpool):
    model = WEMoEAlgorithm(router_hidden_layers=0).build(modelpool)
    set_routing(model, "sample")
    for task, name in enumerate(model.config.tasks):
        model.measure(name, [_pixels(task)])
    for pixels in (_pixels(0), _pixels(0, 1)):
        with pytest.raises(ModelError, match="tell no task"):
            model.identify(pixels)
    assert model.identify(_pixels(0), "projection").shape == (12, 2)


def test_experts_that_are_chosen_for_each_token_tell_no_task(modelpool):
    model = SmileAlgorithm(k=4, gate_k=2).run(modelpool)
    with pytest.raises(ModelError, match="for each token"):
        model.identify(_pixels(0))
