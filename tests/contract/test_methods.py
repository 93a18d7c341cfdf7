"""What every registered method promises: a new method is tested here without a line of its own."""

from __future__ import annotations

import dataclasses
import inspect
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TASKS
from omegaconf import OmegaConf
from runs import assert_same_bits, module_pool, random_tower, tensors_of
from torch import nn
from transformers import CLIPModel

from fusion_merge import (
    CLIPVisionModelPool,
    CLIPVisionModelTaskPool,
    EWEMoEAlgorithm,
    MergedCLIPVisionModel,
    get_method,
    list_methods,
)
from fusion_merge.errors import CheckpointError, ConfigError, ModelError
from fusion_merge.methods.adapted_base import AdaptedMethod
from fusion_merge.methods.base import Method
from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.models.clip import save_tower
from fusion_merge.models.task_models import TaskModels
from fusion_merge.moe.layer import router_parameters
from fusion_merge.registry import object_from_config

METHODS = list_methods()
ADAPTED = [name for name in METHODS if issubclass(get_method(name), AdaptedMethod)]
ROUTED = [name for name in METHODS if issubclass(get_method(name), MoEMethod)]
OPTIONS = [(name, field.name) for name in METHODS for field in dataclasses.fields(get_method(name)) if field.init]

QUICK = {"max_steps": 2, "batch_size": 4, "num_workers": 0}
"""Given to every method that has such options."""

SMALL: dict[str, dict[str, Any]] = {
    "rankone_moe": {"rank_k": 4},
    "fusion_moe": {"rank_k": 4},
    "smile": {"k": 4, "gate_k": 2},
}
"""What a method needs besides, to fit towers that are 16 wide."""

PUBLISHED: dict[str, dict[str, Any]] = {"fusion_moe": {"router_start": "constant", "mixed_tasks": False}}
"""What lets a method start without images, and adapt by batches of one task each that share a weight."""

PRESETS_MAY_DIFFER = {"clip_finetune": {"output"}, "regmean": {"dataloader_kwargs"}}
PRESETS_MAY_DIFFER |= {name: {"cache_dir"} for name in ADAPTED}
"""Options whose default on the command line is another than in Python, by method."""

every_method = pytest.mark.parametrize("name", METHODS)
every_adapted_method = pytest.mark.parametrize("name", ADAPTED)
every_routed_method = pytest.mark.parametrize("name", ROUTED)


def quick(name: str, **options: Any) -> Method:
    cls = get_method(name)
    known = {field.name for field in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in QUICK.items() if k in known} | SMALL.get(name, {}) | options)


def of_depth(name: str, depth: int) -> dict[str, Any]:
    """What gives a method routers of a depth; those without an input cannot start from images."""
    return {"router_hidden_layers": depth} | ({} if depth else PUBLISHED.get(name, {}))


def pool_with(pool_dir: Path, models: dict[str, Any]) -> CLIPVisionModelPool:
    data = {task: str(pool_dir / "images" / task) for task in TASKS}
    models = {"_pretrained_": str(pool_dir / "pretrained"), **models}
    return CLIPVisionModelPool(models, test_datasets=data, train_datasets=data)


@pytest.fixture(scope="module")
def half_precision_dir(pool_dir, tmp_path_factory) -> Path:
    """The models of `pool_dir` in files of float16."""
    root = tmp_path_factory.mktemp("half")
    modules = module_pool(pool_dir)
    CLIPModel.from_pretrained(pool_dir / "pretrained").half().save_pretrained(root / "pretrained")
    for task in TASKS:
        save_tower(modules.load_model(task), root / task, torch.float16)
    return root


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))  # (6, 3, 16, 16)


# Every method


@every_method
def test_result_is_scored_on_every_task(name, modelpool, taskpool):
    model = quick(name).run(modelpool)
    report = taskpool.evaluate(model)
    info = set() if isinstance(model, TaskModels) else {"model_info"}
    assert report.keys() == {*TASKS, "average", *info}
    for key in ("accuracy", "loss"):
        scores = [report[task][key] for task in TASKS]
        assert report["average"][key] == pytest.approx(sum(scores) / len(scores))
        assert all(0 <= score < 100 for score in scores)


@every_method
def test_result_is_in_eval_mode(name, modelpool):
    model = quick(name).run(modelpool)
    towers = model.values() if isinstance(model, TaskModels) else [model]
    assert not any(module.training for tower in towers for module in tower.modules())


@every_method
def test_models_of_the_pool_are_not_changed(name, pool_dir):
    pool = module_pool(pool_dir)
    modules = {model: pool._sources[model] for model in pool.all_model_names}
    before = {model: tensors_of(module) for model, module in modules.items()}
    trainable = {model: [p.requires_grad for p in module.parameters()] for model, module in modules.items()}
    modes = {model: module.training for model, module in modules.items()}
    quick(name).run(pool)
    for model, module in modules.items():
        assert_same_bits(tensors_of(module), before[model])
        assert [p.requires_grad for p in module.parameters()] == trainable[model]
        assert module.training == modes[model]


@every_method
def test_same_seed_gives_the_same_bits_whatever_the_global_generator(name, pool_dir):
    torch.manual_seed(1)
    first = quick(name).run(module_pool(pool_dir))
    torch.manual_seed(2)
    second = quick(name).run(module_pool(pool_dir))
    assert_same_bits(tensors_of(first), tensors_of(second))


@every_method
def test_pool_of_modules_and_pool_of_paths_give_the_same_bits(name, pool_dir, modelpool):
    assert_same_bits(
        tensors_of(quick(name).run(module_pool(pool_dir))),
        tensors_of(quick(name).run(modelpool)),
    )


@every_method
def test_half_precision_files_are_merged_in_float32(name, pool_dir, half_precision_dir, taskpool):
    models = {"_pretrained_": str(half_precision_dir / "pretrained")}
    models |= {task: str(half_precision_dir / task) for task in TASKS}
    data = {task: str(pool_dir / "images" / task) for task in TASKS}
    pool = CLIPVisionModelPool(models, processor=str(pool_dir / "pretrained"), test_datasets=data, train_datasets=data)
    model = quick(name).run(pool)
    floating = [t for t in tensors_of(model).values() if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float32}
    assert 0 < taskpool.evaluate(model)["average"]["loss"] < 100


@every_method
def test_preset_has_the_options_and_defaults_of_the_class(name):
    cls = get_method(name)
    preset = OmegaConf.to_container(OmegaConf.load(str(files("fusion_merge.config") / "method" / f"{name}.yaml")))
    assert preset.pop("_target_") == f"{cls.__module__}.{cls.__qualname__}"
    defaults = {field.name: field.default for field in dataclasses.fields(cls) if field.init}
    assert preset.keys() == defaults.keys()
    for key in {"seed", "fast_dev_run"} & preset.keys():
        assert preset.pop(key) == f"${{{key}}}"
    for key in preset.keys() - PRESETS_MAY_DIFFER.get(name, set()):
        assert (key, preset[key], type(preset[key])) == (key, defaults[key], type(defaults[key]))


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_option_says_what_it_means(name, option):
    field = get_method(name).__dataclass_fields__[option]
    assert field.metadata["help"].strip()


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_option_of_the_wrong_type_is_refused_by_name(name, option):
    with pytest.raises(ConfigError, match=rf"`{option}`=\[\[1\]\].* is not of type"):
        get_method(name)(**{option: [[1]]})


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_misspelt_option_is_refused_with_the_right_one(name, option):
    cls = get_method(name)
    config = {"_target_": f"{cls.__module__}.{cls.__qualname__}", f"{option}z": 1}
    with pytest.raises(ConfigError, match=f"`method.{option}z` is not an option .*did you mean `{option}`"):
        object_from_config(config, "method")


@every_method
def test_every_name_of_the_method_is_accepted_as_name(name):
    cls = get_method(name)
    assert cls(name=name).name == name
    with pytest.raises(ConfigError, match=r"`name`='no_such_method'"):
        cls(name="no_such_method")


@pytest.mark.parametrize("name", [name for name in METHODS if get_method(name).min_models >= 2])
def test_pool_with_one_fine_tuned_model_is_refused(name, pool_dir):
    with pytest.raises(ModelError, match=r"1 fine-tuned model.*at least 2"):
        quick(name).run(pool_with(pool_dir, {"cats": str(pool_dir / "cats")}))


@every_method
def test_models_of_different_shapes_are_refused_naming_the_tensor(name, pool_dir):
    models = {"cats": str(pool_dir / "cats"), "dogs": random_tower(1, intermediate_size=32)}
    with pytest.raises(ModelError, match=r"`dogs`.*`encoder\.layers\.0\.mlp\.fc1"):
        quick(name).run(pool_with(pool_dir, models))


@every_method
def test_class_is_final_and_documented(name):
    cls = get_method(name)
    assert getattr(cls, "__final__", False)
    assert len(inspect.cleandoc(cls.__doc__ or "").splitlines()[0]) > 10


# Methods that adapt, with routers or without


def adapted(name: str, **options: Any) -> Method:
    """A method whose routers move far in a few steps, so that what depends on them shows."""
    return quick(name, lr=0.05, max_steps=3, **options)


def output(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels).pooler_output


@every_routed_method
def test_another_seed_gives_other_routers(name, modelpool):
    first, second = (tensors_of(adapted(name, seed=seed).run(modelpool)) for seed in (0, 1))
    differing = [key for key in first if not torch.equal(first[key], second[key])]
    assert differing
    assert all(".router." in key or key in ("task_coefficients", "task_inputs") for key in differing)


@every_adapted_method
def test_checkpoint_gives_the_adapted_model_without_any_images(name, pool_dir, modelpool, tmp_path):
    model = adapted(name, save_checkpoint=str(tmp_path / "routers.ckpt")).run(modelpool)
    method = quick(name, checkpoint=str(tmp_path / "routers.ckpt"))
    loaded = method.run(module_pool(pool_dir, test_datasets=None))
    assert method.record is None
    assert_same_bits(tensors_of(loaded), tensors_of(model))


@every_routed_method
def test_checkpoint_holds_the_routers_alone(name, modelpool, tmp_path):
    model = adapted(name, save_checkpoint=str(tmp_path / "routers.ckpt")).run(modelpool)
    routers = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    read = 0 if model.task_inputs is None else 4 * model.task_inputs.numel()  # by them, of each task's images
    assert (tmp_path / "routers.ckpt").stat().st_size < routers + read + 10_000


@every_adapted_method
def test_checkpoint_of_another_pool_is_refused(name, pool_dir, modelpool, tmp_path):
    quick(name, save_checkpoint=str(tmp_path / "routers.ckpt")).run(modelpool)
    other = pool_with(pool_dir, {"cats": random_tower(5), "dogs": str(pool_dir / "dogs")})
    with pytest.raises(CheckpointError, match=r"routers\.ckpt.* does not fit: `fingerprints\.cats`"):
        quick(name, checkpoint=str(tmp_path / "routers.ckpt")).run(other)


@every_adapted_method
def test_checkpoint_of_other_tasks_is_refused(name, pool_dir, modelpool, tmp_path):
    quick(name, save_checkpoint=str(tmp_path / "routers.ckpt")).run(modelpool)
    swapped = pool_with(pool_dir, {task: str(pool_dir / task) for task in reversed(TASKS)})
    with pytest.raises(CheckpointError, match="does not fit: `tasks`"):
        quick(name, checkpoint=str(tmp_path / "routers.ckpt")).run(swapped)


@every_routed_method
def test_checkpoint_of_other_options_is_refused(name, modelpool, tmp_path):
    quick(name, router_hidden_layers=1, save_checkpoint=str(tmp_path / "routers.ckpt")).run(modelpool)
    with pytest.raises(CheckpointError, match=r"`options\.router_hidden_layers` is 1 there and 2 here"):
        quick(name, router_hidden_layers=2, checkpoint=str(tmp_path / "routers.ckpt")).run(modelpool)


@every_adapted_method
@pytest.mark.parametrize("option", ["checkpoint", "save_checkpoint"])
def test_checkpoint_without_a_path_is_refused(name, option):
    with pytest.raises(ConfigError, match=f"`{option}`=True"):
        quick(name, **{option: True})


@every_adapted_method
def test_missing_checkpoint_is_named(name, modelpool, tmp_path):
    with pytest.raises(CheckpointError, match=r"no_such\.ckpt.* does not exist"):
        quick(name, checkpoint=str(tmp_path / "no_such.ckpt")).run(modelpool)


@every_routed_method
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_saved_model_computes_the_same_without_the_pool(name, depth, modelpool, images, tmp_path):
    model = adapted(name, **of_depth(name, depth)).run(modelpool)
    expected = output(model, images)
    model.save_pretrained(tmp_path / "merged")
    del model
    assert torch.equal(output(MergedCLIPVisionModel.from_pretrained(tmp_path / "merged"), images), expected)


@every_routed_method
def test_after_adaptation_an_output_does_not_depend_on_batch_mates(name, modelpool, images):
    model = adapted(name, router_hidden_layers=1, batch_reduce=True, **PUBLISHED.get(name, {})).run(modelpool)
    alone = torch.cat([output(model, image[None]) for image in images])
    torch.testing.assert_close(output(model, images), alone, rtol=1e-4, atol=1e-5)


@every_routed_method
def test_inference_batch_reduce_gives_a_batch_one_merged_weight(name, modelpool, images):
    model = adapted(name, router_hidden_layers=1, inference_batch_reduce=True).run(modelpool)
    alone = torch.cat([output(model, image[None]) for image in images])
    assert (output(model, images) - alone).abs().max() > 1e-4


@every_routed_method
def test_routing_during_adaptation_matters(name, modelpool):
    methods = [adapted(name, batch_reduce=b, **PUBLISHED.get(name, {})) for b in (True, False)]
    by_batch, by_sample = (tensors_of(method.run(modelpool)) for method in methods)
    assert any(not torch.equal(by_batch[key], by_sample[key]) for key in by_batch)


@every_adapted_method
def test_fast_dev_run_takes_one_step(name, modelpool):
    method = quick(name, max_steps=5, fast_dev_run=True)
    method.run(modelpool)
    assert method.record.steps == 1
    assert {task: len(values) for task, values in method.record.losses.items()} == dict.fromkeys(TASKS, 1)


@every_routed_method
def test_no_steps_give_the_model_as_built(name, modelpool):
    method = quick(name, max_steps=0, **PUBLISHED.get(name, {}))
    assert_same_bits(tensors_of(method.run(modelpool)), tensors_of(method.build(modelpool)))


@every_routed_method
def test_no_steps_need_no_images(name, pool_dir, images):
    model = quick(name, max_steps=0, **PUBLISHED.get(name, {})).run(module_pool(pool_dir, test_datasets=None))
    assert output(model, images).isfinite().all()


@every_adapted_method
def test_adaptation_without_images_is_refused(name, pool_dir):
    with pytest.raises(ConfigError, match="`test_datasets`"):
        quick(name).run(module_pool(pool_dir, test_datasets=None))


@every_adapted_method
def test_images_come_from_the_task_pool_if_the_model_pool_has_none(name, pool_dir, modelpool, taskpool):
    assert_same_bits(
        tensors_of(quick(name).run(module_pool(pool_dir, test_datasets=None), taskpool)),
        tensors_of(quick(name).run(modelpool)),
    )


@every_adapted_method
def test_a_task_pool_borrows_the_pretrained_model_for_its_heads(name, pool_dir, modelpool):
    tasks = CLIPVisionModelTaskPool({task: str(pool_dir / "images" / task) for task in TASKS})
    assert_same_bits(
        tensors_of(quick(name).run(module_pool(pool_dir, test_datasets=None), tasks)),
        tensors_of(quick(name).run(modelpool)),
    )


@every_routed_method
def test_images_may_be_divided_over_both_pools(name, pool_dir, modelpool):
    (first, *_), data = TASKS, {task: str(pool_dir / "images" / task) for task in TASKS}
    own = module_pool(pool_dir, test_datasets={first: {"data": data[first], "templates": ["a {}."]}})
    model = quick(name).run(own, CLIPVisionModelTaskPool(data))
    assert model.config.tasks == list(TASKS)
    with pytest.raises(ConfigError, match="adaptation needs images of `dogs`: neither"):
        quick(name).run(own, CLIPVisionModelTaskPool({first: data[first]}))


@every_routed_method
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_every_router_depth_is_adapted_and_scored(name, depth, modelpool, taskpool):
    method = quick(name, **of_depth(name, depth))
    report = taskpool.evaluate(method.run(modelpool))
    assert method.record.steps == QUICK["max_steps"]
    assert 0 < report["average"]["loss"] < 100


@every_routed_method
@pytest.mark.parametrize("depth", [-1, 3, True])
def test_other_router_depths_are_refused(name, depth):
    with pytest.raises(ConfigError, match=f"`router_hidden_layers`={depth}"):
        quick(name, router_hidden_layers=depth)


@every_routed_method
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_adaptation_changes_routers_alone(name, depth, modelpool):
    method = adapted(name, **of_depth(name, depth))
    before, after = tensors_of(method.build(modelpool)), tensors_of(method.run(modelpool))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert changed - {"task_coefficients", "task_inputs"} == {key for key in before if ".router." in key} & changed


@every_routed_method
def test_only_routers_require_gradients(name, modelpool):
    model = quick(name).run(modelpool)
    assert all(p.requires_grad == (".router." in key) for key, p in model.named_parameters())


@every_adapted_method
def test_gradient_accumulation_changes_nothing_but_memory(name, modelpool):
    together, one_by_one = (tensors_of(quick(name, use_grad_accumulate=a).run(modelpool)) for a in (False, True))
    for key, tensor in together.items():
        torch.testing.assert_close(one_by_one[key], tensor, rtol=1e-4, atol=1e-5)


@every_adapted_method
def test_adaptation_lowers_the_entropy(name, modelpool):
    method = quick(name, lr=0.01, max_steps=20, batch_size=6)
    method.run(modelpool)
    first, last = (sum(values[i] for values in method.record.losses.values()) for i in (0, -1))
    assert last < first


@every_routed_method
def test_merged_model_says_what_it_is_made_of(name, modelpool, pool_dir):
    config = quick(name, init_lambda=0.25).run(modelpool).config
    assert config.method == name
    assert config.tasks == list(TASKS)
    assert config.method_options["init_lambda"] == 0.25
    assert config.base_model == str(pool_dir / "pretrained")


# Single methods


def test_a_router_is_pruned_after_adaptation_and_after_loading_alike(modelpool, tmp_path):
    options = QUICK | {"post_sparse_gate": True, "gate_prune_ratio": 0.9}
    adapted = EWEMoEAlgorithm(save_checkpoint=str(tmp_path / "r"), **options).run(modelpool)
    loaded = EWEMoEAlgorithm(checkpoint=str(tmp_path / "r"), **options).run(modelpool)
    whole = EWEMoEAlgorithm(checkpoint=str(tmp_path / "r")).run(modelpool)
    assert_same_bits(tensors_of(adapted), tensors_of(loaded))
    for pruned, parameter in zip(router_parameters(loaded), router_parameters(whole), strict=True):
        kept = pruned != 0
        assert kept.sum() <= 0.1 * parameter.numel() + 1
        assert torch.equal(pruned[kept], parameter[kept])
        assert parameter.count_nonzero() == parameter.numel()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"position_encoding_dim": 7}, "`position_encoding_dim`=7 is odd or too wide"),
        ({"position_encoding": True, "shared_gate": False}, "`shared_gate`=True, not False"),
        ({"position_encoding": True, "router_hidden_layers": 0}, "`router_hidden_layers` 1 or 2, not 0"),
    ],
)
def test_a_position_code_that_no_router_would_see_is_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        EWEMoEAlgorithm(**options)


@every_routed_method
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_experts_may_be_stored_in_half_precision(name, dtype, modelpool, images, tmp_path):
    """Half of the memory, hardly another output, and all else in single precision."""
    exact, half = (quick(name, max_steps=0, expert_dtype=d).run(modelpool) for d in ("float32", dtype))
    for key, tensor in half.state_dict().items():
        stored = getattr(torch, dtype) if ".experts." in key and tensor.is_floating_point() else None
        assert tensor.dtype == (stored or exact.state_dict()[key].dtype), key
    outputs, expected = half(images).pooler_output, exact(images).pooler_output
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, expected, atol=2e-2, rtol=2e-2)
    half.save_pretrained(tmp_path)
    assert_same_bits(tensors_of(MergedCLIPVisionModel.from_pretrained(tmp_path)), tensors_of(half))
    outputs.sum().backward()
    assert all(p.grad is not None for p in half.parameters() if p.requires_grad)


def test_a_precision_that_cannot_hold_the_experts_is_refused(pool_dir):
    pool = module_pool(pool_dir)
    pool.state("cats")["encoder.layers.1.mlp.fc2.weight"][0, 0] = 1e6
    with pytest.raises(ConfigError, match=r"`expert_dtype`=float16 .* `encoder.layers.1.mlp.fc2`; choose bfloat16"):
        quick("wemoe", max_steps=0, expert_dtype="float16").run(pool)
