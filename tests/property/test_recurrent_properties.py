"""A recurrent router is the gated recurrent unit of the paper, unrolled over layers by hand."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusion_merge.moe import recurrent_router_maker

quick = settings(deadline=None, max_examples=30, derandomize=True)
sizes = st.integers(1, 5)


def _draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unrolled(routers: nn.ModuleList, tokens: list[Tensor]) -> list[Tensor]:
    """The coefficients of every layer, from the equations of a GRU, gate by gate."""
    gru = routers[0].cell.gru
    of_input, of_state = gru.weight_ih.chunk(3), gru.weight_hh.chunk(3)
    input_bias, state_bias = gru.bias_ih.chunk(3), gru.bias_hh.chunk(3)
    state = torch.zeros(len(tokens[0]), of_state[0].shape[1], dtype=torch.float64)
    coefficients = []
    for router, each in zip(routers, tokens, strict=True):
        z = (each @ router.inner.weight.T + router.inner.bias).mean(dim=1)
        from_input = [z @ weight.T + bias for weight, bias in zip(of_input, input_bias, strict=True)]
        from_state = [state @ weight.T + bias for weight, bias in zip(of_state, state_bias, strict=True)]
        reset = 1 / (1 + torch.exp(-(from_input[0] + from_state[0])))
        update = 1 / (1 + torch.exp(-(from_input[1] + from_state[1])))
        candidate = torch.tanh(from_input[2] + reset * from_state[2])
        state = (1 - update) * candidate + update * state
        coefficients.append(state @ router.out.weight.T + router.out.bias)
    return coefficients


@quick
@given(sizes, sizes, sizes, sizes, sizes, sizes, st.integers(0, 2**16))
def test_coefficients_and_gradients_are_those_of_the_unrolled_unit(layers, batch, length, width, state, count, seed):
    make = recurrent_router_maker(state, 0.3, torch.Generator().manual_seed(seed))
    routers = nn.ModuleList([make(index, width, count) for index in range(layers)]).double()
    for number, parameter in enumerate(routers.parameters()):
        parameter.data = _draw(tuple(parameter.shape), seed + number)  # biases too
    tokens = [_draw((batch, length, width), seed + 100 + layer).requires_grad_() for layer in range(layers)]
    inputs = [*tokens, *routers.parameters()]
    weights = _draw((layers, batch, count), seed + 200)

    found = torch.stack([router.pooled(each) for router, each in zip(routers, tokens, strict=True)])
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    expected = torch.stack(unrolled(routers, tokens))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    for ours, theirs in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)


@quick
@given(sizes, sizes, sizes, sizes, st.integers(0, 2**16))
def test_the_order_of_samples_and_tokens_permutes_coefficients_and_nothing_else(layers, batch, length, width, seed):
    make = recurrent_router_maker(4, 0.3, torch.Generator().manual_seed(seed))
    routers = nn.ModuleList([make(index, width, 3) for index in range(layers)]).double()
    tokens = [_draw((batch, length, width), seed + layer) for layer in range(layers)]
    generator = torch.Generator().manual_seed(seed)
    samples, places = torch.randperm(batch, generator=generator), torch.randperm(length, generator=generator)
    straight = [router.pooled(each) for router, each in zip(routers, tokens, strict=True)]
    shuffled = [router.pooled(each[samples][:, places]) for router, each in zip(routers, tokens, strict=True)]
    for one, other in zip(straight, shuffled, strict=True):
        torch.testing.assert_close(other, one[samples], atol=1e-12, rtol=1e-10)
