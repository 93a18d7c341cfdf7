"""Static merging against fusion-bench 0.2.33: its functions run on plain states; some of its method classes do not.

What differs on purpose (and is tested as such in tests/unit/test_static_methods.py and tests/property):

- A TIES threshold of 100 percent trims nothing; the reference fails.
- Singular vectors of the value zero have no part; the reference takes what the decomposition makes up for them.
- RegMean solves in double precision, and keeps the average where inputs say nothing; the reference inverts.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_merge import IsoCAlgorithm, IsoCTSAlgorithm, TiesMergingAlgorithm, TSVMAlgorithm
from fusion_merge.merging.regression import Regression
from fusion_merge.merging.spectra import iso_c, iso_cts, tsv_merge
from fusion_merge.merging.ties import MERGE_FUNCS, ties, trimmed
from fusion_merge.merging.vectors import TaskVectors
from fusion_merge.methods.static_base import StaticMethod
from fusion_merge.models.clip import module_state
from fusion_merge.task_vectors import State, difference

pytest.importorskip("fusion_bench", reason="fusion-bench is a development dependency")

SHAPES = {"b": (7, 20), "a": (30,), "d": (12, 5), "c": (3, 4, 2, 2), "e": (9, 9)}


@pytest.fixture(scope="module")
def reference():
    """The reference's functions; they warn on import and print, which is no business of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fusion_bench.method.isotropic_merging import iso_utils
        from fusion_bench.method.regmean import regmean
        from fusion_bench.method.task_singular_vector.utils import TSVM_utils
        from fusion_bench.method.ties_merging import ties_merging_utils
    return SimpleNamespace(iso=iso_utils, regmean=regmean, tsv=TSVM_utils, ties=ties_merging_utils)


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **kwargs)


def random_states(tasks: int, *, coarse: bool = False) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A pretrained state and fine-tuned ones; coarse task vectors are equal, or cancel, in many entries."""
    generator = torch.Generator().manual_seed(tasks)
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tuned = []
    for _ in range(tasks):
        noise = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        tuned.append({name: (2 * t).round() if coarse else t for name, t in noise.items()})
    return base, tuned


def flat(state: State) -> Tensor:
    return torch.cat([state[name].flatten() for name in sorted(state)])


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("merge_func", MERGE_FUNCS)
@pytest.mark.parametrize("threshold", [2, 20, 70])
@pytest.mark.parametrize("tasks", [2, 5])
def test_ties(reference, tasks, threshold, merge_func, coarse):
    base, tuned = random_states(tasks, coarse=coarse)
    vectors = trimmed(TaskVectors(base, tuned), threshold)
    ours = vectors.merged(ties(vectors, merge_func, 1.0))
    stacked = torch.stack([flat(state) for state in tuned])
    theirs = quietly(reference.ties.ties_merging, stacked, reset_thresh=threshold, merge_func=merge_func)
    torch.testing.assert_close(flat(ours), theirs)


@pytest.mark.parametrize("threshold", [2, 20, 70])
def test_as_many_entries_are_left(reference, threshold):
    base, tuned = random_states(3)
    kept = trimmed(TaskVectors(base, tuned), threshold)
    stacked = torch.stack([flat(state) for state in tuned])
    theirs, _ = reference.ties.topk_values_mask(stacked, K=threshold)
    ours = torch.cat([kept[name].flatten(1) for name in sorted(kept)], dim=1)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("name", ["b", "d", "e"])
class TestMatrices:
    """One matrix, wide, tall or square."""

    def stacks(self, name: str, tasks: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        _, tuned = random_states(tasks)
        states = [{name: state[name]} for state in tuned]
        return torch.stack([state[name] for state in states]), states

    def test_tsv_m(self, reference, name, tasks):
        stacked, states = self.stacks(name, tasks)
        theirs = quietly(reference.tsv.compute_and_sum_svd_mem_reduction, states, accelerator="cpu")
        torch.testing.assert_close(tsv_merge(stacked), theirs[name], rtol=1e-4, atol=1e-5)

    def test_iso_c(self, reference, name, tasks):
        stacked, states = self.stacks(name, tasks)
        theirs = quietly(reference.iso.iso_c, states, accelerator="cpu")
        torch.testing.assert_close(iso_c(stacked.sum(dim=0)), theirs[name], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("fraction", [0.5, 0.8, 1.0])
    def test_iso_cts(self, reference, name, tasks, fraction):
        stacked, states = self.stacks(name, tasks)
        theirs = quietly(reference.iso.iso_cts, states, fraction, accelerator="cpu")
        torch.testing.assert_close(iso_cts(stacked, fraction), theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ratio", [0.0, 0.6, 0.95, 1.0])
def test_regmean(reference, ratio):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(5, 8, generator=generator) for _ in range(3)]
    inputs = [torch.randn(60, 8, generator=generator) * torch.rand(8, generator=generator) + 0.5 for _ in range(3)]
    grams = [x.T @ x / len(x) for x in inputs]
    theirs = reference.regmean.merging_with_regmean_weights(
        {"fc.weight": weights}, [{"fc": gram.clone()} for gram in grams], ratio, weight_transpose=True
    )["fc.weight"]
    ours = Regression(ratio)
    for weight, gram in zip(weights, grams, strict=True):
        ours.add({"fc": gram.double()}, lambda _, weight=weight: weight)
    found = ours.solution("fc", sum(weights) / 3, torch.device("cpu"))
    torch.testing.assert_close(found.float(), theirs, rtol=1e-3, atol=1e-3)


def task_vectors(modelpool: Any) -> list[dict[str, Tensor]]:
    pretrained = modelpool.state("_pretrained_")
    return [difference(modelpool.state(name), pretrained) for name in modelpool.model_names]


def check_tower(method: StaticMethod, modelpool: Any, merged: State) -> None:
    """Check every tensor of a tower: which are matrices, and what becomes of the others."""
    pretrained, ours = modelpool.state("_pretrained_"), module_state(method.run(modelpool))
    assert ours.keys() == merged.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, pretrained[name] + merged[name], rtol=1e-3, atol=1e-4, msg=name)


def test_tower_by_tsv_m(reference, modelpool):
    merged = quietly(
        reference.tsv.compute_and_sum_svd_mem_reduction, task_vectors(modelpool), accelerator=torch.device("cpu")
    )
    check_tower(TSVMAlgorithm(), modelpool, merged)
    check_tower(TSVMAlgorithm(alpha=0.5), modelpool, {name: 0.5 * t for name, t in merged.items()})


def test_tower_by_tsv_m_with_a_weight_for_each_task(reference, modelpool):
    weights = [0.5, 2.0]
    weighted = [{n: a * t for n, t in v.items()} for a, v in zip(weights, task_vectors(modelpool), strict=True)]
    merged = quietly(reference.tsv.compute_and_sum_svd_mem_reduction, weighted, accelerator=torch.device("cpu"))
    check_tower(TSVMAlgorithm(alpha=weights), modelpool, merged)


@pytest.mark.parametrize("excluded", [None, ["encoder.layers.0.mlp.fc1.weight"]])
def test_tower_by_iso_c(reference, modelpool, excluded: Sequence[str] | None):
    merged = quietly(reference.iso.iso_c, task_vectors(modelpool), accelerator="cpu", exclude_keys=excluded)
    check_tower(IsoCAlgorithm(exclude_keys=excluded), modelpool, merged)


def test_tower_by_iso_cts(reference, modelpool):
    merged = quietly(reference.iso.iso_cts, task_vectors(modelpool), 0.8, accelerator="cpu")
    check_tower(IsoCTSAlgorithm(), modelpool, merged)


def test_tower_by_ties(reference, modelpool):
    vectors = task_vectors(modelpool)
    stacked = torch.stack([flat(v) for v in vectors])
    merged = 0.3 * quietly(reference.ties.ties_merging, stacked, reset_thresh=20, merge_func="sum")
    ours = module_state(TiesMergingAlgorithm().run(modelpool))
    torch.testing.assert_close(flat(ours), flat(modelpool.state("_pretrained_")) + merged)
