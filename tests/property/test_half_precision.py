r"""A bank stored in half precision stays within a stated bound of the float32 result.

Let u be the unit roundoff (2⁻¹¹ for float16, 2⁻⁸ for bfloat16) and η half the smallest subnormal number (2⁻²⁵, 2⁻¹³⁴).
Rounding a value a gives a(1 + δ) + e with |δ| ≤ u and |e| ≤ η, for as long as nothing overflows. From that, and nothing
else, follow the bounds below; norms are Euclidean for vectors and Frobenius for matrices.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from helpers import BANKS, make_bank, random_linear, random_task_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusion_merge.moe import Experts, LowRankExperts
from fusion_merge.moe.experts import TaskVector

quick = settings(deadline=None, max_examples=60, derandomize=True)
every_bank = pytest.mark.parametrize("kind", BANKS)
every_half = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


class Rounding(NamedTuple):
    """What rounding to a type may change: `u` relative, `eta` absolute where numbers become subnormal."""

    u: float
    eta: float


def rounding(half: torch.dtype) -> Rounding:
    info = torch.finfo(half)
    return Rounding(info.eps / 2, info.smallest_normal * info.eps / 2)


def test_the_roundings_are_those_of_the_formats():
    assert rounding(torch.float16) == (2.0**-11, 2.0**-25)
    assert rounding(torch.bfloat16) == (2.0**-8, 2.0**-134)


@dataclass
class Case:
    """A float32 bank, its base layer, and inputs that both halves hold exactly enough: drawn once in float32."""

    bank: Experts
    base: nn.Linear
    x: Tensor
    g: Tensor

    @property
    def exact(self) -> Tensor:
        """The output of the float32 bank, in float64 arithmetic."""
        return applied(self.bank, self.x, self.g, self.base, torch.float64)


def applied(bank: Experts, x: Tensor, g: Tensor, base: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Return a bank's output when everything is converted to `dtype`, in float64."""
    bank, base = copy.deepcopy(bank).to(dtype), copy.deepcopy(base).to(dtype)
    with torch.no_grad():
        return bank(x.to(dtype), g.to(dtype), base).double()


@st.composite
def cases(draw, kind: str) -> Case:
    """Shapes, task counts, ranks, routings, and task vectors of any size from tiny to large."""
    inputs, outputs, seed = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(0, 2**16))
    size = 10.0 ** draw(st.integers(-6, 1))
    vectors = [
        TaskVector(size * v.weight, size * v.bias)
        for v in random_task_vectors(draw(st.integers(1, 5)), outputs, inputs, seed=seed)
    ]
    rank, ratio = draw(st.integers(1, min(inputs, outputs))), draw(st.floats(0.0, 0.95))
    bank = make_bank(kind, vectors, rank=rank, ratio=ratio)
    generator = torch.Generator().manual_seed(seed + 1)
    batch = draw(st.integers(1, 4))
    x = torch.randn(batch, draw(st.integers(1, 4)), inputs, generator=generator)
    g = torch.randn(draw(st.sampled_from([1, batch])), bank.num_coefficients, generator=generator)
    return Case(bank, random_linear(inputs, outputs, seed=seed), x, g)


def task_tensors(bank: Experts) -> tuple[Tensor, Tensor]:
    """Return τ (N, O, I) and β (N, O) of a dense or sparse bank, in float64."""
    return bank.expand().detach().double(), bank.bias.detach().double()


# Stored in half precision


def storage_bound(case: Case, half: torch.dtype) -> Tensor:
    r"""The most that a token's output can move, ‖y′ − y‖, when the bank alone is stored in half precision.

    Dense and sparse, entries rounded one by one:

    .. math:: \sum_n |g_n| \big(u \lVert\tau_n\rVert + \eta\sqrt{OI}\big) \lVert x\rVert
              + \sum_n |g_n| \big(u \lVert\beta_n\rVert + \eta\sqrt{O}\big)

    Low rank, with ‖u_k‖ = 1, ‖v_k‖ = s_k, and both factors of a product rounded:

    .. math:: \sum_k |g_k| \big((2u + u^2) s_k + (1 + u)\,\eta\,(\sqrt{O}\, s_k + \sqrt{I})
              + \eta^2 \sqrt{OI}\big) \lVert x\rVert
              + |\lambda| \sum_n \big(u \lVert\beta_n\rVert + \eta\sqrt{O}\big)

    Shape:
        → (B, T).
    """
    u, eta = rounding(half)
    inputs, outputs = case.base.in_features, case.base.out_features
    x, g = case.x.double().norm(dim=-1), case.g.double().abs()  # (B, T), (B or 1, K)
    if isinstance(case.bank, LowRankExperts):
        left, s = case.bank.left.double().norm(dim=0), case.bank.right.double().norm(dim=1)  # (K,), (K,)
        weight = (2 * u + u**2) * left * s + eta**2 * math.sqrt(outputs * inputs)
        weight += (1 + u) * eta * (math.sqrt(outputs) * s + math.sqrt(inputs) * left)
        bias = u * case.bank.bias.double().norm(dim=1) + eta * math.sqrt(outputs)  # (N,)
        return (g @ weight)[:, None] * x + abs(case.bank.bias_scaling) * bias.sum()
    tau, beta = task_tensors(case.bank)
    weight = u * tau.flatten(1).norm(dim=1) + eta * math.sqrt(outputs * inputs)  # (N,)
    bias = u * beta.norm(dim=1) + eta * math.sqrt(outputs)  # (N,)
    return (g @ weight)[:, None] * x + (g @ bias)[:, None]


@every_bank
@every_half
@quick
@given(st.data())
def test_storage_moves_an_output_by_no_more_than_the_bound(kind, half, data):
    case = data.draw(cases(kind))
    stored = copy.deepcopy(case.bank).to(half)
    moved = (applied(stored, case.x, case.g, case.base, torch.float64) - case.exact).norm(dim=-1)  # (B, T)
    bound = storage_bound(case, half)
    arithmetic = 1e-13 * (1 + case.exact.norm(dim=-1))  # of the float64 that both are computed in
    assert (moved <= bound + arithmetic).all(), f"{(moved / bound).max().item():.3f} of the bound"


@every_bank
@every_half
def test_storage_moves_an_output_by_a_fair_share_of_the_bound(kind, half):
    vectors = random_task_vectors(3, 24, 16)
    bank = make_bank(kind, vectors, rank=4)
    x = torch.randn(8, 4, 16, generator=torch.Generator().manual_seed(1))
    g = torch.randn(8, bank.num_coefficients, generator=torch.Generator().manual_seed(2))
    case = Case(bank, random_linear(16, 24), x, g)
    moved = (applied(copy.deepcopy(bank).to(half), x, g, case.base, torch.float64) - case.exact).norm(dim=-1)
    assert (moved / storage_bound(case, half)).max() > 0.02  # the bound is of the right size


# Computed in half precision


def arithmetic_bound(case: Case, half: torch.dtype) -> Tensor:
    r"""The most that an entry of the output can move when bank, base, input, coefficients and arithmetic are all half.

    A sum of products in which every term passes at most m roundings, whatever the order of summation, moves by at most

    .. math:: \gamma_m S, \qquad \gamma_m = \frac{m u}{1 - m u}

    where S is the same expression with absolute values everywhere, |λ| and |b_0| included:

    .. math:: S = \Big(|W_0| + \sum_n |g_n||\tau_n|\Big)|x| + \dots \qquad\text{or}\qquad
              S = \Big(|W_0| + \sum_k |g_k||u_k||v_k|\Big)|x| + \dots

    Dense and sparse: g, τ, x, g·τ and (g·τ)·x are rounded, the sums over N tasks and the base and over I inputs and the
    bias are, and so are both results: m = N + I + 8 at most. Low rank has one factor more and sums over K, I and, in
    the biases, N: m = K + I + N + 11 at most, in factors and merged.

    Each of the m roundings may also lose η, and what is lost meets no more than all other factors of its term:
    :math:`2 m \eta (1 + u)^m M`, M the same as S with 1 added to each absolute value.

    Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, §3.1 and §2.1.

    Shape:
        → (B, T, O).
    """
    u, eta = rounding(half)
    tasks, coefficients, inputs = case.bank.bias.shape[0], case.bank.num_coefficients, case.base.in_features
    m = coefficients + inputs + tasks + 11 if isinstance(case.bank, LowRankExperts) else tasks + inputs + 8
    assert m * u < 1
    return m * u / (1 - m * u) * magnitude(case, 0.0) + 2 * m * eta * (1 + u) ** m * magnitude(case, 1.0)


def magnitude(case: Case, more: float) -> Tensor:
    """The layer's formula with |a| + `more` for each of its values a, by `delta`-like sums in float64 (B, T, O)."""

    def size(tensor: Tensor) -> Tensor:
        return tensor.detach().double().abs() + more

    x, g, bank = size(case.x), size(case.g), case.bank
    if isinstance(bank, LowRankExperts):
        weight = torch.einsum("ok,bk,ki->boi", size(bank.left), g, size(bank.right))  # (B, O, I)
        bias = (abs(bank.bias_scaling) + more) * size(bank.bias).sum(dim=0, keepdim=True)  # (1, O)
    else:
        tau, beta = task_tensors(bank)
        weight = torch.einsum("bn,noi->boi", g, size(tau))  # (B, O, I)
        bias = g @ size(beta)  # (B, O)
    weight, bias = weight + size(case.base.weight), bias + size(case.base.bias)
    return torch.einsum("bti,boi->bto", x, weight.expand(x.shape[0], -1, -1)) + bias[:, None]


@every_bank
@every_half
@quick
@given(st.data())
def test_half_arithmetic_moves_an_output_by_no_more_than_the_bound(kind, half, data):
    case = data.draw(cases(kind))
    moved = (applied(case.bank, case.x, case.g, case.base, half) - case.exact).abs()
    bound = arithmetic_bound(case, half)
    assert moved.isfinite().all()
    assert (moved <= bound).all(), f"{(moved / bound).max().item():.3f} of the bound"
