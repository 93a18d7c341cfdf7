"""The merged model on disk and in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import copied, same_state
from huggingface_hub import HfApi, ModelCard, RepoUrl
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, CLIPVisionModel
from transformers.utils import hub as transformers_hub
from transformers.utils.hub import PushToHubMixin

from fusion_merge import EWEMoEAlgorithm, MergedCLIPVisionModel, RankOneMoEAlgorithm, WEMoEAlgorithm
from fusion_merge.errors import CheckpointError, ConfigError, FusionMergeError, ModelError
from fusion_merge.models import merged_files
from fusion_merge.models.clip import module_state, save_tower
from fusion_merge.models.merged import MergedCLIPVisionConfig
from fusion_merge.moe import ConstantRouter, Routing, moe_layers, record_coefficients, set_routing

METHODS = {
    "dense": WEMoEAlgorithm(),
    "sparse_own_routers": EWEMoEAlgorithm(tv_prune_ratio=0.5, shared_gate=False),
    "sparse_shared": EWEMoEAlgorithm(tv_prune_ratio=0.5),
    "sparse_shared_coded": EWEMoEAlgorithm(tv_prune_ratio=0.5, position_encoding=True, router_hidden_layers=1),
    "low_rank": RankOneMoEAlgorithm(rank_k=3),
    "low_rank_select": RankOneMoEAlgorithm(rank_k=3, select_k=2, router_hidden_layers=2),
    "constant": WEMoEAlgorithm(router_hidden_layers=0),
}


def _build(modelpool, name: str) -> MergedCLIPVisionModel:
    """Build a routed model whose routers tell samples apart."""
    model = METHODS[name].build(modelpool)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 2:
            parameter.data *= 20
    set_routing(model, Routing.SAMPLE)
    return model


@pytest.fixture(params=METHODS)
def model(request, modelpool) -> MergedCLIPVisionModel:
    return _build(modelpool, request.param)


@pytest.fixture
def saved(modelpool, tmp_path):
    """The folder of a saved low-rank model."""
    _build(modelpool, "low_rank").save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def _pixels(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


def _outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(_pixels(next(model.parameters()).dtype)).pooler_output


def _edit_weights(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder, **values) -> None:
    """Change a configuration as somebody would who makes a right checksum."""
    config = MergedCLIPVisionConfig.from_pretrained(folder)
    for name, value in values.items():
        setattr(config, name, value)
    config.save_pretrained(folder)


def test_a_saved_model_is_read_back_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path / "merged")
    again = MergedCLIPVisionModel.from_pretrained(tmp_path / "merged")
    assert same_state(again.own_state(), model.own_state())
    assert torch.equal(_outputs(again), _outputs(model))
    assert [layer.spec() for layer in moe_layers(again).values()] == [
        layer.spec() for layer in moe_layers(model).values()
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_is_read_back_bit_for_bit(model, dtype, tmp_path):
    model = model.to(dtype)
    model.save_pretrained(tmp_path / "merged")
    again = MergedCLIPVisionModel.from_pretrained(tmp_path / "merged")
    assert same_state(again.own_state(), model.own_state())
    assert torch.equal(_outputs(again), _outputs(model))


def test_half_converts_values_and_leaves_the_index_of_a_sparse_bank(modelpool, tmp_path):
    model = _build(modelpool, "sparse_shared").half()
    model.save_pretrained(tmp_path / "merged")
    bank = moe_layers(MergedCLIPVisionModel.from_pretrained(tmp_path / "merged").vision_model)[
        "encoder.layers.0.mlp"
    ].fc1.experts
    assert (bank.values.dtype, bank.gaps.dtype, bank.starts.dtype) == (torch.float16, torch.uint8, torch.int32)


def test_a_read_model_is_in_eval_mode_and_trains_routers_alone(model, tmp_path):
    model.save_pretrained(tmp_path / "merged")
    again = MergedCLIPVisionModel.from_pretrained(tmp_path / "merged")
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".router." in name for name in trainable)
    assert not again.training


@pytest.mark.parametrize("name", ["sparse_shared", "sparse_shared_coded"])
def test_a_shared_router_is_stored_once_and_shared_again(modelpool, tmp_path, name):
    _build(modelpool, name).save_pretrained(tmp_path / "merged")
    layers = {
        key.split(".mlp.")[0] for key in load_file(tmp_path / "merged" / "model.safetensors") if ".router." in key
    }
    assert layers == {"vision_model.encoder.layers.0"}
    again = MergedCLIPVisionModel.from_pretrained(tmp_path / "merged")
    routers = [layer.router for layer in moe_layers(again).values()]
    first, second = (getattr(r, "shared", r) for r in routers)
    assert first is second
    assert len({r.layer_index for r in routers if hasattr(r, "layer_index")}) == (2 if "coded" in name else 0)


def test_pruned_entries_are_not_stored(modelpool, tmp_path):
    sizes = {}
    for name in ("dense", "sparse"):
        method = WEMoEAlgorithm() if name == "dense" else EWEMoEAlgorithm(tv_prune_ratio=0.9)
        model = method.build(modelpool)
        sizes[name] = sum(t.nbytes for n, t in model.own_state().items() if ".experts." in n)
    assert sizes["sparse"] < 0.3 * sizes["dense"]


@pytest.mark.parametrize("routing", list(Routing))
def test_the_routing_is_kept(modelpool, tmp_path, routing):
    model = _build(modelpool, "dense")
    set_routing(model, routing)
    model.save_pretrained(tmp_path / "merged")
    again = MergedCLIPVisionModel.from_pretrained(tmp_path / "merged")
    assert {layer.routing for layer in moe_layers(again).values()} == {routing}


def test_the_configuration_says_what_was_merged_and_how(saved, pool_dir):
    config = MergedCLIPVisionModel.from_pretrained(saved).config
    assert (config.tasks, config.method) == (["cats", "dogs"], "rankone_moe")
    assert config.method_options["rank_k"] == 3
    assert config.base_model == str(pool_dir / "pretrained")


def test_auto_classes_read_a_merged_model(saved):
    assert isinstance(AutoConfig.from_pretrained(saved), MergedCLIPVisionConfig)
    model = AutoModel.from_pretrained(saved)
    assert isinstance(model, MergedCLIPVisionModel)
    assert torch.equal(_outputs(model), _outputs(MergedCLIPVisionModel.from_pretrained(saved)))


def test_a_revision_means_nothing_for_a_folder_as_in_transformers(saved):
    assert isinstance(AutoModel.from_pretrained(saved, revision="main"), MergedCLIPVisionModel)


def test_a_read_model_may_be_saved_again(saved, tmp_path):
    first = MergedCLIPVisionModel.from_pretrained(saved)
    first.save_pretrained(tmp_path / "again")
    again = MergedCLIPVisionModel.from_pretrained(tmp_path / "again")
    assert same_state(again.own_state(), first.own_state())
    assert again.config.to_dict() == first.config.to_dict()


def test_reading_draws_no_random_numbers(saved):
    before = torch.get_rng_state()
    MergedCLIPVisionModel.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, "float16"], ids=["dtype", "name"])
@pytest.mark.parametrize("reader", [MergedCLIPVisionModel, AutoModel])
def test_a_dtype_converts_what_is_read(saved, reader, dtype):
    model = reader.from_pretrained(saved, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_a_subfolder_is_not_ignored(saved, modelpool):
    WEMoEAlgorithm().build(modelpool).save_pretrained(saved / "inner")
    model = MergedCLIPVisionModel.from_pretrained(saved, subfolder="inner")
    assert model.config.method == "wemoe"


def test_shards_are_read_back_and_replaced_by_a_single_file(saved):
    model = MergedCLIPVisionModel.from_pretrained(saved)
    model.save_pretrained(saved, max_shard_size="20KB")
    assert len(list(saved.glob("model-*.safetensors"))) > 1
    assert not (saved / "model.safetensors").exists()
    assert same_state(MergedCLIPVisionModel.from_pretrained(saved).own_state(), model.own_state())
    model.save_pretrained(saved)
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("I/O error: No space left")], ids=repr)
def test_a_failed_save_leaves_the_old_model(saved, monkeypatch, error):
    model = MergedCLIPVisionModel.from_pretrained(saved)
    before = copied(model.own_state())

    def full(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(merged_files, "save_torch_state_dict", full)
    with pytest.raises(FusionMergeError, match="No space left"):
        model.save_pretrained(saved)
    assert same_state(MergedCLIPVisionModel.from_pretrained(saved).own_state(), before)
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_folder_that_cannot_be_made_is_an_error(saved, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FusionMergeError, match="cannot write"):
        MergedCLIPVisionModel.from_pretrained(saved).save_pretrained(tmp_path / "file" / "merged")


def test_other_processes_than_the_main_one_write_nothing(saved, tmp_path):
    MergedCLIPVisionModel.from_pretrained(saved).save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_pickles_are_not_written(saved, tmp_path):
    with pytest.raises(ConfigError, match="safe_serialization"):
        MergedCLIPVisionModel.from_pretrained(saved).save_pretrained(tmp_path / "none", safe_serialization=False)


PLACES = {
    "expert": "vision_model.encoder.layers.1.mlp.fc1.experts.left",
    "router": "vision_model.encoder.layers.0.mlp.router.out.weight",
    "base": "vision_model.encoder.layers.0.mlp.fc2.base.bias",
    "outside": "vision_model.post_layernorm.weight",
}


@pytest.mark.parametrize("name", PLACES.values(), ids=PLACES)
def test_a_missing_tensor_is_refused_by_name(saved, name):
    _edit_weights(saved, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks `{name}`"):
        MergedCLIPVisionModel.from_pretrained(saved)


def test_an_unexpected_tensor_is_refused_by_name(saved):
    _edit_weights(saved, lambda tensors: tensors.update({"vision_model.extra": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"unexpectedly, `vision_model\.extra`"):
        MergedCLIPVisionModel.from_pretrained(saved)


@pytest.mark.parametrize("name", PLACES.values(), ids=PLACES)
def test_a_tensor_of_another_shape_is_refused_by_name(saved, name):
    _edit_weights(saved, lambda tensors: tensors.update({name: torch.zeros(2, 2)}))
    with pytest.raises(CheckpointError, match=rf"`{name}` of shape \(2, 2\)"):
        MergedCLIPVisionModel.from_pretrained(saved)


def test_auto_model_refuses_an_incomplete_file_too(saved):
    _edit_weights(saved, lambda tensors: tensors.pop(PLACES["router"]))
    with pytest.raises(CheckpointError, match="lacks"):
        AutoModel.from_pretrained(saved)


def test_a_configuration_that_routes_nothing_does_not_fit_routed_weights(saved):
    _edit_config(saved, moe={})
    with pytest.raises(CheckpointError):
        MergedCLIPVisionModel.from_pretrained(saved)


def test_a_configuration_that_routes_what_is_not_there_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    spec = config["moe"]["encoder.layers.0.mlp"]
    _edit_config(saved, moe=config["moe"] | {"encoder.layers.7.mlp": spec})
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.7\.mlp"):
        MergedCLIPVisionModel.from_pretrained(saved)


def test_another_kind_of_model_is_refused(pool_dir):
    with pytest.raises(CheckpointError, match="'clip', not a merged one"):
        MergedCLIPVisionModel.from_pretrained(pool_dir / "pretrained")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, file):
    (saved / file).unlink()
    with pytest.raises(ModelError, match=file):
        MergedCLIPVisionModel.from_pretrained(saved)


def test_a_truncated_file_is_refused(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot read weights from .*model\.safetensors"):
        MergedCLIPVisionModel.from_pretrained(saved)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        MergedCLIPVisionModel.from_pretrained(tmp_path / "nowhere")


def test_an_unknown_option_is_refused(saved):
    with pytest.raises(ConfigError, match="`load_in_5bit`"):
        MergedCLIPVisionModel.from_pretrained(saved, load_in_5bit=True)


def test_a_merged_model_is_called_like_a_vision_tower(model):
    outputs = model(pixel_values=_pixels(), output_hidden_states=True)
    assert outputs.pooler_output.shape == (3, 16)
    assert len(outputs.hidden_states) == 3


def test_before_adaptation_a_constant_router_gives_task_arithmetic(modelpool):
    from fusion_merge.models.clip import build_tower
    from fusion_merge.task_vectors import task_arithmetic

    states = [modelpool.state(name) for name in modelpool.model_names]
    merged = build_tower(
        modelpool.config(), task_arithmetic(modelpool.state("_pretrained_"), states, 0.3), where="merge"
    )
    routed = METHODS["constant"].build(modelpool)
    torch.testing.assert_close(_outputs(routed), _outputs(merged), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["as_is", "float16"])
def test_a_static_tower_is_read_by_transformers_with_no_missing_key(modelpool, tmp_path, dtype):
    tower = modelpool.load_model("cats")
    save_tower(tower, tmp_path / "tower", dtype)
    again, info = CLIPVisionModel.from_pretrained(tmp_path / "tower", output_loading_info=True, dtype=torch.float32)
    assert not any(info.values())
    tolerance = 0 if dtype is None else 1e-2
    torch.testing.assert_close(_outputs(again), _outputs(tower), atol=tolerance, rtol=tolerance)


# Exact on disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_every_model_comes_back_bit_for_bit_in_every_precision(modelpool, tmp_path, name, dtype):
    model = _build(modelpool, name).to(dtype)
    model.save_pretrained(tmp_path)
    again = MergedCLIPVisionModel.from_pretrained(tmp_path)
    assert same_state(again.state_dict(), model.state_dict())
    pixels = torch.randn(3, 3, 16, 16, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).pooler_output, model(pixels).pooler_output)
    stored = load_file(tmp_path / "model.safetensors")
    routers = {name.split(".router.")[0] for name in stored if ".router." in name}
    assert len(routers) == (1 if model.config.shared_router else 2)  # a shared router is stored once


def test_a_flipped_bit_is_noticed(saved):
    file = saved / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: its weights are not those that were written"):
        MergedCLIPVisionModel.from_pretrained(saved)


# One task's tower


def test_a_task_model_is_a_plain_tower_that_computes_the_merge_at_mean_coefficients(modelpool, taskpool):
    model = RankOneMoEAlgorithm(rank_k=4, max_steps=2, batch_size=4).run(modelpool)
    pixels = torch.stack([pixels for pixels, _ in taskpool.images("cats")])
    means = model.measure("cats", [pixels[:5], pixels[5:]])
    tower = model.task_model("cats")
    assert type(tower) is CLIPVisionModel
    for layer, mean in zip(moe_layers(model.vision_model).values(), means, strict=True):
        assert layer.num_coefficients == len(mean)
        layer.router = ConstantRouter(len(mean))
        layer.router.coefficients.data = mean
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels).pooler_output, model(pixels).pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [WEMoEAlgorithm, EWEMoEAlgorithm])
def test_mean_coefficients_are_means_over_samples(modelpool, taskpool, method):
    model = method(max_steps=2, batch_size=4).run(modelpool)
    pixels = torch.stack([pixels for pixels, _ in taskpool.images("dogs")])
    with torch.no_grad(), record_coefficients(model) as record:
        for image in pixels:
            model(image.unsqueeze(0))
    expected = torch.stack([torch.cat(values).mean(dim=0) for values in record.values()])
    torch.testing.assert_close(model.task_coefficients[model.config.tasks.index("dogs")], expected)


def test_mean_coefficients_are_saved_with_the_model_and_its_routers(modelpool, tmp_path):
    options = {"max_steps": 2, "batch_size": 4}
    model = WEMoEAlgorithm(**options, save_checkpoint=str(tmp_path / "routers")).run(modelpool)
    assert model.config.measured_tasks == ["cats", "dogs"]
    model.save_pretrained(tmp_path / "merged")
    for again in (
        MergedCLIPVisionModel.from_pretrained(tmp_path / "merged"),
        WEMoEAlgorithm(checkpoint=str(tmp_path / "routers")).run(modelpool),
    ):
        expected = module_state(model.task_model("dogs"))
        assert same_state(module_state(again.task_model("dogs")), expected)


def test_coefficients_of_pruned_routers_are_not_taken_for_those_of_whole_ones(modelpool, tmp_path):
    options = {"max_steps": 2, "batch_size": 4, "save_checkpoint": str(tmp_path / "routers")}
    EWEMoEAlgorithm(**options, post_sparse_gate=True, gate_prune_ratio=0.5).run(modelpool)
    whole = EWEMoEAlgorithm(checkpoint=str(tmp_path / "routers")).run(modelpool)
    assert whole.config.measured_tasks == []


def test_a_task_model_needs_a_task_that_was_measured(modelpool):
    model = WEMoEAlgorithm(max_steps=0).run(modelpool)
    with pytest.raises(ModelError, match=r"coefficients of `cats` are not known; call `measure\('cats', batches\)`"):
        model.task_model("cats")
    with pytest.raises(ModelError, match="`cat` was not merged; did you mean `cats`"):
        model.task_model("cat")
    with pytest.raises(ModelError, match="no image of `cats`"):
        model.measure("cats", [])


# What a model says of itself


def test_the_card_tells_what_the_model_is_made_of(modelpool, tmp_path):
    model = WEMoEAlgorithm(max_steps=0).run(modelpool)
    model.config.base_model, model.config.models = "openai/clip-vit-base-patch32", {"cats": "me/cats@v1", "dogs": "/d"}
    model.save_pretrained(tmp_path)
    model.add_scores(tmp_path, {"cats": 0.5, "dogs": 0.25}, "fusion_merge method=wemoe")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == ["openai/clip-vit-base-patch32", "me/cats"]
    assert card.data.library_name == "fusion_merge"
    assert {"model-merging", "wemoe"} <= set(card.data.tags)
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("cats", "accuracy", 0.5),
        ("dogs", "accuracy", 0.25),
    ]
    for told in ("fusion_merge method=wemoe", "| `init_lambda` ", "| dogs   | /d ", "| cats   | 50.0    |"):
        assert told in card.text
    again = MergedCLIPVisionModel.from_pretrained(tmp_path)
    assert again.card() == model.card()
    assert same_state(again.state_dict(), model.state_dict())


def test_a_model_is_pushed_by_the_standard_mixin_with_its_own_card(modelpool, monkeypatch):
    """The hub cannot be reached from a test: what would be uploaded is kept."""
    uploaded = {}

    def upload(self, working_dir, repo_id, *_args, **_kwargs):
        uploaded.update({file.name: file.read_bytes() for file in Path(working_dir).iterdir()}, repo_id=repo_id)

    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr(HfApi, "create_repo", lambda _self, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    monkeypatch.setattr(transformers_hub, "create_repo", HfApi().create_repo, raising=False)
    monkeypatch.setattr(
        transformers_hub, "create_and_tag_model_card", lambda *_a, **_k: ModelCard("---\n{}\n---\nbare")
    )
    model = WEMoEAlgorithm(max_steps=0).run(modelpool)
    model.push_to_hub("me/merged")
    assert uploaded["repo_id"] == "me/merged"
    assert uploaded["README.md"].decode() == model.card()
    assert {"config.json", "model.safetensors"} < uploaded.keys()
