"""Where routers start: exact linear algebra on banks, or on a few unlabelled images, before the first gradient step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fusion_merge.errors import AdaptationError
from fusion_merge.moe import RoutedBlock, Routing, moe_layers, set_routing
from fusion_merge.moe.blocks import is_block
from fusion_merge.moe.features import before_blocks, in_chunks
from fusion_merge.moe.projection_router import ProjectionRouter

STARTS = ("constant", "projection", "ridge")
"""Where routers may start."""

CHUNK = 32
"""Images of a start that an MLP or attention sees at a time."""


@torch.no_grad()
def ridge_start(model: nn.Module, images: Mapping[str, Tensor], *, ridge: float = 1e-3) -> None:
    r"""Let each router's last layer tell the tasks apart: ridge regression from its inputs to one-hot coefficients.

    .. math:: \min_{A, a} \sum_n \frac1{B_n} \sum_{i \le B_n} \lVert A h_{ni} + a - e_n \rVert^2
              + \rho\, \tfrac{\operatorname{tr} C}{D} \lVert A \rVert^2

    with h what the layer reads of an image, C its covariance, and e_n one at every coefficient of task n and zero
    elsewhere: an image of task n gets that task's expert. Blocks are solved in forward order, in one pass of all
    images: what a block reads depends on the routers before it, which are solved by then. Between blocks all images are
    at hand; attention and MLPs, whose inner tensors are larger, see them in chunks.

    Args:
        model: a routed model, each of whose blocks has a router of its own; its routers are changed.
        images: for each task, in the order of the experts, some of its images (B, 3, height, width).
        ridge: ρ, above 0.

    Raises:
        AdaptationError: if two blocks share a router.
        ConfigError: if a router does not end in a linear layer.

    Source: after the closed-form classifiers of "RanPAC" (arXiv 2307.02251), which tell classes apart; here tasks.
    """
    layers = list(moe_layers(model).values())
    _refuse_shared(layers, "ridge")
    device = next(model.parameters()).device
    pixels = torch.cat([batch.to(device) for batch in images.values()])  # (B, 3, height, width)
    tasks = [torch.full((len(batch),), index) for index, batch in enumerate(images.values())]
    one_hot = nn.functional.one_hot(torch.cat(tasks), len(images)).double()  # (B, N)
    weights = torch.cat([torch.full((len(t),), 1 / (len(t) * len(tasks)), dtype=torch.float64) for t in tasks])  # (B,)

    def solve(block: RoutedBlock, tokens: Tensor) -> None:
        features = block.router.last_inputs(tokens)  # an error, where there is no such layer
        out: Any = block.router.last_layer()
        weight, bias = ridge_solution(features.cpu().double(), one_hot, weights, ridge)  # (N, F), (N,)
        each = block.num_coefficients // len(images)
        out.weight.copy_(weight.repeat_interleave(each, dim=0))
        out.bias.copy_(bias.repeat_interleave(each))

    with (
        before_blocks(moe_layers(model), lambda _, block, tokens: solve(block, tokens)),
        _by_sample(model, layers),
        in_chunks([module for module in model.modules() if is_block(module)], CHUNK),
    ):
        model(pixel_values=pixels)


def ridge_solution(features: Tensor, targets: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    r"""Return the weighted ridge regression from features to targets, with an intercept that is not shrunk.

    Args:
        features: h.
        targets: what they should give.
        weights: of the samples; they sum up to 1.
        ridge: ρ, relative to the mean variance of the features.

    Shape:
        features (B, F), targets (B, N), weights (B,) → weight (N, F), intercept (N,).
    """
    mean, goal = weights @ features, weights @ targets  # (F,), (N,)
    centred = features - mean
    covariance = centred.T @ (weights.unsqueeze(1) * centred)  # (F, F)
    scale = ridge * covariance.diagonal().mean().clamp_min(torch.finfo(features.dtype).eps)  # above 0: it is solvable
    covariance.diagonal().add_(scale)
    slope = torch.linalg.solve(covariance, centred.T @ (weights.unsqueeze(1) * (targets - goal)))  # (F, N)
    return slope.T, goal - mean @ slope


@torch.no_grad()
def projection_start(model: nn.Module, num_tasks: int) -> None:
    r"""Give each `ProjectionRouter` its tasks' right singular subspaces; no image is needed.

    For a task, the weights' task vectors of all linear layers that read the block's input (fc1; q, k and v) are put
    below one another, as the block's bank stores them; V are the first R right singular vectors.

    Args:
        model: a routed model, each of whose blocks has such a router; changed.
        num_tasks: N.

    Raises:
        AdaptationError: if two blocks share a router, or one is of another kind.
    """
    layers = list(moe_layers(model).values())
    _refuse_shared(layers, "projection")
    for block in layers:
        router = block.router
        if not isinstance(router, ProjectionRouter):
            raise AdaptationError(f"`router_start`=projection cannot start a `{type(router).__name__}`")
        readers = [linear for name, linear in block.linears().items() if name not in ("fc2", "out_proj")]
        for task in range(num_tasks):
            own = torch.zeros(1, num_tasks, device=router.subspaces.device)
            own[0, task] = 1
            coefficients = own.repeat_interleave(block.num_coefficients // num_tasks, dim=1)  # (1, K)
            stacked = torch.cat([linear.experts.delta(coefficients).weight[0].float() for linear in readers])
            _, values, right = torch.linalg.svd(stacked, full_matrices=False)
            least = torch.finfo(values.dtype).eps * max(stacked.shape) * values[0]  # what is below is rounding
            found = right[: router.rank] * (values[: router.rank] > least).unsqueeze(1)  # (≤ R, D)
            router.subspaces[task].zero_()[: len(found)] = found.to(router.subspaces)


def _refuse_shared(layers: list[RoutedBlock], start: str) -> None:
    if len({id(block.router) for block in layers}) < len(layers):
        raise AdaptationError(f"`router_start`={start} solves each layer's router, and these share one")


@contextmanager
def _by_sample(model: nn.Module, layers: list[RoutedBlock]) -> Iterator[None]:
    """Route each sample by itself while the context lasts."""
    before = [block.routing for block in layers]
    set_routing(model, Routing.SAMPLE)
    try:
        yield
    finally:
        for block, routing in zip(layers, before, strict=True):
            block.routing = routing
