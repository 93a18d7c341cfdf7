"""Routed MLPs."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from helpers import BANKS, ToyMLP, ToyTower, make_bank, random_linear, random_task_vectors, upcycled_toy
from torch import nn
from torch.nn import functional as F

from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.moe import (
    ConstantRouter,
    MoELinear,
    MoEMLP,
    Routing,
    SoftTopK,
    make_router,
    moe_layers,
    record_coefficients,
    set_routing,
)
from fusion_merge.moe.blocks import empty_block
from fusion_merge.moe.layer import mlp_parts, router_parameters

N, D, HIDDEN, B, T = 3, 6, 10, 4, 3


def _x(batch: int = B) -> torch.Tensor:
    return torch.randn(batch, T, D, generator=torch.Generator().manual_seed(7))


def _mlp(kind: str = "dense", depth: int = 1, routing: Routing = Routing.SAMPLE, selection=None) -> MoEMLP:
    first = make_bank(kind, random_task_vectors(N, HIDDEN, D, seed=1))
    second = make_bank(kind, random_task_vectors(N, D, HIDDEN, seed=2))
    generator = torch.Generator().manual_seed(0)
    router = make_router(depth, D, first.num_coefficients, 0.3, hidden=D, generator=generator)
    for name, parameter in router.named_parameters():
        if name.endswith("weight"):
            parameter.data *= 50  # large enough to tell samples apart
    fc1, fc2 = random_linear(D, HIDDEN, seed=3), random_linear(HIDDEN, D, seed=4)
    return MoEMLP(MoELinear(fc1, first), nn.GELU(), MoELinear(fc2, second), router, routing, selection)


def _by_definition(mlp: MoEMLP, x: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Apply the MLP sample by sample with weights merged as `delta` says."""
    outputs = []
    for i, sample in enumerate(x):
        g = coefficients[min(i, len(coefficients) - 1)].unsqueeze(0)
        hidden = sample
        for layer in (mlp.fc1, mlp.fc2):
            weight, bias = layer.experts.delta(g)
            hidden = F.linear(hidden, layer.base.weight + weight[0], layer.base.bias + bias[0])
            hidden = mlp.activation(hidden) if layer is mlp.fc1 else hidden
        outputs.append(hidden)
    return torch.stack(outputs)


@pytest.mark.parametrize("routing", list(Routing))
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("kind", BANKS)
def test_forward_applies_both_layers_with_the_weights_of_one_router(kind, depth, routing):
    mlp, x = _mlp(kind, depth, routing), _x()
    expected = _by_definition(mlp, x, mlp.coefficients(x))
    torch.testing.assert_close(mlp(x), expected, atol=1e-4, rtol=1e-4)


def test_sample_routing_averages_over_tokens():
    mlp, x = _mlp(depth=2), _x()
    torch.testing.assert_close(mlp.coefficients(x), mlp.router(x).mean(dim=1))


def test_batch_routing_averages_over_samples_too():
    mlp, x = _mlp(depth=2, routing=Routing.BATCH), _x()
    torch.testing.assert_close(mlp.coefficients(x), mlp.router(x).mean(dim=(0, 1)).unsqueeze(0))


def test_the_outputs_of_a_two_layer_router_are_averaged_not_its_inputs():
    mlp, x = _mlp(depth=2), _x()
    of_mean = mlp.router(x.mean(dim=1, keepdim=True))[:, 0]
    assert not torch.allclose(mlp.coefficients(x), of_mean, atol=1e-3)


@pytest.mark.parametrize("routing", list(Routing))
def test_selection_comes_after_all_averaging(routing):
    plain, x = _mlp(depth=1, routing=routing), _x()
    selective = _mlp(depth=1, routing=routing, selection=SoftTopK(1))
    assert torch.equal(selective.coefficients(x), SoftTopK(1)(plain.coefficients(x)))


@pytest.mark.parametrize("kind", BANKS)
def test_batch_mates_do_not_matter_under_sample_routing(kind):
    mlp, x = _mlp(kind), _x()
    alone = torch.cat([mlp(x[i : i + 1]) for i in range(B)])
    torch.testing.assert_close(mlp(x), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", BANKS)
def test_batch_mates_matter_under_batch_routing(kind):
    mlp, x = _mlp(kind, routing=Routing.BATCH), _x()
    assert not torch.allclose(mlp(x)[:1], mlp(x[:1]), atol=1e-2)


@pytest.mark.parametrize("kind", BANKS)
def test_both_routings_agree_on_a_single_sample(kind):
    x = _x(1)
    torch.testing.assert_close(_mlp(kind, routing=Routing.BATCH)(x), _mlp(kind)(x))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_zero_coefficients_give_the_base_mlp(kind):
    mlp, x = _mlp(kind, depth=0), _x()
    mlp.router.coefficients.data.zero_()
    expected = mlp.fc2.base(mlp.activation(mlp.fc1.base(x)))
    torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", range(N))
def test_one_hot_coefficients_give_that_experts_mlp(task):
    mlp, x = _mlp("dense", depth=0), _x()
    mlp.router.coefficients.data = torch.eye(N)[task]
    hidden = x
    for layer in (mlp.fc1, mlp.fc2):
        weight = layer.base.weight + layer.experts.expand()[task]
        hidden = F.linear(hidden, weight, layer.base.bias + layer.experts.bias[task])
        hidden = F.gelu(hidden) if layer is mlp.fc1 else hidden
    torch.testing.assert_close(mlp(x), hidden, atol=1e-4, rtol=1e-4)


def test_routing_may_be_given_by_name():
    assert _mlp(routing="batch").routing is Routing.BATCH


def test_layers_and_router_must_agree_on_the_number_of_coefficients():
    mlp = _mlp("dense")
    with pytest.raises(ConfigError, match=r"\(3, 3, 4\)"):
        MoEMLP(mlp.fc1, nn.GELU(), mlp.fc2, ConstantRouter(4))


def test_a_layer_without_bias_is_refused():
    with pytest.raises(ModelError, match="without a bias"):
        MoELinear(nn.Linear(D, HIDDEN, bias=False), make_bank("dense", random_task_vectors(N, HIDDEN, D)))


@pytest.mark.parametrize("kind", BANKS)
def test_only_routers_are_trained(kind):
    mlp = _mlp(kind)
    assert {n for n, p in mlp.named_parameters() if p.requires_grad} == {"router.out.weight", "router.out.bias"}


@pytest.mark.parametrize("selection", [None, SoftTopK(2)], ids=["all", "soft_top_k"])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("kind", BANKS)
def test_an_empty_layer_takes_the_state_that_its_spec_was_made_from(kind, depth, selection):
    mlp, x = _mlp(kind, depth, Routing.BATCH, selection), _x()
    again = empty_block(mlp.spec(), ToyMLP(D, HIDDEN))
    again.activation = mlp.activation
    again.load_state_dict(mlp.state_dict())
    assert again.spec() == mlp.spec()
    assert torch.equal(again(x), mlp(x))


def test_an_empty_layer_may_take_the_router_of_an_earlier_one():
    mlp = _mlp()
    again = empty_block(mlp.spec(), ToyMLP(D, HIDDEN), shared_router=mlp.router)
    assert again.router is mlp.router


def test_mlp_parts_finds_layers_and_activation_whatever_it_is_called():
    mlp = ToyMLP(D, HIDDEN)
    assert mlp_parts(mlp) == (mlp.fc1, mlp.activation_fn, mlp.fc2)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), ToyTower()])
def test_other_modules_are_not_mlps(module):
    with pytest.raises(ModelError, match=type(module).__name__):
        mlp_parts(module)


def test_set_routing_reaches_every_layer():
    model = upcycled_toy()
    set_routing(model, "batch")
    assert [layer.routing for layer in moe_layers(model).values()] == [Routing.BATCH] * 2


@pytest.mark.parametrize(
    "visit",
    [
        moe_layers,
        router_parameters,
        lambda m: set_routing(m, Routing.SAMPLE),
        lambda m: record_coefficients(m).__enter__(),
    ],
    ids=["moe_layers", "router_parameters", "set_routing", "record_coefficients"],
)
def test_a_model_without_routed_layers_is_refused(visit):
    with pytest.raises(ModelError, match="`ToyTower` has no routed layer"):
        visit(ToyTower())


def test_an_unknown_routing_is_refused_by_name():
    with pytest.raises(ConfigError, match="token"):
        set_routing(upcycled_toy(), "token")


def test_routed_layers_come_in_forward_order():
    assert list(moe_layers(upcycled_toy())) == ["layers.0", "layers.1"]


@pytest.mark.parametrize(("shared", "count"), [(False, 4), (True, 2)])
def test_a_shared_router_is_trained_once(shared, count):
    model = upcycled_toy(shared=shared)
    assert len(router_parameters(model)) == count
    assert sum(p.requires_grad for p in model.parameters()) == count


@pytest.mark.parametrize(("routing", "rows"), [(Routing.SAMPLE, B), (Routing.BATCH, 1)])
def test_recorded_coefficients_are_those_that_were_used(routing, rows):
    model = upcycled_toy(routing=routing, selection=SoftTopK(2))
    with record_coefficients(model) as record:
        model(_x())
        model(_x(2))
    assert [t.shape for t in record["layers.0"]] == [(rows, N), (min(rows, 2), N)]
    first = model.layers[0]
    torch.testing.assert_close(record["layers.0"][0], first.coefficients(_x() * model.scale).detach())
    assert list(record) == ["layers.0", "layers.1"]


def test_recording_keeps_no_graph_and_ends_with_its_context():
    model = upcycled_toy()
    with contextlib.suppress(KeyError), record_coefficients(model) as record:
        model(_x())
        raise KeyError
    model(_x())
    assert len(record["layers.0"]) == 1
    assert not record["layers.0"][0].requires_grad


def test_a_deep_copy_routes_as_the_original():
    model = upcycled_toy(shared=True)
    again = copy.deepcopy(model)
    assert torch.equal(again(_x()), model(_x()))
    assert again.layers[0].router is again.layers[1].router
    assert again.layers[0].router is not model.layers[0].router
