"""Upcycling MLPs into mixtures of experts."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import BANKS, ToyTower, copied, make_bank, same_state, toy_states, upcycled_toy
from torch import nn

from fusion_merge.errors import ModelError
from fusion_merge.moe import (
    ConstantRouter,
    DenseExperts,
    LowRankExperts,
    Routing,
    SelectAll,
    SoftTopK,
    find_mlps,
    moe_layers,
    route_mlps,
    upcycle_mlps,
)
from fusion_merge.task_vectors import task_arithmetic


def _x() -> torch.Tensor:
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(5))


def _upcycle(merged, pretrained, finetuned, **options):
    options.setdefault("make_experts", lambda _path, vectors: DenseExperts.from_task_vectors(vectors))
    options.setdefault("make_router", lambda _index, _width, count: ConstantRouter(count, 0.3))
    return upcycle_mlps(merged, pretrained, finetuned, routing=Routing.SAMPLE, **options)


def _statically_merged(tower, finetuned) -> ToyTower:
    merged = ToyTower()
    merged.load_state_dict(task_arithmetic(tower.state_dict(), finetuned, 0.3))
    return merged


@pytest.mark.parametrize("kind", BANKS)
def test_inputs_are_unchanged_bit_for_bit(kind):
    tower, finetuned = toy_states()
    merged = _statically_merged(tower, finetuned)
    pretrained = tower.state_dict()
    before = [copied(s) for s in (merged.state_dict(), pretrained, *finetuned)]
    modules = [type(m) for m in merged.modules()]
    model = _upcycle(merged, pretrained, finetuned, make_experts=lambda _p, v: make_bank(kind, v))
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert all(same_state(s, b) for s, b in zip((merged.state_dict(), pretrained, *finetuned), before, strict=True))
    assert [type(m) for m in merged.modules()] == modules
    assert all(p.requires_grad for p in merged.parameters())


def test_the_base_of_a_routed_mlp_is_the_pretrained_one():
    tower, finetuned = toy_states()
    model = _upcycle(_statically_merged(tower, finetuned), tower.state_dict(), finetuned)
    for upcycled, plain in zip(model.layers, tower.layers, strict=True):
        assert same_state(upcycled.fc1.base.state_dict(), plain.fc1.state_dict())
        assert same_state(upcycled.fc2.base.state_dict(), plain.fc2.state_dict())


def test_everything_outside_the_mlps_stays_at_the_static_merge():
    tower, finetuned = toy_states()
    merged = _statically_merged(tower, finetuned)
    assert torch.equal(_upcycle(merged, tower.state_dict(), finetuned).scale, merged.scale)


def test_constant_dense_routing_is_task_arithmetic_before_adaptation():
    tower, finetuned = toy_states()
    merged = _statically_merged(tower, finetuned)
    model = _upcycle(merged, tower.state_dict(), finetuned)
    torch.testing.assert_close(model(_x()), merged(_x()), atol=1e-5, rtol=1e-5)


def test_constant_full_rank_routing_is_task_arithmetic_before_adaptation():
    tower, finetuned = toy_states()
    merged = _statically_merged(tower, finetuned)
    model = _upcycle(
        merged,
        tower.state_dict(),
        finetuned,
        make_experts=lambda _path, vectors: LowRankExperts.from_task_vectors(vectors, -1, 0.3),
    )
    torch.testing.assert_close(model(_x()), merged(_x()), atol=1e-5, rtol=1e-5)


def test_experts_and_routers_are_asked_for_layer_by_layer():
    tower, finetuned = toy_states()
    paths, routers = [], []

    def experts(path, vectors):
        paths.append((path, len(vectors), tuple(vectors[0].weight.shape)))
        return DenseExperts.from_task_vectors(vectors)

    def router(index, width, count):
        routers.append((index, width, count))
        return ConstantRouter(count)

    _upcycle(tower, tower.state_dict(), finetuned, make_experts=experts, make_router=router)
    assert paths == [
        (f"layers.{i}.{fc}", 3, shape) for i in range(2) for fc, shape in (("fc1", (10, 6)), ("fc2", (6, 10)))
    ]
    assert routers == [(0, 6, 3), (1, 6, 3)]


def test_gradient_reaches_the_routers_alone():
    model = upcycled_toy("low_rank")
    model(_x()).square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {f"layers.{i}.router.out.{t}" for i in range(2) for t in ("weight", "bias")}


def test_each_layer_gets_a_selection_of_its_own():
    first, second = (layer.selection for layer in moe_layers(upcycled_toy(selection=SoftTopK(2))).values())
    assert first is not second
    assert first.k == second.k == 2


def test_without_a_selection_all_coefficients_take_part():
    assert all(isinstance(layer.selection, SelectAll) for layer in moe_layers(upcycled_toy()).values())


def test_a_model_equal_to_the_pretrained_one_is_noted_by_name(caplog):
    tower, finetuned = toy_states()
    finetuned[1] = copied(tower.state_dict())
    with caplog.at_level(logging.INFO, logger="fusion_merge"):
        model = _upcycle(tower, tower.state_dict(), finetuned, task_names=["cats", "dogs", "birds"])
    (note,) = caplog.messages
    assert note.startswith("no expert of task `dogs` changes a layer: ")
    assert note.endswith("routers choose among the experts of the other tasks")
    assert not model.layers[0].fc1.experts.weight[1].any()


def test_a_model_that_leaves_one_mlp_as_it_is_is_noted_by_name(caplog):
    tower, finetuned = toy_states()
    finetuned[1] |= {n: t.clone() for n, t in tower.state_dict().items() if n.startswith("layers.0.")}
    with caplog.at_level(logging.INFO, logger="fusion_merge"):
        _upcycle(tower, tower.state_dict(), finetuned, task_names=["cats", "dogs", "birds"])
    (note,) = caplog.messages
    assert note.startswith("`dogs` equals the pretrained model in 2 of 4 routed layers")


class _InFactors(dict):
    """A state that knows the task vector of each weight in factors."""

    def __init__(self, pretrained, state, factors):
        super().__init__(state)
        self.pretrained, self._factors = pretrained, factors

    def factors(self, name):
        return self._factors.get(name)


def test_task_vectors_carry_the_factors_that_a_state_has_of_this_very_pretrained_state():
    tower, (finetuned, *_) = toy_states()
    pretrained = tower.state_dict()
    factors = {"layers.0.fc1.weight": (torch.randn(10, 2), torch.randn(2, 6))}
    seen = []

    def look(path, vectors):
        seen.extend(v for v in vectors if path == "layers.0.fc1")
        return make_bank("low_rank", vectors)

    for known in (pretrained, copied(pretrained)):
        _upcycle(tower, pretrained, [_InFactors(known, finetuned, factors)], make_experts=look)
    assert seen[0].factors is factors["layers.0.fc1.weight"]
    assert torch.equal(seen[0].weight, seen[0].factors[0] @ seen[0].factors[1])
    assert torch.equal(seen[0].bias, finetuned["layers.0.fc1.bias"] - pretrained["layers.0.fc1.bias"])
    assert seen[1].factors is None
    assert torch.equal(seen[1].weight, finetuned["layers.0.fc1.weight"] - pretrained["layers.0.fc1.weight"])


@pytest.mark.parametrize("kind", BANKS)
def test_a_model_equal_to_the_pretrained_one_works_in_every_bank(kind):
    tower, finetuned = toy_states()
    finetuned[1] = copied(tower.state_dict())
    model = _upcycle(tower, tower.state_dict(), finetuned, make_experts=lambda _p, v: make_bank(kind, v))
    assert torch.isfinite(model(_x())).all()


def test_models_that_differ_everywhere_are_not_noted(caplog):
    tower, finetuned = toy_states()
    with caplog.at_level(logging.INFO, logger="fusion_merge"):
        _upcycle(tower, tower.state_dict(), finetuned)
    assert not caplog.messages


def test_progress_is_told_once_an_mlp():
    tower, finetuned = toy_states()
    ticks = []
    _upcycle(tower, tower.state_dict(), finetuned, progress=lambda: ticks.append(1))
    assert len(ticks) == 2


def test_a_model_without_mlps_is_refused():
    with pytest.raises(ModelError, match="`Linear` has no MLP"):
        _upcycle(nn.Linear(2, 2), {}, [])


def test_a_model_that_is_routed_already_is_refused():
    model = upcycled_toy()
    with pytest.raises(ModelError, match="has no MLP"):
        _upcycle(model, model.state_dict(), [])


def test_a_layer_without_bias_is_refused_by_name():
    tower, finetuned = toy_states()
    tower.layers[1].fc2 = nn.Linear(10, 6, bias=False)
    with pytest.raises(ModelError, match=r"`layers\.1\.fc2` has no bias"):
        _upcycle(tower, finetuned[0], finetuned)


def test_mlps_are_found_in_forward_order():
    assert list(find_mlps(ToyTower(depth=3))) == ["layers.0", "layers.1", "layers.2"]


def test_lazily_read_states_are_read_one_tensor_at_a_time():
    tower, finetuned = toy_states(1)
    read = []

    class Lazy(dict):
        def __getitem__(self, name: str) -> torch.Tensor:
            read.append(name)
            return super().__getitem__(name)

    _upcycle(tower, tower.state_dict(), [Lazy(finetuned[0])])
    assert read == [f"layers.{i}.{fc}.{t}" for i in range(2) for fc in ("fc1", "fc2") for t in ("weight", "bias")]


def _route(model, **options):
    def bank(_path, linear):
        weight = torch.ones(3, linear.out_features, linear.in_features)
        return DenseExperts(weight, torch.ones(3, linear.out_features))

    return route_mlps(
        model, make_bank=bank, make_router=lambda _i, _w, count: ConstantRouter(count), routing="batch", **options
    )


def test_routing_a_model_keeps_its_own_layers_as_bases_and_leaves_it_alone():
    tower, _ = toy_states()
    before, kinds = copied(tower.state_dict()), [type(m) for m in tower.modules()]
    routed = _route(tower)
    for upcycled, plain in zip(routed.layers, tower.layers, strict=True):
        assert same_state(upcycled.fc1.base.state_dict(), plain.fc1.state_dict())
        assert upcycled.routing is Routing.BATCH
    torch.testing.assert_close(routed(_x()), tower(_x()))  # all coefficients are zero
    assert same_state(tower.state_dict(), before)
    assert [type(m) for m in tower.modules()] == kinds
    assert all(p.requires_grad for p in tower.parameters())


def test_a_model_on_the_meta_device_is_routed_without_memory():
    with torch.device("meta"):
        routed = _route(ToyTower(), selection=SoftTopK(2))
    assert all(t.is_meta for t in (*routed.parameters(), *routed.buffers()))
    assert {layer.selection.k for layer in moe_layers(routed).values()} == {2}


def test_there_is_nothing_to_route_without_mlps():
    with pytest.raises(ModelError, match="`Linear` has no MLP"):
        _route(nn.Linear(2, 2))
