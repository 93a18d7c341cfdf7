"""Routers that carry a state from layer to layer."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import threading
import weakref

import pytest
import torch
from helpers import ToyTower, copied, make_bank, same_state, toy_states
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.moe import (
    ConstantRouter,
    LayerEncodedRouter,
    RecurrentCell,
    RecurrentRouter,
    Routing,
    make_router,
    moe_layers,
    recurrent_router_maker,
    upcycle_mlps,
)
from fusion_merge.moe.layer import router_parameters
from fusion_merge.moe.router import empty_router

D, H, K, L, LAMBDA = 6, 5, 3, 4, 0.3


def _routers(layers: int = L, seed: int = 0, scale: float = 30.0) -> nn.ModuleList:
    """Recurrent routers of one model, with weights large enough to tell samples apart."""
    make = recurrent_router_maker(H, LAMBDA, torch.Generator().manual_seed(seed))
    routers = nn.ModuleList([make(index, D, K) for index in range(layers)])
    for router in routers:
        for linear in (router.inner, router.out):
            linear.weight.data *= scale
    return routers


def _tokens(layers: int = L, batch: int = 2, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 7, D, generator=generator) for _ in range(layers)]


def _pass(routers: nn.ModuleList, tokens: list[Tensor]) -> list[Tensor]:
    return [router.pooled(each) for router, each in zip(routers, tokens, strict=True)]


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_coefficients_of_all_tokens_of_a_sample_are_the_pooled_ones():
    routers, tokens = _routers(), _tokens()
    for coefficients, pooled in zip([r(t) for r, t in zip(routers, tokens, strict=True)], _pass(routers, tokens),
                                    strict=True):  # fmt: skip
        assert torch.equal(coefficients, pooled[:, None].expand(-1, 7, -1))


def test_a_decision_depends_on_what_earlier_layers_saw_and_not_on_what_later_ones_do():
    routers, tokens = _routers(), _tokens()
    before = _pass(routers, tokens)
    changed = [*tokens]
    changed[1] = tokens[1] + 1
    after = _pass(routers, changed)
    assert torch.equal(after[0], before[0])
    assert not any(torch.equal(a, b) for a, b in zip(after[1:], before[1:], strict=True))


def test_samples_do_not_see_each_other():
    routers, tokens = _routers(), _tokens(batch=3)
    alone = [_pass(routers, [each[i : i + 1] for each in tokens]) for i in range(3)]
    for layer, both in enumerate(_pass(routers, tokens)):
        torch.testing.assert_close(both, torch.cat([one[layer] for one in alone]))


def test_a_pass_does_not_see_the_one_before_it():
    routers, tokens = _routers(), _tokens()
    fresh = _pass(copy.deepcopy(routers), tokens)
    for other in (_tokens(seed=5), _tokens(batch=9, seed=6)):
        _pass(routers, other)
        assert _same(_pass(routers, tokens), fresh)


@pytest.mark.parametrize("broken_off_after", [1, 2, 3])
def test_a_pass_does_not_see_one_that_was_broken_off(broken_off_after):
    routers, tokens = _routers(), _tokens()
    fresh = _pass(routers, tokens)
    _pass(routers[:broken_off_after], _tokens(seed=5)[:broken_off_after])
    assert _same(_pass(routers, tokens), fresh)


def test_nothing_of_a_pass_is_left_after_its_last_layer():
    routers, alive = _routers(), []
    routers[0].cell.register_forward_hook(lambda _module, _args, state: alive.append(weakref.ref(state)))
    outputs = _pass(routers, _tokens())
    del outputs
    gc.collect()
    assert [reference() for reference in alive] == [None] * L


def test_what_a_broken_off_pass_left_is_forgotten_on_request():
    routers, alive = _routers(), []
    routers[0].cell.register_forward_hook(lambda _module, _args, state: alive.append(weakref.ref(state)))
    _pass(routers[:2], _tokens()[:2])
    gc.collect()
    assert alive[-1]() is not None
    routers[0].cell.reset()
    gc.collect()
    assert alive[-1]() is None
    with pytest.raises(ModelError, match="no pass"):
        routers[2].pooled(_tokens()[2])


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_pass_begins_at_layer_zero(first):
    with pytest.raises(ModelError, match=f"layer {first} was called, but no pass .* from layer 0"):
        _routers()[first].pooled(_tokens()[0])


@pytest.mark.parametrize(("second", "third"), [(2, None), (3, None), (1, 1), (1, 3)])
def test_a_layer_out_of_order_is_refused_and_ends_the_pass(second, third):
    routers, tokens = _routers(), _tokens()
    fresh = _pass(routers, tokens)
    wrong, turn = (second, 1) if third is None else (third, 2)
    routers[0].pooled(tokens[0])
    if third is not None:
        routers[second].pooled(tokens[second])
    with pytest.raises(ModelError, match=f"layer {wrong} was called where it was the turn of layer {turn}"):
        routers[wrong].pooled(tokens[wrong])
    with pytest.raises(ModelError, match="no pass"):
        routers[turn].pooled(tokens[turn])
    assert _same(_pass(routers, tokens), fresh)


def test_a_layer_after_the_last_is_refused():
    routers, tokens = _routers(), _tokens()
    _pass(routers, tokens)
    with pytest.raises(ModelError, match="layer 3 was called, but no pass"):
        routers[3].pooled(tokens[3])


@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch_in_the_middle_of_a_pass_is_refused(batch):
    routers, tokens = _routers(), _tokens()
    routers[0].pooled(tokens[0])
    with pytest.raises(ModelError, match=f"layer 1 was called with {batch} samples in a pass of 2"):
        routers[1].pooled(_tokens(batch=batch)[1])


def test_layers_that_are_computed_again_are_refused():
    routers, tokens = _routers(), [each.requires_grad_() for each in _tokens()]
    outputs = [checkpoint(router.pooled, each, use_reentrant=False)
               for router, each in zip(routers, tokens, strict=True)]  # fmt: skip
    with pytest.raises(ModelError, match="no pass"):
        torch.stack(outputs).sum().backward()


def test_threads_have_passes_of_their_own():
    routers, given = _routers(), {"first": _tokens(seed=5), "second": _tokens(seed=6)}
    expected = {name: _pass(routers, tokens) for name, tokens in given.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in given}
    barrier = threading.Barrier(2, timeout=30)

    def run(name: str) -> None:
        for router, tokens in zip(routers, given[name], strict=True):
            found[name].append(router.pooled(tokens))
            barrier.wait()  # layer by layer, both at once

    threads = [threading.Thread(target=run, args=(name,)) for name in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(_same(found[name], expected[name]) for name in given)


def test_copies_share_one_cell_of_their_own_and_no_state():
    routers, tokens = _routers(), _tokens()
    expected = _pass(routers, tokens)
    routers[0].pooled(tokens[0])  # a state with a graph, which could not be copied
    file = io.BytesIO()
    torch.save(routers, file)
    file.seek(0)
    for other in (copy.deepcopy(routers), pickle.loads(pickle.dumps(routers)), torch.load(file, weights_only=False)):
        (cell,) = {router.cell for router in other}
        assert cell is not routers[0].cell
        with pytest.raises(ModelError, match="no pass"):
            other[1].pooled(tokens[1])
        assert _same(_pass(other, tokens), expected)
    assert torch.equal(routers[1].pooled(tokens[1]), expected[1])  # and copying did not end the pass


def test_the_cell_is_among_the_parameters_once_and_the_state_never():
    routers = _routers()
    before = [*routers.state_dict()]
    routers[0].pooled(_tokens()[0])
    assert [*routers.state_dict()] == before
    assert sum(p.numel() for p in routers.parameters()) == L * (D * H + H + H * K + K) + 6 * H * H + 6 * H
    assert {name for name in before if ".cell." in name} == {
        f"{layer}.cell.gru.{part}_{side}h" for layer in range(L) for part in ("weight", "bias") for side in "ih"
    }


def test_a_training_step_reaches_every_router_and_the_cell():
    routers = _routers(scale=1.0)
    torch.stack(_pass(routers, _tokens())).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in routers.parameters())


def test_a_layer_s_projection_learns_from_later_decisions_alone_too():
    routers = _routers()
    _pass(routers, _tokens())[-1].sum().backward()
    assert all(router.inner.weight.grad.any() for router in routers)
    assert all(router.out.weight.grad is None for router in routers[:-1])


def test_training_and_evaluation_decide_alike():
    routers, tokens = _routers(), _tokens()
    training = _pass(routers.train(), tokens)
    with torch.no_grad():
        assert _same(_pass(routers.eval(), tokens), training)
    with torch.inference_mode():
        assert _same(_pass(routers, tokens), training)
    _pass(routers.train(), tokens)[-1].sum().backward()


def test_mixed_precision_leaves_decisions_exact():
    routers, tokens = _routers(), _tokens()
    expected = _pass(routers, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert _same(_pass(routers, tokens), expected)


def test_half_precision_parameters_decide_in_float32():
    routers = _routers()
    half = copy.deepcopy(routers).to(torch.bfloat16)
    rounded = copy.deepcopy(half).float()
    tokens = [each.bfloat16() for each in _tokens()]
    found = _pass(half, tokens)
    assert all(each.dtype == torch.float32 for each in found)
    assert _same(found, _pass(rounded, [each.float() for each in tokens]))
    assert half[0](tokens[0]).dtype == torch.bfloat16


def test_coefficients_start_at_lambda_and_the_cell_as_documented():
    make = recurrent_router_maker(64, LAMBDA, torch.Generator().manual_seed(0))
    router = make(0, 96, K)
    assert torch.equal(router.out.bias, torch.full((K,), LAMBDA))
    assert not router.inner.bias.any()
    torch.testing.assert_close(router.pooled(torch.randn(3, 5, 96)), torch.full((3, K), LAMBDA), atol=0.1, rtol=0)
    gru = router.cell.gru
    assert not gru.bias_ih.any()
    assert not gru.bias_hh.any()
    for weight in (gru.weight_ih, gru.weight_hh):
        assert weight.abs().max().item() <= 1 / 8
        assert weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    for linear in (router.inner, router.out):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.15)


def test_the_same_seed_gives_the_same_routers_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = _routers(), _routers(), _routers(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_state(first.state_dict(), again.state_dict())
    assert not torch.equal(first[0].cell.gru.weight_hh, other[0].cell.gru.weight_hh)


def test_index_zero_begins_another_model():
    make = recurrent_router_maker(H, LAMBDA)
    first = [make(index, D, K) for index in range(2)]
    second = [make(index, D, K) for index in range(3)]
    assert first[0].cell is first[1].cell is not second[0].cell
    assert second[0].cell is second[2].cell
    assert (first[0].cell.num_layers, second[0].cell.num_layers) == (2, 3)


def test_the_maker_begins_at_layer_zero():
    with pytest.raises(ModelError, match="layer 2; begin with layer 0"):
        recurrent_router_maker(H, LAMBDA)(2, D, K)


def test_routers_are_made_without_memory():
    with torch.device("meta"):
        make = recurrent_router_maker(H, LAMBDA, torch.Generator("cpu"))
        routers = nn.ModuleList([make(index, D, K) for index in range(2)])
    assert {p.device.type for p in routers.parameters()} == {"meta"}


@pytest.mark.parametrize("width", [0, -1])
@pytest.mark.parametrize("make", [RecurrentCell, lambda width: recurrent_router_maker(width, LAMBDA)])
def test_a_state_without_width_is_refused(make, width):
    with pytest.raises(ConfigError, match=f"`router_state_width`={width}"):
        make(width)


def test_a_negative_layer_is_refused():
    with pytest.raises(ConfigError, match="`layer_index`=-1"):
        RecurrentRouter(RecurrentCell(H), -1, D, K)


def test_the_shared_part_is_what_routers_of_several_layers_hold():
    routers = _routers()
    assert {router.shared_part() for router in routers} == {routers[0].cell}
    shared = make_router(1, D + 8, K, LAMBDA, hidden=H)
    assert {LayerEncodedRouter(shared, layer, 8).shared_part() for layer in range(3)} == {shared}
    for depth in (0, 1, 2):
        assert make_router(depth, D, K, LAMBDA, hidden=H).shared_part() is None


def test_routers_are_made_again_from_their_specs_around_one_cell():
    routers, tokens = _routers(), _tokens()
    specs = json.loads(json.dumps([router.spec() for router in routers]))
    shared, again = None, nn.ModuleList()
    before = torch.get_rng_state()
    for spec in specs:
        again.append(empty_router(spec, shared))
        shared = again[-1].shared_part()
    assert torch.equal(torch.get_rng_state(), before)
    assert [router.spec() for router in again] == specs
    assert len({router.cell for router in again}) == 1
    first = {name: tensor for name, tensor in copied(routers.state_dict()).items()
             if ".cell." not in name or name.startswith("0.")}  # fmt: skip
    again.load_state_dict(first, strict=False, assign=True)
    assert same_state(again.state_dict(), routers.state_dict())
    assert _same(_pass(again, tokens), _pass(routers, tokens))


@pytest.mark.parametrize("kind", ["whole", "layer_encoded"])
def test_routers_that_share_a_router_are_made_again_from_their_specs(kind):
    inner = make_router(2, D + 4 if kind == "layer_encoded" else D, K, LAMBDA, hidden=H)
    routers = [LayerEncodedRouter(inner, layer, 4) if kind == "layer_encoded" else inner for layer in range(3)]
    first = empty_router(routers[0].spec())
    shared = first.shared_part() or first
    others = [empty_router(router.spec(), shared) for router in routers[1:]]
    assert [router.spec() for router in (first, *others)] == [router.spec() for router in routers]
    assert all((router.shared_part() or router) is shared for router in others)


@pytest.mark.parametrize(
    ("spec", "shared"),
    [
        (RecurrentRouter(RecurrentCell(H), 1, D, K).spec(), RecurrentCell(H + 1)),
        (RecurrentRouter(RecurrentCell(H), 1, D, K).spec(), ConstantRouter(K)),
        (ConstantRouter(K).spec(), RecurrentCell(H)),
        (ConstantRouter(K).spec(), ConstantRouter(K + 1)),
        (LayerEncodedRouter(make_router(1, D + 4, K, LAMBDA, hidden=H), 1, 4).spec(), ConstantRouter(K)),
        (ConstantRouter(K).spec(), nn.Linear(2, 2)),
    ],
)
def test_what_does_not_fit_is_not_shared(spec, shared):
    with pytest.raises(ConfigError, match="share"):
        empty_router(spec, shared)


def _tower(routing: Routing = Routing.SAMPLE) -> ToyTower:
    """A toy tower with recurrent routers that tell samples apart."""
    tower, finetuned = toy_states()
    make = recurrent_router_maker(H, LAMBDA, torch.Generator().manual_seed(0))
    model = upcycle_mlps(
        tower,
        tower.state_dict(),
        finetuned,
        make_experts=lambda _path, vectors: make_bank("dense", vectors),
        make_router=make,
        routing=routing,
    )
    for layer in moe_layers(model).values():
        for linear in (layer.router.inner, layer.router.out):
            linear.weight.data *= 30
    return model


@pytest.mark.parametrize("routing", list(Routing))
def test_a_tower_with_recurrent_routers_gives_the_same_again(routing):
    model, pixels = _tower(routing), torch.randn(4, 7, D, generator=torch.Generator().manual_seed(2))
    first = model(pixels)
    model(pixels[:3] + 1)
    assert torch.equal(model(pixels), first)
    alone = torch.cat([model(pixels[i : i + 1]) for i in range(4)])
    assert torch.allclose(alone, first, atol=1e-5) is (routing is Routing.SAMPLE)
    assert torch.equal(copy.deepcopy(model)(pixels), first)


def test_a_tower_with_recurrent_routers_learns():
    model, pixels = _tower(), torch.randn(4, 7, D, generator=torch.Generator().manual_seed(2))
    parameters = router_parameters(model)
    cell = next(iter(moe_layers(model).values())).router.cell
    assert len(parameters) == 2 * 4 + 4
    assert all(any(p is q for q in parameters) for p in cell.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer, losses = torch.optim.Adam(parameters, lr=1e-2), []
    for _ in range(20):
        loss = -model(pixels).softmax(dim=-1).amax(dim=-1).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
