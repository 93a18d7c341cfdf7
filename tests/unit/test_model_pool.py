"""Model pools: where models may come from, what is read and when, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from helpers import TASKS
from PIL import Image as PILImage
from runs import assert_same_bits, random_tower, tensors_of
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from fusion_merge import CLIPFinetuneAlgorithm, CLIPVisionModelPool, WEMoEAlgorithm
from fusion_merge.errors import ConfigError, DataError, ModelError
from fusion_merge.models.clip import module_config, module_state, save_tower, vision_backbone
from fusion_merge.models.sources import LazyState
from fusion_merge.pools import references


def write_checkpoint(folder: Path, tower: nn.Module, name: str, prefix: str) -> str:
    """Write a tower's files with a prefix of the tensors' names of our choice."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(module_config(tower).to_json_string(use_diff=False))
    state = {f"{prefix}{key}": tensor.contiguous() for key, tensor in module_state(tower).items()}
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    return str(folder)


def save_sharded(folder: Path, tower: CLIPVisionModel) -> str:
    tower.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return str(folder)


def save_whole_clip(folder: Path, tower: CLIPVisionModel, pool_dir: Path) -> str:
    """Write the tower inside a whole CLIP model, text tower included."""
    clip = CLIPModel.from_pretrained(pool_dir / "pretrained")
    own = module_state(clip)
    for key, tensor in module_state(tower).items():
        own[key].copy_(tensor)
    clip.save_pretrained(folder)
    return str(folder)


def save_torch_shards(folder: Path, tower: CLIPVisionModel) -> str:
    """Write a tower as two torch files and their index."""
    write_checkpoint(folder, tower, "whole.bin", "vision_model.")
    state = torch.load(folder / "whole.bin", weights_only=True)
    table = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
    for file in set(table.values()):
        torch.save({name: tensor for name, tensor in state.items() if table[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return str(folder)


def save_with_projection(folder: Path, tower: CLIPVisionModel) -> str:
    model = CLIPVisionModelWithProjection(module_config(tower))
    for key, tensor in module_state(model).items():
        tensor.copy_(module_state(tower)[key])
    model.save_pretrained(folder)
    return str(folder)


def save_whole_clip_as_torch(folder: Path, tower: CLIPVisionModel, pool_dir: Path) -> str:
    save_whole_clip(folder, tower, pool_dir)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return str(folder)


def below_home(folder: Path, tower: CLIPVisionModel) -> str:
    save_tower(tower, folder)
    return f"~/{os.path.relpath(folder, Path.home())}"


def save_with_transformers(folder: Path, tower: CLIPVisionModel) -> str:
    tower.save_pretrained(folder)
    return str(folder)


def save_with_us(folder: Path, tower: CLIPVisionModel) -> str:
    save_tower(tower, folder)
    return str(folder)


SOURCES: dict[str, Any] = {
    "module": lambda folder, tower, _: tower,
    "saved tower": lambda folder, tower, _: save_with_us(folder, tower),
    "saved by transformers": lambda folder, tower, _: save_with_transformers(folder, tower),
    "whole CLIP model": lambda folder, tower, pool_dir: save_whole_clip(folder, tower, pool_dir),
    "flat keys": lambda folder, tower, _: write_checkpoint(folder, tower, "model.safetensors", ""),
    "nested keys": lambda folder, tower, _: write_checkpoint(folder, tower, "model.safetensors", "vision_model."),
    "wrapped keys": lambda folder, tower, _: write_checkpoint(
        folder, tower, "model.safetensors", "module.clip.vision_model."
    ),
    "torch file": lambda folder, tower, _: write_checkpoint(folder, tower, "pytorch_model.bin", "vision_model."),
    "torch shards": lambda folder, tower, _: save_torch_shards(folder, tower),
    "whole CLIP model as a torch file": lambda folder, tower, pool_dir: save_whole_clip_as_torch(
        folder, tower, pool_dir
    ),
    "tower with a projection": lambda folder, tower, _: save_with_projection(folder, tower),
    "below the home folder": lambda folder, tower, _: below_home(folder, tower),
    "path config below the home folder": lambda folder, tower, _: {"path": below_home(folder, tower)},
    "shards": lambda folder, tower, _: save_sharded(folder, tower),
    "one file": lambda folder, tower, _: f"{save_with_us(folder, tower)}/model.safetensors",
    "path object": lambda folder, tower, _: Path(save_with_us(folder, tower)),
    "path config": lambda folder, tower, _: {"path": save_with_us(folder, tower)},
    "target config": lambda folder, tower, _: {
        "_target_": "transformers.CLIPVisionModel.from_pretrained",
        "pretrained_model_name_or_path": save_with_us(folder, tower),
    },
    "subfolder config": lambda folder, tower, _: {
        "path": str(Path(save_with_us(folder / "inner", tower)).parent),
        "subfolder": "inner",
    },
    "target config of our own": lambda folder, tower, _: {"_target_": "runs.random_tower", "seed": 7},
}


@pytest.fixture
def tower() -> CLIPVisionModel:
    return random_tower(7)


@pytest.fixture(params=list(SOURCES))
def source(request, tmp_path, tower, pool_dir) -> Any:
    return SOURCES[request.param](tmp_path / "model", tower, pool_dir)


# Names


@pytest.mark.parametrize(("name", "is_task"), [("cats", True), ("_cats", True), ("cats_", True), ("_teacher_", False)])
def test_names_between_underscores_are_not_tasks(name, is_task):
    pool = CLIPVisionModelPool({"_pretrained_": "some/model", name: "another/model"})
    assert pool.model_names == ([name] if is_task else [])
    assert pool.all_model_names == ["_pretrained_", name]


def test_tasks_keep_their_order():
    assert CLIPVisionModelPool({"b": "x/b", "_pretrained_": "x/p", "a": "x/a"}).model_names == ["b", "a"]


@pytest.mark.parametrize("models", [{}, {"cats": "x/cats"}, {"pretrained": "x/p", "cats": "x/cats"}])
def test_pool_without_a_pretrained_model_is_refused(models):
    with pytest.raises(ConfigError, match="the model pool has no `_pretrained_`"):
        CLIPVisionModelPool(models)


def test_pool_whose_pretrained_model_is_null_is_refused():
    with pytest.raises(ConfigError, match="the model pool has no `_pretrained_`"):
        CLIPVisionModelPool({"_pretrained_": None, "cats": "x/cats"})


def test_null_takes_a_model_out():
    assert CLIPVisionModelPool({"_pretrained_": "x/p", "cats": None, "dogs": "x/d"}).model_names == ["dogs"]


def test_unknown_model_is_refused_with_the_nearest(modelpool):
    with pytest.raises(ModelError, match="`cat` is not in the pool; did you mean `cats`"):
        modelpool.state("cat")


@pytest.mark.parametrize("models", ["models/pretrained", ["a", "b"], 3])
def test_models_that_are_no_table_are_refused_with_an_example(models):
    with pytest.raises(ConfigError, match=r"`models`=.* is not a table.*`models=\{_pretrained_: PATH_OR_HUB_ID"):
        CLIPVisionModelPool(models)


@pytest.mark.parametrize("option", ["train_datasets", "test_datasets"])
def test_datasets_that_are_no_table_are_refused_with_an_example(option):
    with pytest.raises(ConfigError, match=rf"`{option}`='images' is not a table.*`{option}=\{{TASK:"):
        CLIPVisionModelPool({"_pretrained_": "x/p"}, **{option: "images"})


# Where models come from


def test_every_kind_of_source_gives_the_same_tensors(source, tower):
    pool = CLIPVisionModelPool({"_pretrained_": source})
    state = {name: tensor for name, tensor in pool.state("_pretrained_").items() if "position_ids" not in name}
    assert_same_bits(state, {n: t for n, t in module_state(tower).items() if "position_ids" not in n})


def test_every_kind_of_source_gives_the_same_fingerprint(source, tower):
    expected = CLIPVisionModelPool({"_pretrained_": tower}).fingerprints()
    assert CLIPVisionModelPool({"_pretrained_": source}).fingerprints() == expected


def test_every_kind_of_source_gives_the_same_working_tower(source, tower):
    loaded = CLIPVisionModelPool({"_pretrained_": source}).load_pretrained_model()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values=pixels).pooler_output, tower(pixel_values=pixels).pooler_output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["model.safetensors", "pytorch_model.bin", "whole"])
def test_half_precision_checkpoints_are_read_in_single_precision(tower, pool_dir, tmp_path, dtype, how):
    half = {name: tensor.to(dtype).float() for name, tensor in module_state(tower).items()}
    if how == "whole":
        folder = save_whole_clip(tmp_path / "model", tower, pool_dir)
        clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).to(dtype)
        clip.save_pretrained(folder)
    else:
        folder = write_checkpoint(tmp_path / "model", tower.to(dtype), how, "vision_model.")
    state = CLIPVisionModelPool({"_pretrained_": folder}).state("_pretrained_")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert_same_bits({n: t for n, t in state.items() if "position_ids" not in n}, half)


def test_other_weights_give_another_fingerprint(tower):
    first = CLIPVisionModelPool({"_pretrained_": tower}).fingerprints()
    assert CLIPVisionModelPool({"_pretrained_": random_tower(8)}).fingerprints() != first


def test_one_changed_tensor_gives_another_fingerprint(tower):
    first = CLIPVisionModelPool({"_pretrained_": tower}).fingerprints()
    module_state(tower)["encoder.layers.1.mlp.fc2.weight"].add_(1e-3)
    assert CLIPVisionModelPool({"_pretrained_": tower}).fingerprints() != first


def test_loaded_model_is_a_copy(tower):
    pool = CLIPVisionModelPool({"_pretrained_": tower})
    before = tensors_of(tower)
    for parameter in pool.load_pretrained_model().parameters():
        parameter.data.zero_()
    assert_same_bits(tensors_of(tower), before)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x/cats@main", "x/cats@main"),
        ({"path": "x/cats"}, "x/cats"),
        ({"path": "x/cats", "revision": "v1", "subfolder": "inner"}, "x/cats@v1 (inner)"),
        ({"_target_": "runs.random_tower", "seed": 7}, "runs.random_tower"),
    ],
)
def test_origin_is_told_in_words(source, words):
    assert CLIPVisionModelPool({"_pretrained_": source}).base_model == words


FROM_PRETRAINED = {"_target_": "transformers.CLIPVisionModel.from_pretrained", "pretrained_model_name_or_path": "a/b"}


def test_options_for_the_hub_are_passed_on(monkeypatch):
    given = {"revision": "v1", "subfolder": "cats", "token": "t", "cache_dir": "c", "local_files_only": True}
    asked: list[dict[str, Any]] = []

    def find(source: str, **options: Any) -> None:
        asked.append({"source": source, **options})
        raise ModelError("found nothing")

    monkeypatch.setattr(references, "find_files", find)
    with pytest.raises(ModelError, match="model `_pretrained_`: found nothing"):
        CLIPVisionModelPool({"_pretrained_": FROM_PRETRAINED | given}).check(0)
    assert asked == [{"source": "a/b", **given}]


@pytest.mark.parametrize("source", [FROM_PRETRAINED, {"path": "a/b"}], ids=["target", "path"])
@pytest.mark.parametrize(
    ("key", "message"), [("revison", "did you mean `revision`"), ("sub_folder", "did you mean `subfolder`")]
)
def test_other_options_are_refused_with_the_nearest(pool_dir, source, key, message):
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained"), "cats": source | {key: "x"}})
    with pytest.raises(ConfigError, match=f"`{key}` is not an option of model `cats`; {message}"):
        pool.check()


@pytest.mark.parametrize(
    "source",
    [
        {"_target_": "transformers.CLIPVisionModel.from_pretrained"},
        {"path": "a/b", "pretrained_model_name_or_path": "a/c"},
        {"revision": "v1"},
    ],
)
def test_config_without_one_path_is_refused(source):
    with pytest.raises(ConfigError, match=r"model `_pretrained_` is .*give one of `path`"):
        CLIPVisionModelPool({"_pretrained_": source}).check(0)


def test_origin_of_a_module_is_its_class(tower):
    assert CLIPVisionModelPool({"_pretrained_": tower}).base_model == "a CLIPVisionModel"


# What is read, and when


def test_making_a_pool_reads_nothing(tmp_path):
    pool = CLIPVisionModelPool({"_pretrained_": "/no/such", "cats": str(tmp_path)}, test_datasets={"cats": "/no/such"})
    assert pool.model_names == ["cats"]


def test_check_reads_no_weights(modelpool, monkeypatch):
    monkeypatch.setattr(LazyState, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    modelpool.check(2)


def test_different_shapes_are_refused_before_any_weight_is_read(pool_dir, tmp_path, monkeypatch):
    save_tower(random_tower(1, intermediate_size=32), tmp_path / "wide")
    monkeypatch.setattr(LazyState, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained"), "wide": str(tmp_path / "wide")})
    with pytest.raises(ModelError, match=r"`wide` \(.*wide\).*`encoder\.layers\.0\.mlp\.fc1\.\w+`.*32.*24"):
        pool.check()


def test_models_of_different_depths_are_refused_naming_a_tensor(pool_dir):
    deep = random_tower(1, num_hidden_layers=3)
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained"), "deep": deep})
    with pytest.raises(ModelError, match=r"`deep`.*`encoder\.layers\.2\."):
        pool.check()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("num_attention_heads", 4),
        ("layer_norm_eps", 1e-6),
        ("image_size", 17),
    ],
)
def test_models_that_compute_otherwise_are_refused_before_any_weight_is_read(
    pool_dir, tmp_path, key, value, monkeypatch
):
    save_tower(random_tower(1, **{key: value}), tmp_path / "other")
    monkeypatch.setattr(LazyState, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained"), "cats": str(tmp_path / "other")})
    with pytest.raises(ModelError, match=rf"model `cats` \(.*other\) has `{key}`={value!r}.*the pretrained model has"):
        pool.check()


def test_checkpoint_that_lacks_a_tensor_is_refused(pool_dir, tmp_path, tower):
    folder = Path(write_checkpoint(tmp_path / "model", tower, "model.safetensors", ""))
    state = {n: t.contiguous() for n, t in module_state(tower).items() if n != "post_layernorm.bias"}
    save_file(state, folder / "model.safetensors")
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained"), "cats": str(folder)})
    with pytest.raises(ModelError, match=r"`cats`.*`post_layernorm\.bias`"):
        pool.check()


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_models_are_refused(pool_dir, count):
    models = {"_pretrained_": str(pool_dir / "pretrained")} | {t: str(pool_dir / t) for t in list(TASKS)[:count]}
    with pytest.raises(ModelError, match=f"{count} fine-tuned model.*at least 2; add them under `models`"):
        CLIPVisionModelPool(models).check(2)


@pytest.mark.parametrize("path", ["/no/such/model", "./no_such_model", "no_such.safetensors", "no/such/model"])
def test_missing_model_is_refused_by_name_and_path(pool_dir, path):
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained"), "cats": path})
    with pytest.raises(ModelError, match=f"model `cats`: `{path}` does not exist"):
        pool.check()


def test_model_that_is_not_on_the_hub_is_refused_by_name(pool_dir):
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained"), "cats": "no_such/model"})
    with pytest.raises(
        ModelError, match=r"model `cats`: `no_such/model` is not a folder here and not in the cache; bring it"
    ):
        pool.check()


def test_folder_without_weights_is_refused(pool_dir, tmp_path):
    (tmp_path / "config.json").write_text((pool_dir / "cats" / "config.json").read_text())
    with pytest.raises(ModelError, match=r"`_pretrained_`.*has no weights; looked for model\.safetensors"):
        CLIPVisionModelPool({"_pretrained_": str(tmp_path)}).check(0)


def test_folder_without_a_config_is_refused(pool_dir, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((pool_dir / "cats" / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"`_pretrained_`.*has no `config\.json`"):
        CLIPVisionModelPool({"_pretrained_": str(tmp_path)}).check(0)


def test_broken_weights_are_refused(pool_dir, tmp_path):
    (tmp_path / "config.json").write_text((pool_dir / "cats" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match=r"cannot read weights from .*model\.safetensors"):
        CLIPVisionModelPool({"_pretrained_": str(tmp_path)}).check(0)


def test_model_of_another_kind_is_refused(pool_dir, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((pool_dir / "cats" / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match=r"`model_type` is 'bert'.*`clip`"):
        CLIPVisionModelPool({"_pretrained_": str(tmp_path)}).check(0)


def test_what_is_no_model_is_refused():
    with pytest.raises(ModelError, match=r"`_pretrained_`.*int"):
        CLIPVisionModelPool({"_pretrained_": 3}).check(0)


def test_config_that_cannot_be_made_is_refused(pool_dir):
    models = {"_pretrained_": str(pool_dir / "pretrained"), "cats": {"_target_": "no_such_package.Model"}}
    with pytest.raises(ModelError, match=r"`cats`.*no_such_package"):
        CLIPVisionModelPool(models).check()


def test_another_platform_is_refused(pool_dir):
    with pytest.raises(ConfigError, match="`platform`='modelscope'"):
        CLIPVisionModelPool({"_pretrained_": "x/p"}, platform="modelscope")


@pytest.mark.parametrize("platform", ["hf", "huggingface"])
def test_platform_may_be_named_as_fusion_bench_does(platform):
    assert CLIPVisionModelPool({"_pretrained_": "x/p"}, platform=platform).all_model_names == ["_pretrained_"]


# Its datasets


def test_task_pool_is_made_of_the_pool_s_datasets(modelpool):
    assert modelpool.task_pool().task_names == list(TASKS)


@pytest.mark.parametrize("split", ["train", "test"])
def test_pool_without_datasets_makes_no_task_pool(pool_dir, split):
    with pytest.raises(ConfigError, match=f"no `{split}_datasets`"):
        CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained")}).task_pool(split)


@pytest.mark.parametrize(("split", "images"), [("train", 3), ("test", 2)])
def test_train_and_test_datasets_take_their_own_split(pool_dir, split, images):
    features = Features({"image": Image(), "label": ClassLabel(names=["tabby", "siamese"])})
    blank = PILImage.new("RGB", (4, 4))

    def blanks(count: int) -> Dataset:
        return Dataset.from_dict({"image": [blank] * count, "label": [0] * count}, features=features)

    data = {"cats": DatasetDict({"train": blanks(3), "test": blanks(2)})}
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained")}, train_datasets=data, test_datasets=data)
    assert len(pool.task_pool(split).task("cats")) == images


@pytest.mark.parametrize(("split", "images"), [("train", 2400), ("test", 300)])
def test_embedded_tasks_take_their_own_split(pool_dir, split, images):
    data = {"dots": "zoo://tiny8/dots"}
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained")}, train_datasets=data, test_datasets=data)
    assert len(pool.task_pool(split).task("dots")) == images


def blanks(*labels: int) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=["tabby", "siamese"])})
    return Dataset.from_dict({"image": [PILImage.new("RGB", (20, 20))] * len(labels), "label": labels}, features)


def test_fine_tuning_never_trains_on_other_splits(pool_dir):
    data = {"cats": DatasetDict({"validation": blanks(0), "test": blanks(0)})}
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained")}, train_datasets=data)
    with pytest.raises(DataError, match="`cats` has the splits validation, test, and no `train`"):
        CLIPFinetuneAlgorithm(max_steps=1).check(pool)


def test_neither_test_nor_train_datasets_are_refused(modelpool):
    with pytest.raises(ConfigError, match=r"`split`='validation'.*neither `test` nor `train`"):
        modelpool.task_pool("validation")


def test_unlabelled_images_are_adapted_on_where_classnames_are_given(pool_dir):
    flat = {task: str(pool_dir / "images" / task / names[0]) for task, names in TASKS.items()}
    models = {"_pretrained_": str(pool_dir / "pretrained")} | {task: str(pool_dir / task) for task in TASKS}
    named = {task: {"data": flat[task], "classnames": list(names)} for task, names in TASKS.items()}
    method = WEMoEAlgorithm(max_steps=1, batch_size=4)
    method.run(CLIPVisionModelPool(models, test_datasets=named))
    assert method.record is not None
    assert method.record.steps == 1
    with pytest.raises(DataError, match="`cats` has no label column"):
        method.run(CLIPVisionModelPool(models, test_datasets=flat))


def test_unlabelled_images_are_not_fine_tuned_on(pool_dir):
    data = {"cats": {"data": str(pool_dir / "images" / "cats" / "tabby"), "classnames": ["tabby", "siamese"]}}
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained")}, train_datasets=data)
    with pytest.raises(DataError, match="`cats` has no label column"):
        CLIPFinetuneAlgorithm(max_steps=1).check(pool)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("as_module", [False, True])
def test_weights_that_are_no_numbers_are_refused_naming_tensor_and_model(pool_dir, tmp_path, value, as_module):
    tower = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained")}).load_pretrained_model()
    vision_backbone(tower).encoder.layers[1].mlp.fc1.weight.data[3, 2] = value
    save_tower(tower, tmp_path / "broken")
    pool = CLIPVisionModelPool(
        {"_pretrained_": str(pool_dir / "pretrained"), "cats": tower if as_module else str(tmp_path / "broken")}
    )
    with pytest.raises(ModelError, match=r"(?s)encoder\.layers\.1\.mlp\.fc1\.weight.*NaN|NaN.*fc1\.weight"):
        pool.load_model("cats")
