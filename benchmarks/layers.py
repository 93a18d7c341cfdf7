"""Routed layers beside a plain MLP of the same shape (the floor) and fusion-bench's layers (the reference)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from benchmarks.report import OURS_TO_FLOOR, REFERENCE_TO_OURS, Row, Target, timed_row
from benchmarks.settings import BATCH, LAMBDA, METHODS, PRUNED, Geometry, Settings
from benchmarks.timing import Call, Comparison, compare
from fusion_merge.moe import (
    DenseExperts,
    Experts,
    LowRankExperts,
    MoELinear,
    MoEMLP,
    Routing,
    SparseExperts,
    make_router,
)
from fusion_merge.moe.experts import TaskVector

PASSES = ("forward", "forward + backward")

_SAMPLE = {"rankone_moe": (1.7, 1.7), "wemoe": (1.8, 2.6)}  # how many times the floor, of each pass
_BATCH, _SPARSE = 1.4, 1.15
_BUILDING = 15.0


class MLP(nn.Module):
    """A plain transformer MLP, as CLIP's."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation_fn = ACT2FN["quick_gelu"]
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply the MLP: (B, T, D) → (B, T, D)."""
        output: Tensor = self.fc2(self.activation_fn(self.fc1(tokens)))
        return output


@torch.no_grad()
def fine_tune(linear: nn.Linear, rank: int) -> None:
    """Add to a layer what has a decaying spectrum, as real task vectors have.

    Args:
        linear: the layer, changed in place.
        rank: rank-one experts a task; the spectrum reaches four times as far.
    """
    rows, columns = linear.weight.shape
    decay = torch.logspace(0, -2, 4 * rank)
    leading = torch.randn(rows, 4 * rank) * decay @ torch.randn(4 * rank, columns)
    linear.weight += 1e-3 * (leading / 8 + 0.1 * torch.randn(rows, columns))
    linear.bias += 1e-3 * torch.randn(rows)


def make_mlps(geometry: Geometry, tasks: int) -> tuple[MLP, list[MLP]]:
    """Make a random MLP and fine-tuned ones.

    Args:
        geometry: the shape.
        tasks: how many.
    """
    torch.manual_seed(0)
    base = MLP(geometry.width, geometry.hidden).requires_grad_(False)
    tuned = [copy.deepcopy(base) for _ in range(tasks)]
    for mlp in tuned:
        fine_tune(mlp.fc1, geometry.rank)
        fine_tune(mlp.fc2, geometry.rank)
    return base, tuned


def make_bank(method: str, base: nn.Linear, tuned: list[nn.Linear], rank: int) -> Experts:
    """Make the bank of one linear layer.

    Args:
        method: one of `METHODS`.
        base: the pretrained layer.
        tuned: the fine-tuned ones.
        rank: rank-one experts a task.
    """
    vectors = [TaskVector(t.weight - base.weight, t.bias - base.bias) for t in tuned]
    if method == "wemoe":
        return DenseExperts.from_task_vectors(vectors)
    if method == "e_wemoe":
        return SparseExperts.from_task_vectors(vectors, PRUNED)
    return LowRankExperts.from_task_vectors(vectors, rank, LAMBDA)


def ours(method: str, base: MLP, tuned: list[MLP], rank: int) -> MoEMLP:
    """Make our routed MLP; arguments as those of `make_bank`."""
    layers = []
    for part in ("fc1", "fc2"):
        linear = copy.deepcopy(getattr(base, part))
        layers.append(MoELinear(linear, make_bank(method, linear, [getattr(t, part) for t in tuned], rank)))
    width, count = base.fc1.in_features, layers[0].experts.num_coefficients
    depth = 1 if method == "rankone_moe" else 2
    router = make_router(depth, width, count, LAMBDA, hidden=width)
    return MoEMLP(layers[0], base.activation_fn, layers[1], router)


def reference(method: str, base: MLP, tuned: list[MLP], rank: int) -> nn.Module | None:
    """Make fusion-bench's routed MLP, if that is installed; it changes copies of what it is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from fusion_bench.models import rankone_moe, sparse_we_moe, we_moe
        except ImportError:
            return None
    width, own, experts = base.fc1.in_features, copy.deepcopy(base).requires_grad_(True), copy.deepcopy(tuned)
    options: dict[str, Any] = {"init_lambda": LAMBDA, "batch_first": True}
    options["router_hidden_layers"] = 1 if method == "rankone_moe" else 2
    if method == "wemoe":
        made = we_moe.WeightEnsemblingMoE(width, own, experts, **options)
    elif method == "e_wemoe":
        made = sparse_we_moe.SparseWeightEnsemblingMoE(width, own, experts, tv_prune_ratio=PRUNED, **options)
    else:
        made = rankone_moe.RankOneMoE(width, own, experts, rank_k=rank, svd_accelerator="cpu", **options)
    return made  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Layers:
    """The MLPs of one shape: a plain one, ours by method, and fusion-bench's by method if that is installed."""

    plain: MLP
    ours: dict[str, MoEMLP]
    reference: dict[str, nn.Module]


@lru_cache(maxsize=1)
def make_layers(width: int, hidden: int, rank: int, tasks: int) -> Layers:
    """Make the MLPs of one shape, or hand out the last ones again.

    Args:
        width: D.
        hidden: the width inside.
        rank: rank-one experts a task.
        tasks: N.
    """
    base, tuned = make_mlps(Geometry("", width, hidden, 1, 1, 1, 1, rank), tasks)
    own = {method: ours(method, base, tuned, rank) for method in METHODS}
    theirs = {method: reference(method, base, tuned, rank) for method in METHODS}
    return Layers(base, own, {method: made for method, made in theirs.items() if made is not None})


def call(mlp: nn.Module, geometry: Geometry, what: str) -> Call:
    """Return a pass of a layer: forward, or that with the gradient of its input and of its router, if it has one.

    Args:
        mlp: the layer.
        geometry: says how many tokens there are.
        what: one of `PASSES`.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, geometry.tokens, geometry.width)
    tokens, towards = (torch.randn(shape, generator=generator) for _ in range(2))
    wanted = tokens.clone().requires_grad_(True)

    def forward() -> None:
        with torch.no_grad():
            mlp(tokens)

    def both() -> None:
        wanted.grad = None
        mlp.zero_grad()
        mlp(wanted).backward(towards)

    return forward if what == PASSES[0] else both


@cache
def measure(settings: Settings, geometry: Geometry, tasks: int, method: str, routing: Routing, what: str) -> Comparison:
    """Time a pass of a layer; what was timed before is not timed again.

    Args:
        settings: of the run.
        geometry: the shape.
        tasks: N.
        method: one of `METHODS`.
        routing: what coefficients are averaged over.
        what: one of `PASSES`.
    """
    made = make_layers(geometry.width, geometry.hidden, geometry.rank, tasks)
    contestants: dict[str, nn.Module] = {"floor": made.plain, "ours": made.ours[method]}
    if method in made.reference:
        contestants["reference"] = made.reference[method]
    if method == "e_wemoe":
        contestants["WEMoE"] = made.ours["wemoe"]
    for mlp in contestants.values():
        if isinstance(mlp, MoEMLP):
            mlp.routing = routing
        elif mlp is not made.plain:
            mlp.batch_reduce = routing is Routing.BATCH  # type: ignore[assignment]
    return compare({name: call(mlp, geometry, what) for name, mlp in contestants.items()}, settings)


def _target(method: str, routing: Routing, what: str) -> Target:
    if method == "e_wemoe":
        return Target("ours / WEMoE", _SPARSE)
    return Target(OURS_TO_FLOOR, _BATCH if routing is Routing.BATCH else _SAMPLE[method][PASSES.index(what)])


def layer_rows(settings: Settings) -> Iterator[Row]:
    """Time one MLP of the geometry: every method, routing and pass.

    Args:
        settings: of the run.
    """
    note = f"One MLP of {settings.geometry}, {settings.tasks} experts, batch {BATCH}, float32. The floor is a plain "
    note += "MLP with frozen weights; backwards it forms the gradient of its input."
    for routing in (Routing.SAMPLE, Routing.BATCH):
        for method, name in METHODS.items():
            for what in PASSES:
                found = measure(settings, settings.geometry, settings.tasks, method, routing, what)
                title, target = f"{name}, {routing} routing, {what}", _target(method, routing, what)
                yield timed_row("layers", title, found, target=target, note=note)


def growth_rows(settings: Settings) -> Iterator[Row]:
    """Time one MLP with few and with many experts, sample routing.

    Args:
        settings: of the run.
    """
    for tasks in settings.growth:
        for method, name in METHODS.items():
            for what in PASSES:
                found = measure(settings, settings.geometry, tasks, method, Routing.SAMPLE, what)
                yield timed_row("growth", f"{tasks} experts, {name}, {what}", found, note="Sample routing.")


def geometry_rows(settings: Settings) -> Iterator[Row]:
    """Time one MLP of other geometries, sample routing.

    Args:
        settings: of the run.
    """
    for geometry in settings.others:
        for method, name in METHODS.items():
            for what in PASSES:
                found = measure(settings, geometry, settings.tasks, method, Routing.SAMPLE, what)
                note = f"One MLP of {geometry}, sample routing."
                yield timed_row("geometries", f"{geometry.name}, {name}, {what}", found, note=note)


def build_rows(settings: Settings) -> Iterator[Row]:
    """Time the making of a layer, all of its decompositions among it.

    Args:
        settings: of the run.
    """
    rank = settings.geometry.rank
    base, tuned = make_mlps(settings.geometry, settings.tasks)

    def grams() -> None:
        for mlp in tuned:
            for weight in (mlp.fc1.weight, mlp.fc2.weight.T):
                torch.mm(weight.T, weight)

    calls: dict[str, Call] = {"floor": grams, "ours": lambda: ours("rankone_moe", base, tuned, rank)}
    if reference("rankone_moe", base, tuned[:1], rank) is not None:
        calls["reference"] = lambda: reference("rankone_moe", base, tuned, rank)
    note = f"The floor is the {2 * settings.tasks} Gram products of the MLP's weights, on their smaller side. Ours and "
    note += "the reference make the whole layer; the reference copies its models first, as it changes them."
    target = Target(REFERENCE_TO_OURS, _BUILDING, at_least=True)
    yield timed_row("build", f"RankOne-MoE, one MLP, rank {rank}", compare(calls, settings), target=target, note=note)
