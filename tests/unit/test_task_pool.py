"""Task pools: heads, scores, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TASKS, write_processor
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
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
from fusion_merge.pools.loaders import Placement
from fusion_merge.pools.reading import Purpose
from fusion_merge.pools.task_pool import RESERVED, model_info
from fusion_merge.registry import object_from_config
from fusion_merge.schema import register_schema


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


@pytest.mark.parametrize(
    "classnames",
    [list(TASKS["cats"]), sorted(TASKS["cats"]), {"tabby": "tabby", "siamese": "siamese"}],
    ids=["as listed", "sorted", "mapping"],
)
def test_order_of_the_dataset_s_own_class_names_changes_no_score(pool_dir, modelpool, classnames):
    spec = {"data": str(pool_dir / "images" / "cats"), "classnames": classnames, "templates": ["a photo of a {}."]}
    pool = CLIPVisionModelTaskPool({"cats": spec}, clip_model=str(pool_dir / "pretrained"))
    accuracy, loss = scores_by_hand(pool_dir, "cats", ["a photo of a {}."])
    scores = pool.evaluate(modelpool.load_pretrained_model())["cats"]
    assert scores == {"accuracy": pytest.approx(accuracy), "loss": pytest.approx(loss, rel=1e-4)}


def test_mixed_precision_is_for_the_tower_alone(pool_dir, modelpool):
    pool, seen = one_task(pool_dir), []
    pool.head("dogs").register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0].dtype, torch.is_autocast_enabled("cpu")))
    )
    tower = modelpool.load_pretrained_model()
    tower.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    placement = Placement(autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    pool.evaluate(tower, placement=placement)
    assert seen == [True, (torch.float32, False)]


def test_unlabelled_images_are_refused_when_they_are_checked_or_scored(pool_dir, modelpool):
    flat = {"data": str(pool_dir / "images" / "dogs" / "husky"), "classnames": list(TASKS["dogs"])}
    with pytest.raises(DataError, match="`dogs` has no label column"):
        one_task(pool_dir, flat).check()
    pool = one_task(pool_dir, flat, purpose=Purpose.ADAPTATION)
    pool.check()
    with pytest.raises(DataError, match="task `dogs` has no labels to score on"):
        pool.evaluate(modelpool.load_pretrained_model())


# Options


def test_split_of_the_pool_that_is_not_there_is_refused(pool_dir, tmp_path):
    (tmp_path / "test").symlink_to(pool_dir / "images" / "dogs")
    with pytest.raises(DataError, match=r"`dogs` has the splits test, but `split`='validatoin'"):
        one_task(pool_dir, str(tmp_path), split="validatoin").check()


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


@pytest.mark.parametrize("as_path", [str, Path, lambda path: {"path": str(path)}], ids=["str", "Path", "mapping"])
def test_template_of_fusion_bench_gives_the_same_report(pool_dir, taskpool, modelpool, as_path):
    base = str(pool_dir / "pretrained")
    other = CLIPVisionModelTaskPool(
        test_datasets={task: str(pool_dir / "images" / task) for task in TASKS},
        base_model=as_path(base),
        clip_model={"_target_": "transformers.CLIPModel.from_pretrained", "pretrained_model_name_or_path": base},
        processor={"_target_": "transformers.CLIPProcessor.from_pretrained", "pretrained_model_name_or_path": base},
        dataloader_kwargs={"batch_size": 32, "num_workers": 0, "pin_memory": True, "drop_last": False},
    )
    other.check()
    assert (other.batch_size, other.num_workers) == (32, 0)
    tower = modelpool.load_pretrained_model()
    assert other.evaluate(tower) == {
        key: pytest.approx(value, rel=1e-5) for key, value in taskpool.evaluate(tower).items()
    }


def test_preset_takes_options_under_fusion_bench_s_names(pool_dir):
    base = str(pool_dir / "pretrained")
    register_schema()
    target = f"from_pretrained,pretrained_model_name_or_path:{base}}}"
    with initialize_config_module("fusion_merge.config", version_base="1.3"):
        config: Any = compose(
            "config",
            overrides=[
                "modelpool=clip_vision",
                f"modelpool.models={{_pretrained_: {base}}}",
                f"modelpool.processor={{_target_:transformers.CLIPProcessor.{target}",
                "modelpool.platform=huggingface",
                f"+taskpool.tasks.dogs={pool_dir / 'images' / 'dogs'}",
                f"taskpool.clip_model={{_target_:transformers.CLIPModel.{target}",
                f"taskpool.processor={{_target_:transformers.CLIPProcessor.{target}",
                f"taskpool.base_model={base}",
                "++taskpool.dataloader_kwargs.batch_size=32",
                "++taskpool.dataloader_kwargs.shuffle=false",
            ],
        )
        plain: Any = OmegaConf.to_container(config, resolve=True)
    pool = object_from_config(plain["taskpool"], "taskpool")
    object_from_config(plain["modelpool"], "modelpool").lend_pretrained(pool)
    pool.check()
    assert (pool.batch_size, pool.num_workers) == (32, 8)


def test_config_may_make_the_clip_model(pool_dir, monkeypatch):
    monkeypatch.setattr("runs.whole_clip", CLIPModel.from_pretrained, raising=False)
    config = {"_target_": "runs.whole_clip", "pretrained_model_name_or_path": str(pool_dir / "pretrained")}
    tasks = {"dogs": str(pool_dir / "images" / "dogs")}
    pool = CLIPVisionModelTaskPool(tasks, clip_model=config, processor=str(pool_dir / "pretrained"))
    pool.check()
    torch.testing.assert_close(pool.head("dogs").embeddings, one_task(pool_dir).head("dogs").embeddings)


@pytest.mark.parametrize("option", ["clip_model", "processor"])
def test_misspelt_key_of_a_config_is_refused_with_the_nearest(pool_dir, option):
    with pytest.raises(ConfigError, match=f"`revison` is not an option of `{option}`; did you mean `revision`"):
        CLIPVisionModelTaskPool({"dogs": "images"}, **{option: {"path": "a/b", "revison": "x"}})


def test_clip_model_and_base_model_must_agree(pool_dir):
    with pytest.raises(ConfigError, match=r"`clip_model`='a/b' and `base_model`='a/c'.*give one"):
        CLIPVisionModelTaskPool({"dogs": "images"}, clip_model="a/b", base_model="a/c")


def test_task_under_both_names_is_refused():
    with pytest.raises(ConfigError, match="task `dogs` is in both `tasks` and `test_datasets`"):
        CLIPVisionModelTaskPool({"dogs": "a"}, test_datasets={"cats": "b", "dogs": "a"})


@pytest.mark.parametrize("option", ["tasks", "test_datasets", "dataloader_kwargs"])
@pytest.mark.parametrize("value", ["images/dogs", ["images/dogs"]])
def test_what_is_no_table_is_refused_with_an_example(option, value):
    options = {"tasks": {"dogs": "images"}} | {option: value}
    with pytest.raises(ConfigError, match=rf"`{option}`=.*images/dogs.*write `{option}=\{{"):
        CLIPVisionModelTaskPool(**options)


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


@pytest.mark.parametrize("lent", [None, random_tower(0)], ids=["nothing", "a tower"])
def test_pool_that_knows_no_clip_model_is_refused_when_it_is_checked(pool_dir, lent):
    pool = CLIPVisionModelTaskPool(
        {"dogs": str(pool_dir / "images" / "dogs")}, clip_model=lent, processor=str(pool_dir / "pretrained")
    )
    with pytest.raises(ModelError, match=r"knows no CLIP model.*`clip_model`"):
        pool.check()


def test_pretrained_module_without_text_makes_no_heads(pool_dir, taskpool):
    pool = CLIPVisionModelTaskPool({"dogs": str(pool_dir / "images" / "dogs")}, processor=str(pool_dir / "pretrained"))
    CLIPVisionModelPool({"_pretrained_": random_tower(0)}).lend_pretrained(pool)
    with pytest.raises(ModelError, match="knows no CLIP model"):
        pool.check()


def test_weight_file_of_a_whole_model_makes_the_heads_of_its_folder(pool_dir):
    file = str(pool_dir / "pretrained" / "model.safetensors")
    pool = CLIPVisionModelTaskPool({"dogs": str(pool_dir / "images" / "dogs")}, clip_model=file)
    pool.check()
    torch.testing.assert_close(pool.head("dogs").embeddings, one_task(pool_dir).head("dogs").embeddings)


def test_weight_file_of_another_name_is_refused(pool_dir, tmp_path):
    for file in (pool_dir / "pretrained").iterdir():
        (tmp_path / file.name.replace("model.", "other.")).symlink_to(file)
    pool = CLIPVisionModelTaskPool({"dogs": "images"}, clip_model=str(tmp_path / "other.safetensors"))
    with pytest.raises(ModelError, match="is one file; give the folder"):
        pool.check()


@pytest.mark.parametrize(("key", "value"), [("patch_size", 4), ("hidden_size", 8), ("num_hidden_layers", 1)])
def test_heads_of_another_architecture_are_refused_before_anything_is_built(pool_dir, modelpool, tmp_path, key, value):
    config = CLIPModel.from_pretrained(pool_dir / "pretrained").config
    setattr(config.vision_config, key, value)
    CLIPModel(config).save_pretrained(tmp_path)
    write_processor(tmp_path, size=16)
    taskpool = CLIPVisionModelTaskPool({"cats": str(pool_dir / "images" / "cats")}, clip_model=str(tmp_path))
    with pytest.raises(ModelError, match=rf"heads .* CLIP model with `{key}`={value} \(.*\), but the models have"):
        WEMoEAlgorithm(max_steps=0).check(modelpool, taskpool)


def test_processor_of_another_size_is_refused_when_it_is_checked(pool_dir, tmp_path):
    write_processor(tmp_path, size=32)
    taskpool = one_task(pool_dir, processor=str(tmp_path))
    with pytest.raises(DataError, match=r"images of shape \(3, 32, 32\) of any picture, but the CLIP .*\(3, 16, 16\)"):
        taskpool.check()


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
