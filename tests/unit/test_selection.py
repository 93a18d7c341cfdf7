"""Selections on merging coefficients."""

from __future__ import annotations

import pytest
import torch

from fusion_merge.errors import ConfigError
from fusion_merge.moe import SelectAll, SoftTopK
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
