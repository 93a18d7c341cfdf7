"""Expert banks."""

from __future__ import annotations

import pytest
import torch
from helpers import BANKS, apply_delta, make_bank, random_linear, random_task_vectors

from fusion_merge.errors import ConfigError
from fusion_merge.moe import DenseExperts, LowRankExperts, SparseExperts
from fusion_merge.moe.experts import (
    TaskVector,
    dense_spec,
    empty_experts,
    low_rank_spec,
    sparse_spec,
)
from fusion_merge.task_vectors import magnitude_prune, num_survivors

N, OUT, IN, B, T = 3, 7, 5, 4, 2


@pytest.fixture(params=BANKS)
def bank(request):
    return make_bank(request.param, random_task_vectors(N, OUT, IN))


def _x(batch: int = B) -> torch.Tensor:
    return torch.randn(batch, T, IN, generator=torch.Generator().manual_seed(1))


def _coefficients(bank, rows: int) -> torch.Tensor:
    return torch.randn(rows, bank.num_coefficients, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("batch", "rows"), [(B, B), (B, 1), (1, 1)], ids=["sample", "batch", "single"])
def test_forward_equals_applying_delta(bank, batch, rows):
    base, x, coefficients = random_linear(IN, OUT), _x(batch), _coefficients(bank, rows)
    expected = apply_delta(x, bank.delta(coefficients), base)
    torch.testing.assert_close(bank(x, coefficients, base), expected, atol=1e-4, rtol=1e-4)


def test_delta_has_one_row_for_each_row_of_coefficients(bank):
    delta = bank.delta(_coefficients(bank, B))
    assert delta.weight.shape == (B, OUT, IN)
    assert delta.bias.shape == (B, OUT)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_zero_coefficients_give_the_base_layer(kind):
    bank, base, x = make_bank(kind, random_task_vectors(N, OUT, IN)), random_linear(IN, OUT), _x()
    torch.testing.assert_close(bank(x, torch.zeros(B, N), base), base(x))


def test_zero_coefficients_leave_low_rank_experts_with_their_static_biases():
    vectors, base, x = random_task_vectors(N, OUT, IN), random_linear(IN, OUT), _x()
    bank = LowRankExperts.from_task_vectors(vectors, 2, bias_scaling=0.3)
    expected = base(x) + 0.3 * sum(v.bias for v in vectors)
    torch.testing.assert_close(bank(x, torch.zeros(B, bank.num_coefficients), base), expected)


@pytest.mark.parametrize("task", range(N))
def test_a_one_hot_dense_coefficient_gives_that_finetuned_layer(task):
    vectors, base, x = random_task_vectors(N, OUT, IN), random_linear(IN, OUT), _x()
    expected = torch.nn.functional.linear(x, base.weight + vectors[task].weight, base.bias + vectors[task].bias)
    coefficients = torch.eye(N)[task].expand(B, N)
    torch.testing.assert_close(DenseExperts.from_task_vectors(vectors)(x, coefficients, base), expected)


def test_full_rank_with_uniform_coefficients_is_task_arithmetic():
    vectors, base, x = random_task_vectors(N, OUT, IN), random_linear(IN, OUT), _x()
    bank = LowRankExperts.from_task_vectors(vectors, -1, bias_scaling=0.3)
    weight = base.weight + 0.3 * sum(v.weight for v in vectors)
    bias = base.bias + 0.3 * sum(v.bias for v in vectors)
    coefficients = torch.full((B, bank.num_coefficients), 0.3)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(bank(x, coefficients, base), expected, atol=1e-5, rtol=1e-5)


def test_low_rank_experts_are_task_major_by_descending_singular_value():
    vectors = random_task_vectors(N, OUT, IN)
    bank = LowRankExperts.from_task_vectors(vectors, 2, bias_scaling=0.3)
    assert bank.num_coefficients == N * 2
    for n, vector in enumerate(vectors):
        u, s, vh = torch.linalg.svd(vector.weight)
        for j in range(2):
            only = torch.eye(N * 2)[n * 2 + j].unsqueeze(0)
            expected = s[j] * torch.outer(u[:, j], vh[j])
            torch.testing.assert_close(bank.delta(only).weight[0], expected, atol=1e-5, rtol=1e-5)


def test_low_rank_biases_do_not_depend_on_the_coefficients():
    bank = make_bank("low_rank", random_task_vectors(N, OUT, IN))
    biases = bank.delta(_coefficients(bank, 2)).bias
    assert torch.equal(biases[0], biases[1])


def test_a_rank_that_a_layer_cannot_have_is_refused():
    with pytest.raises(ConfigError, match="`rank`=6"):
        LowRankExperts.from_task_vectors(random_task_vectors(N, OUT, IN), 6, bias_scaling=0.3)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
def test_sparse_experts_expand_to_the_pruned_task_vectors(ratio):
    vectors = random_task_vectors(N, OUT, IN)
    expected = torch.stack([magnitude_prune(v.weight, ratio) for v in vectors])
    assert torch.equal(SparseExperts.from_task_vectors(vectors, ratio).expand(), expected)


def test_sparse_experts_prune_each_tensor_by_itself():
    small, large = random_task_vectors(2, OUT, IN)
    large = TaskVector(100 * large.weight, 100 * large.bias)
    bank = SparseExperts.from_task_vectors([small, large], 0.6)
    counts = bank.expand().flatten(1).count_nonzero(dim=1)
    assert counts[0] == counts[1] == 14  # 40 % of 35
    assert (bank.bias != 0).sum(dim=1).tolist() == [3, 3]  # 40 % of 7, above the quantile between two entries


def test_sparse_experts_store_the_survivors_and_hardly_more():
    bank = SparseExperts.from_task_vectors(random_task_vectors(N, 200, 50), 0.9)
    assert N * 1000 <= bank.values.numel() == bank.gaps.numel() <= N * 1000 + 1
    assert (bank.gaps.dtype, bank.starts.dtype, bank.starts.numel()) == (torch.uint8, torch.int32, 2)
    stored = sum(t.numel() * t.element_size() for t in bank.state_dict().values())
    assert stored < 0.15 * N * 200 * 50 * 4


def test_sparse_experts_may_have_no_survivor_at_all():
    zeros = [TaskVector(torch.zeros(OUT, IN), torch.zeros(OUT))] * N
    bank, base, x = SparseExperts.from_task_vectors(zeros, 0.5), random_linear(IN, OUT), _x()
    assert not bank.values.any()
    torch.testing.assert_close(bank(x, torch.ones(B, N), base), base(x))


def test_experts_are_frozen(bank):
    assert not any(p.requires_grad for p in bank.parameters())


def test_gradient_reaches_the_coefficients(bank):
    coefficients = _coefficients(bank, B).requires_grad_()
    bank(_x(), coefficients, random_linear(IN, OUT)).square().sum().backward()
    assert coefficients.grad.count_nonzero() == coefficients.numel()


def test_making_a_bank_does_not_change_the_task_vectors(bank):
    vectors = random_task_vectors(N, OUT, IN)
    for kind in BANKS:
        for parameter in make_bank(kind, vectors).parameters():
            parameter.data.zero_()
    for vector, again in zip(vectors, random_task_vectors(N, OUT, IN), strict=True):
        assert torch.equal(vector.weight, again.weight)
        assert torch.equal(vector.bias, again.bias)


def test_an_empty_bank_takes_the_state_that_its_spec_was_made_from(bank):
    copy = empty_experts(bank.spec(), IN, OUT)
    copy.load_state_dict(bank.state_dict())
    base, x, coefficients = random_linear(IN, OUT), _x(), _coefficients(bank, B)
    assert torch.equal(copy(x, coefficients, base), bank(x, coefficients, base))
    assert copy.spec() == bank.spec()


def test_an_unknown_kind_of_bank_is_refused():
    with pytest.raises(ConfigError, match="`quantum` is unknown"):
        empty_experts({"kind": "quantum", "num_tasks": 1}, IN, OUT)


def test_a_spec_is_known_before_its_bank_is_made():
    vectors = random_task_vectors(N, OUT, IN)
    assert make_bank("dense", vectors).spec() == dense_spec(N)
    assert make_bank("sparse", vectors, ratio=0.6).spec() == sparse_spec(N, N * num_survivors(OUT * IN, 0.6))
    assert make_bank("low_rank", vectors, rank=4).spec() == low_rank_spec(N, 4, 0.3)


@pytest.mark.parametrize(
    ("entries", "ratio", "survivors"),
    [
        (1, 0.0, 0),
        (35, 0.0, 34),
        (35, 0.6, 14),
        (101, 0.29, 71),
        (3072 * 768, 0.9, 235_930),
        (3072 * 768, 0.99, 23_593),
    ],
)
def test_survivors_are_strictly_above_the_quantile(entries, ratio, survivors):
    assert num_survivors(entries, ratio) == survivors
