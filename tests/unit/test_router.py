"""Routers."""

from __future__ import annotations

import math

import pytest
import torch

from fusion_merge.errors import ConfigError
from fusion_merge.moe import ConstantRouter, LayerEncodedRouter, LinearRouter, MLPRouter, make_router
from fusion_merge.moe.router import empty_router, layer_code

D, H, K, LAMBDA = 64, 48, 40, 0.3


def _make(depth: int, seed: int = 0):
    return make_router(depth, D, K, LAMBDA, hidden=H, generator=torch.Generator().manual_seed(seed))


def _tokens() -> torch.Tensor:
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("depth", "kind"), [(0, ConstantRouter), (1, LinearRouter), (2, MLPRouter)])
def test_depth_counts_linear_layers(depth, kind):
    router = _make(depth)
    assert type(router) is kind
    assert sum(isinstance(m, torch.nn.Linear) for m in router.modules()) == depth


@pytest.mark.parametrize("depth", [-1, 3])
def test_other_depths_are_refused(depth):
    with pytest.raises(ConfigError, match=f"`router_hidden_layers`={depth}"):
        _make(depth)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_routers_give_coefficients_for_each_token(depth):
    assert _make(depth)(_tokens()).shape == (2, 5, K)


@pytest.mark.parametrize(("depth", "count"), [(0, K), (1, D * K + K), (2, D * H + H + H * K + K)])
def test_routers_train_as_many_parameters_as_published(depth, count):
    assert sum(p.numel() for p in _make(depth).parameters() if p.requires_grad) == count


def test_a_constant_router_ignores_its_input():
    assert torch.equal(_make(0)(_tokens()), torch.full((2, 5, K), LAMBDA))


def test_a_linear_router_is_linear():
    router, tokens = _make(1), _tokens()
    torch.testing.assert_close(router(tokens), tokens @ router.out.weight.T + router.out.bias)


def test_an_mlp_router_has_a_relu_between_its_layers():
    router, tokens = _make(2), _tokens()
    hidden = (tokens @ router.inner.weight.T + router.inner.bias).clamp(min=0)
    torch.testing.assert_close(router(tokens), hidden @ router.out.weight.T + router.out.bias)


@pytest.mark.parametrize("depth", [1, 2])
def test_last_biases_start_at_lambda_and_inner_ones_at_zero(depth):
    router = _make(depth)
    assert torch.equal(router.out.bias, torch.full((K,), LAMBDA))
    if depth == 2:
        assert not router.inner.bias.any()


@pytest.mark.parametrize("name", ["inner", "out"])
def test_weights_start_as_noise_of_a_hundredth(name):
    weight = getattr(_make(2), name).weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert abs(weight.mean().item()) < 0.001


@pytest.mark.parametrize("depth", [1, 2])
def test_the_same_seed_gives_the_same_router_whatever_the_global_generator_does(depth):
    first = _make(depth)
    torch.rand(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), _make(depth).parameters(), strict=True))


@pytest.mark.parametrize("depth", [1, 2])
def test_another_seed_gives_another_router(depth):
    assert not torch.equal(_make(depth, 0).out.weight, _make(depth, 1).out.weight)


@pytest.mark.parametrize("depth", [1, 2])
def test_making_a_router_with_a_generator_leaves_the_global_one_alone(depth):
    before = torch.get_rng_state()
    _make(depth)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("layer", "dim"), [(0, 8), (3, 8), (11, 2), (5, 16)])
def test_the_position_code_is_all_sines_then_all_cosines(layer, dim):
    frequencies = [10000 ** (-2 * i / dim) for i in range(dim // 2)]
    expected = [math.sin(layer * w) for w in frequencies] + [math.cos(layer * w) for w in frequencies]
    torch.testing.assert_close(layer_code(layer, dim), torch.tensor(expected))


def test_the_position_code_is_prepended_to_every_token():
    shared = make_router(1, D + 8, K, LAMBDA, hidden=H, generator=torch.Generator().manual_seed(0))
    tokens = _tokens()
    code = layer_code(3, 8).expand(2, 5, 8)
    expected = shared(torch.cat([code, tokens], dim=-1))
    assert torch.equal(LayerEncodedRouter(shared, 3, 8)(tokens), expected)


def test_layer_encoded_routers_of_two_layers_share_parameters_and_decide_differently():
    shared = make_router(1, D + 8, K, LAMBDA, hidden=H, generator=torch.Generator().manual_seed(0))
    first, second = LayerEncodedRouter(shared, 0, 8), LayerEncodedRouter(shared, 1, 8)
    both = torch.nn.ModuleList([first, second])
    assert len(list(both.parameters())) == 2
    assert not torch.equal(first(_tokens()), second(_tokens()))


def test_the_position_code_is_not_stored():
    shared = make_router(1, D + 8, K, LAMBDA, hidden=H)
    assert not [name for name in LayerEncodedRouter(shared, 1, 8).state_dict() if "code" in name]


def test_a_layer_encoded_router_works_in_half_precision():
    shared = make_router(1, D + 8, K, LAMBDA, hidden=H)
    router = LayerEncodedRouter(shared, 1, 8).to(torch.bfloat16)
    assert router(_tokens().to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("dim", [-2, 0, 1, 7])
def test_odd_or_empty_position_codes_are_refused(dim):
    with pytest.raises(ConfigError, match=f"`position_encoding_dim`={dim}"):
        LayerEncodedRouter(ConstantRouter(K), 0, dim)


@pytest.mark.parametrize("depth", [0, 1, 2, "layer_encoded"])
def test_an_empty_router_takes_the_state_that_its_spec_was_made_from(depth):
    if depth == "layer_encoded":
        router = LayerEncodedRouter(make_router(2, D + 4, K, LAMBDA, hidden=H), 3, 4)
    else:
        router = _make(depth)
    copy = empty_router(router.spec())
    copy.load_state_dict(router.state_dict())
    assert copy.spec() == router.spec()
    assert torch.equal(copy(_tokens()), router(_tokens()))


def test_an_unknown_kind_of_router_is_refused():
    with pytest.raises(ConfigError, match="`oracle` is unknown"):
        empty_router({"kind": "oracle"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_pooled_coefficients_are_the_mean_over_tokens(depth, dtype):
    router = make_router(depth, 6, 5, 0.3, hidden=7, generator=torch.Generator().manual_seed(0))
    coded = LayerEncodedRouter(make_router(depth, 10, 5, 0.3, hidden=7), 2, 4) if depth else router
    tokens = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    for each in (router.to(dtype), coded.to(dtype)):
        found, expected = each.pooled(tokens), each(tokens).double().mean(dim=1)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.double(), expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)
