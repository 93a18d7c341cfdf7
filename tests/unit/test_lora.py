"""PEFT LoRA adapters as models of a pool: PEFT itself is what they are made with and compared with."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from runs import assert_same_bits, random_tower
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPVisionModel

from fusion_merge import (
    CLIPVisionModelPool,
    EWEMoEAlgorithm,
    IsoCAlgorithm,
    IsoCTSAlgorithm,
    LayerWiseAdaMergingAlgorithm,
    RankOneMoEAlgorithm,
    SimpleAverageAlgorithm,
    SmileAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
    TSVMAlgorithm,
    WEMoEAlgorithm,
)
from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.models.clip import module_state, save_tower
from fusion_merge.models.lora import LoraState
from fusion_merge.models.sources import fingerprint
from fusion_merge.moe import vectors
from fusion_merge.task_vectors import factored_svd, truncated_svd

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # which PEFT asks for
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape"),  # biases, to PEFT
]

ATTENTION, MLP = ["q_proj", "v_proj"], ["fc1", "fc2"]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": [*ATTENTION, *MLP]},
    "attention": {"target_modules": ATTENTION},
    "mlp": {"target_modules": MLP, "r": 3, "lora_alpha": 5},
    "rslora": {"target_modules": [*ATTENTION, *MLP], "r": 4, "use_rslora": True},
    "patterns": {
        "target_modules": [*ATTENTION, *MLP],
        "rank_pattern": {r"layers\.1\.mlp\.fc1": 2, "q_proj": 5, "fc2": 7},
        "alpha_pattern": {"fc1": 3.5, r"layers\.0\..*": 0.5, "q_proj": 11},
    },
    "rslora patterns": {"target_modules": MLP, "rank_pattern": {"fc2": 2}, "use_rslora": True},
    "one layer": {"target_modules": MLP, "layers_to_transform": [1]},
    "by expression": {"target_modules": r".*layers\.0\..*fc2", "lora_dropout": 0.1},
    "all linear layers": {"target_modules": "all-linear", "exclude_modules": ["out_proj"]},
    "convolution": {"target_modules": ["patch_embedding", "fc1"]},
    "rank above the width": {"target_modules": MLP, "r": 40},
    "all biases": {"target_modules": ATTENTION, "bias": "all"},
    "own biases": {"target_modules": MLP, "bias": "lora_only", "r": 3},
    "biases of the factors": {"target_modules": MLP, "lora_bias": True},
    "whole modules": {"target_modules": MLP, "modules_to_save": ["post_layernorm"]},
    "a start of its own": {"target_modules": MLP, "init_lora_weights": "gaussian"},
}


def shake(model: nn.Module, seed: int = 0) -> None:
    """Change what is trained, so that no adapter is the identity and no bias the pretrained one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def write_adapter(folder: Path, model: nn.Module, *, seed: int = 0, **options: Any) -> str:
    """Write an adapter of a model with PEFT."""
    adapted = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 6} | options)))
    shake(adapted, seed)
    adapted.save_pretrained(folder)
    return str(folder)


def merged(model: nn.Module, folder: str) -> dict[str, Tensor]:
    """What PEFT makes of a model and an adapter, under canonical names."""
    return dict(module_state(PeftModel.from_pretrained(model, folder).merge_and_unload()))


@pytest.fixture
def base(pool_dir) -> CLIPVisionModel:
    """A model of its own, as PEFT changes those that it adds adapters to."""
    return CLIPVisionModel.from_pretrained(pool_dir / "pretrained")


@pytest.fixture(scope="module")
def write(pool_dir, tmp_path_factory) -> Callable[..., str]:
    """Returns the folder of an adapter of a kind; each is written once."""
    root = tmp_path_factory.mktemp("adapters")

    def once(kind: str, seed: int = 0) -> str:
        folder = root / f"{kind}-{seed}"
        if not folder.exists():
            model = CLIPVisionModel.from_pretrained(pool_dir / "pretrained")
            write_adapter(folder, model, seed=seed, **CONFIGS[kind])
        return str(folder)

    return once


@pytest.fixture
def adapter(write, tmp_path) -> Path:
    """An adapter that may be changed."""
    return Path(shutil.copytree(write("plain"), tmp_path / "adapter"))


@pytest.fixture
def pool_of(pool_dir) -> Callable[..., CLIPVisionModelPool]:
    def make(*adapters: Any, **named: Any) -> CLIPVisionModelPool:
        models = {f"task{i}": adapter for i, adapter in enumerate(adapters)} | named
        return CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained")} | models)

    return make


def edit(folder: Path, **changes: Any) -> Path:
    """Change what an adapter's configuration says."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def rename(folder: Path, change: Callable[[str], str]) -> Path:
    """Change the names of an adapter's tensors."""
    file = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)
    return folder


# What the state is


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_the_state_is_what_peft_merges(kind, base, write, pool_of):
    expected = merged(base, write(kind))
    pool = pool_of(write(kind))
    pool.check()
    found = dict(pool.state("task0"))
    assert found.keys() == expected.keys()
    changed = 0
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
        changed += not torch.equal(tensor, pool.state("_pretrained_")[name])
    assert changed > 0


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_factors_and_first_rows_are_those_of_the_state(kind, write, pool_of):
    pool = pool_of(write(kind))
    before, state = pool.state("_pretrained_"), pool.state("task0")
    assert isinstance(state, LoraState)
    for name, tensor in state.items():
        torch.testing.assert_close(state.first_row(name), tensor.flatten()[: tensor.shape[-1]])
        if factors := state.factors(name):
            torch.testing.assert_close(factors[0] @ factors[1], tensor - before[name], rtol=1e-5, atol=1e-6)
        else:
            assert tensor.ndim != 2


def test_what_an_adapter_leaves_alone_is_the_pretrained_tensor(write, pool_of):
    pool = pool_of(write("attention"))
    before, state = pool.state("_pretrained_"), pool.state("task0")
    same = {name: state[name] for name in state if not name.endswith(("q_proj.weight", "v_proj.weight"))}
    assert len(same) == len(state) - 4
    assert_same_bits(same, {name: before[name] for name in same})


def test_a_weight_that_is_held_whole_has_no_factors(adapter, pool_of):
    file, name = adapter / "adapter_model.safetensors", "encoder.layers.0.self_attn.k_proj.weight"
    save_file(load_file(file) | {f"base_model.model.{name}": torch.ones(16, 16)}, file)
    state = pool_of(adapter).state("task0")
    assert state.factors(name) is None
    assert torch.equal(state[name], torch.ones(16, 16))
    assert torch.equal(state.first_row(name), torch.ones(16))


def test_nothing_is_read_before_it_is_asked_for(adapter, pool_of, monkeypatch):
    monkeypatch.setattr(LoraState, "__getitem__", lambda *_: pytest.fail("a tensor was formed"))
    pool_of(adapter).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors_are_multiplied_in_single_precision(adapter, pool_of, dtype):
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    rounded = dict(pool_of(adapter).state("task0"))
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file)
    assert_same_bits(rounded, dict(pool_of(adapter).state("task0")))


# Where adapters come from, and what their files look like

LAYOUTS: dict[str, Callable[[str], str]] = {
    "nested": lambda n: f"base_model.model.vision_model.{_bare(n)}",
    "flat": lambda n: f"base_model.model.{_bare(n)}",
    "of a whole CLIP": lambda n: f"base_model.model.clip.vision_model.{_bare(n)}",
    "with the adapter's name": lambda n: n.replace(".weight", ".default.weight"),
    "without a prefix": lambda n: _bare(n),
}


def _bare(name: str) -> str:
    return name.removeprefix("base_model.model.").removeprefix("vision_model.")


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_of_names_gives_the_same_state(layout, adapter, pool_of):
    expected = dict(pool_of(adapter).state("task0"))
    assert_same_bits(dict(pool_of(rename(adapter, LAYOUTS[layout])).state("task0")), expected)


def test_a_torch_file_gives_the_same_state(adapter, pool_of):
    expected = dict(pool_of(adapter).state("task0"))
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert_same_bits(dict(pool_of(adapter).state("task0")), expected)


@pytest.mark.parametrize(
    "source",
    [
        lambda f: f / "adapter_model.safetensors",
        lambda f: {"path": str(f)},
        lambda f: {"path": str(f.parent), "subfolder": f.name},
        lambda f: {"_target_": "fusion_bench.models.load_lora_vision_model_hf", "peft_name": str(f)},
    ],
    ids=["file", "path", "subfolder", "fusion_bench"],
)
def test_every_way_to_name_an_adapter_gives_the_same_state(source, adapter, pool_of):
    expected = dict(pool_of(adapter).state("task0"))
    assert_same_bits(dict(pool_of(source(adapter)).state("task0")), expected)


def test_fusion_bench_s_configuration_of_a_pool_is_understood(pool_dir, adapter):
    loaders = "fusion_bench.models.linearized.vision_model"
    base = str(pool_dir / "pretrained")
    models = {
        "_pretrained_": {"_target_": f"{loaders}.load_fft_vision_model_hf", "model_name": base},
        "cats": {
            "_target_": f"{loaders}.load_lora_vision_model_hf",
            "base_model_name": base,
            "peft_name": str(adapter),
            "merge_and_unload": True,
        },
    }
    pool = CLIPVisionModelPool(models)
    pool.check()
    assert (pool.base_model, pool.describe("cats")) == (base, str(adapter))
    models["cats"]["base_model_name"] = "another/clip"
    with pytest.raises(ModelError, match=r"`cats`.*added to `another/clip`, but `_pretrained_` is .*base_model_name"):
        CLIPVisionModelPool(models).check()
    models["cats"]["pefd_name"] = "x"
    with pytest.raises(ConfigError, match="`pefd_name` is not an option of model `cats`; did you mean `peft_name`"):
        CLIPVisionModelPool(models).check()


def test_the_base_may_be_a_module(base, adapter, pool_of):
    expected = dict(pool_of(adapter).state("task0"))
    pool = CLIPVisionModelPool({"_pretrained_": base, "cats": adapter})
    assert_same_bits(dict(pool.state("cats")), expected)
    assert pool.fingerprints()["cats"] == pool_of(cats=adapter).fingerprints()["cats"]


def test_fingerprints_tell_adapters_apart(adapter, pool_of):
    file = adapter / "adapter_model.safetensors"
    prints = {fingerprint(pool_of(adapter).state("task0"))}
    for name, tensor in list(load_file(file).items()):
        save_file(load_file(file) | {name: tensor + 1e-3}, file)
        prints.add(fingerprint(pool_of(adapter).state("task0")))
    assert len(prints) == 1 + len(load_file(file))


def test_other_towers_are_left_aside_with_a_note(pool_dir, pool_of, tmp_path, caplog):
    clip = CLIPModel.from_pretrained(pool_dir / "pretrained")
    targets = [*MLP, "visual_projection"]
    folder = write_adapter(tmp_path / "adapter", clip, target_modules=targets)
    with caplog.at_level(logging.INFO, logger="fusion_merge"):
        state = pool_of(folder).state("task0")
    (note,) = caplog.messages
    assert "beside the vision tower are left aside" in note
    expected = merged(CLIPModel.from_pretrained(pool_dir / "pretrained"), folder)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_an_adapter_of_a_base_with_another_name_is_noted(adapter, pool_of, caplog):
    edit(adapter, base_model_name_or_path="openai/clip-vit-base-patch32")
    with caplog.at_level(logging.INFO, logger="fusion_merge"):
        pool_of(adapter).check()
    (note,) = caplog.messages
    assert "made for `openai/clip-vit-base-patch32`; here it is added to" in note


def test_a_local_copy_of_the_base_needs_no_note(adapter, pool_of, caplog):
    edit(adapter, base_model_name_or_path="someone/pretrained")
    with caplog.at_level(logging.INFO, logger="fusion_merge"):
        pool_of(adapter).check()
    assert caplog.messages == []


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, r"`peft_type`='LOHA', and only LORA is read; merge it with PEFT"),
        ({"use_dora": True}, r"`use_dora`=True .* does not express; merge it with PEFT"),
        ({"alora_invocation_tokens": [1]}, r"`alora_invocation_tokens`=\[1\]"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "`layer_replication`"),
        ({"trainable_token_indices": [0]}, "`trainable_token_indices`"),
        ({"target_parameters": ["x"]}, "`target_parameters`"),
        ({"an_option_of_tomorrow": "yes"}, "`an_option_of_tomorrow`='yes'"),
        ({"init_lora_weights": "pissa"}, r"`init_lora_weights`='pissa': .*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "`init_lora_weights`='loftq'"),
        ({"init_lora_weights": "olora"}, "`init_lora_weights`='olora'"),
        ({"bias": "some"}, "`bias`='some'"),
        ({"bias": "all"}, r"`bias`='all' .* does not hold `.*bias`"),
        ({"bias": "lora_only"}, r"`bias`='lora_only' .* does not hold `encoder\.layers\.0\.\w+\.\w+\.bias`"),
        ({"modules_to_save": ["post_layernorm"]}, r"`modules_to_save` with 'post_layernorm' .* holds no tensor of it"),
        ({"r": 0}, "`r`=0 .* not a whole number of at least 1"),
        ({"r": 5}, r"factors of rank 4 for `.*`, but its adapter_config\.json says 5"),
        ({"rank_pattern": {"fc1": 2}}, r"factors of rank 4 for `.*fc1\.weight`, but .* says 2"),
        ({"rank_pattern": {"(": 4}}, r"`rank_pattern` with '\(', not a regular expression"),
        ({"alpha_pattern": ["fc1"]}, "`alpha_pattern`=.* not a table"),
        ({"lora_alpha": "6"}, "`lora_alpha`='6' .* not a number"),
        ({"lora_alpha": float("nan")}, "`lora_alpha`=nan .* not a number"),
        ({"auto_mapping": {"base_model_class": "CLIPTextModel"}}, "adapter of a CLIPTextModel"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_represented_is_refused(adapter, pool_of, changes, message):
    pool = pool_of(edit(adapter, **changes))
    with pytest.raises(ModelError, match=r"model `task0` \(.*adapter\).*" + message):
        pool.check()


def test_options_that_are_off_and_newer_than_we_are_do_not_matter(adapter, pool_of):
    pool_of(edit(adapter, an_option_of_tomorrow=False, another=None, fan_in_fan_out=True)).check()


Q = "encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.replace("fc1.lora_A.weight", "fc1.lora_magnitude_vector"), "`.*lora_magnitude_vector`, and only"),
        (lambda n: n.replace("fc1.lora_A.", "fc1.lora_C."), "`.*lora_C.weight`, and only factors"),
        (
            lambda n: n.replace("layers.1.", "layers.7."),
            r"has no `encoder\.layers\.7\..*; it was made for `.*pretrained`",
        ),
        (lambda n: n.replace("encoder.layers.1.", "decoder.9."), r"`.*decoder\.9\..*`, which belongs to no part"),
        (
            lambda n: n.replace("vision_model.", "").replace("encoder.layers", "text_model.encoder.layers"),
            "nothing of a",
        ),
        (lambda n: n.replace("0.mlp.fc1.lora_A", "0.mlp.fc2.lora_B.two"), "are for one tensor; keep one"),
        (lambda n: n.replace("layers.0.self_attn.q_proj", "layers.0.mlp.fc1x"), r"`.*fc1x.*`|fc1x"),
        (lambda n: n.replace("0.mlp.fc1.lora_B.weight", "0.mlp.fc1.lora_B.bias"), r"lacks `lora_B` of `.*fc1\.weight`"),
    ],
    ids=["magnitude", "unknown_factor", "deeper", "elsewhere", "text", "two_adapters", "no_such_layer", "one_factor"],
)
def test_tensors_that_have_no_place_are_refused(adapter, pool_of, change, message):
    pool = pool_of(rename(adapter, change))
    with pytest.raises(ModelError, match=r"(?s)model `task0`.*" + message):
        pool.check()


@pytest.mark.parametrize(
    ("key", "shape"),
    [("lora_A", (4, 12)), ("lora_B", (12, 4)), ("lora_A", (3, 16)), ("lora_A", (4, 16, 1)), ("lora_A", (4,))],
)
def test_factors_that_do_not_fit_the_base_are_refused(adapter, pool_of, key, shape):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith(f"layers.0.self_attn.q_proj.{key}.weight"))
    save_file(tensors | {name: torch.zeros(shape)}, file)
    with pytest.raises(ModelError, match=rf"factors of shapes .* for `{Q}\.weight`, .* made for `.*pretrained`"):
        pool_of(adapter).check()


def test_an_adapter_of_a_wider_model_is_refused(pool_of, tmp_path):
    folder = write_adapter(tmp_path / "adapter", random_tower(1, intermediate_size=32), target_modules=MLP)
    with pytest.raises(ModelError, match=r"`encoder\.layers\.\d\.mlp\.fc[12]\.weight`, which is of"):
        pool_of(folder).check()


def test_an_adapter_of_whole_numbers_is_refused(adapter, pool_of):
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ModelError, match="holds I8 values"):
        pool_of(adapter).check()


def test_an_adapter_without_weights_or_configuration_is_refused(adapter, pool_of):
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"the configuration of an adapter, but no weights; looked for adapter_model\.s"
    ):
        pool_of(adapter).check()
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"has no `adapter_config\.json` beside it"):
        pool_of(adapter / "adapter_model.safetensors").check()


def test_a_folder_of_a_model_and_an_adapter_is_refused_but_its_files_are_not(adapter, pool_dir, pool_of):
    expected = dict(pool_of(adapter).state("task0"))
    for file in ("config.json", "model.safetensors"):
        shutil.copy(pool_dir / "cats" / file, adapter / file)
    with pytest.raises(
        ModelError, match=r"holds both a model and an adapter; give one file of the two: model\.s.*, ada"
    ):
        pool_of(adapter).check()
    assert_same_bits(dict(pool_of(adapter / "adapter_model.safetensors").state("task0")), expected)
    assert_same_bits(
        dict(pool_of(adapter / "model.safetensors").state("task0")), dict(pool_of(pool_dir / "cats").state("task0"))
    )


def test_the_pretrained_model_cannot_be_an_adapter(adapter):
    with pytest.raises(
        ModelError, match=r"model `_pretrained_` \(.*\) is an adapter; give the model that it was made for"
    ):
        CLIPVisionModelPool({"_pretrained_": str(adapter)}).check(0)


def test_values_that_are_no_numbers_are_refused(adapter, pool_of):
    file = adapter / "adapter_model.safetensors"
    save_file({n: t * 1e30 for n, t in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=r"`task0`.*NaN or infinite values in `.*_proj\.weight`; use another adapter"):
        pool_of(adapter).load_model("task0")


# Decomposition in factors


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
@pytest.mark.parametrize("inner", [0, 1, 3, 7, 20])
@pytest.mark.parametrize("rank", [1, 3, 5, -1])
def test_a_product_is_decomposed_as_its_matrix(shape, inner, rank):
    generator = torch.Generator().manual_seed(inner)
    left, right = (torch.randn(s, generator=generator) for s in ((shape[0], inner), (inner, shape[1])))
    us, svs = factored_svd(left, right, rank)
    dense_us, dense_svs = truncated_svd(left @ right, rank)
    assert (us.shape, svs.shape) == (dense_us.shape, dense_svs.shape)
    torch.testing.assert_close(us @ svs, dense_us @ dense_svs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(svs.norm(dim=1), dense_svs.norm(dim=1), rtol=1e-4, atol=1e-5)  # by descending value
    found = min(inner, *us.shape[1:])
    torch.testing.assert_close(us[:, :found].T @ us[:, :found], torch.eye(found), rtol=1e-5, atol=1e-5)
    assert not us[:, inner:].any()
    assert not svs[inner:].any()


def test_a_rank_that_is_not_possible_is_refused_of_a_product_too():
    with pytest.raises(ConfigError, match=r"`rank`=8 is not possible for a matrix of \(7, 12\); choose 1-7 or -1"):
        factored_svd(torch.zeros(7, 2), torch.zeros(2, 12), 8)


# The methods


@pytest.fixture
def adapters(write) -> dict[str, str]:
    return {"cats": write("rslora"), "dogs": write("own biases", 1)}


METHODS = {
    "rankone_moe": lambda: RankOneMoEAlgorithm(rank_k=4, max_steps=0),
    "wemoe": lambda: WEMoEAlgorithm(max_steps=0),
    "e_wemoe": lambda: EWEMoEAlgorithm(max_steps=0),
    "task_arithmetic": lambda: TaskArithmeticAlgorithm(),
    "simple_average": lambda: SimpleAverageAlgorithm(),
    "ties_merging": lambda: TiesMergingAlgorithm(threshold=100),
    "tsv_m": lambda: TSVMAlgorithm(),
    "iso_c": lambda: IsoCAlgorithm(scaling_factor=0.3),
    "iso_cts": lambda: IsoCTSAlgorithm(scaling_factor=0.3),
    "smile": lambda: SmileAlgorithm(k=4, gate_k=8),
    "layer_wise_adamerging": lambda: LayerWiseAdaMergingAlgorithm(max_steps=0),
}


@pytest.mark.parametrize("method", list(METHODS))
def test_methods_make_of_adapters_what_they_make_of_merged_models(method, adapters, pool_dir, pool_of, tmp_path):
    for task, folder in adapters.items():
        tower = PeftModel.from_pretrained(CLIPVisionModel.from_pretrained(pool_dir / "pretrained"), folder)
        save_tower(tower.merge_and_unload(), tmp_path / "merged" / task)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    outputs = []
    for models in (adapters, {task: str(tmp_path / "merged" / task) for task in adapters}):
        model = METHODS[method]().run(pool_of(**models))
        with torch.no_grad():
            outputs.append(model(pixel_values=pixels).pooler_output)
    tolerance = 1e-2 if method == "e_wemoe" else 1e-5  # which entries survive pruning may turn on rounding
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)


def test_rankone_moe_never_decomposes_a_whole_matrix_of_an_adapter(adapters, pool_dir, pool_of, monkeypatch):
    monkeypatch.setattr(vectors, "truncated_svd", lambda *_: pytest.fail("a whole matrix was decomposed"))
    svd = torch.linalg.svd
    sizes: list[torch.Size] = []
    monkeypatch.setattr(torch.linalg, "svd", lambda m, *rest: (sizes.append(m.shape), svd(m, *rest))[1])
    RankOneMoEAlgorithm(rank_k=4, max_steps=0).run(pool_of(**adapters))
    assert set(sizes) == {(4, 4), (3, 3)}
    with pytest.raises(pytest.fail.Exception, match="a whole matrix was decomposed"):
        RankOneMoEAlgorithm(rank_k=4, max_steps=0).run(pool_of(**adapters, birds=str(pool_dir / "cats")))


@pytest.mark.parametrize("method", ["rankone_moe", "wemoe", "e_wemoe"])
def test_adapters_of_the_attention_alone_give_zero_experts_and_one_note(method, write, pool_of, taskpool, caplog):
    models = {"cats": write("attention"), "dogs": write("attention", 1)}
    algorithm = METHODS[method]()
    algorithm.max_steps, algorithm.batch_size = 1, 2
    with caplog.at_level(logging.INFO, logger="fusion_merge"):
        model = algorithm.run(pool_of(**models), taskpool)
    notes = [m for m in caplog.messages if "changes a layer" in m]
    assert len(notes) == 1
    assert notes[0].startswith("no expert of task `cats`, `dogs` changes a layer: ")
    assert notes[0].endswith("the result is task arithmetic")
    static = TaskArithmeticAlgorithm(scaling_factor=algorithm.init_lambda).run(pool_of(**models))
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=pixels).pooler_output, static(pixel_values=pixels).pooler_output)
