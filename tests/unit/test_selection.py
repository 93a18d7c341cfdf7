"""Selections on merging coefficients."""

from __future__ import annotations

import pytest
import torch

from fusion_merge.errors import ConfigError
from fusion_merge.moe import (
    SELECTIONS,
    Bounded,
    Chain,
    SelectAll,
    SoftTopK,
    TopK,
    TopP,
    TsallisTopP,
    selection_named,
)
from fusion_merge.moe.selection import empty_selection

G = torch.tensor([[0.5, 0.1, 0.9, -0.4], [0.2, 0.8, 0.4, 0.6]])


def test_select_all_changes_nothing():
    assert torch.equal(SelectAll()(G), G)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_soft_top_k_is_the_published_formula(k):
    threshold = G.sort(dim=-1, descending=True).values[:, k - 1 : k]
    torch.testing.assert_close(SoftTopK(k)(G), G / (1 + torch.exp(-100 * (G - threshold))))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_kth_largest_coefficient_is_halved(k):
    at = G.argsort(dim=-1, descending=True)[:, k - 1 : k]
    torch.testing.assert_close(SoftTopK(k)(G).gather(1, at), G.gather(1, at) / 2)


def test_well_separated_coefficients_are_kept_above_and_dropped_below():
    torch.testing.assert_close(SoftTopK(2)(G), torch.tensor([[0.25, 0, 0.9, 0], [0, 0.8, 0, 0.3]]), atol=1e-4, rtol=0)


def test_near_ties_leak():
    selected = SoftTopK(1)(torch.tensor([[0.300, 0.299]]))
    assert selected[0, 1] > 0.1


def test_equal_coefficients_are_all_halved():
    assert torch.equal(SoftTopK(2)(torch.full((1, 5), 0.3)), torch.full((1, 5), 0.15))


def test_selecting_all_softly_is_not_the_identity():
    torch.testing.assert_close(SoftTopK(4)(G)[0], torch.tensor([0.5, 0.1, 0.9, -0.2]))


def test_rows_are_selected_independently():
    both = SoftTopK(2)(G)
    assert torch.equal(both, torch.cat([SoftTopK(2)(G[:1]), SoftTopK(2)(G[1:])]))


def test_gradient_flows_through_the_threshold():
    near = torch.tensor([[0.300, 0.310]], requires_grad=True)
    gradient = torch.autograd.grad(SoftTopK(1)(near)[0, 0], near)[0]
    # the other coefficient is the threshold: raising it lowers what is left of this one
    mask = torch.sigmoid(torch.tensor(100 * -0.010))
    assert gradient[0, 1].item() == pytest.approx((-100 * 0.300 * mask * (1 - mask)).item(), rel=1e-3)


def test_the_gradient_is_right_by_finite_differences():
    near = torch.tensor([[0.300, 0.310, 0.29]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SoftTopK(2), near)


def test_the_sharpness_is_an_argument():
    soft = SoftTopK(1, sharpness=1.0)(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    hard = SoftTopK(1)(torch.tensor([[1.0, 0.5]], dtype=torch.float64))
    assert soft[0, 0] == 0.5
    assert hard[0, 1] < 1e-20


@pytest.mark.parametrize("k", [0, -1])
def test_selecting_none_is_refused(k):
    with pytest.raises(ConfigError, match=f"`select_k`={k}"):
        SoftTopK(k)


def test_selecting_more_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"`select_k`=5 .*choose 1-4"):
        SoftTopK(5)(G)


@pytest.mark.parametrize("selection", [SelectAll(), SoftTopK(3, sharpness=20.0)], ids=["all", "soft_top_k"])
def test_a_selection_is_made_again_from_its_spec(selection):
    again = empty_selection(selection.spec())
    assert type(again) is type(selection)
    assert torch.equal(again(G), selection(G))


def test_an_unknown_kind_of_selection_is_refused():
    with pytest.raises(ConfigError, match="`lottery` is unknown"):
        empty_selection({"kind": "lottery"})


NAMED = {"k": 2, "p": 0.6, "temperature": 0.2, "q": 1.5, "threshold": 0.7, "bounds": None}


def test_of_equal_coefficients_the_first_are_kept():
    tied = torch.tensor([[0.1, 0.3, 0.3, 0.3, 0.1]])
    assert TopK(2)(tied).tolist() == torch.tensor([[0.0, 0.3, 0.3, 0.0, 0.0]]).tolist()
    assert TopK(4)(tied).tolist() == torch.tensor([[0.1, 0.3, 0.3, 0.3, 0.0]]).tolist()


def test_large_is_large_by_value():
    assert torch.equal(TopK(1)(torch.tensor([[-0.9, 0.1]])), torch.tensor([[0.0, 0.1]]))


def test_all_below_zero_are_selected_like_any_others():
    assert torch.equal(TopK(1)(torch.tensor([[-0.9, -0.1]])), torch.tensor([[0.0, -0.1]]))


def test_a_sum_that_is_p_exactly_is_enough():
    assert TopP(0.5)(torch.full((1, 4), 0.3)).count_nonzero() == 2


@pytest.mark.parametrize(("temperature", "count"), [(0.01, 1), (0.2, 2), (100.0, 3)])
def test_the_temperature_decides_how_many_it_takes(temperature, count):
    assert TopP(0.7, temperature)(torch.tensor([[0.2, 0.8, 0.4, 0.6]])).count_nonzero() == count


@pytest.mark.parametrize("p", [1e-12, 0.5])
def test_one_expert_is_always_kept(p):
    assert torch.equal(TopP(p, 1e-4)(G), TopK(1)(G))


def test_an_undecided_row_keeps_all_and_a_decided_one_does_not():
    both = torch.tensor([[0.30, 0.31, 0.29], [0.9, 0.1, 0.1]])
    assert torch.equal(TsallisTopP(0.5, 0.1, 2.0, 0.9)(both), torch.tensor([[0.30, 0.31, 0.29], [0.9, 0.0, 0.0]]))


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0])
def test_a_threshold_of_zero_keeps_all_of_an_imperfect_decision(q):
    assert torch.equal(TsallisTopP(0.1, 0.2, q, 0.0)(G), G)


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0])
def test_equal_experts_are_no_more_undecided_than_can_be(q):
    for count in range(2, 40):
        assert TsallisTopP(0.01, 1.0, q, 1.0)(torch.full((1, count), 0.3)).count_nonzero() == 1


@pytest.mark.parametrize("selection", [TopP(0.5), TsallisTopP(0.5, 1.0, 2.0, 0.5)], ids=["top_p", "tsallis_top_p"])
def test_what_is_not_a_number_stays_visible(selection):
    assert selection(torch.tensor([[0.9, float("nan"), 0.1]])).isnan().any()


def test_a_clamp_has_a_gradient_at_its_bounds_and_none_beyond():
    g = torch.tensor([[-0.1, 0.0, 0.5, 1.0, 1.1]], requires_grad=True)
    Bounded(0.0, 1.0)(g).sum().backward()
    assert g.grad.tolist() == [[0, 1, 1, 1, 0]]


def test_a_chain_applies_its_parts_in_order():
    g = torch.tensor([[0.2, 2.0, 3.0]])
    assert torch.equal(Chain([TopK(1), Bounded(0.1, 1.0)])(g), torch.tensor([[0.1, 0.1, 1.0]]))
    assert torch.equal(Chain([Bounded(0.1, 1.0), TopK(1)])(g), torch.tensor([[0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("k", [0, -1])
def test_keeping_none_is_refused(k):
    with pytest.raises(ConfigError, match=f"`select_k`={k}"):
        TopK(k)


def test_keeping_more_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"`select_k`=5 .*choose 1-4"):
        TopK(5)(G)


@pytest.mark.parametrize(
    ("option", "make"),
    [
        ("select_p", lambda: TopP(0.0)),
        ("select_p", lambda: TopP(1.01)),
        ("select_p", lambda: TopP(float("nan"))),
        ("select_p", lambda: TsallisTopP(-0.1)),
        ("select_temperature", lambda: TopP(0.5, 0.0)),
        ("select_temperature", lambda: TopP(0.5, float("inf"))),
        ("select_temperature", lambda: TsallisTopP(0.5, -1.0)),
        ("select_q", lambda: TsallisTopP(0.5, 1.0, 0.0)),
        ("select_q", lambda: TsallisTopP(0.5, 1.0, float("nan"))),
        ("select_threshold", lambda: TsallisTopP(0.5, 1.0, 1.0, 1.1)),
        ("select_threshold", lambda: TsallisTopP(0.5, 1.0, 1.0, -0.1)),
        ("coefficient_bounds", lambda: Bounded(1.0, 0.0)),
        ("coefficient_bounds", lambda: Bounded(0.5, 0.5)),
        ("coefficient_bounds", lambda: Bounded(0.0, float("inf"))),
        ("coefficient_bounds", lambda: Bounded(float("nan"), 1.0)),
    ],
)
def test_arguments_out_of_range_are_refused(option, make):
    with pytest.raises(ConfigError, match=f"`{option}`="):
        make()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("all", None),
        ("soft_top_k", SoftTopK(2)),
        ("top_k", TopK(2)),
        ("top_p", TopP(0.6, 0.2)),
        ("tsallis_top_p", TsallisTopP(0.6, 0.2, 1.5, 0.7)),
    ],
)
def test_a_selection_is_made_by_name(name, expected):
    found = selection_named(name, **NAMED)
    assert type(found) is type(expected)
    if expected is not None:
        assert found.spec() == expected.spec()
    bounded = selection_named(name, **{**NAMED, "bounds": [0, 0.5]})
    once = G if expected is None else expected(G)
    assert torch.equal(bounded(G), once.clamp(0, 0.5))
    assert name in SELECTIONS


@pytest.mark.parametrize("name", ["soft_top_k", "top_k"])
def test_minus_one_is_all_of_them(name):
    assert selection_named(name, **{**NAMED, "k": -1}) is None


def test_what_a_selection_does_not_need_is_not_looked_at():
    assert selection_named("all", k=0, p=0, temperature=0, q=0, threshold=9, bounds=None) is None


def test_bounds_do_not_change_which_are_selected():
    named = selection_named("top_k", **{**NAMED, "k": 1, "bounds": (0.0, 0.5)})
    assert torch.equal(named(torch.tensor([[0.6, 0.9, 0.7]])), torch.tensor([[0.0, 0.5, 0.0]]))


def test_bounds_without_zero_go_with_all_alone():
    assert torch.equal(selection_named("all", **{**NAMED, "bounds": (0.3, 0.5)})(G), G.clamp(0.3, 0.5))
    with pytest.raises(ConfigError, match=r"`coefficient_bounds`=\[0.3, 0.5\] exclude 0.*`selection`=all"):
        selection_named("top_k", **{**NAMED, "bounds": (0.3, 0.5)})


@pytest.mark.parametrize("bounds", [(), (0.1,), (0.0, 0.5, 1.0)])
def test_bounds_are_two(bounds):
    with pytest.raises(ConfigError, match=r"`coefficient_bounds`=.* two numbers"):
        selection_named("all", **{**NAMED, "bounds": bounds})


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"`selection`='topk' is unknown; did you mean `top_k`"):
        selection_named("topk", **NAMED)
