"""Attention with experts: the routed block equals the plain one at the merged weights, and knows when it is misused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_merge import MergedCLIPVisionModel, TaskArithmeticAlgorithm, WEMoEAlgorithm
from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.models.clip import vision_backbone
from fusion_merge.moe import (
    ConstantRouter,
    LinearRouter,
    LowRankExperts,
    MoEAttention,
    MoELinear,
    find_blocks,
    moe_layers,
    set_routing,
)
from fusion_merge.moe.attention import PROJECTIONS, attention_parts
from fusion_merge.moe.blocks import check_layers, empty_block, layers_of

D, N, RANK, TOKENS = 16, 3, 2, 5


@pytest.fixture
def plain() -> nn.Module:
    config = CLIPVisionConfig(
        **{"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2},
        **{"image_size": 8, "patch_size": 4, "projection_dim": 8},
    )
    torch.manual_seed(0)
    return vision_backbone(CLIPVisionModel(config)).requires_grad_(False).eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def bank() -> LowRankExperts:
    return LowRankExperts(
        torch.randn(D, N * RANK) / 4, torch.randn(N * RANK, D) / 4, torch.randn(N, D) / 4, bias_scaling=0.3
    )


def routed(attention: nn.Module) -> MoEAttention:
    own = copy.deepcopy(attention)
    projections = {name: MoELinear(linear, bank()) for name, linear in attention_parts(own).items()}
    router = LinearRouter(D, N * RANK, 0.3, torch.Generator().manual_seed(1))
    router.out.weight.data *= 30  # so that samples are told apart
    return MoEAttention(own, projections, router)


def test_each_sample_gets_the_attention_of_its_own_merged_weights(plain):
    attention = plain.encoder.layers[0].self_attn
    block, x = routed(attention), torch.randn(4, TOKENS, D)
    coefficients = block.coefficients(x)
    assert (coefficients.std(dim=0) > 1e-3).all()
    output = block(hidden_states=x, attention_mask=None)[0]
    for i in range(4):
        merged = copy.deepcopy(attention)
        for name, linear in block.linears().items():
            delta = linear.experts.delta(coefficients[i : i + 1])
            getattr(merged, name).weight.data += delta.weight[0]
            getattr(merged, name).bias.data += delta.bias[0]
        expected = merged(hidden_states=x[i : i + 1], attention_mask=None)[0]
        torch.testing.assert_close(output[i : i + 1], expected, atol=1e-5, rtol=1e-4)


def test_the_router_of_attention_gets_a_gradient_and_nothing_else_does(plain):
    block = routed(plain.encoder.layers[0].self_attn)
    block(hidden_states=torch.randn(2, TOKENS, D), attention_mask=None)[0].square().sum().backward()
    assert {name for name, p in block.named_parameters() if p.grad is not None} == {
        "router.out.weight",
        "router.out.bias",
    }
    assert block.router.out.weight.grad.abs().sum() > 0


def test_a_projection_called_by_itself_says_so(plain):
    block = routed(plain.encoder.layers[0].self_attn)
    with pytest.raises(ModelError, match="outside of its attention block"):
        block.attention.q_proj(torch.randn(1, TOKENS, D))
    block(hidden_states=torch.randn(1, TOKENS, D), attention_mask=None)
    with pytest.raises(ModelError, match="outside of its attention block"):  # no coefficients are left over
        block.attention.v_proj(torch.randn(1, TOKENS, D))


def test_a_copy_routes_by_itself(plain):
    block, x = routed(plain.encoder.layers[0].self_attn), torch.randn(2, TOKENS, D)
    before = block(hidden_states=x, attention_mask=None)[0]
    other = copy.deepcopy(block)
    other.router.out.bias.data += 1
    assert not torch.allclose(other(hidden_states=x, attention_mask=None)[0], before)
    assert torch.equal(block(hidden_states=x, attention_mask=None)[0], before)


def test_a_block_is_made_again_from_its_spec(plain):
    attention = plain.encoder.layers[0].self_attn
    block, x = routed(attention), torch.randn(2, TOKENS, D)
    again = empty_block(block.spec(), copy.deepcopy(attention))
    again.load_state_dict(block.state_dict())
    assert torch.equal(again(hidden_states=x, attention_mask=None)[0], block(hidden_states=x, attention_mask=None)[0])
    with pytest.raises(ModelError, match="kind 'attention' cannot take the place of `CLIPMLP`"):
        empty_block(block.spec(), plain.encoder.layers[0].mlp)


def test_counts_must_agree(plain):
    own = copy.deepcopy(plain.encoder.layers[0].self_attn)
    projections = {name: MoELinear(linear, bank()) for name, linear in attention_parts(own).items()}
    with pytest.raises(ConfigError, match=r"q_proj, k_proj, v_proj, out_proj and router have \(6, 6, 6, 6, 5\)"):
        MoEAttention(own, projections, ConstantRouter(5))


def test_blocks_are_found_in_forward_order(plain):
    names = list(find_blocks(plain, "all"))
    assert names[:4] == [f"encoder.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")]
    assert list(find_blocks(plain, "attention")) == names[::2]
    assert list(find_blocks(plain)) == names[1::2]
    with pytest.raises(ConfigError, match="`targets`='heads' is not possible; choose mlp or attention or all"):
        find_blocks(plain, "heads")


def test_layers_are_chosen_by_number_or_by_how_far_they_moved():
    blocks = [f"encoder.layers.{i}.mlp" for i in range(4)]
    by_hand = {"encoder.layers.2.mlp": 0, "encoder.layers.0.mlp": 1}
    order = lambda names: sorted(names, key=lambda name: by_hand.get(name, 9))  # noqa: E731
    assert layers_of("all", blocks, order) == [0, 1, 2, 3]
    assert layers_of([3, 1], blocks, order) == [3, 1]
    assert layers_of("critical:2", blocks, order) == [0, 2]


@pytest.mark.parametrize("wrong", ["critical:0", "critical:x", "some", [-1], [1, 1], []])
def test_what_can_be_no_choice_of_layers_is_refused_before_there_is_a_model(wrong):
    with pytest.raises(ConfigError, match="is not possible; choose"):
        WEMoEAlgorithm(layers=wrong)


@pytest.mark.parametrize("wrong", ["critical:0", "critical:5", "critical:x", "some", [4], [-1], [1, 1], []])
def test_layers_that_are_not_there_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"`layers`=.* is not possible; choose .*all"):
        check_layers(wrong, 4)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_constant_coefficients_in_attention_are_task_arithmetic(modelpool, pixels, targets):
    options = {"init_lambda": 0.4, "router_hidden_layers": 0, "max_steps": 0, "targets": targets}
    expected = TaskArithmeticAlgorithm(scaling_factor=0.4).run(modelpool)(pixels).pooler_output
    model = WEMoEAlgorithm(**options).run(modelpool)
    output = model(pixels).pooler_output
    if targets == "attention":  # the MLPs are merged statically
        assert {name.rpartition(".")[2] for name in moe_layers(model)} == {"self_attn"}
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("routing", ["sample", "batch"])
def test_a_model_with_routed_attention_is_saved_and_read_again(modelpool, pixels, tmp_path, routing):
    model = WEMoEAlgorithm(targets="all", layers=[1], router_hidden_layers=1, max_steps=0).run(modelpool)
    set_routing(model, routing)
    assert list(moe_layers(model)) == [f"vision_model.encoder.layers.1.{part}" for part in ("self_attn", "mlp")]
    model.save_pretrained(tmp_path / "merged")
    again = MergedCLIPVisionModel.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(pixels).pooler_output, model(pixels).pooler_output)


def test_a_task_s_plain_tower_has_its_attention_merged(modelpool, pixels):
    model = WEMoEAlgorithm(targets="all", router_hidden_layers=0, max_steps=0).run(modelpool)
    task = modelpool.model_names[0]
    model.measure(task, [pixels])
    plain = model.task_model(task)
    assert attention_parts(vision_backbone(plain).encoder.layers[0].self_attn).keys() == set(PROJECTIONS)
    torch.testing.assert_close(plain(pixels).pooler_output, model(pixels).pooler_output, atol=1e-5, rtol=1e-4)


def test_critical_layers_are_those_that_moved_most(modelpool):
    model = WEMoEAlgorithm(layers="critical:1", max_steps=0).run(modelpool)
    moved = {}
    pretrained = modelpool.state("_pretrained_")
    for name in modelpool.model_names:
        for key, tensor in modelpool.state(name).items():
            if ".mlp." in key:
                layer = key.partition(".mlp.")[0]
                squared, norm = moved.setdefault((layer, name), [0.0, 0.0])
                difference = (tensor.double() - pretrained[key].double()).square().sum().item()
                moved[layer, name] = [squared + difference, norm + pretrained[key].double().square().sum().item()]
    share = {layer: sum((d / n) ** 0.5 for (of, _), (d, n) in moved.items() if of == layer) for layer, _ in moved}
    assert list(moe_layers(model)) == [f"vision_model.{max(share, key=share.get)}.mlp"]
