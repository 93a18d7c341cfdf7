"""What holds for every routed MLP and every upcycled tower, whatever banks, routers and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from helpers import (
    BANKS,
    ToyTower,
    apply_delta,
    copied,
    make_bank,
    random_linear,
    random_task_vectors,
    same_state,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_merge.moe import (
    ConstantRouter,
    DenseExperts,
    LowRankExperts,
    MoELinear,
    MoEMLP,
    Router,
    Routing,
    SoftTopK,
    SparseExperts,
    make_router,
    upcycle_mlps,
)
from fusion_merge.moe.experts import TaskVector
from fusion_merge.task_vectors import task_arithmetic

quick = settings(deadline=None, max_examples=30, derandomize=True)

kinds = st.sampled_from(BANKS)
depths = st.sampled_from([0, 1, 2])
routings = st.sampled_from(list(Routing))
dtypes = st.sampled_from([torch.float32, torch.float64])
sizes = st.integers(1, 7)
seeds = st.integers(0, 2**16)
lambdas = st.floats(-2, 2)
EPS = {torch.float32: 2e-5, torch.float64: 1e-12}


def _close(actual: Tensor, expected: Tensor) -> None:
    """Compare to the rounding of the type, relative to the largest entry."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=EPS[expected.dtype] * (1 + expected.abs().max().item()))


def _draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@dataclass
class Parts:
    """The plain layers and task vectors that a routed MLP is made of."""

    base1: nn.Linear
    base2: nn.Linear
    vectors1: list[TaskVector]
    vectors2: list[TaskVector]
    kind: str
    rank: int
    ratio: float
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        return self.base1.weight.dtype

    @property
    def width(self) -> int:
        return self.base1.in_features

    @property
    def tasks(self) -> int:
        return len(self.vectors1)

    def layers(self, kind: str | None = None, **options: Any) -> tuple[MoELinear, MoELinear]:
        options = {"rank": self.rank, "ratio": self.ratio} | options
        first = MoELinear(self.base1, make_bank(kind or self.kind, self.vectors1, **options))
        return first, MoELinear(self.base2, make_bank(kind or self.kind, self.vectors2, **options))

    def mlp(self, depth: int = 1, routing: Routing = Routing.SAMPLE, select: int | None = None) -> MoEMLP:
        """A routed MLP whose router tells samples and tokens apart."""
        first, second = self.layers()
        count = first.experts.num_coefficients
        generator = torch.Generator().manual_seed(self.seed)
        router = make_router(depth, self.width, count, 0.3, hidden=self.width, generator=generator).to(self.dtype)
        for parameter in router.parameters():
            if parameter.ndim == 2:
                parameter.data *= 50
        return MoEMLP(first, nn.GELU(), second, router, routing, None if select is None else SoftTopK(select))

    def constant(self, coefficients: Tensor, **options: Any) -> MoEMLP:
        """A routed MLP with the given coefficients."""
        router = ConstantRouter(coefficients.numel())
        router.coefficients.data = coefficients.to(self.dtype)
        first, second = self.layers(**options)
        return MoEMLP(first, nn.GELU(), second, router, Routing.SAMPLE)

    def plain(self, x: Tensor, weights: Sequence[float], biases: Sequence[float]) -> Tensor:
        """The plain MLP moved along its task vectors."""
        for base, vectors in ((self.base1, self.vectors1), (self.base2, self.vectors2)):
            weight = base.weight + sum(g * v.weight for g, v in zip(weights, vectors, strict=True))
            bias = base.bias + sum(g * v.bias for g, v in zip(biases, vectors, strict=True))
            x = F.linear(x, weight, bias)
            x = F.gelu(x) if base is self.base1 else x
        return x


@st.composite
def parts(draw, least_tasks: int = 1) -> Parts:
    width, hidden, dtype, seed = draw(sizes), draw(sizes), draw(dtypes), draw(seeds)
    tasks = draw(st.integers(least_tasks, 4))
    return Parts(
        random_linear(width, hidden, seed=seed, dtype=dtype),
        random_linear(hidden, width, seed=seed + 1, dtype=dtype),
        random_task_vectors(tasks, hidden, width, seed=seed + 2, dtype=dtype),
        random_task_vectors(tasks, width, hidden, seed=seed + 3, dtype=dtype),
        draw(kinds),
        draw(st.integers(1, min(width, hidden))),
        draw(st.floats(0.0, 0.99)),
        seed,
    )


# One routed MLP


@quick
@given(parts(), sizes, sizes)
def test_zero_coefficients_give_the_pretrained_mlp_low_rank_with_its_static_biases(p, batch, tokens):
    x = _draw((batch, tokens, p.width), p.seed + 4, p.dtype)
    mlp = p.constant(torch.zeros(p.layers()[0].experts.num_coefficients))
    static = [0.3 if p.kind == "low_rank" else 0.0] * p.tasks
    _close(mlp(x), p.plain(x, [0.0] * p.tasks, static))


@quick
@given(parts(), st.integers(0, 3), sizes, sizes)
def test_a_one_hot_dense_coefficient_gives_that_expert_s_mlp(p, task, batch, tokens):
    one_hot = torch.eye(p.tasks)[task % p.tasks]
    x = _draw((batch, tokens, p.width), p.seed + 4, p.dtype)
    _close(p.constant(one_hot, kind="dense")(x), p.plain(x, one_hot.tolist(), one_hot.tolist()))


@quick
@given(parts(), sizes, sizes)
def test_full_rank_with_uniform_coefficients_is_task_arithmetic(p, batch, tokens):
    full = {"kind": "low_rank", "rank": -1}
    x = _draw((batch, tokens, p.width), p.seed + 4, p.dtype)
    count = p.layers(**full)[0].experts.num_coefficients
    mlp = p.constant(torch.full((count,), 0.3, dtype=p.dtype), **full)
    _close(mlp(x), p.plain(x, [0.3] * p.tasks, [0.3] * p.tasks))


@quick
@given(parts(), depths, routings, st.booleans(), sizes, sizes)
def test_forward_equals_applying_delta_under_both_routings(p, depth, routing, select, batch, tokens):
    mlp = p.mlp(depth, routing, select=1 if select else None)
    x = _draw((batch, tokens, p.width), p.seed + 4, p.dtype)
    g = mlp.coefficients(x)
    assert g.shape == (batch if routing is Routing.SAMPLE else 1, mlp.num_coefficients)
    hidden = F.gelu(apply_delta(x, mlp.fc1.experts.delta(g), p.base1))
    _close(mlp(x), apply_delta(hidden, mlp.fc2.experts.delta(g), p.base2))


@quick
@given(parts(), depths, st.booleans(), st.integers(1, 6), st.integers(0, 5), sizes)
def test_a_sample_does_not_see_its_batch_mates(p, depth, select, batch, at, tokens):
    mlp = p.mlp(depth, select=1 if select else None)
    x = _draw((batch, tokens, p.width), p.seed + 4, p.dtype)
    at %= batch
    others = 100 * _draw(x.shape, p.seed + 5, p.dtype)
    others[at] = x[at]
    alone = mlp(x[at : at + 1])
    _close(mlp(x)[at : at + 1], alone)
    _close(mlp(others)[at : at + 1], alone)


@quick
@given(parts(), depths, routings, sizes)
def test_a_forward_pass_changes_neither_input_nor_weights(p, depth, routing, batch):
    mlp = p.mlp(depth, routing, select=1)
    x = _draw((batch, 2, p.width), p.seed + 4, p.dtype)
    weights, before = copied(mlp.state_dict()), x.clone()
    mlp(x).sum().backward()
    assert torch.equal(x, before)
    assert same_state(mlp.state_dict(), weights)


@quick
@given(parts(), kinds)
def test_making_a_bank_changes_no_task_vector(p, kind):
    before = [tensor.clone() for vector in p.vectors1 for tensor in vector if tensor is not None]
    for parameter in make_bank(kind, p.vectors1, rank=p.rank, ratio=p.ratio).parameters():
        parameter.data.add_(1)
    after = [tensor for vector in p.vectors1 for tensor in vector if tensor is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# Whole towers


def _tower_states(tasks: int, depth: int, width: int, hidden: int, seed: int) -> tuple[ToyTower, list[dict]]:
    """Return a pretrained tower of any size and its fine-tuned states."""
    tower = ToyTower(width, hidden, depth)
    for index, parameter in enumerate(tower.parameters()):
        parameter.data = 0.5 * _draw(parameter.shape, seed + index)
    state = tower.state_dict()
    tuned = [
        {n: t + 0.3 * _draw(t.shape, seed + 97 * k + i) for i, (n, t) in enumerate(state.items())}
        for k in range(1, tasks + 1)
    ]
    return tower, tuned


def _upcycled(
    tower: ToyTower, finetuned: list[dict], kind: str, *, seed: int, depth: int = 1, rank: int = 1
) -> nn.Module:
    """Return the routed tower, everything outside its MLPs merged with λ = 0.3."""
    width, hidden = tower.layers[0].fc1.in_features, tower.layers[0].fc1.out_features
    merged = ToyTower(width, hidden, len(tower.layers))
    merged.load_state_dict(task_arithmetic(tower.state_dict(), finetuned, 0.3))
    generator = torch.Generator().manual_seed(seed)

    def router(_index: int, d: int, count: int) -> Router:
        return make_router(depth, d, count, 0.3, hidden=d, generator=generator)

    return upcycle_mlps(
        merged,
        tower.state_dict(),
        finetuned,
        make_experts=lambda _path, vectors: make_bank(kind, vectors, rank=rank, ratio=0.5),
        make_router=router,
        routing=Routing.SAMPLE,
    )


towers = st.builds(_tower_states, st.integers(1, 4), st.integers(1, 3), sizes, sizes, seeds)


@quick
@given(towers, kinds, depths, seeds)
def test_upcycling_changes_no_state(given_states, kind, depth, seed):
    tower, tuned = given_states
    before = [copied(state) for state in (tower.state_dict(), *tuned)]
    model = _upcycled(tower, tuned, kind, seed=seed, depth=depth)
    for tensor in model.state_dict().values():
        tensor.add_(1)
    assert all(same_state(a, b) for a, b in zip((tower.state_dict(), *tuned), before, strict=True))


@quick
@given(towers, kinds, depths, seeds)
def test_the_same_seed_gives_the_same_bits_whatever_the_global_stream(given_states, kind, depth, seed):
    tower, tuned = given_states
    first = _upcycled(tower, tuned, kind, seed=seed, depth=depth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        second = _upcycled(tower, tuned, kind, seed=seed, depth=depth)
    assert same_state(first.state_dict(), second.state_dict())


def _experts_of(model: nn.Module, tasks: int) -> dict[str, Tensor]:
    """Return every tensor that belongs to one task each, the task being its first dimension."""
    found: dict[str, Tensor] = {}
    for name, bank in model.named_modules():
        if isinstance(bank, DenseExperts | SparseExperts | LowRankExperts):
            found[f"{name}.bias"] = bank.bias
        if isinstance(bank, DenseExperts):
            found[name] = bank.weight
        if isinstance(bank, SparseExperts):
            found[name] = bank.expand()
        if isinstance(bank, LowRankExperts):
            found[f"{name}.left"] = bank.left.T.unflatten(0, (tasks, -1))  # (N, R, O)
            found[f"{name}.right"] = bank.right.unflatten(0, (tasks, -1))  # (N, R, I)
    return found


@quick
@given(towers, kinds, depths, seeds, st.randoms(use_true_random=False))
def test_the_order_of_tasks_permutes_the_experts_and_nothing_else(given_states, kind, depth, seed, random):
    tower, tuned = given_states
    order = list(range(len(tuned)))
    random.shuffle(order)
    first = _upcycled(tower, tuned, kind, seed=seed, depth=depth)
    second = _upcycled(tower, [tuned[n] for n in order], kind, seed=seed, depth=depth)
    experts, permuted = _experts_of(first, len(order)), _experts_of(second, len(order))
    assert len(experts) >= 4 * len(tower.layers)
    assert all(torch.equal(permuted[name], experts[name][order]) for name in experts)
    before, after = first.state_dict(), second.state_dict()
    rest = [name for name in before if ".experts." not in name]
    assert {"scale", "layers.0.fc1.base.weight"} < set(rest)
    for name in rest:
        if ".base." in name or ".router." in name:
            assert torch.equal(before[name], after[name]), name
        else:
            _close(after[name], before[name])  # a sum in another order


@quick
@given(towers, kinds, st.integers(0, 4), seeds)
def test_a_task_equal_to_the_pretrained_model_changes_no_output(given_states, kind, at, seed):
    tower, tuned = given_states
    at = min(at, len(tuned))
    more = [*tuned[:at], copied(tower.state_dict()), *tuned[at:]]
    x = _draw((2, 3, tower.layers[0].fc1.in_features), seed)
    expected = _upcycled(tower, tuned, kind, seed=seed, depth=0)(x)
    _close(_upcycled(tower, more, kind, seed=seed, depth=0)(x), expected)


@quick
@given(parts(), lambdas, st.floats(-4, 4), sizes)
def test_scaling_lambda_scales_the_static_biases_of_low_rank_experts_linearly(p, scaling, factor, rows):
    def static(value: float) -> tuple[Tensor, Tensor]:
        bank = LowRankExperts.from_task_vectors(p.vectors1, p.rank, bias_scaling=value)
        delta = bank.delta(_draw((rows, bank.num_coefficients), p.seed + 4, p.dtype))
        return delta.weight, delta.bias

    (weight, bias), (same_weight, scaled) = static(scaling), static(factor * scaling)
    _close(scaled, factor * bias)
    assert torch.equal(same_weight, weight)


@quick
@given(towers, lambdas, st.floats(-4, 4))
def test_scaling_lambda_scales_the_static_merge_linearly(given_states, scaling, factor):
    tower, tuned = given_states
    base = tower.state_dict()

    def moved(value: float) -> dict[str, Tensor]:
        return {name: t - base[name] for name, t in task_arithmetic(base, tuned, value).items()}

    once, scaled = moved(scaling), moved(factor * scaling)
    for name in base:
        _close(scaled[name], factor * once[name])
