"""What is read off the parameters of fine-tuned models: distances, cosines, histograms, energies."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fusion_merge.models.clip import part_of_tensor
from fusion_merge.models.parameters import (
    bin_edges,
    explained_energy,
    magnitudes,
    variation,
    variation_rows,
)

FC1, FC2, QUERY, NORM, OUTSIDE = (
    "encoder.layers.1.mlp.fc1.weight",
    "encoder.layers.1.mlp.fc2.bias",
    "encoder.layers.0.self_attn.q_proj.weight",
    "encoder.layers.1.layer_norm1.weight",
    "embeddings.class_embedding",
)


def states(seed: int = 0, moved: float = 0.1) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {FC1: (9, 5), FC2: (5,), QUERY: (5, 5), NORM: (5,), OUTSIDE: (7,)}
    before = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return before, {n: t + moved * torch.randn(t.shape, generator=generator) for n, t in before.items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (FC1, (1, "mlp")),
        (QUERY, (0, "attention")),
        (NORM, (1, "rest")),
        (OUTSIDE, (None, "rest")),
        ("encoder.layers.11.self_attn.out_proj.bias", (11, "attention")),
        ("post_layernorm.weight", (None, "rest")),
    ],
)
def test_a_tensor_belongs_to_a_part_of_a_layer(name, expected):
    assert part_of_tensor(name) == expected


def test_distance_and_cosine_are_those_of_torch_over_all_entries_of_a_part():
    before, after = states()
    found = variation(before, after)
    assert list(found) == [(0, "attention"), (1, "mlp"), (1, "rest"), (None, "rest")]
    a, b = (torch.cat([s[FC1].flatten(), s[FC2]]).double() for s in (before, after))
    assert found[1, "mlp"].entries == a.numel() == 50
    assert found[1, "mlp"].distance == pytest.approx(torch.dist(a, b).item(), rel=1e-12)
    assert found[1, "mlp"].cosine == pytest.approx(F.cosine_similarity(a, b, dim=0).item(), rel=1e-12)


def test_what_did_not_move_has_distance_0_and_cosine_1():
    before, _ = states()
    for moved in variation(before, before).values():
        assert (moved.distance, moved.cosine) == (0.0, pytest.approx(1.0, abs=1e-15))


def test_a_tiny_move_is_not_lost_in_single_precision():
    before = {FC1: torch.full((1000,), 1.0)}
    after = {FC1: torch.full((1000,), 1.0) + torch.tensor([1e-4] + [0.0] * 999)}
    cosine = variation(before, after)[1, "mlp"].cosine
    assert 0 < 1 - cosine < 1e-10


def test_the_cosine_of_zeros_is_no_number():
    zeros = {FC1: torch.zeros(3)}
    assert math.isnan(variation(zeros, zeros)[1, "mlp"].cosine)


def test_rows_name_task_layer_and_part():
    found = {"cats": variation(*states())}
    rows = variation_rows(found)
    assert [row["part"] for row in rows] == ["attention", "mlp", "rest", "rest"]
    assert {row["task"] for row in rows} == {"cats"}


def test_counts_sum_to_the_number_of_entries_and_agree_with_numpy():
    import numpy as np

    before, after = states()
    after[NORM] = before[NORM].clone()
    found = magnitudes(before, after)
    assert found.total == sum(t.numel() for t in before.values())
    assert found.zeros == 5
    sizes = torch.cat([(after[n].double() - before[n].double()).abs().flatten() for n in before if n != NORM])
    expected, _ = np.histogram(sizes.numpy(), bins=bin_edges())
    assert found.counts == expected.tolist()


def test_what_is_beyond_all_bins_is_counted_too():
    before = {FC1: torch.zeros(4, dtype=torch.float64)}
    after = {FC1: torch.tensor([1e-30, 1e30, 0.0, 1.0], dtype=torch.float64)}
    found = magnitudes(before, after)
    assert (found.counts[0], found.counts[-1], found.zeros, found.total) == (1, 1, 1, 4)


def test_quantiles_are_right_to_the_width_of_a_bin():
    before, after = states(moved=0.01)
    found = magnitudes(before, after)
    sizes = torch.cat([(after[n].double() - before[n].double()).abs().flatten() for n in before]).sort().values
    for share in (0.5, 0.9):
        exact = sizes[math.ceil(share * len(sizes)) - 1].item()
        assert exact <= found.quantile(share) <= exact * 10**0.1 * (1 + 1e-9)
    still = magnitudes(before, before)
    assert still.quantile(0.9) == 0.0


def test_energy_is_that_of_truncated_decompositions():
    before, after = states()
    kept = explained_energy(before, after, [1, 3, 5, -1])
    delta = (after[FC1] - before[FC1]).double()
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    for rank, energy in zip((1, 3), kept, strict=False):
        truncated = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
        assert energy == pytest.approx(1 - ((delta - truncated).norm() / delta.norm()).square().item())
    assert kept[2:] == pytest.approx([1.0, 1.0])
    assert kept == sorted(kept)


def test_energy_of_what_did_not_move_is_all_explained():
    before, _ = states()
    assert explained_energy(before, before, [1]) == [1.0]
