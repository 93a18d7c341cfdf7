"""What the parameters of fine-tuned models say, read tensor by tensor: how far they moved, how large entries are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_merge.models.clip import part_of_tensor
from fusion_merge.task_vectors import State

PARTS = ("mlp", "attention", "rest")
"""The parts of a layer that are told apart."""

_DECADES = (-12, 2)
_BINS_A_DECADE = 10


@dataclass
class Moved:
    """How far one part of one layer moved in fine-tuning; sums over its entries, in float64.

    Attributes:
        entries: how many.
        squared: of the differences, squared.
        dot: of the products of pretrained and fine-tuned entries.
        pretrained: of the pretrained entries, squared.
        finetuned: of the fine-tuned entries, squared.
    """

    entries: int = 0
    squared: float = 0.0
    dot: float = 0.0
    pretrained: float = 0.0
    finetuned: float = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Count a tensor in.

        Args:
            before: the pretrained one.
            after: the fine-tuned one.
        """
        a, b = before.double().flatten(), after.double().flatten()
        self.entries += a.numel()
        self.squared += float((b - a).square().sum())
        self.dot += float(a @ b)
        self.pretrained += float(a @ a)
        self.finetuned += float(b @ b)

    @property
    def distance(self) -> float:
        """The L2 distance."""
        return math.sqrt(self.squared)

    @property
    def cosine(self) -> float:
        """The cosine similarity; NaN where either has only zeros."""
        norms = math.sqrt(self.pretrained) * math.sqrt(self.finetuned)
        return min(self.dot / norms, 1.0) if norms > 0 else math.nan


def variation(pretrained: State, finetuned: State) -> dict[tuple[int | None, str], Moved]:
    r"""Return how far each part of each layer moved in fine-tuning.

    .. math:: \lVert \theta_n - \theta_0 \rVert_2, \qquad
              \frac{\langle \theta_n, \theta_0 \rangle}{\lVert \theta_n \rVert \lVert \theta_0 \rVert}

    Args:
        pretrained: the pretrained tower; one tensor is read at a time.
        finetuned: a tower that was fine-tuned from it.

    Returns:
        by layer (None outside of layers) and part, in that order.

    Source: Tang et al., "WEMoE", ICML 2024, section 3 (there MLP and attention).
    """
    moved: dict[tuple[int | None, str], Moved] = {}
    for name, before, after in _pairs(pretrained, finetuned):
        moved.setdefault(part_of_tensor(name), Moved()).add(before, after)
    order = sorted(moved, key=lambda key: (math.inf if key[0] is None else key[0], PARTS.index(key[1])))
    return {key: moved[key] for key in order}


def moved_most(pretrained: State, finetuned: Sequence[State], names: Sequence[str]) -> list[str]:
    r"""Return blocks of parameters in the order in which fine-tuning moved them, the one moved most first.

    .. math:: v_b = \frac1N \sum_n \frac{\lVert \theta_{n,b} - \theta_{0,b} \rVert_2}{\lVert \theta_{0,b} \rVert_2}

    Relative to the pretrained norm, so that blocks of different sizes can be compared; equal ones stay in their order.

    Args:
        pretrained: the pretrained tower.
        finetuned: the N towers that were fine-tuned from it.
        names: the blocks, as beginnings of the parameters' names.

    Source: after Tang et al., "WEMoE", ICML 2024, section 3, and E-WEMoE, arXiv 2410.21804.
    """
    measured = {name: [Moved() for _ in finetuned] for name in names}
    for index, state in enumerate(finetuned):
        for name, before, after in _pairs(pretrained, state):
            for block in names:
                if name.startswith(f"{block}."):
                    measured[block][index].add(before, after)
    shares = {b: sum(m.distance / math.sqrt(max(m.pretrained, 1e-30)) for m in ms) for b, ms in measured.items()}
    return sorted(names, key=lambda block: -shares[block])


@dataclass
class Magnitudes:
    """A histogram of the magnitudes of a task vector's entries; bins are equally wide in the logarithm.

    Attributes:
        counts: entries in each bin; what is smaller or larger than all bins is in the first or the last.
        zeros: entries that did not move at all.
    """

    counts: list[int]
    zeros: int

    @property
    def total(self) -> int:
        """The number of entries."""
        return sum(self.counts) + self.zeros

    def quantile(self, share: float) -> float:
        """Return the magnitude below which a share of the entries is, to the width of a bin.

        Args:
            share: in 0-1.
        """
        below = self.zeros
        if below >= share * self.total:
            return 0.0
        for count, edge in zip(self.counts, bin_edges()[1:], strict=True):
            below += count
            if below >= share * self.total:
                return edge
        return bin_edges()[-1]


def bin_edges() -> list[float]:
    """Return the edges of the bins, one more than there are bins."""
    low, high = _DECADES
    count = (high - low) * _BINS_A_DECADE
    return [10 ** (low + i / _BINS_A_DECADE) for i in range(count + 1)]


def magnitudes(pretrained: State, finetuned: State) -> Magnitudes:
    """Return the histogram of the magnitudes of a task vector's entries.

    Args:
        pretrained: the pretrained tower; one tensor is read at a time.
        finetuned: a tower that was fine-tuned from it.

    Source: Shen et al., "Efficient and Effective Weight-Ensembling Mixture of Experts", 2024: most entries are small.
    """
    inner = torch.tensor(bin_edges()[1:-1], dtype=torch.float64)
    counts = torch.zeros(len(inner) + 1, dtype=torch.int64)
    zeros = 0
    for _, before, after in _pairs(pretrained, finetuned):
        sizes = (after.double() - before.double()).abs().flatten()
        zeros += int((sizes == 0).sum())
        found = torch.bucketize(sizes[sizes > 0], inner)
        counts += torch.bincount(found, minlength=len(counts))
    return Magnitudes(counts.tolist(), zeros)


def explained_energy(pretrained: State, finetuned: State, ranks: Sequence[int]) -> list[float]:
    r"""Return the share of the energy of the MLPs' task vectors that truncation to each rank keeps.

    .. math:: E_k = \frac{\sum_W \sum_{i \le k} s_i(W_n - W_0)^2}{\sum_W \lVert W_n - W_0 \rVert_F^2}

    Args:
        pretrained: the pretrained tower; one matrix is read at a time.
        finetuned: a tower that was fine-tuned from it.
        ranks: the ranks; -1 is full rank.

    Returns:
        for each rank, in 0-1; 1 where nothing moved.
    """
    kept, total = [0.0] * len(ranks), 0.0
    for name, before, after in _pairs(pretrained, finetuned):
        if part_of_tensor(name)[1] != "mlp" or before.ndim != 2:
            continue
        energies = torch.linalg.svdvals(after.double() - before.double()).square()  # (min(O, I),), descending
        total += float(energies.sum())
        kept = [
            k + float((energies if rank < 0 else energies[:rank]).sum()) for k, rank in zip(kept, ranks, strict=True)
        ]
    return [k / total if total > 0 else 1.0 for k in kept]


def _pairs(pretrained: State, finetuned: State) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the tensors that hold numbers to train, each with what became of it."""
    for name in pretrained:
        before = pretrained[name]
        if before.is_floating_point():
            yield name, before, finetuned[name]


def variation_rows(found: Mapping[str, Mapping[tuple[int | None, str], Moved]]) -> list[dict[str, object]]:
    """Return what `variation` found of several tasks as plain rows.

    Args:
        found: by task.
    """
    return [
        {"task": task, "layer": layer, "part": part, "entries": m.entries, "distance": m.distance, "cosine": m.cosine}
        for task, moved in found.items()
        for (layer, part), m in moved.items()
    ]
