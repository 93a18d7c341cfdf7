"""Task pools: heads, scores, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TASKS
from PIL import Image
from runs import random_tower
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from fusion_merge import (
    CLIPVisionModelPool,
    CLIPVisionModelTaskPool,
    DummyTaskPool,
    EWEMoEAlgorithm,
    WEMoEAlgorithm,
)
from fusion_merge.errors import ConfigError, DataError, ModelError
from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.models.task_models import TaskModels
from fusion_merge.pools import heads
from fusion_merge.pools.task_pool import RESERVED, model_info


class Counting(nn.Module):
    """A tower that remembers the size of every batch it saw."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.batches: list[int] = []

    def forward(self, pixel_values: torch.Tensor) -> Any:
        self.batches.append(len(pixel_values))
        return self.tower(pixel_values=pixel_values)


def one_task(pool_dir: Path, spec: Any = None, **options: Any) -> CLIPVisionModelTaskPool:
    tasks = {"dogs": spec or str(pool_dir / "images" / "dogs")}
    return CLIPVisionModelTaskPool(tasks, clip_model=str(pool_dir / "pretrained"), **options)


def scores_by_hand(pool_dir: Path, task: str, templates: list[str]) -> tuple[float, float]:
    """Accuracy and mean cross-entropy of the pretrained model, with transformers' own model and processor."""
    clip = CLIPModel.from_pretrained(pool_dir / "pretrained").eval()
    processor = CLIPProcessor.from_pretrained(pool_dir / "pretrained", backend="pil")
    names = sorted(TASKS[task])  # as an image folder numbers them
    labelled = [
        (file, label) for label, name in enumerate(names) for file in (pool_dir / "images" / task / name).iterdir()
    ]
    similarities = []
    for template in templates:
        inputs = processor(
            text=[template.format(name) for name in names],
            images=[Image.open(file) for file, _ in labelled],
            return_tensors="pt",
            padding=True,
        )
        with torch.no_grad():
            output = clip(**inputs)
        similarities.append(output.text_embeds)
    embeddings = F.normalize(torch.stack(similarities).mean(dim=0), dim=-1)  # (C, P)
    logits = clip.logit_scale.exp() * output.image_embeds @ embeddings.T  # (B, C)
    labels = torch.tensor([label for _, label in labelled])
    return (logits.argmax(dim=-1) == labels).float().mean().item(), F.cross_entropy(logits, labels).item()


# Scores


@pytest.mark.parametrize("templates", [["a photo of a {}."], ["a photo of a {}.", "{}!", "one {} here"]])
@pytest.mark.parametrize("task", list(TASKS))
def test_scores_are_those_of_transformers(pool_dir, modelpool, task, templates):
    data = {"data": str(pool_dir / "images" / task), "templates": templates}
    pool = CLIPVisionModelTaskPool({task: data}, clip_model=str(pool_dir / "pretrained"))
    accuracy, loss = scores_by_hand(pool_dir, task, templates)
    assert pool.evaluate(modelpool.load_pretrained_model())[task] == {
        "accuracy": pytest.approx(accuracy),
        "loss": pytest.approx(loss, rel=1e-4),
    }


def test_scores_do_not_depend_on_the_batch_size(pool_dir, modelpool):
    tower = modelpool.load_model("dogs")
    whole, parts = (one_task(pool_dir, batch_size=size).evaluate(tower)["dogs"] for size in (128, 5))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_report_names_every_task_their_average_and_the_model(taskpool, modelpool):
    report = taskpool.evaluate(modelpool.load_pretrained_model())
    assert list(report) == ["model_info", "cats", "dogs", "average"]
    for key in ("accuracy", "loss"):
        assert report["average"][key] == pytest.approx((report["cats"][key] + report["dogs"][key]) / 2)


def test_one_model_a_task_has_no_model_info(taskpool, modelpool):
    assert list(taskpool.evaluate(modelpool.fine_tuned_models())) == ["cats", "dogs", "average"]


def test_one_model_a_task_is_scored_on_its_own_task(taskpool, modelpool):
    towers = modelpool.fine_tuned_models()
    report = taskpool.evaluate(towers)
    assert report["dogs"] == taskpool.evaluate(towers["dogs"])["dogs"]
    assert report["dogs"] != taskpool.evaluate(towers["cats"])["dogs"]


def test_chosen_tasks_alone_are_scored(taskpool, modelpool):
    report = taskpool.evaluate(modelpool.load_pretrained_model(), tasks=["dogs"])
    assert list(report) == ["model_info", "dogs", "average"]
    assert report["average"] == report["dogs"]


def test_unknown_task_is_refused_with_the_nearest(taskpool, modelpool):
    with pytest.raises(DataError, match="task `dog` is not in the task pool; did you mean `dogs`"):
        taskpool.evaluate(modelpool.load_pretrained_model(), tasks=["dog"])


def test_unknown_option_of_the_evaluation_is_refused(taskpool, modelpool):
    with pytest.raises(ConfigError, match="`task` is not an option"):
        taskpool.evaluate(modelpool.load_pretrained_model(), task=["dogs"])


def test_scoring_leaves_the_model_s_tensors_alone(taskpool, modelpool):
    tower = modelpool.load_pretrained_model()
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    taskpool.evaluate(tower)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())


# Options


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"dataloader_kwargs": {"batch_size": 7}}])
def test_batch_size_holds(pool_dir, modelpool, options):
    tower = Counting(modelpool.load_pretrained_model())
    one_task(pool_dir, **options).evaluate(tower)
    assert tower.batches == [7, 7, 4]


def test_fast_dev_run_scores_one_batch(pool_dir, modelpool):
    tower = Counting(modelpool.load_pretrained_model())
    one_task(pool_dir, batch_size=5, fast_dev_run=True).evaluate(tower)
    assert tower.batches == [5]


def test_options_under_fusion_bench_s_names_give_the_same_report(pool_dir, taskpool, modelpool):
    tasks = {task: str(pool_dir / "images" / task) for task in TASKS}
    other = CLIPVisionModelTaskPool(test_datasets=tasks, base_model=str(pool_dir / "pretrained"))
    tower = modelpool.load_pretrained_model()
    assert other.evaluate(tower) == taskpool.evaluate(tower)


def test_objects_give_the_same_report_as_paths(pool_dir, taskpool, modelpool):
    tasks = {task: str(pool_dir / "images" / task) for task in TASKS}
    clip = CLIPModel.from_pretrained(pool_dir / "pretrained").eval()
    processor = CLIPProcessor.from_pretrained(pool_dir / "pretrained", backend="pil")
    tower = modelpool.load_pretrained_model()
    other = CLIPVisionModelTaskPool(tasks, clip_model=clip, processor=processor)
    assert other.evaluate(tower) == taskpool.evaluate(tower)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "`batch_size`=0"),
        ({"num_workers": -1}, "`num_workers`=-1"),
        ({"dataloader_kwargs": {"batch_size": 0}}, "`batch_size`=0"),
        ({"batch_size": "many"}, "`batch_size`='many'"),
        ({"batch_size": 2.5}, r"`batch_size`=2\.5"),
        ({"dataloader_kwargs": {"batchsize": 4}}, "`batchsize`.*did you mean `batch_size`"),
    ],
)
def test_impossible_options_are_refused_by_name(pool_dir, options, named):
    with pytest.raises(ConfigError, match=named):
        one_task(pool_dir, **options)


@pytest.mark.parametrize("name", RESERVED)
def test_task_cannot_have_a_name_that_the_report_needs(pool_dir, name):
    with pytest.raises(DataError, match=f"a task cannot be called `{name}`"):
        CLIPVisionModelTaskPool({name: str(pool_dir / "images" / "cats")})


def test_pool_without_tasks_is_refused():
    with pytest.raises(DataError, match="no tasks"):
        CLIPVisionModelTaskPool({})


# Heads


@pytest.fixture
def embedded(monkeypatch) -> list[list[str]]:
    """Every list of prompts that goes through the text tower."""
    calls: list[list[str]] = []
    embed = heads.text_embeddings

    def count(model: CLIPModel, tokenizer: Any, prompts: list[str], **options: Any) -> torch.Tensor:
        calls.append(list(prompts))
        return embed(model, tokenizer, prompts, **options)

    monkeypatch.setattr(heads, "text_embeddings", count)
    return calls


def test_heads_are_made_once_for_adaptation_and_all_evaluations(pool_dir, taskpool, embedded):
    models = {"_pretrained_": str(pool_dir / "pretrained")} | {task: str(pool_dir / task) for task in TASKS}
    pool = CLIPVisionModelPool(models)
    merged = WEMoEAlgorithm(max_steps=1, batch_size=4).run(pool, taskpool)
    for model in (merged, pool.load_pretrained_model(), pool.fine_tuned_models()):
        taskpool.evaluate(model)
    assert embedded == [[f"a photo of a {name}." for name in sorted(names)] for names in TASKS.values()]


def test_braces_in_a_class_name_are_left_alone(pool_dir, embedded):
    spec = {"data": str(pool_dir / "images" / "dogs"), "classnames": ["{0}", "{a}", "%s"], "templates": ["<{}>"]}
    one_task(pool_dir, spec).head("dogs")
    assert embedded == [["<{0}>", "<{a}>", "<%s>"]]


def test_head_is_frozen_and_of_unit_length(taskpool):
    head = taskpool.head("dogs")
    assert list(head.parameters()) == []
    torch.testing.assert_close(head.embeddings.norm(dim=-1), torch.ones(3))


def test_class_with_several_prompts_is_their_normalised_mean(pool_dir):
    dogs = str(pool_dir / "images" / "dogs")
    one, two, both = (
        one_task(pool_dir, {"data": dogs, "templates": templates}).head("dogs").embeddings
        for templates in (["a {}."], ["some {}!"], ["a {}.", "some {}!"])
    )
    torch.testing.assert_close(both, F.normalize(one + two, dim=-1))


def test_images_are_preprocessed_once(pool_dir, modelpool, monkeypatch):
    pool = one_task(pool_dir)
    pool.evaluate(modelpool.load_pretrained_model())
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("an image was read again"))
    pool.evaluate(modelpool.load_model("dogs"))


def test_pool_that_knows_no_clip_model_is_refused(pool_dir):
    with pytest.raises(ModelError, match="`clip_model`"):
        CLIPVisionModelTaskPool({"dogs": str(pool_dir / "images" / "dogs")}).head("dogs")


def test_clip_model_without_a_text_tower_is_refused(pool_dir):
    pool = CLIPVisionModelTaskPool(
        {"dogs": str(pool_dir / "images" / "dogs")},
        clip_model=str(pool_dir / "cats"),
        processor=str(pool_dir / "pretrained"),
    )
    with pytest.raises(ModelError, match="text tower"):
        pool.head("dogs")


def test_folder_without_a_processor_is_refused(pool_dir):
    pool = CLIPVisionModelTaskPool(
        {"dogs": str(pool_dir / "images" / "dogs")},
        clip_model=str(pool_dir / "pretrained"),
        processor=str(pool_dir / "cats"),
    )
    with pytest.raises(ModelError, match=f"processor.*{pool_dir / 'cats'}"):
        pool.images("dogs")


def test_lent_pretrained_model_does_not_replace_an_own_one(pool_dir, modelpool):
    pool = one_task(pool_dir)
    pool.use_pretrained("no/such/model")
    assert pool.head("dogs").embeddings.shape == (3, 12)


# Model info


def test_model_info_counts_all_and_trained_parameters():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5).requires_grad_(False))
    assert model_info(model) == {
        "trainable_params": 8,
        "all_params": 8 + 15,
        "trainable_percentage": pytest.approx(8 / 23),
    }


def test_model_info_of_a_model_without_parameters():
    assert model_info(nn.ReLU()) == {"trainable_params": 0, "all_params": 0, "trainable_percentage": 0.0}


D, N, LAYERS = 16, len(TASKS), 2


@pytest.mark.parametrize(
    ("method", "routers"),
    [
        (WEMoEAlgorithm(max_steps=0, router_hidden_layers=1), LAYERS * (D * N + N)),
        (WEMoEAlgorithm(max_steps=0, router_hidden_layers=2), LAYERS * (D * D + D + D * N + N)),
        (EWEMoEAlgorithm(max_steps=0, router_hidden_layers=2), D * D + D + D * N + N),
        (EWEMoEAlgorithm(max_steps=0, shared_gate=False), LAYERS * (D * D + D + D * N + N)),
        (
            EWEMoEAlgorithm(max_steps=0, position_encoding=True, position_encoding_dim=4),
            20 * 20 + 20 + 20 * N + N,
        ),
    ],
    ids=["wemoe 1", "wemoe 2", "shared", "not shared", "shared with position"],
)
def test_model_info_counts_a_shared_router_once(method: MoEMethod, routers, modelpool):
    assert model_info(method.run(modelpool))["trainable_params"] == routers


# The dummy pool


def test_dummy_pool_reports_the_size_alone():
    tower = random_tower(0)
    assert DummyTaskPool().evaluate(tower) == {"model_info": model_info(tower)}


def test_dummy_pool_has_nothing_to_say_of_several_models():
    assert DummyTaskPool().evaluate(TaskModels({"cats": lambda: random_tower(0)})) == {}


def test_pool_that_was_scored_on_can_be_adapted_on(modelpool):
    tasks = modelpool.task_pool()
    tasks.evaluate(modelpool.load_pretrained_model())
    model = WEMoEAlgorithm(max_steps=1, batch_size=4).run(modelpool, tasks)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
