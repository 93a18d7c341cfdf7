"""What knows CLIP's insides: names, towers, processors, text embeddings, heads."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import copied, same_state
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModel

from fusion_merge.errors import DataError, ModelError
from fusion_merge.models.clip import (
    Processor,
    build_tower,
    canonical_names,
    check_same_arithmetic,
    expected_shapes,
    load_clip,
    load_processor,
    module_config,
    module_state,
    pooled_output,
    split_processor,
    text_embeddings,
    vision_backbone,
    vision_config,
)
from fusion_merge.pools.datasets import ImageTask
from fusion_merge.pools.heads import class_embeddings, zero_shot_head

CLASSES = ("tabby", "siamese", "a long haired persian")


@pytest.fixture
def clip(pool_dir) -> CLIPModel:
    return load_clip(str(pool_dir / "pretrained"), where="here")


@pytest.fixture
def processor(pool_dir) -> Processor:
    return load_processor(str(pool_dir / "pretrained"), where="here")


@pytest.fixture
def copy_of_pretrained(pool_dir, tmp_path):
    return shutil.copytree(pool_dir / "pretrained", tmp_path / "copy")


def _edit_weights(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _plain_text_embeddings(clip, processor, prompts: list[str]) -> torch.Tensor:
    """Embed prompts one at a time by the whole CLIP model."""
    rows = []
    for prompt in prompts:
        tokens = processor.tokenizer(text=[prompt], return_tensors="pt", truncation=True, max_length=24)
        with torch.no_grad():
            rows.append(clip(**tokens, pixel_values=torch.zeros(1, 3, 16, 16)).text_embeds[0])
    return torch.stack(rows)


CANONICAL = (
    "embeddings.class_embedding",
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
    "pre_layrnorm.weight",
    "encoder.layers.0.mlp.fc1.weight",
    "post_layernorm.bias",
)


@pytest.mark.parametrize(
    "prefix", ["", "vision_model.", "clip.vision_model.", "model.vision_model.", "module.vision_model."]
)
@pytest.mark.parametrize("name", CANONICAL)
def test_every_layout_has_the_same_canonical_names(prefix, name):
    assert canonical_names([prefix + name]) == {name: prefix + name}


@pytest.mark.parametrize(
    "name",
    [
        "logit_scale",
        "visual_projection.weight",
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "clip.text_model.embeddings.position_embedding.weight",
        "vision_model.embeddings.position_ids",
        "classifier.weight",
    ],
)
def test_other_tensors_than_the_vision_towers_are_ignored(name):
    assert canonical_names([name]) == {}


def test_two_names_for_one_tensor_are_refused():
    with pytest.raises(ModelError, match="are the same tensor"):
        canonical_names(["vision_model.pre_layrnorm.weight", "pre_layrnorm.weight"])


def test_the_tower_inside_each_kind_of_module_is_the_same(clip):
    tower = build_tower(module_config(clip), module_state(clip), where="here")
    for module in (tower, vision_backbone(tower), vision_backbone(clip)):
        assert same_state(module_state(module), module_state(clip))


def test_a_built_tower_computes_what_the_clip_model_computes(clip):
    tower = build_tower(module_config(clip), module_state(clip), where="here")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = clip.vision_model(pixel_values=pixels).pooler_output
    assert torch.equal(pooled_output(tower(pixel_values=pixels)), expected)


def test_building_a_tower_copies_the_weights(clip):
    before = copied(module_state(clip))
    tower = build_tower(module_config(clip), module_state(clip), where="here")
    for parameter in tower.parameters():
        parameter.data.zero_()
    assert same_state(module_state(clip), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("pre_layrnorm.bias"), "the cat model lacks `pre_layrnorm.bias`"),
        (lambda s: s.update({"encoder.layers.2.mlp.fc1.bias": torch.zeros(24)}), r"unexpectedly, `encoder\.layers\.2"),
        (lambda s: s.update({"pre_layrnorm.bias": torch.zeros(3)}), r"`pre_layrnorm\.bias` of shape \(3,\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_a_state_that_does_not_fit_builds_no_tower(clip, change, message):
    state = module_state(clip)
    change(state)
    with pytest.raises(ModelError, match=message):
        build_tower(module_config(clip), state, where="the cat model")


def test_expected_shapes_are_those_of_the_weights(clip):
    shapes = {name: tuple(t.shape) for name, t in module_state(clip).items()}
    assert expected_shapes(module_config(clip)) == shapes


def test_modules_that_are_not_clip_are_refused():
    with pytest.raises(ModelError, match="`Linear` is not a CLIP vision model"):
        vision_backbone(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("model", ["pretrained", "cats"], ids=["whole", "tower"])
def test_the_vision_configuration_is_found_in_either_kind(pool_dir, model):
    config = json.loads((pool_dir / model / "config.json").read_text())
    found = vision_config(config, where="here")
    assert (found.hidden_size, found.num_hidden_layers, found.image_size) == (16, 2, 16)


def test_the_configuration_of_another_model_is_refused():
    with pytest.raises(ModelError, match="`model_type` is 'bert' in the config of here"):
        vision_config({"model_type": "bert"}, where="here")


@pytest.mark.parametrize("return_dict", [True, False], ids=["object", "tuple"])
def test_the_pooled_output_is_found_in_every_kind_of_output(pool_dir, return_dict):
    tower = CLIPVisionModel.from_pretrained(pool_dir / "cats")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    output = tower(pixel_values=pixels, return_dict=return_dict)
    assert isinstance(output, tuple) is not return_dict
    torch.testing.assert_close(pooled_output(output), tower(pixel_values=pixels).pooler_output)


def test_a_tensor_is_its_own_pooled_output():
    tensor = torch.ones(2, 3)
    assert pooled_output(tensor) is tensor


def test_load_clip_gives_a_frozen_model_in_eval_mode_and_float32(copy_of_pretrained):
    _edit_weights(copy_of_pretrained, lambda s: s.update({n: t.half() for n, t in s.items() if t.is_floating_point()}))
    clip = load_clip(str(copy_of_pretrained), where="here")
    assert {p.dtype for p in clip.parameters()} == {torch.float32}
    assert not clip.training
    assert not any(p.requires_grad for p in clip.parameters())


def test_load_clip_refuses_a_tower_without_text(pool_dir):
    with pytest.raises(ModelError, match=r"the cat tower .*lacks|cannot read the cat tower"):
        load_clip(str(pool_dir / "cats"), where="the cat tower")


def test_load_clip_refuses_a_missing_tensor_by_name(copy_of_pretrained):
    _edit_weights(copy_of_pretrained, lambda s: s.pop("text_projection.weight"))
    with pytest.raises(ModelError, match=r"here lacks `text_projection\.weight`"):
        load_clip(str(copy_of_pretrained), where="here")


def test_load_clip_refuses_a_tensor_of_another_shape(copy_of_pretrained):
    _edit_weights(copy_of_pretrained, lambda s: s.update({"text_projection.weight": torch.zeros(3, 16)}))
    with pytest.raises(ModelError, match="here"):
        load_clip(str(copy_of_pretrained), where="here")


def test_load_clip_refuses_a_truncated_file(copy_of_pretrained):
    weights = copy_of_pretrained / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot read here as a CLIP model"):
        load_clip(str(copy_of_pretrained), where="here")


def test_load_clip_refuses_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="cannot read `here`"):
        load_clip(str(tmp_path), where="`here`")


def test_load_processor_refuses_a_folder_without_one(pool_dir):
    with pytest.raises(ModelError, match="cannot read a CLIP processor from the cat tower"):
        load_processor(str(pool_dir / "cats"), where="the cat tower")


def test_images_of_any_size_and_mode_are_preprocessed(processor):
    for mode, size in (("RGB", (40, 20)), ("L", (10, 10)), ("RGBA", (16, 30)), ("P", (9, 17))):
        assert processor.preprocess(Image.new(mode, size)).shape == (3, 16, 16)


def test_preprocessing_is_that_of_pil(processor):
    rgb = Image.new("RGB", (20, 20), (255, 0, 128))
    expected = (torch.tensor([255, 0, 128]) / 255 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(processor.preprocess(rgb)[:, 3, 5], expected, atol=1e-5, rtol=1e-5)


def _pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 22, 3)).astype(np.uint8)


AS_ARRAY = {
    "bytes": lambda a: a,
    "whole numbers": lambda a: a.astype(np.int64),
    "floats": lambda a: a.astype(np.float32) / 255,
    "doubles": lambda a: a / 255,
    "byte tensor": lambda a: torch.from_numpy(a),
    "channels first": lambda a: a.transpose(2, 0, 1),
    "ToTensor": lambda a: torch.from_numpy(a).permute(2, 0, 1) / 255,
    "doubles in a tensor": lambda a: torch.from_numpy(a).permute(2, 0, 1).double() / 255,
}


@pytest.mark.parametrize("kind", AS_ARRAY)
def test_arrays_are_preprocessed_as_the_same_picture(processor, kind):
    expected = processor.preprocess(Image.fromarray(_pixels()))
    assert torch.equal(processor.preprocess(AS_ARRAY[kind](_pixels())), expected)


@pytest.mark.parametrize(
    ("array", "values"),
    [
        (_pixels() / 1.0, r"float64 values from 0 to 255"),
        (_pixels() / 255 * 2 - 1, r"float64 values from -1 to 1"),
        (torch.tensor(_pixels() / 127.5 - 1).bfloat16(), r"float32 values from -1 to 1"),
        (_pixels().astype(np.int32) * 257, r"int32 values from 0 to 65535"),
        (np.full((4, 4, 3), np.nan), r"float64 values from nan to nan"),
    ],
    ids=["floats to 255", "normalised", "half precision", "16 bits", "nan"],
)
def test_arrays_of_another_range_are_refused(processor, array, values):
    with pytest.raises(DataError, match=f"an image holds {values}; give a PIL image"):
        processor.preprocess(array)


@pytest.mark.parametrize("what", ["cat.png", None, np.zeros((4, 4, 3), bool)])
def test_what_is_no_picture_is_refused(processor, what):
    with pytest.raises(DataError, match="give a PIL image"):
        processor.preprocess(what)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("num_attention_heads", 4),
        ("layer_norm_eps", 1e-6),
        ("image_size", 17),
        ("patch_size", 4),
    ],
)
def test_towers_that_compute_otherwise_are_refused(clip, key, value):
    own = module_config(clip)
    other = copy.deepcopy(own)
    check_same_arithmetic(own, other, where="the cat model")
    setattr(other, key, value)
    with pytest.raises(ModelError, match=f"the cat model has `{key}`={value!r}.*has {getattr(own, key)!r}"):
        check_same_arithmetic(own, other, where="the cat model")


def test_a_processor_object_is_split_into_its_halves(processor):
    class Whole:
        image_processor, tokenizer = processor.image_processor, processor.tokenizer

    assert split_processor(Whole()) == processor
    assert split_processor(processor) is processor


def test_what_is_no_processor_is_refused():
    with pytest.raises(ModelError, match="`processor` is a int"):
        split_processor(3)


def test_text_embeddings_equal_a_plain_computation(clip, processor):
    prompts = [f"a photo of a {name}." for name in CLASSES]
    expected = _plain_text_embeddings(clip, processor, prompts)
    torch.testing.assert_close(text_embeddings(clip, processor.tokenizer, prompts), expected)


def test_text_embeddings_do_not_depend_on_the_batch_size(clip, processor):
    prompts = ["a", "a photo of a cat", "b", "many more words here", "c"]
    one = text_embeddings(clip, processor.tokenizer, prompts, batch_size=1)
    torch.testing.assert_close(text_embeddings(clip, processor.tokenizer, prompts, batch_size=2), one)


def test_prompts_that_are_too_long_are_cut(clip, processor):
    assert text_embeddings(clip, processor.tokenizer, ["word " * 60]).shape == (1, 12)


def test_class_embeddings_average_unit_vectors_over_templates(clip, processor):
    templates = ["a photo of a {}.", "a drawing of the {}.", "{}"]
    rows = []
    for name in CLASSES:
        each = _plain_text_embeddings(clip, processor, [t.replace("{}", name) for t in templates])
        mean = (each / each.norm(dim=-1, keepdim=True)).mean(dim=0)
        rows.append(mean / mean.norm())
    torch.testing.assert_close(class_embeddings(clip, processor.tokenizer, CLASSES, templates), torch.stack(rows))


def _task(templates: tuple[str, ...] = ("a photo of a {}.",)) -> ImageTask:
    return ImageTask("cats", [], 0, 1, CLASSES, templates)


def test_heads_give_the_logits_of_a_plain_clip_model_sample_by_sample(clip, processor, pool_dir):
    head = zero_shot_head(clip, processor.tokenizer, _task())
    tower = CLIPVisionModel.from_pretrained(pool_dir / "pretrained").eval()
    prompts = [f"a photo of a {name}." for name in CLASSES]
    tokens = processor.tokenizer(text=prompts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    for file in sorted((pool_dir / "images" / "cats" / "tabby").iterdir()):
        pixels = processor.preprocess(Image.open(file)).unsqueeze(0)
        with torch.no_grad():
            expected = clip(**tokens, pixel_values=pixels).logits_per_image
            torch.testing.assert_close(head(pooled_output(tower(pixel_values=pixels))), expected, atol=1e-4, rtol=1e-4)


def test_heads_scale_cosines_by_the_exponential_of_the_logit_scale(clip, processor):
    head = zero_shot_head(clip, processor.tokenizer, _task())
    pooled = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(10 * pooled), head(pooled))
    assert head(pooled).abs().max() <= clip.logit_scale.exp()


def test_heads_are_frozen_and_do_not_share_memory_with_the_model(clip, processor):
    head = zero_shot_head(clip, processor.tokenizer, _task())
    before = copied(clip.state_dict())
    assert not list(head.parameters())
    for tensor in head.buffers():
        tensor.zero_()
    assert same_state(clip.state_dict(), before)


def test_gradient_flows_through_a_head_to_the_pooled_output(clip, processor):
    head = zero_shot_head(clip, processor.tokenizer, _task())
    pooled = torch.randn(2, 16, requires_grad=True)
    head(pooled)[:, 0].sum().backward()
    assert pooled.grad.any()
