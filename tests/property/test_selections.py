"""Every selection is its definition, written out slowly; what holds for all of them, whatever the coefficients."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import ToyTower, upcycled_toy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_merge.moe import (
    Bounded,
    Chain,
    Routing,
    SelectAll,
    Selection,
    SoftTopK,
    TopK,
    TopP,
    TsallisTopP,
    moe_layers,
    record_coefficients,
)
from fusion_merge.moe.blocks import empty_block
from fusion_merge.moe.probabilities import nucleus, relative_tsallis_entropy
from fusion_merge.moe.selection import empty_selection

quick = settings(deadline=None, max_examples=60, derandomize=True)

CLEAR = 1e-4
"""How far from a limit a sum has to be for rounding to float32 not to matter."""

dtypes = st.sampled_from([torch.float32, torch.float64])
coarse = st.sampled_from([-0.5, -0.25, 0.0, 0.25, 0.3, 0.5, 1.0])  # so that many are equal
values = st.floats(-2, 2, width=32) | coarse
shares = st.floats(0.01, 0.99)
temperatures = st.floats(0.05, 5)
indices = st.sampled_from([0.3, 0.999, 1.0, 1.001, 1.5, 2.0, 5.0])


@st.composite
def rows(draw, elements=values, most: int = 8) -> Tensor:
    """Coefficients (B, K)."""
    batch, count = draw(st.integers(1, 3)), draw(st.integers(1, most))
    table = [draw(st.lists(elements, min_size=count, max_size=count)) for _ in range(batch)]
    return torch.tensor(table, dtype=draw(dtypes))


def order_of(row: list[float]) -> list[int]:
    """The indices from the largest to the smallest; of equal ones the lowest first."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def probabilities_of(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp((value - max(row)) / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def only(row: list[float], kept: set[int]) -> list[float]:
    return [value if i in kept else 0.0 for i, value in enumerate(row)]


def slow_top_p(row: list[float], p: float, temperature: float) -> list[float]:
    probabilities, kept, reached = probabilities_of(row, temperature), set(), 0.0
    for i in order_of(row):
        kept.add(i)
        reached += probabilities[i]
        assume(abs(reached - p) > CLEAR)
        if reached >= p:
            break
    return only(row, kept)


def slow_entropy(probabilities: list[float], q: float) -> float:
    if q == 1:
        return -sum(p * math.log(p) for p in probabilities if p > 0)
    return (1 - sum(p**q for p in probabilities)) / (q - 1)


def slow_tsallis_top_p(row: list[float], p: float, temperature: float, q: float, threshold: float) -> list[float]:
    if len(row) == 1:
        return row
    probabilities = probabilities_of(row, temperature)
    relative = slow_entropy(probabilities, q) / slow_entropy([1 / len(row)] * len(row), q)
    assume(abs(relative - threshold) > CLEAR)
    return row if relative > threshold else slow_top_p(row, p, temperature)


def same(found: Tensor, expected: list[list[float]], given_: Tensor) -> None:
    assert found.dtype == given_.dtype
    assert torch.equal(found, torch.tensor(expected, dtype=given_.dtype))


@quick
@given(rows(), st.data())
def test_top_k_keeps_the_k_largest_as_they_are(coefficients, data):
    k = data.draw(st.integers(1, coefficients.shape[1]))
    same(TopK(k)(coefficients), [only(row, set(order_of(row)[:k])) for row in coefficients.tolist()], coefficients)


@quick
@given(rows(elements=st.sampled_from([1.0, 2.0])), st.data())
def test_top_k_keeps_exactly_k_where_many_are_equal(coefficients, data):
    k = data.draw(st.integers(1, coefficients.shape[1]))
    assert (TopK(k)(coefficients) != 0).sum(dim=1).tolist() == [k] * len(coefficients)


@quick
@given(st.integers(64, 300), st.integers(0, 2**16), dtypes)
def test_of_many_equal_coefficients_the_first_are_kept(count, seed, dtype):
    # sorting is not stable by itself from some length on
    tied = 0.3 + 0.1 * torch.randint(0, 2, (2, count), generator=torch.Generator().manual_seed(seed)).to(dtype)
    most = [order_of(row)[: count // 3] for row in tied.tolist()]
    same(TopK(count // 3)(tied), [only(row, set(kept)) for row, kept in zip(tied.tolist(), most, strict=True)], tied)
    for kept in (TopP(0.2)(tied) != 0, TsallisTopP(0.2, 1.0, 2.0, 1.0)(tied) != 0):
        for row, mask in zip(tied.tolist(), kept.tolist(), strict=True):
            assert {i for i, inside in enumerate(mask) if inside} == set(order_of(row)[: sum(mask)])


@quick
@given(rows(), shares, temperatures)
def test_top_p_keeps_the_fewest_that_reach_p(coefficients, p, temperature):
    expected = [slow_top_p(row, p, temperature) for row in coefficients.tolist()]
    same(TopP(p, temperature)(coefficients), expected, coefficients)


@quick
@given(st.integers(1, 16), st.integers(1, 16), dtypes)
def test_top_p_counts_equal_experts(count, wanted, dtype):
    wanted = min(wanted, count)
    kept = nucleus(torch.full((1, count), 0.3, dtype=dtype), (wanted - 0.5) / count, 1.0)
    assert kept.tolist() == [[i < wanted for i in range(count)]]


@quick
@given(rows(), temperatures)
def test_top_p_with_all_probability_is_the_identity(coefficients, temperature):
    assert torch.equal(TopP(1.0, temperature)(coefficients), coefficients)


@quick
@given(rows(), shares, temperatures, indices, st.floats(0, 1))
def test_tsallis_top_p_keeps_all_where_the_router_is_undecided(coefficients, p, temperature, q, threshold):
    expected = [slow_tsallis_top_p(row, p, temperature, q, threshold) for row in coefficients.tolist()]
    same(TsallisTopP(p, temperature, q, threshold)(coefficients), expected, coefficients)


@quick
@given(rows(), temperatures, indices)
def test_the_relative_entropy_is_its_definition(coefficients, temperature, q):
    assume(coefficients.shape[1] > 1)
    found = relative_tsallis_entropy(coefficients, temperature, q)
    for row, value in zip(coefficients.tolist(), found[:, 0].tolist(), strict=True):
        full = slow_entropy([1 / len(row)] * len(row), q)
        assert value == pytest.approx(slow_entropy(probabilities_of(row, temperature), q) / full, abs=1e-5)


@quick
@given(rows(), temperatures, st.sampled_from([1 - 1e-9, 1 + 1e-9, 1 - 1e-5, 1 + 1e-5]))
def test_an_index_near_one_is_nearly_shannon_s_entropy(coefficients, temperature, q):
    shannon = relative_tsallis_entropy(coefficients, temperature, 1.0)
    torch.testing.assert_close(relative_tsallis_entropy(coefficients, temperature, q), shannon, atol=1e-4, rtol=0)


@quick
@given(rows(), st.floats(1e-30, 1e6), st.floats(0.01, 100))
def test_the_relative_entropy_is_a_share_however_sharp_or_flat(coefficients, temperature, q):
    found = relative_tsallis_entropy(coefficients, temperature, q)
    assert ((found >= 0) & (found <= 1)).all()


@quick
@given(rows(), shares, temperatures, indices)
def test_a_threshold_of_one_is_top_p(coefficients, p, temperature, q):
    assume(coefficients.shape[1] > 1)
    assert torch.equal(TsallisTopP(p, temperature, q, 1.0)(coefficients), TopP(p, temperature)(coefficients))


@quick
@given(rows(), st.floats(-2, 0), st.floats(0.01, 2))
def test_bounds_are_kept(coefficients, low, high):
    expected = [[min(max(value, low), high) for value in row] for row in coefficients.tolist()]
    torch.testing.assert_close(Bounded(low, high)(coefficients), torch.tensor(expected, dtype=coefficients.dtype))


def examples(count: int) -> list[Selection]:
    return [
        SelectAll(),
        SoftTopK(max(1, count // 2)),
        TopK(max(1, count // 2)),
        TopP(0.6, 0.2),
        TsallisTopP(0.6, 0.2, 1.5, 0.7),
        Bounded(-0.1, 0.4),
        Chain([TopK(1), Bounded(0.0, 0.4)]),
    ]


@quick
@given(rows())
def test_rows_do_not_depend_on_each_other(coefficients):
    for selection in examples(coefficients.shape[1]):
        alone = torch.cat([selection(row) for row in coefficients.split(1)])
        assert torch.equal(selection(coefficients), alone)


@quick
@given(rows())
def test_inputs_stay_as_they_are(coefficients):
    before = coefficients.clone()
    for selection in examples(coefficients.shape[1]):
        selection(coefficients)
    assert torch.equal(coefficients, before)


@quick
@given(rows())
def test_a_selection_is_made_again_from_its_spec_in_a_file(coefficients):
    for selection in examples(coefficients.shape[1]):
        again = empty_selection(json.loads(json.dumps(selection.spec(), allow_nan=False)))
        assert type(again) is type(selection)
        assert again.spec() == selection.spec()
        assert torch.equal(again(coefficients), selection(coefficients))


@quick
@given(rows(elements=st.floats(0, 2, width=32) | st.sampled_from([0.0, 0.5])), st.data())
def test_selecting_again_changes_nothing_more(coefficients, data):
    k = data.draw(st.integers(1, coefficients.shape[1]))
    for selection in (SelectAll(), TopK(k), TopP(1.0), Bounded(0.1, 0.7), Chain([TopK(k), Bounded(0.0, 0.7)])):
        once = selection(coefficients)
        assert torch.equal(selection(once), once)


@quick
@given(st.permutations(range(6)), st.sampled_from([TopK(1), TopK(3), TopK(6), TopP(0.7, 0.2), TopP(1.0),
    TsallisTopP(0.7, 0.2, 2.0, 0.5), TsallisTopP(0.7, 0.2, 1.0, 0.999), Bounded(-0.21, 0.33),
    Chain([TopK(3), Bounded(-0.21, 0.33)]), Chain([TopP(0.7, 0.2), Bounded(-0.21, 0.33)])]))  # fmt: skip
def test_gradients_are_right_away_from_ties(order, selection):
    distinct = torch.tensor([[-0.55, -0.3, -0.05, 0.17, 0.4, 0.62]], dtype=torch.float64)[:, list(order)]
    assert torch.autograd.gradcheck(selection, distinct.requires_grad_())


@quick
@given(rows(), st.data())
def test_the_gradient_reaches_what_is_kept_and_nothing_else(coefficients, data):
    k = data.draw(st.integers(1, coefficients.shape[1]))
    for selection in (TopK(k), TopP(0.6, 0.2), TsallisTopP(0.6, 0.2, 1.5, 0.7)):
        nonzero = coefficients.where(coefficients != 0, 0.7).requires_grad_()
        selected = selection(nonzero)
        selected.sum().backward()
        assert torch.equal(nonzero.grad, (selected != 0).to(nonzero.dtype))


@quick
@given(rows(), shares, temperatures)
def test_half_precision_selects_what_float32_would_of_the_same_values(coefficients, p, temperature):
    half = coefficients.to(torch.bfloat16)
    k = max(1, half.shape[1] // 2)
    for selection in (TopK(k), TopP(p, temperature), TsallisTopP(p, temperature, 1.5, 0.7)):
        selected = selection(half)
        assert selected.dtype == torch.bfloat16
        assert torch.equal(selected.float(), selection(half.float()))


@pytest.mark.parametrize("routing", list(Routing))
@pytest.mark.parametrize("selection", examples(3), ids=lambda s: type(s).__name__)
def test_a_routed_model_applies_a_selection_and_is_made_again_with_it(selection, routing):
    model = upcycled_toy(routing=routing, selection=selection)
    pixels = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    with record_coefficients(model) as record:
        model(pixels)
    for name, layer in moe_layers(model).items():
        (applied,) = record[name]
        raw = model_coefficients(model, name, pixels)
        assert applied.shape == ((4, 3) if routing is Routing.SAMPLE else (1, 3))
        torch.testing.assert_close(applied, selection(raw))
        again = empty_block(json.loads(json.dumps(layer.spec())), upcycled_plain(name))
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(pixels), layer(pixels))


def model_coefficients(model: torch.nn.Module, name: str, pixels: Tensor) -> Tensor:
    """What a layer's router says, averaged, before the selection."""
    layer, seen = moe_layers(model)[name], []
    handle = layer.selection.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    model(pixels)
    handle.remove()
    return seen[0]


def upcycled_plain(name: str) -> torch.nn.Module:
    return ToyTower().get_submodule(name)
