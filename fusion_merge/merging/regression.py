"""RegMean: the linear layer whose outputs are nearest to those of all models, each on its own inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import final

import torch
from torch import Tensor, nn


@torch.no_grad()
def input_grams(model: nn.Module, layers: Collection[str], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    r"""Return the mean Gram matrix of the inputs of some layers, in double precision.

    .. math:: G = \frac1T \sum_t x_t x_t^\top

    Layers that are given the same input, such as queries, keys and values, share one matrix.

    Args:
        model: the model; not changed.
        layers: names of its linear layers.
        batches: what the model is given, one after the other.

    Shape:
        for each layer (I, I), where the model is; on the CPU if there is no double precision there.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    first_of: dict[str, str] = {}
    latest: list[tuple[Tensor, str]] = []

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if latest and latest[0][0] is inputs[0]:
                first_of[name] = latest[0][1]
                return
            first_of[name], latest[:] = name, [(inputs[0], name)]
            flat = inputs[0].flatten(0, -2)  # (T, I)
            flat = (flat.cpu() if flat.device.type == "mps" else flat).double()
            gram = flat.T @ flat
            sums[name] = sums[name].add_(gram) if name in sums else gram
            rows[name] = rows.get(name, 0) + len(flat)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in layers]
    try:
        for batch in batches:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    means = {name: gram.div_(rows[name]) for name, gram in sums.items()}
    return {name: means[first_of[name]] for name in layers}


@final
class Regression:
    r"""The merged weights of linear layers, from the models one after the other.

    .. math:: \tau = \Big(\sum_n \tau_n G_n\Big) \Big(\sum_n G_n\Big)^{-1}

    Task vectors are merged instead of weights: the result is the same, and rounding is less.

    Args:
        off_diagonal: α in [0, 1], what all entries of Gram matrices but the diagonal are multiplied by.

    Source: Jin et al. 2023, "Dataless knowledge fusion", eq. 2 and §3.2.
    """

    def __init__(self, off_diagonal: float) -> None:
        self._off_diagonal = off_diagonal
        self._grams: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}
        self._first_of: dict[str, str] = {}

    def add(self, grams: Mapping[str, Tensor], task_vector: Callable[[str], Tensor]) -> None:
        """Add a model.

        Args:
            grams: the Gram matrix of each layer's inputs, as `input_grams` gives them; changed in place.
            task_vector: that of the weight of a layer.
        """
        seen: dict[int, str] = {}
        for layer, gram in grams.items():
            first = self._first_of[layer] = seen.setdefault(id(gram), layer)
            if first == layer:
                diagonal = gram.diagonal().clone()
                gram.mul_(self._off_diagonal).diagonal().copy_(diagonal)
                _add(self._grams, layer, gram)
            _add(self._products, layer, task_vector(layer).to(gram) @ gram)

    def __contains__(self, layer: str) -> bool:
        return layer in self._products

    def solution(self, layer: str, start: Tensor, device: torch.device) -> Tensor:
        """Return the merged task vector of the weight of a layer.

        Args:
            layer: its name.
            start: what stays where inputs say nothing.
            device: where to compute.

        Shape:
            (O, I) → (O, I), in double precision, on the CPU.
        """
        device = torch.device("cpu") if device.type == "mps" else device
        product, gram = self._products[layer].to(device), self._grams[self._first_of[layer]].to(device)
        return least_squares(product, gram, start.to(product)).cpu()


def least_squares(product: Tensor, gram: Tensor, start: Tensor) -> Tensor:
    r"""Return the solution of normal equations; if there are many, the one that is nearest to a given matrix.

    .. math:: W G = B

    Args:
        product: B.
        gram: G, symmetric and positive semidefinite.
        start: what W is in directions that G does not have.

    Shape:
        (O, I), (I, I), (O, I) → (O, I).
    """
    rest = product - start @ gram
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal()
    smallest = (torch.finfo(gram.dtype).eps * len(gram)) ** 0.5
    if failed == 0 and diagonal.min() > smallest * diagonal.max():
        return start + torch.cholesky_solve(rest.T, factor).T
    return start + rest @ torch.linalg.pinv(gram, hermitian=True)


def _add(sums: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in sums:
        sums[name] += tensor.cpu()
    else:
        sums[name] = tensor.cpu().clone()
