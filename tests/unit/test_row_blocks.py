"""Merged weights applied block by block: what a plain product of the whole merged weight gives, gradients included."""

from __future__ import annotations

import pytest
import torch
from helpers import apply_delta, make_bank, random_linear, random_task_vectors

from fusion_merge.moe import row_blocks

BATCH, TOKENS, WIDTH, ROWS, TASKS = 3, 5, 6, 70, 4


@pytest.fixture(params=["one block", "several blocks"])
def blocks(request, monkeypatch) -> None:
    if request.param == "several blocks":  # of 16 rows, and a shorter one at the end
        monkeypatch.setattr(row_blocks, "_SAMPLE_BYTES", 1)
        monkeypatch.setattr(row_blocks, "_BATCH_BYTES", 1)


def _case(kind: str, samples: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    bank = make_bank(kind, random_task_vectors(TASKS, ROWS, WIDTH, dtype=dtype))
    base = random_linear(WIDTH, ROWS, dtype=dtype).requires_grad_(False)
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    coefficients = torch.randn(samples, TASKS, generator=generator, dtype=dtype, requires_grad=True)
    return bank, base, x, coefficients


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("samples", [1, BATCH])
def test_outputs_and_gradients_are_those_of_the_whole_merged_weight(kind, samples):
    bank, base, x, coefficients = _case(kind, samples)
    towards = torch.randn(BATCH, TOKENS, ROWS, dtype=torch.float64)
    output, expected = bank(x, coefficients, base), apply_delta(x, bank.delta(coefficients), base)
    torch.testing.assert_close(output, expected)
    found = torch.autograd.grad((output * towards).sum(), (x, coefficients))
    wanted = torch.autograd.grad((expected * towards).sum(), (x, coefficients))
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("samples", [1, BATCH])
def test_gradients_are_those_of_small_differences(kind, samples):
    bank, base, x, coefficients = _case(kind, samples)
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


@pytest.mark.parametrize(("first", "last"), [(0, 1), (0, ROWS), (17, 40), (ROWS - 1, ROWS)])
def test_a_sparse_bank_gives_any_rows(first, last):
    bank = _case("sparse", 1)[0]
    assert torch.equal(bank.rows(first, last), bank.expand()[:, first:last])
