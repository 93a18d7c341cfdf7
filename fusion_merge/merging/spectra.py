"""Merging by singular vectors: task singular vectors (TSV-M) and isotropic merging (Iso-C, Iso-CTS)."""

from __future__ import annotations

import torch
from torch import Tensor

_LEFT_OVER = 1e-4
"""Of a matrix's norm, what is left of it that says nothing: what is subtracted is not known better than that."""


def tsv_merge(stacked: Tensor) -> Tensor:
    r"""Return one matrix of N, each cut to a part of its rank, after their singular vectors are made orthogonal.

    .. math:: \tau_n \approx U_n \Sigma_n V_n^\top \ (k = \lfloor r / N \rfloor), \qquad
              \tau = \operatorname{polar}([U_1 \dots U_N])\, \operatorname{diag}(\Sigma_1, \dots, \Sigma_N)\,
              \operatorname{polar}([V_1 \dots V_N])^\top

    Args:
        stacked: the task vectors of one matrix; N at most r = min(O, I), or else nothing is left of them.

    Shape:
        (N, O, I) → (O, I).

    Source: Gargiulo et al. 2025, "Task singular vectors", algorithm 1.
    """
    kept = min(stacked.shape[1:]) // len(stacked)
    parts = [singular_triplets(matrix, kept) for matrix in stacked]
    left, values, right = (torch.cat(some, dim=-1) for some in zip(*parts, strict=True))  # (O, Nk), (Nk,), (I, Nk)
    return (polar(left) * values) @ polar(right).T


def iso_c(total: Tensor) -> Tensor:
    r"""Return a matrix with its singular vectors, and the mean of its singular values in the place of each.

    .. math:: \sum_n \tau_n = U \Sigma V^\top, \qquad \tau = \bar\sigma\, U V^\top

    Args:
        total: the sum of the task vectors of one matrix.

    Shape:
        (O, I) → (O, I).

    Source: Marczak et al. 2025, "No task left behind", §4.1.
    """
    left, values, right = singular_triplets(total)
    return values.sum() / max(1, values.numel()) * (left @ right.T)


def iso_cts(stacked: Tensor, common_space_fraction: float) -> Tensor:
    r"""Return what `iso_c` does of a common space and of directions that each task has for itself.

    .. math:: \tau = \bar\sigma\, \operatorname{polar}([U_c\ U_1 \dots U_N])\,
              \operatorname{polar}([V_c\ V_1 \dots V_N])^\top

    c: the leading singular vectors of the sum; n: those of what of τₙ is orthogonal to :math:`U_c`.

    Args:
        stacked: the task vectors of one matrix.
        common_space_fraction: about which part of the rank the common space has, 0-1; the tasks share the rest equally.

    Shape:
        (N, O, I) → (O, I).

    Source: Marczak et al. 2025, §4.2 and algorithm 2.
    """
    tasks, rank = len(stacked), min(stacked.shape[1:])
    own = min(round((rank - int(rank * common_space_fraction)) / tasks), rank // tasks)
    common = singular_triplets(stacked.sum(dim=0), rank - own * tasks)
    basis = common[0]  # (O, c)
    parts = [common]
    for matrix in stacked:
        rest = matrix - basis @ (basis.T @ matrix)
        parts.append(singular_triplets(rest, own, beside=matrix if basis.numel() else None))  # exact without a basis
    left, values, right = (torch.cat(some, dim=-1) for some in zip(*parts, strict=True))
    return values.sum() / max(1, values.numel()) * (polar(left) @ polar(right).T)


def polar(matrix: Tensor) -> Tensor:
    r"""Return the nearest matrix with orthonormal columns: the solution of the orthogonal Procrustes problem.

    .. math:: M = P \Sigma Q^\top \implies \operatorname{polar}(M) = P Q^\top

    Directions that M does not have stay out: of dependent columns it is a partial isometry, and unique.

    Args:
        matrix: M, at least as tall as it is wide.

    Shape:
        (D, K) → (D, K).
    """
    left, _, right = singular_triplets(matrix)
    return left @ right.T


def singular_triplets(
    matrix: Tensor, most: int | None = None, *, beside: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the leading singular vectors and values of a matrix, without those that are nothing but rounding.

    .. math:: M \approx U \Sigma V^\top

    Singular vectors of the value zero are arbitrary, and here none is made up.

    Args:
        matrix: M.
        most: how many at most; by default all.
        beside: what M was formed from by taking something away: what is rounding of that is rounding of M.

    Shape:
        (O, I) → U (O, k), Σ (k,), V (I, k).
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    smallest = torch.finfo(matrix.dtype).eps * max(matrix.shape) ** 0.5 * values[:1]
    if beside is not None:
        smallest = torch.maximum(smallest, _LEFT_OVER * torch.linalg.matrix_norm(beside))
    found = int((values > smallest).sum())
    kept = found if most is None else min(most, found)
    return left[:, :kept], values[:kept], right[:kept].T
