"""Objectives: their values are those of the formulas, and what they say of a collapse."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fusion_merge.adaptation.objectives import (
    entropy,
    expert_labels,
    infomax,
    make_objective,
    marginal_entropy,
    mean_entropy,
    tsallis_entropy,
)
from fusion_merge.errors import AdaptationError, ConfigError


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


@pytest.mark.parametrize("apart", [1e-3, 1e-5, 1e-7])
def test_tsallis_entropy_is_exact_near_order_1_in_single_precision(logits, apart):
    torch.testing.assert_close(tsallis_entropy(logits.float(), 1 + apart), entropy(logits.float()), atol=5e-3, rtol=0)


@pytest.mark.parametrize("order", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_tsallis_entropy_is_its_formula(logits, order):
    p = logits.softmax(dim=-1)
    expected = -(p * p.log()).sum(-1) if order == 1 else (1 - p.pow(order).sum(-1)) / (order - 1)
    torch.testing.assert_close(tsallis_entropy(logits, order), expected)


def test_tsallis_entropy_of_an_order_near_1_is_shannon_s(logits):
    torch.testing.assert_close(tsallis_entropy(logits, 1 + 1e-6), entropy(logits), atol=1e-5, rtol=1e-5)


def test_tsallis_entropy_of_order_2_is_the_gini_impurity(logits):
    torch.testing.assert_close(tsallis_entropy(logits, 2.0), 1 - logits.softmax(-1).square().sum(-1))


def test_infomax_is_conditional_less_marginal_entropy(logits):
    p = logits.softmax(dim=-1)
    mean = p.mean(dim=0)
    marginal = -(mean * mean.log()).sum()
    torch.testing.assert_close(marginal_entropy(logits), marginal)
    torch.testing.assert_close(infomax(logits), -(p * p.log()).sum(-1).mean() - marginal)


def test_the_mean_of_the_processes_gradients_of_infomax_is_that_of_the_whole_batch(logits):
    whole = logits.clone().requires_grad_()
    infomax(whole).backward()
    means = [half.softmax(dim=-1).mean(dim=0) for half in logits.chunk(2)]
    shares = [half.clone().requires_grad_() for half in logits.chunk(2)]
    for share in shares:
        (infomax(share, lambda _: (means[0] + means[1]) / 2) / 2).backward()
    torch.testing.assert_close(torch.cat([share.grad for share in shares]), whole.grad)
    alone = logits[:3].clone().requires_grad_()
    (infomax(alone) / 2).backward()
    assert (alone.grad - whole.grad[:3]).abs().max() > 1e-3  # a process that knew only its own images would be wrong


def test_a_collapse_pays_under_entropy_and_not_under_infomax():
    """All images on one class, against each decided for its own: entropy cannot tell them apart."""
    collapsed = torch.zeros(8, 4, dtype=torch.float64)
    collapsed[:, 0] = 20
    spread = 20 * F.one_hot(torch.arange(8) % 4, 4).double()
    assert mean_entropy(collapsed) == pytest.approx(mean_entropy(spread).item(), abs=1e-6)
    assert infomax(spread) == pytest.approx(-math.log(4), abs=1e-6)
    assert infomax(collapsed) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_expert_labels_are_least_at_the_expert_s_own_logits(logits, temperature):
    own = logits.clone().requires_grad_()
    loss = expert_labels(own, logits, temperature)
    (gradient,) = torch.autograd.grad(loss, own)
    assert gradient.abs().max() < 1e-12
    assert loss < expert_labels(logits + torch.randn_like(logits), logits, temperature)
    soft = (logits / temperature).softmax(-1)
    torch.testing.assert_close(loss.detach(), -(temperature**2) * (soft * soft.log()).sum(-1).mean())


def test_one_hot_experts_give_cross_entropy(logits):
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    certain = 1e3 * F.one_hot(labels, 5).double()
    torch.testing.assert_close(expert_labels(logits, certain, 1.0), F.cross_entropy(logits, labels))


@pytest.mark.parametrize("name", ["entropy", "infomax", "tsallis", "expert_labels"])
def test_the_gradient_of_every_objective_is_that_of_its_value(logits, name):
    objective = make_objective(name, temperature=2.0, order=1.5)
    experts = torch.randn(6, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: objective(z, experts), logits.clone().requires_grad_())


@pytest.mark.parametrize("name", ["entropy", "infomax", "tsallis", "expert_labels"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_finite_values_and_gradients(name, dtype):
    z = torch.tensor([[60.0, -60.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = make_objective(name)(z, z.detach())
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


def test_objectives_are_added_with_their_weights(logits):
    experts = torch.randn(6, 5, dtype=torch.float64)
    total = make_objective("expert_labels + 0.1*infomax+2*tsallis", temperature=2.0, order=3.0)
    expected = expert_labels(logits, experts, 2.0) + 0.1 * infomax(logits) + 2 * tsallis_entropy(logits, 3.0).mean()
    torch.testing.assert_close(total(logits, experts), expected)
    assert total.needs_experts
    assert total.measure == "loss"
    assert make_objective("entropy").measure == "entropy"
    assert not make_objective("entropy+infomax").needs_experts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no objective ``"),
        ("entropy+", "there is no objective ``"),
        ("0.1*expert_label", "`expert_label`; did you mean `expert_labels`"),
        ("entropy+entropy", "names `entropy` twice"),
        ("0*entropy", "the weight '0' is not a number above 0"),
        ("-1*entropy", "the weight '-1' is not a number above 0"),
        ("x*entropy", "the weight 'x' is not a number above 0"),
        ("inf*entropy", "the weight 'inf' is not a number above 0"),
    ],
)
def test_what_is_no_objective_is_refused(text, message):
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        make_objective(text)


def test_expert_labels_without_an_expert_say_what_is_missing(logits):
    with pytest.raises(AdaptationError, match="needs the logits of the task's expert"):
        make_objective("expert_labels")(logits)
