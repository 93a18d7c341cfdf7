"""What the static merges promise for any task vectors: invariances, optima, and spectra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.merging.regression import Regression, input_grams, least_squares
from fusion_merge.merging.spectra import iso_c, iso_cts, polar, singular_triplets, tsv_merge
from fusion_merge.merging.ties import MERGE_FUNCS, disjoint_merge, smallest, ties, trimmed
from fusion_merge.merging.vectors import TaskVectors, mean
from fusion_merge.methods.dare import dropped
from fusion_merge.task_vectors import simple_average, task_arithmetic

few = settings(max_examples=25, deadline=None)
seeds, counts = st.integers(0, 10_000), st.integers(1, 5)
funcs, sizes = st.sampled_from(MERGE_FUNCS), st.integers(1, 9)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def vectors_of(seed: int, tasks: int, scale: float = 1.0) -> TaskVectors:
    shapes = {"a": (4, 6), "b": (5,), "c": (2, 3, 2, 2)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tuned = [
        {name: scale * draw(seed * 100 + 10 * n + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
        for n in range(tasks)
    ]
    return TaskVectors(base, tuned)


def flat(vectors: TaskVectors) -> Tensor:
    return torch.cat([vectors[name].flatten(1) for name in vectors], dim=1)


def ties_of(vectors: TaskVectors, percent: float, merge_func: str) -> Tensor:
    kept = trimmed(vectors, percent)
    merged = kept.merged(ties(kept, merge_func, 1.0))
    return torch.cat([merged[name].flatten() for name in merged])


# Task vectors


@few
@given(seeds, counts)
def test_sum_and_mean_are_task_arithmetic_and_the_average(seed, tasks):
    base = {"w": draw(seed, 3, 4), "n": torch.arange(3)}
    tuned = [{"w": draw(seed + n + 1, 3, 4), "n": torch.arange(3)} for n in range(tasks)]
    vectors = TaskVectors(base, tuned)
    torch.testing.assert_close(vectors.merged(mean)["w"], simple_average(base, tuned)["w"])
    total = vectors.merged(lambda _, stacked: 0.3 * stacked.sum(dim=0))
    torch.testing.assert_close(total["w"], task_arithmetic(base, tuned, 0.3)["w"])
    assert torch.equal(total["n"], base["n"])
    assert list(vectors) == ["w"]


def test_tensors_that_are_left_are_the_pretrained_ones():
    vectors = TaskVectors(
        {"a": torch.ones(2), "b": torch.ones(2)}, [{"a": torch.zeros(2), "b": torch.zeros(2)}], leave=["a"]
    )
    merged = vectors.merged(mean)
    assert (merged["a"].tolist(), merged["b"].tolist(), len(merged), list(vectors)) == ([1, 1], [0, 0], 2, ["b"])


def test_task_vectors_of_no_model_or_other_shapes_are_refused():
    with pytest.raises(ModelError, match="no fine-tuned model"):
        TaskVectors({"a": torch.ones(2)}, [])
    with pytest.raises(ModelError, match="`a` of shape"):
        TaskVectors({"a": torch.ones(2)}, [{"a": torch.ones(3)}])


# TIES


@few
@given(seeds, counts, st.integers(1, 53), st.floats(1e-30, 1e30))
def test_threshold_is_the_kth_smallest_of_the_whole_model(seed, tasks, k, scale):
    vectors = vectors_of(seed, tasks, scale)
    expected = flat(vectors).abs().kthvalue(k, dim=1).values
    assert torch.equal(smallest(vectors, k), expected)


@few
@given(seeds, counts, st.floats(1.5, 99.5), funcs)
def test_ties_does_not_depend_on_the_order_of_tasks(seed, tasks, percent, merge_func):
    forwards = vectors_of(seed, tasks)
    backwards = TaskVectors(forwards._pretrained, forwards._finetuned[::-1])
    torch.testing.assert_close(ties_of(forwards, percent, merge_func), ties_of(backwards, percent, merge_func))


@few
@given(seeds, counts, st.floats(1.5, 100), funcs, st.sampled_from([0.5, 2.0, 1024.0]))
def test_ties_is_homogeneous(seed, tasks, percent, merge_func, scale):
    one, other = vectors_of(seed, tasks), vectors_of(seed, tasks, scale)
    torch.testing.assert_close(ties_of(other, percent, merge_func), scale * ties_of(one, percent, merge_func))


@few
@given(seeds, funcs)
def test_one_task_that_is_not_trimmed_is_itself(seed, merge_func):
    vectors = vectors_of(seed, 1)
    assert torch.equal(ties_of(vectors, 100, merge_func), flat(vectors)[0])


@few
@given(seeds, counts)
def test_without_trimming_the_sum_is_over_those_that_agree(seed, tasks):
    vectors = vectors_of(seed, tasks)
    stacked = flat(vectors)
    sign = stacked.sum(dim=0).sign()
    expected = torch.stack([torch.where(row.sign() == sign, row, torch.zeros(())) for row in stacked]).sum(dim=0)
    torch.testing.assert_close(ties_of(vectors, 100, "sum"), expected)


def test_entries_that_cancel_take_the_sign_of_most_others():
    for sign in (1.0, -1.0):
        tuned = [{"w": torch.tensor([2.0, 1.0, 3.0]) * sign}, {"w": torch.tensor([-2.0, 1.0, 3.0]) * sign}]
        assert (ties_of(TaskVectors({"w": torch.zeros(3)}, tuned), 100, "sum") * sign).tolist() == [2, 2, 6]


def test_mean_is_over_those_that_agree_and_max_the_largest():
    stacked = torch.tensor([[1.0, -4.0], [3.0, -2.0], [-1.0, 0.0]])
    sign = torch.tensor([1.0, -1.0])
    assert disjoint_merge(stacked, sign, "mean").tolist() == [2, -3]
    assert disjoint_merge(stacked, sign, "max").tolist() == [3, -4]
    assert disjoint_merge(stacked, sign, "sum").tolist() == [4, -6]
    with pytest.raises(ConfigError, match="`merge_func`='min'"):
        disjoint_merge(stacked, sign, "min")


@pytest.mark.parametrize("percent", [0.0, -3.0, 100.5])
def test_impossible_percentages_are_refused(percent):
    with pytest.raises(ConfigError, match="percent of the entries"):
        trimmed(vectors_of(0, 2), percent)


# DARE


@few
@given(seeds, st.floats(0, 0.95))
def test_dropping_keeps_the_expectation_and_the_share(seed, ratio):
    vectors = TaskVectors({"w": torch.zeros(300, 400)}, [{"w": torch.ones(300, 400)}] * 2)
    left = dropped(vectors, ratio, seed=seed)["w"]
    assert left.mean().item() == pytest.approx(1, abs=0.06)
    assert (left == 0).float().mean().item() == pytest.approx(ratio, abs=0.01)
    kept = left[left != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - ratio)))
    assert not torch.equal(left[0], left[1]) or ratio < 0.01
    plain = dropped(vectors, ratio, rescale=False, seed=seed)["w"]
    assert torch.equal(plain != 0, left != 0)
    assert set(plain.unique().tolist()) <= {0.0, 1.0}


def test_the_same_is_dropped_whenever_it_is_read_and_whatever_is_left_out():
    base = {"a": torch.zeros(20, 20), "b": torch.zeros(20, 20)}
    tuned = [{"a": torch.ones(20, 20), "b": torch.ones(20, 20)}]
    vectors, without = TaskVectors(base, tuned), TaskVectors(base, tuned, leave=["a"])
    left = dropped(vectors, 0.5)
    assert torch.equal(left["b"], left["b"])
    assert torch.equal(left["b"], dropped(without, 0.5)["b"])
    assert not torch.equal(left["a"], left["b"])
    assert not torch.equal(left["a"], dropped(vectors, 0.5, seed=1)["a"])
    assert torch.equal(dropped(vectors, 0.5, only={"b"})["a"], vectors["a"])
    assert torch.equal(dropped(vectors, 0.0)["a"], vectors["a"])


# Spectra


@few
@given(seeds, sizes, sizes)
def test_polar_factor_is_orthonormal_and_nearest(seed, rows, more):
    matrix = draw(seed, rows + more, rows)
    factor = polar(matrix)
    torch.testing.assert_close(factor.T @ factor, torch.eye(rows), atol=1e-4, rtol=0)
    product = factor.T @ matrix  # symmetric, which makes it the solution of the Procrustes problem
    torch.testing.assert_close(product, product.T, atol=1e-3, rtol=0)


@few
@given(seeds, st.integers(2, 9), st.integers(2, 9))
def test_one_task_is_not_changed_by_tsv_m(seed, rows, columns):
    matrix = draw(seed, rows, columns)
    torch.testing.assert_close(tsv_merge(matrix[None]), matrix, atol=1e-4, rtol=1e-4)


@few
@given(seeds, st.integers(1, 4))
def test_equal_tasks_merge_to_what_is_left_of_them(seed, tasks):
    matrix = draw(seed, 8, 12)
    left, values, right = singular_triplets(matrix, 8 // tasks)
    merged = tsv_merge(matrix.expand(tasks, -1, -1))
    torch.testing.assert_close(merged, (left * values) @ right.T, atol=1e-4, rtol=1e-4)


@few
@given(seeds)
def test_tasks_without_overlap_are_not_changed_beyond_their_rank(seed):
    """Orthogonal already: nothing interferes, and each keeps the leading half of its spectrum."""
    basis = torch.linalg.qr(draw(seed, 8, 8)).Q
    rows = torch.linalg.qr(draw(seed + 1, 12, 12)).Q
    parts = [(basis[:, i : i + 2] * torch.tensor([3.0, 1.0])) @ rows[i : i + 2] for i in (0, 2)]
    torch.testing.assert_close(tsv_merge(torch.stack(parts)), sum(parts), atol=1e-4, rtol=1e-4)


@few
@given(seeds, st.integers(2, 4))
def test_a_task_that_changed_nothing_bends_no_other(seed, tasks):
    matrix = draw(seed, 8, 12)
    still = torch.cat([matrix[None], torch.zeros(tasks - 1, 8, 12)])
    left, values, right = singular_triplets(matrix, 8 // tasks)
    torch.testing.assert_close(tsv_merge(still), (left * values) @ right.T, atol=1e-4, rtol=1e-4)


@few
@given(seeds, st.integers(2, 4), st.sampled_from([(8, 12), (12, 8), (8, 8)]))
def test_spectral_merges_do_not_depend_on_the_order_of_tasks(seed, tasks, shape):
    stacked = draw(seed, tasks, *shape).double()  # in float32 near-equal singular values alone make thousandths
    for merge in (tsv_merge, lambda s: iso_cts(s, 0.5)):
        torch.testing.assert_close(merge(stacked.flip(0)), merge(stacked), atol=1e-6, rtol=1e-6)


@few
@given(seeds, st.integers(1, 4), st.sampled_from([(8, 12), (12, 8), (8, 8)]), st.floats(0, 1))
def test_isotropic_merges_have_one_singular_value(seed, tasks, shape, fraction):
    stacked = draw(seed, tasks, *shape)
    # beside a common space a direction counts from a 10,000th of its matrix on; one 8 × 8 in 260 has a smaller one
    assume(all(torch.linalg.svdvals(matrix)[-1] > 2e-4 * torch.linalg.matrix_norm(matrix) for matrix in stacked))
    for merged in (iso_c(stacked.sum(dim=0)), iso_cts(stacked, fraction)):
        values = torch.linalg.svdvals(merged)
        torch.testing.assert_close(values, values.mean().expand_as(values), atol=1e-3, rtol=1e-3)
    total = torch.linalg.svdvals(stacked.sum(dim=0)).sum()
    torch.testing.assert_close(torch.linalg.svdvals(iso_c(stacked.sum(dim=0))).sum(), total, atol=1e-3, rtol=1e-3)


def test_a_small_direction_stays_where_nothing_was_taken_away_from_it():
    """Its singular value is a 6,000th of the largest, which is no rounding of a matrix that is left as it was."""
    values = torch.linalg.svdvals(iso_cts(draw(44, 1, 8, 8), 0.0))
    torch.testing.assert_close(values, values[0].expand(8))


@few
@given(seeds, st.integers(1, 4))
def test_with_a_common_space_alone_iso_cts_is_iso_c(seed, tasks):
    stacked = draw(seed, tasks, 6, 9)
    torch.testing.assert_close(iso_cts(stacked, 1.0), iso_c(stacked.sum(dim=0)), atol=1e-4, rtol=1e-4)


@few
@given(seeds, st.integers(1, 5))
def test_directions_that_nothing_moves_in_are_not_made_up(seed, rank):
    low = draw(seed, 8, rank) @ draw(seed + 1, rank, 12)
    values = torch.linalg.svdvals(iso_c(low))
    torch.testing.assert_close(
        values[:rank], torch.linalg.svdvals(low)[:rank].mean().expand(rank), atol=1e-3, rtol=1e-3
    )
    assert values[rank:].max() < 1e-3
    for merged in (iso_c(torch.zeros(3, 4)), iso_cts(torch.zeros(2, 3, 4), 0.5), tsv_merge(torch.zeros(2, 3, 4))):
        assert torch.equal(merged, torch.zeros(3, 4))


@few
@given(seeds, st.integers(1, 6))
def test_task_vectors_of_low_rank_are_merged_within_the_directions_that_they_have(seed, rank):
    """Below the common space's rank, and above it: what is left beside that space may be nothing but rounding."""
    parts = [(draw(seed + n, 24, rank), draw(seed + 9 + n, rank, 32)) for n in range(3)]
    stacked = torch.stack([left @ right for left, right in parts])
    columns = torch.linalg.qr(torch.cat([left for left, _ in parts], dim=1)).Q
    rows = torch.linalg.qr(torch.cat([right for _, right in parts]).T).Q
    for merged in (iso_c(stacked.sum(dim=0)), iso_cts(stacked, 0.8), tsv_merge(stacked)):
        beside = merged - columns @ (columns.T @ merged @ rows) @ rows.T
        assert beside.norm() <= 1e-3 * merged.norm()


def test_more_directions_than_there_are_are_not_given_to_tasks():
    assert iso_cts(draw(0, 2, 3, 5), 0.0).isfinite().all()  # half of 3 for each would be rounded up to 2


# RegMean


def regression(seed: int, tasks: int, images: int, ratio: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    weights = [draw(seed + n, 3, 6) for n in range(tasks)]
    inputs = [draw(seed + 50 + n, images, 6) for n in range(tasks)]
    found = Regression(ratio)
    for weight, x in zip(weights, inputs, strict=True):
        found.add({"fc": (x.double().T @ x.double()) / len(x)}, lambda _, weight=weight: weight)
    return weights, inputs, found.solution("fc", torch.stack(weights).mean(dim=0), torch.device("cpu"))


@few
@given(seeds, st.integers(1, 4))
def test_regression_is_the_optimum_of_least_squares(seed, tasks):
    weights, inputs, found = regression(seed, tasks, 20, 1.0)

    def loss(merged: Tensor) -> Tensor:
        return sum(((x.double() @ (merged - w.double()).T) ** 2).mean() for w, x in zip(weights, inputs, strict=True))

    candidate = found.clone().requires_grad_()
    loss(candidate).backward()
    assert candidate.grad.abs().max() < 1e-8
    if tasks > 1:
        assert loss(found) < loss(torch.stack(weights).mean(dim=0).double())


@few
@given(seeds, st.floats(0, 1))
def test_regression_of_equal_weights_is_that_weight(seed, ratio):
    weight, found = draw(seed, 3, 6), Regression(ratio)
    for n in range(3):
        x = draw(seed + n, 10, 6)
        found.add({"fc": (x.double().T @ x.double())}, lambda _: weight)
    solution = found.solution("fc", weight, torch.device("cpu"))
    torch.testing.assert_close(solution, weight.double(), atol=1e-6, rtol=1e-6)


@few
@given(seeds)
def test_diagonal_alone_weighs_each_input_by_its_power(seed):
    weights, inputs, found = regression(seed, 2, 20, 0.0)
    powers = [x.double().square().mean(dim=0) for x in inputs]
    expected = sum(w.double() * p for w, p in zip(weights, powers, strict=True)) / sum(powers)
    torch.testing.assert_close(found, expected)


@few
@given(seeds, st.integers(1, 3))
def test_where_inputs_say_nothing_the_average_stays(seed, images):
    """Fewer images than inputs: the optimum is not unique, and the one nearest to the average is taken."""
    weights, inputs, found = regression(seed, 2, images, 1.0)
    average = torch.stack(weights).mean(dim=0).double()
    seen = torch.cat(inputs).double()
    unseen = torch.eye(6, dtype=torch.float64) - torch.linalg.pinv(seen) @ seen
    torch.testing.assert_close((found - average) @ unseen, torch.zeros(3, 6, dtype=torch.float64), atol=1e-6, rtol=0)
    gradient = sum(
        (found - w.double()) @ (x.double().T @ x.double()) / len(x) for w, x in zip(weights, inputs, strict=True)
    )
    assert gradient.abs().max() < 1e-6


def test_inputs_that_are_always_zero_leave_the_average():
    gram = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    start = torch.tensor([[5.0, 7.0]], dtype=torch.float64)
    assert least_squares(torch.tensor([[2.0, 0.0]], dtype=torch.float64), gram, start).tolist() == [[2.0, 7.0]]


def test_gram_matrices_are_those_of_the_inputs_and_shared_where_inputs_are():
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o = (torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.q(x) + self.k(x))

    model, batches = Two(), [draw(0, 3, 5, 4), draw(1, 2, 5, 4)]
    grams = input_grams(model, ["q", "k", "o"], batches)
    rows = torch.cat([b.flatten(0, 1) for b in batches]).double()
    torch.testing.assert_close(grams["q"], rows.T @ rows / 25)
    assert grams["q"] is grams["k"]
    inner = torch.cat([(model.q(b) + model.k(b)).flatten(0, 1) for b in batches]).detach().double()
    torch.testing.assert_close(grams["o"], inner.T @ inner / 25)
    assert not any(module._forward_pre_hooks for module in model.modules())
