"""Banks and routers that grow and shrink, and the ridge regression that tells a router of a new task."""

from __future__ import annotations

import pytest
import torch
from helpers import BANKS, make_bank, random_task_vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.moe import ConstantRouter, LayerEncodedRouter, LinearRouter, MLPRouter
from fusion_merge.moe.features import last_inputs
from fusion_merge.moe.refit import grown_rows, moments, resized, rows_of, shrunk_rows
from fusion_merge.moe.vectors import TaskVector
from fusion_merge.task_vectors import magnitude_prune


def _delta(bank, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return bank.delta(torch.randn(2, bank.num_coefficients, generator=generator))


def _pruned(vector: TaskVector) -> TaskVector:
    return TaskVector(magnitude_prune(vector.weight, 0.6), magnitude_prune(vector.bias, 0.6))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)], ids=["widens", "narrows"])
@pytest.mark.parametrize("kind", BANKS)
def test_a_bank_that_grew_is_one_made_of_all_task_vectors(kind, shape):
    vectors = random_task_vectors(4, *shape)
    last = _pruned(vectors[3]) if kind == "sparse" else vectors[3]
    before = make_bank(kind, vectors[:3])
    kept = _delta(before)
    grown = before.with_task(last)
    for found, expected in zip(_delta(grown), _delta(make_bank(kind, vectors)), strict=True):
        torch.testing.assert_close(found, expected)
    assert grown.spec()["num_tasks"] == 4
    assert all(torch.equal(a, b) for a, b in zip(_delta(before), kept, strict=True))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(BANKS), st.integers(2, 5), st.data())
def test_a_bank_that_lost_a_task_is_one_made_of_the_others(kind, num_tasks, data):
    index = data.draw(st.integers(0, num_tasks - 1))
    vectors = random_task_vectors(num_tasks, 6, 4)
    left = [vector for place, vector in enumerate(vectors) if place != index]
    for found, expected in zip(
        _delta(make_bank(kind, vectors).without_task(index)), _delta(make_bank(kind, left)), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", BANKS)
def test_a_bank_stays_in_its_precision_or_refuses_what_it_cannot_hold(kind):
    vectors = random_task_vectors(3, 6, 4)
    bank = make_bank(kind, vectors[:2]).half()
    assert all(p.dtype == torch.float16 for p in bank.with_task(vectors[2]).parameters())
    with pytest.raises(ConfigError, match="build them in float32"):
        bank.with_task(TaskVector(vectors[2].weight * 1e6, vectors[2].bias))


def _inputs(tasks: int, images: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(tasks, 1, width, generator=generator)
    inputs = centres + torch.randn(tasks, images, width, generator=generator)
    return torch.cat([inputs, torch.ones(tasks, images, 1)], dim=2)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.floats(1e-4, 1.0))
def test_grown_rows_minimise_what_they_are_to_minimise(tasks, count, ridge):
    inputs = _inputs(tasks + 1, 12, 5).double()
    rows = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    old, new = moments(inputs[:-1]), moments(inputs[-1:])
    grown = grown_rows(rows, old, new, count, ridge)
    everything = inputs.flatten(0, 1)
    scale = everything[:, :-1].var(dim=0, unbiased=False).mean() * ridge * (tasks + 1)

    def loss(candidate: torch.Tensor) -> torch.Tensor:
        kept, added = candidate[:3], candidate[3:]
        each_old = inputs[:-1].flatten(0, 1)
        penalty = (kept - rows)[:, :-1].square().sum() + added[:, :-1].square().sum()
        return (
            ((each_old @ (kept - rows).T).square().sum() + (inputs[-1] @ kept.T).square().sum()) / 12
            + ((each_old @ added.T).square().sum() + (inputs[-1] @ added.T - 1).square().sum()) / 12
            + scale * penalty
        )

    candidate = grown.clone().requires_grad_()
    loss(candidate).backward()
    assert candidate.grad.abs().max() < 1e-6
    assert torch.equal(grown[3:], grown[3].expand(count, -1))


def test_what_tells_tasks_apart_is_found_and_what_was_decided_before_is_kept():
    inputs = _inputs(3, 20, 40)
    rows = torch.randn(2, 41, generator=torch.Generator().manual_seed(1)) / 40
    grown = grown_rows(rows, moments(inputs[:2]), moments(inputs[2:]), 1, 1e-3)
    old, new = inputs[:2].flatten(0, 1).double(), inputs[2].double()
    assert (old @ grown[2]).abs().max() < 0.25
    assert (new @ grown[2] - 1).abs().max() < 0.25
    assert ((old @ (grown[:2] - rows.double()).T).abs().max()) < 0.2 < (old @ rows.double().T).abs().mean()
    assert (new @ grown[:2].T).abs().max() < 0.2 < (new @ rows.double().T).abs().mean()


def test_rows_of_zeros_are_no_images():
    inputs = _inputs(2, 6, 3)
    padded = torch.cat([inputs, torch.zeros(2, 4, 4)], dim=1)
    for found, expected in zip(moments(padded), moments(inputs), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "router",
    [
        LinearRouter(4, 3, generator=torch.Generator().manual_seed(0)),
        MLPRouter(4, 5, 3, generator=torch.Generator().manual_seed(0)),
        LayerEncodedRouter(LinearRouter(6, 3, generator=torch.Generator().manual_seed(0)), 1, 2),
        LayerEncodedRouter(MLPRouter(6, 5, 3, generator=torch.Generator().manual_seed(0)), 1, 2),
    ],
    ids=["linear", "mlp", "coded_linear", "coded_mlp"],
)
def test_coefficients_are_a_linear_map_of_what_the_last_layer_reads(router):
    tokens = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(last_inputs(router, tokens) @ rows_of(router).T, router.pooled(tokens))


def test_a_router_forgets_and_learns_rows_and_its_spec_follows():
    router = LinearRouter(4, 6)
    rows = rows_of(router)
    resized(router, shrunk_rows(router, 2, 2))
    assert torch.equal(rows_of(router), rows[[0, 1, 4, 5]])
    assert (router.spec()["num_coefficients"], router.out.out_features) == (4, 4)
    assert router.out.weight.requires_grad


def test_a_constant_router_forgets_and_cannot_learn():
    router = ConstantRouter(3)
    router.coefficients.data = torch.arange(3.0)
    resized(router, shrunk_rows(router, 1, 1))
    assert router.coefficients.tolist() == [0.0, 2.0]
    assert router.last_layer() is None
    with pytest.raises(ModelError, match="ConstantRouter has no linear layer"):
        rows_of(router)
    with pytest.raises(ConfigError, match="has no linear layer at its end"):
        last_inputs(router, torch.zeros(1, 1, 4))
