"""A low-rank sum, in factors or merged: what the whole merged weight gives, gradients included."""

from __future__ import annotations

import pytest
import torch
from helpers import apply_delta, make_bank, random_linear, random_task_vectors

from fusion_merge.moe import MoELinear, MoEMLP, Routing, SoftTopK, make_router
from fusion_merge.moe.factors import factored_linear, merged_factors

INPUTS, OUTPUTS, BATCH, TOKENS = 6, 9, 3, 5


def _case(samples: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    bank = make_bank("low_rank", random_task_vectors(2, OUTPUTS, INPUTS, dtype=dtype), rank=2)
    base = random_linear(INPUTS, OUTPUTS, dtype=dtype).requires_grad_(False)
    x = torch.randn(BATCH, TOKENS, INPUTS, generator=generator, dtype=dtype, requires_grad=True)
    coefficients = torch.randn(samples, 4, generator=generator, dtype=dtype, requires_grad=True)
    return bank, base, x, coefficients


def _apply(way, bank, base, x, coefficients):
    bias = base.bias + bank.delta(coefficients[:1]).bias[0]
    return way(x, coefficients, base.weight, bias, bank.left, bank.right)


WAYS = [(factored_linear, BATCH), (factored_linear, 1), (merged_factors, 1)]


@pytest.mark.parametrize(("way", "samples"), WAYS)
def test_outputs_and_gradients_are_those_of_the_whole_merged_weight(way, samples):
    bank, base, x, coefficients = _case(samples)
    output, expected = _apply(way, bank, base, x, coefficients), apply_delta(x, bank.delta(coefficients), base)
    torch.testing.assert_close(output, expected)
    towards = torch.randn_like(output)
    found = torch.autograd.grad((output * towards).sum(), (x, coefficients))
    wanted = torch.autograd.grad((expected * towards).sum(), (x, coefficients))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("way", "samples"), WAYS)
def test_gradients_are_those_of_small_differences(way, samples):
    bank, base, x, coefficients = _case(samples)
    assert torch.autograd.gradcheck(lambda a, b: _apply(way, bank, base, a, b), (x, coefficients))


@pytest.mark.parametrize("wanted", ["input", "coefficients"])
def test_only_the_gradients_that_are_wanted_are_formed(wanted):
    bank, base, x, coefficients = _case(1)
    (coefficients if wanted == "input" else x).requires_grad_(False)
    _apply(merged_factors, bank, base, x, coefficients).sum().backward()
    assert (x.grad is not None, coefficients.grad is not None) == (wanted == "input", wanted == "coefficients")


@pytest.mark.parametrize(("way", "samples"), WAYS)
def test_mixed_precision_computes_in_half_precision_backwards_too(way, samples):
    bank, base, x, coefficients = _case(samples, torch.float32)
    exact = torch.autograd.grad(_apply(way, bank, base, x, coefficients).square().sum(), (x, coefficients))
    with torch.autocast("cpu", torch.bfloat16):
        output = _apply(way, bank, base, x, coefficients)
    assert output.dtype == torch.bfloat16
    rounded = torch.autograd.grad(output.float().square().sum(), (x, coefficients))
    for value, expected in zip(rounded, exact, strict=True):
        assert value.dtype == torch.float32
        assert (value - expected).norm() < 0.03 * expected.norm()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own doing
@pytest.mark.parametrize("selection", [None, SoftTopK(2)])
@pytest.mark.parametrize("routing", list(Routing))
def test_a_low_rank_mlp_compiles_in_one_piece(routing, selection):
    """No graph break, whichever way the sum is applied."""
    torch.compiler.reset()
    vectors = [random_task_vectors(2, OUTPUTS, INPUTS), random_task_vectors(2, INPUTS, OUTPUTS)]
    layers = [
        MoELinear(random_linear(*shape), make_bank("low_rank", task_vectors))
        for shape, task_vectors in zip([(INPUTS, OUTPUTS), (OUTPUTS, INPUTS)], vectors, strict=True)
    ]
    router = make_router(1, INPUTS, 4, 0.3, hidden=8, generator=torch.Generator().manual_seed(0))
    mlp = MoEMLP(layers[0], torch.nn.GELU(), layers[1], router, routing, selection)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    for batch in (1, 4):
        x = torch.randn(batch, 20, INPUTS, requires_grad=True)
        output, expected = compiled(x), mlp(x)
        torch.testing.assert_close(output, expected)
        found = torch.autograd.grad(output.square().sum(), [x, *router.parameters()])
        wanted = torch.autograd.grad(expected.square().sum(), [x, *router.parameters()])
        torch.testing.assert_close(found, wanted)
