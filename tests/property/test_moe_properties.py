"""What holds for every expert bank, whatever the shapes."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from helpers import BANKS, apply_delta, make_bank, random_linear, random_task_vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_merge.moe.experts import TaskVector
from fusion_merge.task_vectors import magnitude_prune, num_survivors, task_arithmetic, truncated_svd

quick = settings(deadline=None, max_examples=30, derandomize=True)

TOLERANCE = {"atol": 2e-3, "rtol": 1e-3}

kinds = st.sampled_from(BANKS)
dtypes = st.sampled_from([torch.float32, torch.float64])
sizes = st.integers(1, 7)
seeds = st.integers(0, 2**16)


def _draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def layers(draw, least_tasks: int = 1):
    """A bank of any kind, its base layer and its task vectors."""
    inputs, outputs, dtype, seed = draw(sizes), draw(sizes), draw(dtypes), draw(seeds)
    vectors = random_task_vectors(draw(st.integers(least_tasks, 4)), outputs, inputs, seed=seed, dtype=dtype)
    kind, rank, ratio = draw(kinds), draw(st.integers(1, min(inputs, outputs))), draw(st.floats(0.0, 0.99))
    return {
        "make": lambda v: make_bank(kind, v, rank=rank, ratio=ratio),
        "per_task": rank if kind == "low_rank" else 1,
        "vectors": vectors,
        "base": random_linear(inputs, outputs, seed=seed + 1, dtype=dtype),
        "inputs": inputs,
        "dtype": dtype,
        "seed": seed,
    }


@quick
@given(layers(), sizes, sizes, st.booleans())
def test_forward_equals_applying_delta(layer, batch, tokens, one_row):
    bank, dtype, seed = layer["make"](layer["vectors"]), layer["dtype"], layer["seed"]
    x = _draw((batch, tokens, layer["inputs"]), seed + 2, dtype)
    coefficients = _draw((1 if one_row else batch, bank.num_coefficients), seed + 3, dtype)
    output = bank(x, coefficients, layer["base"])
    assert output.dtype == dtype
    torch.testing.assert_close(output, apply_delta(x, bank.delta(coefficients), layer["base"]), **TOLERANCE)


@quick
@given(layers(least_tasks=2), sizes, st.randoms(use_true_random=False))
def test_the_order_of_tasks_permutes_experts_and_nothing_else(layer, batch, random):
    order = list(range(len(layer["vectors"])))
    random.shuffle(order)
    bank, shuffled = layer["make"](layer["vectors"]), layer["make"]([layer["vectors"][n] for n in order])
    x = _draw((batch, 3, layer["inputs"]), layer["seed"] + 2, layer["dtype"])
    coefficients = _draw((batch, bank.num_coefficients), layer["seed"] + 3, layer["dtype"])
    columns = [n * layer["per_task"] + j for n in order for j in range(layer["per_task"])]
    expected = bank(x, coefficients, layer["base"])
    torch.testing.assert_close(shuffled(x, coefficients[:, columns], layer["base"]), expected, **TOLERANCE)


@quick
@given(layers(), st.integers(0, 4), st.floats(-3, 3))
def test_an_expert_equal_to_the_pretrained_model_changes_nothing(layer, at, coefficient):
    vectors, dtype, seed, per_task = layer["vectors"], layer["dtype"], layer["seed"], layer["per_task"]
    nothing = TaskVector(*(torch.zeros_like(tensor) for tensor in vectors[0][:2]))
    at = min(at, len(vectors))
    bank, more = layer["make"](vectors), layer["make"]([*vectors[:at], nothing, *vectors[at:]])
    assert more.num_coefficients == bank.num_coefficients + per_task
    x = _draw((2, 3, layer["inputs"]), seed + 2, dtype)
    g = _draw((2, bank.num_coefficients), seed + 3, dtype)
    extra = torch.full((2, per_task), coefficient, dtype=dtype)
    with_nothing = torch.cat([g[:, : at * per_task], extra, g[:, at * per_task :]], dim=1)
    expected = bank(x, g, layer["base"])
    torch.testing.assert_close(more(x, with_nothing, layer["base"]), expected, **TOLERANCE)


@quick
@given(st.integers(1, 4), st.floats(-2, 2), st.floats(-2, 2), dtypes, seeds)
def test_task_arithmetic_is_linear_in_its_scaling_factor(tasks, first, second, dtype, seed):
    pretrained = {"w": _draw((3, 2), seed, dtype)}
    finetuned = [{"w": _draw((3, 2), seed + 1 + n, dtype)} for n in range(tasks)]

    def moved(scaling_factor: float) -> torch.Tensor:
        return task_arithmetic(pretrained, finetuned, scaling_factor)["w"] - pretrained["w"]

    torch.testing.assert_close(moved(first) + moved(second), moved(first + second), atol=1e-4, rtol=1e-4)


@quick
@given(st.integers(1, 60), st.floats(0.0, 0.999), dtypes, seeds)
def test_pruning_keeps_the_largest_entries_and_at_most_their_share(size, ratio, dtype, seed):
    tensor = _draw((size,), seed, dtype)
    kept = magnitude_prune(tensor, ratio) != 0
    assert kept.sum().item() <= math.ceil((1 - ratio) * (size - 1))
    if kept.any() and not kept.all():
        assert tensor[kept].abs().min() > tensor[~kept].abs().max()


@quick
@given(st.integers(1, 5000), st.floats(0.0, 0.9999), seeds)
def test_the_number_of_survivors_is_known_beforehand(size, ratio, seed):
    distinct = 1 + torch.randperm(size, generator=torch.Generator().manual_seed(seed)).float()
    assert magnitude_prune(distinct, ratio).count_nonzero() == num_survivors(size, ratio)


@quick
@given(st.integers(1, 60), st.floats(0.0, 0.999), st.integers(0, 3), seeds)
def test_equal_magnitudes_and_zeros_leave_fewer_survivors(size, ratio, largest, seed):
    tied = torch.randint(-largest, largest + 1, (size,), generator=torch.Generator().manual_seed(seed)).float()
    assert magnitude_prune(tied, ratio).count_nonzero() <= num_survivors(size, ratio)


@quick
@given(sizes, sizes, seeds)
def test_svd_error_falls_with_the_rank_to_nothing(outputs, inputs, seed):
    matrix = _draw((outputs, inputs), seed)
    errors = []
    for rank in range(1, min(outputs, inputs) + 1):
        left, right = truncated_svd(matrix, rank)
        errors.append((matrix - left @ right).norm().item())
    assert all(after <= before + 1e-5 for before, after in pairwise(errors))
    assert errors[-1] < 1e-4
