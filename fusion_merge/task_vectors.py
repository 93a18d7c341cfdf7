r"""State-dict algebra: task vectors, task arithmetic, magnitude pruning, truncated SVD.

A *state* is a mapping from parameter names to tensors. Every function is pure: inputs are never changed and
never shared with the result where the result differs from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal

import torch
from torch import Tensor

from fusion_merge.errors import ConfigError, ModelError

State = Mapping[str, Tensor]

Combine = Callable[[Tensor, Tensor, int], Tensor]
"""Makes a merged tensor of the pretrained one, the sum of its task vectors, and the number of models."""

_LARGE = 256  # below this smaller side of a matrix, its whole decomposition takes no time
_ROUNDS = 12  # after so many, the whole decomposition is the better way
_TOLERANCE = 5e-5  # of the energy that is left over
_NEARLY_ALL = 1e-5  # of the energy: what is left over then is rounding


def difference(finetuned: State, pretrained: State) -> dict[str, Tensor]:
    r"""Return the task vector of a fine-tuned model.

    .. math:: \tau = \theta - \theta_0

    Only floating-point tensors have a task vector; integer buffers are left out.

    Args:
        finetuned: the state after fine-tuning.
        pretrained: the state before it, with the same names and shapes.

    Raises:
        ModelError: if names or shapes differ.

    Source: Ilharco et al. 2023, "Editing models with task arithmetic", §2.
    """
    check_same_shapes(pretrained, finetuned)
    return {name: finetuned[name] - pretrained[name] for name in pretrained if pretrained[name].is_floating_point()}


def task_arithmetic(pretrained: State, finetuned: Iterable[State], scaling_factor: float) -> dict[str, Tensor]:
    r"""Return the static merge that moves along the sum of all task vectors.

    .. math:: \theta = \theta_0 + \lambda \sum_n (\theta_n - \theta_0)

    Models are read one tensor at a time, so that lazily loaded states stay on disk.

    Args:
        pretrained: the state that every model was fine-tuned from.
        finetuned: the fine-tuned states, with the same names and shapes.
        scaling_factor: λ, any finite number; 1/N gives the simple average of N models.

    Raises:
        ModelError: if names or shapes differ.

    Source: Ilharco et al. 2023, §2.
    """
    return static_merge(pretrained, finetuned, scaled(scaling_factor))


def scaled(scaling_factor: float) -> Combine:
    """Return how task arithmetic combines a tensor with the sum of its task vectors.

    Args:
        scaling_factor: λ.
    """
    return lambda base, total, _: base + scaling_factor * total


def simple_average(pretrained: State, finetuned: Iterable[State]) -> dict[str, Tensor]:
    r"""Return the mean of the fine-tuned models.

    .. math:: \theta = \theta_0 + \frac{1}{N} \sum_n (\theta_n - \theta_0) = \frac{1}{N} \sum_n \theta_n

    Args:
        pretrained: the state that every model was fine-tuned from; its names and integer buffers are kept.
        finetuned: the fine-tuned states.

    Raises:
        ModelError: if names or shapes differ.

    Source: Wortsman et al. 2022, "Model soups".
    """
    return static_merge(pretrained, finetuned, lambda base, total, count: base + total / count)


def static_merge(pretrained: State, finetuned: Iterable[State], combine: Combine) -> dict[str, Tensor]:
    """Return `combine(pretrained, sum of task vectors, number of models)` for every floating-point tensor.

    Args:
        pretrained: the state that every model was fine-tuned from.
        finetuned: the fine-tuned states.
        combine: what to do with one tensor, the sum of its task vectors, and their number.

    Raises:
        ModelError: if names or shapes differ, or if there is no model to merge.
    """
    return dict(StaticMerge(pretrained, finetuned, combine))


class StaticMerge(Mapping[str, Tensor]):
    """A static merge whose tensors are formed when they are asked for, one at a time.

    Args:
        pretrained: the state that every model was fine-tuned from.
        finetuned: the fine-tuned states.
        combine: what to do with one tensor, the sum of its task vectors, and their number.
        leave: beginnings of the names that stay as they are in `pretrained`.

    Raises:
        ModelError: if names or shapes differ, or if there is no model to merge.
    """

    def __init__(
        self, pretrained: State, finetuned: Iterable[State], combine: Combine, *, leave: tuple[str, ...] = ()
    ) -> None:
        self._pretrained, self._finetuned = pretrained, list(finetuned)
        self._combine, self._leave = combine, leave
        if not self._finetuned:
            raise ModelError("there is no fine-tuned model to merge; give at least one beside `_pretrained_`")
        for state in self._finetuned:
            check_same_shapes(pretrained, state)
        self.shapes = shapes_of(pretrained)

    def __getitem__(self, name: str) -> Tensor:
        base = self._pretrained[name]
        if not base.is_floating_point() or name.startswith(self._leave):
            return base.clone()
        total = torch.zeros_like(base)
        for state in self._finetuned:
            total += state[name].to(base) - base
        return self._combine(base, total, len(self._finetuned))

    def __iter__(self) -> Iterator[str]:
        return iter(self._pretrained)

    def __len__(self) -> int:
        return len(self._pretrained)


def magnitude_prune(tensor: Tensor, prune_ratio: float) -> Tensor:
    r"""Return the tensor with its entries of small magnitude set to zero.

    Kept are the entries with :math:`|x|` strictly above the `prune_ratio` quantile of :math:`|x|` (linear
    interpolation between neighbours); nothing is rescaled. Because the comparison is strict, ratio 0 still drops
    the smallest entry, as the published method does.

    Args:
        tensor: floating point, of any shape and size; `torch.quantile` would stop at 2^24 elements.
        prune_ratio: the share to drop, in [0, 1).

    Shape:
        Same as `tensor`.

    Raises:
        ConfigError: if `prune_ratio` is outside [0, 1).

    Source: E-WEMoE, arXiv 2410.21804, eq. for the pruned task vectors.
    """
    if not 0.0 <= prune_ratio < 1.0:
        raise ConfigError(f"`prune_ratio`={prune_ratio} is outside [0, 1); 0.9 keeps the largest tenth")
    if tensor.numel() == 0:
        return tensor.clone()
    magnitude = tensor.detach().abs()
    magnitude = magnitude if magnitude.dtype == torch.float64 else magnitude.float()
    dropped = tensor.numel() - num_survivors(tensor.numel(), prune_ratio)
    threshold = torch.kthvalue(magnitude.flatten(), dropped).values  # no entry lies between this and the quantile
    return torch.where(magnitude <= threshold, torch.zeros_like(tensor), tensor)


def num_survivors(num_entries: int, prune_ratio: float) -> int:
    r"""Return how many entries of a tensor `magnitude_prune` keeps.

    .. math:: n - \lfloor r\,(n - 1) \rfloor - 1

    Fewer survive where entries are zero, or as large as the quantile: this is exact for distinct magnitudes.

    Args:
        num_entries: n, at least 1.
        prune_ratio: r, the share to drop, in [0, 1).
    """
    # 0.29 of 100 is 29, and floats say 28.999…
    return num_entries - int(Decimal(str(prune_ratio)) * (num_entries - 1)) - 1


def truncated_svd(matrix: Tensor, rank: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    r"""Return the best approximation of a matrix by `rank` outer products, in factors.

    .. math:: M \approx \sum_{j \le k} u_j (s_j v_j)^\top

    Args:
        matrix: the matrix M.
        rank: k, in 1…min(O, I), or -1 for full rank.
        device: where to compute; by default where the matrix is. The result comes back to the matrix's device.

    Shape:
        matrix (O, I) → left (O, k) with orthonormal columns :math:`u_j`, right (k, I) with rows
        :math:`s_j v_j`, by descending singular value.

    Raises:
        ConfigError: if `rank` is not possible for this matrix.

    Source: Eckart & Young 1936.
    """
    rank = _possible_rank(rank, tuple(matrix.shape))
    limit = min(matrix.shape)
    exact = matrix.to(device or matrix.device, torch.promote_types(matrix.dtype, torch.float32))
    tall = exact if exact.shape[0] >= exact.shape[1] else exact.T
    worth_it = limit >= _LARGE and 8 * rank <= limit
    left, values, right = (_iterated_svd(tall, rank) if worth_it else None) or torch.linalg.svd(tall, False)
    left, right = left[:, :rank], right[:rank]  # orthonormal columns, orthonormal rows
    if tall is not exact:
        left, right = right.T, left.T  # (O, k), (k, I)
    return left.to(matrix).contiguous(), (values[:rank, None] * right).to(matrix).contiguous()


def factored_svd(
    left: Tensor, right: Tensor, rank: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    r"""Do what `truncated_svd` does of a product that is given as two thin matrices, without forming it.

    .. math:: L = Q_1 R_1,\ R^\top = Q_2 R_2,\ R_1 R_2^\top = U S V^\top \implies
              L R = (Q_1 U)\, S\, (Q_2 V)^\top

    As with every decomposition, signs are free: each outer product is the same, not each of its two vectors.

    Args:
        left: L.
        right: R.
        rank: k, in 1…min(O, I), or -1 for full rank; beyond r both results hold zeros.
        device: where to compute; by default where `left` is. The result comes back to it.

    Shape:
        left (O, r), right (r, I), r ≥ 0 → left (O, k), right (k, I), as in `truncated_svd` but for the zeros.

    Raises:
        ConfigError: if `rank` is not possible for the product.
    """
    rank = _possible_rank(rank, (left.shape[0], right.shape[1]))
    us, svs = left.new_zeros(left.shape[0], rank), left.new_zeros(rank, right.shape[1])
    if left.shape[1] == 0:
        return us, svs
    exact = torch.promote_types(left.dtype, torch.float32)
    first = torch.linalg.qr(left.to(device or left.device, exact))  # (O, q), (q, r)
    second = torch.linalg.qr(right.to(device or left.device, exact).T)  # (I, p), (p, r)
    u, s, v = torch.linalg.svd(first.R @ second.R.T, False)
    found = min(rank, s.numel())
    us[:, :found] = (first.Q @ u[:, :found]).to(us)
    svs[:found] = (s[:found, None] * (v[:found] @ second.Q.T)).to(svs)
    return us, svs


def _possible_rank(rank: int, shape: tuple[int, ...]) -> int:
    limit = min(shape)
    if rank == -1:
        return limit
    if not 1 <= rank <= limit:
        raise ConfigError(f"`rank`={rank} is not possible for a matrix of {shape}; choose 1-{limit} or -1")
    return rank


def _iterated_svd(tall: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the leading singular triplets by randomised subspace iteration, or None where it does not converge.

    The subspace is twice as wide as the rank. Rounds end when what further ones could still capture, extrapolated
    from the last two, is below `_TOLERANCE` of what is left over: then the residual is that of the best
    approximation to better than 1e-4. The start is drawn with a fixed seed, so that the result is always the same.

    Source: Halko, Martinsson & Tropp 2011, algorithm 4.4.
    """
    generator = torch.Generator(tall.device).manual_seed(0)
    width = 2 * rank
    start = torch.randn(tall.shape[1], width, generator=generator, device=tall.device, dtype=tall.dtype)
    basis = torch.linalg.qr(start).Q  # (I, q)
    total = tall.square().sum(dtype=torch.float64).item()
    captured, gains = 0.0, [math.inf]
    for _ in range(_ROUNDS):
        image = tall @ basis  # (O, q)
        energies = torch.linalg.eigvalsh((image.T @ image).double())  # ascending, (q,)
        found = energies[-rank:].sum().item()
        gains.append(found - captured)
        captured = found
        rest = total - captured
        if rest <= _NEARLY_ALL * total:
            return None  # single precision cannot tell what is left: the exact decomposition can
        ratio = min(max(gains[-1] / gains[-2], 0.0), 0.95)
        if len(gains) > 2 and gains[-1] * ratio / (1 - ratio) <= _TOLERANCE * rest:
            left, values, right = torch.linalg.svd(image, False)
            return left, values, right @ basis.T  # (O, q), (q,), (q, I)
        basis = torch.linalg.qr(tall.T @ image).Q
    return None


def check_same_shapes(reference: State, other: State, *, where: str = "the fine-tuned model") -> None:
    """Refuse a state that does not have the names and shapes of another.

    Args:
        reference: what is expected.
        other: what is checked.
        where: how the error calls `other`.

    Raises:
        ModelError: names the first tensors that are missing, unexpected or of another shape.
    """
    check_same_shape_tables(shapes_of(reference), shapes_of(other), where=where)


def check_same_shape_tables(
    reference: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]], *, where: str
) -> None:
    """Do what `check_same_shapes` does, from tables of shapes that need no weights.

    Args:
        reference: the expected shape of each tensor.
        other: the shapes that are checked.
        where: how the error calls `other`.

    Raises:
        ModelError: names the first tensors that are missing, unexpected or of another shape.
    """
    for problem, names in (
        ("lacks", sorted(reference.keys() - other.keys())),
        ("has, unexpectedly,", sorted(other.keys() - reference.keys())),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"{where} {problem} {', '.join(f'`{n}`' for n in names[:3])}{more}; "
                "all models of a pool must come from the same architecture"
            )
    for name, shape in reference.items():
        if other[name] != shape:
            raise ModelError(
                f"{where} has `{name}` of shape {other[name]}, the pretrained model has {shape}; "
                "all models of a pool must come from the same architecture"
            )


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor; lazily read states answer from file headers alone.

    Args:
        state: the state to describe.
    """
    table = getattr(state, "shapes", None)
    if isinstance(table, Mapping):
        return dict(table)
    return {name: tuple(state[name].shape) for name in state}
