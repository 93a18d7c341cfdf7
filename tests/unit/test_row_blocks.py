"""Merged weights applied block by block: what a plain product of the whole merged weight gives, gradients included."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import apply_delta, make_bank, random_linear, random_task_vectors

from fusion_merge.errors import ModelError
from fusion_merge.moe import MoELinear, row_blocks

BATCH, TOKENS, SHORT, LONG, TASKS = 3, 5, 6, 70, 4

SHAPES = {"widens": (SHORT, LONG), "narrows": (LONG, SHORT), "square": (LONG, LONG), "one block": (SHORT, 8)}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Of 64 rows of 6, so that the longer sides make a block and a shorter one, or many."""
    monkeypatch.setattr(row_blocks, "_ENTRIES", 64 * SHORT)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("group", [1, 2])
def test_samples_may_be_taken_in_groups(kind, group, monkeypatch):
    bank, base, x, coefficients = _case(kind, BATCH)
    whole = bank(x, coefficients, base)
    monkeypatch.setattr(row_blocks, "SAMPLES", group)
    grouped = bank(x, coefficients, base)
    torch.testing.assert_close(grouped, whole)
    found, expected = (torch.autograd.grad(out.square().sum(), (x, coefficients)) for out in (grouped, whole))
    torch.testing.assert_close(found, expected)


every_shape = pytest.mark.parametrize("shape", SHAPES)


def _case(kind: str, samples: int, dtype: torch.dtype = torch.float64, shape: str = "widens"):
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = SHAPES[shape]
    bank = make_bank(kind, random_task_vectors(TASKS, outputs, inputs, dtype=dtype))
    base = random_linear(inputs, outputs, dtype=dtype).requires_grad_(False)
    x = torch.randn(BATCH, TOKENS, inputs, generator=generator, dtype=dtype, requires_grad=True)
    coefficients = torch.randn(samples, TASKS, generator=generator, dtype=dtype, requires_grad=True)
    return bank, base, x, coefficients


@every_shape
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("samples", [1, BATCH])
def test_outputs_and_gradients_are_those_of_the_whole_merged_weight(kind, samples, shape):
    bank, base, x, coefficients = _case(kind, samples, shape=shape)
    towards = torch.randn(BATCH, TOKENS, base.out_features, dtype=torch.float64)
    output, expected = bank(x, coefficients, base), apply_delta(x, bank.delta(coefficients), base)
    torch.testing.assert_close(output, expected)
    found = torch.autograd.grad((output * towards).sum(), (x, coefficients))
    wanted = torch.autograd.grad((expected * towards).sum(), (x, coefficients))
    torch.testing.assert_close(found, wanted)


@every_shape
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("samples", [1, BATCH])
def test_gradients_are_those_of_small_differences(kind, samples, shape):
    bank, base, x, coefficients = _case(kind, samples, shape=shape)
    assert torch.autograd.gradcheck(lambda a, b: bank(a, b, base), (x, coefficients))


@pytest.mark.parametrize("wanted", ["input", "coefficients"])
def test_only_the_gradients_that_are_wanted_are_formed(wanted):
    bank, base, x, coefficients = _case("dense", BATCH)
    (coefficients if wanted == "input" else x).requires_grad_(False)
    bank(x, coefficients, base).sum().backward()
    assert (x.grad is not None, coefficients.grad is not None) == (wanted == "input", wanted == "coefficients")


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_mixed_precision_computes_in_half_precision_backwards_too(kind):
    bank, base, x, coefficients = _case(kind, BATCH, torch.float32)
    exact = torch.autograd.grad(bank(x, coefficients, base).square().sum(), (x, coefficients))
    with torch.autocast("cpu", torch.bfloat16):
        output = bank(x, coefficients, base)
    assert output.dtype == torch.bfloat16
    rounded = torch.autograd.grad(output.float().square().sum(), (x, coefficients))
    for value, expected in zip(rounded, exact, strict=True):
        assert value.dtype == torch.float32
        assert (value - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_no_merged_weight_is_kept_for_the_gradient(kind):
    bank, base, x, coefficients = _case(kind, BATCH)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        bank(x, coefficients, base)
    assert max(kept) <= max(x.numel(), base.weight.numel())


@every_shape
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_bank_gives_its_rows_in_blocks_along_the_longer_side(kind, shape):
    bank = _case(kind, 1, shape=shape)[0]
    long = row_blocks.along(bank.expand())  # (N, L, S)
    height = row_blocks.block_rows(long.shape[2])
    for first in range(0, long.shape[1], height):
        last = min(first + height, long.shape[1])
        assert torch.equal(bank.rows(first, last), long[:, first:last])


@every_shape
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_base_lies_in_memory_as_it_is_read(kind, shape):
    bank, base, *_ = _case(kind, 1, shape=shape)
    before = base.weight.clone()
    layer = MoELinear(base, bank)
    assert row_blocks.along(layer.base.weight).is_contiguous()
    assert torch.equal(layer.base.weight, before)
    assert row_blocks.along(copy.deepcopy(layer).half().base.weight).is_contiguous()


@pytest.mark.parametrize("kind", ["dense", "sparse", "low_rank"])
@pytest.mark.parametrize("samples", [1, BATCH])
def test_second_derivatives_are_right_or_refused(kind, samples):
    bank, base, x, coefficients = _case("dense" if kind == "low_rank" else kind, samples)
    if kind == "low_rank":
        bank = make_bank(kind, random_task_vectors(2, *reversed(SHAPES["widens"]), dtype=torch.float64), rank=2)
        x = x.detach().repeat(1, 8, 1).requires_grad_()  # so many tokens that a merged weight is cheaper
    (first,) = torch.autograd.grad(bank(x, coefficients, base).square().sum(), x, create_graph=True)
    if kind == "low_rank" and samples > 1:
        delta = apply_delta(x, bank.delta(coefficients), base).square().sum()
        (expected,) = torch.autograd.grad(delta, x, create_graph=True)
        found, wanted = (torch.autograd.grad(d.square().sum(), coefficients)[0] for d in (first, expected))
        torch.testing.assert_close(found, wanted)
    else:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.square().sum().backward()


def test_a_base_that_wants_a_gradient_is_refused():
    bank, base, x, coefficients = _case("dense", 1)
    layer = MoELinear(base, bank)
    layer.base.requires_grad_(True)
    with pytest.raises(ModelError, match="the base of a routed layer is frozen"):
        layer(x, coefficients)
