"""Routers: who decides the merging coefficients of a layer, token by token."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from fusion_merge.errors import ConfigError
from fusion_merge.moe.precision import exact
from fusion_merge.moe.projection_router import ProjectionRouter
from fusion_merge.moe.recurrent import RecurrentCell, RecurrentRouter
from fusion_merge.moe.router_base import Router as Router
from fusion_merge.moe.router_base import exact_linear, mean_over_tokens, noisy_linear


@final
class ConstantRouter(Router):
    r"""A free vector of coefficients; the input is ignored.

    .. math:: g = \lambda \mathbf{1}

    Args:
        num_coefficients: K.
        init_lambda: λ, where every coefficient starts.
    """

    def __init__(self, num_coefficients: int, init_lambda: float = 0.0) -> None:
        super().__init__()
        self.num_coefficients = num_coefficients
        self.coefficients = nn.Parameter(torch.full((num_coefficients,), float(init_lambda)))

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Router.forward`."""
        return self.coefficients.expand(*tokens.shape[:2], -1)  # (B, T, K)

    def pooled(self, tokens: Tensor) -> Tensor:
        """See `Router.pooled`."""
        return exact(self.coefficients).expand(tokens.shape[0], -1)  # (B, K)

    def spec(self) -> dict[str, Any]:
        """See `Router.spec`."""
        return {"kind": "constant", "num_coefficients": self.num_coefficients}


@final
class LinearRouter(Router):
    r"""One linear layer.

    .. math:: g(x) = A x + a, \qquad A \sim \mathcal N(0, 0.01^2), \quad a = \lambda \mathbf{1}

    Args:
        width: D.
        num_coefficients: K.
        init_lambda: λ, where every coefficient starts, to the noise of A.
        generator: where the noise comes from.
    """

    def __init__(
        self,
        width: int,
        num_coefficients: int,
        init_lambda: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.num_coefficients = num_coefficients
        self.out = noisy_linear(width, num_coefficients, init_lambda, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Router.forward`."""
        return self.out(tokens)  # (B, T, K)

    def pooled(self, tokens: Tensor) -> Tensor:
        """See `Router.pooled`: of a linear map, the mean of the outputs is the output of the mean."""
        return exact_linear(self.out, self.last_inputs(tokens))  # (B, K)

    def last_layer(self) -> nn.Linear:
        """See `Router.last_layer`."""
        return self.out

    def last_inputs(self, tokens: Tensor) -> Tensor:
        """See `Router.last_inputs`: the mean token."""
        return mean_over_tokens(tokens)  # (B, D)

    def spec(self) -> dict[str, Any]:
        """See `Router.spec`."""
        return {"kind": "linear", "width": self.width, "num_coefficients": self.num_coefficients}


@final
class MLPRouter(Router):
    r"""Two linear layers with a ReLU between them.

    .. math:: g(x) = A_2 \operatorname{relu}(A_1 x + a_1) + a_2, \qquad A_i \sim \mathcal N(0, 0.01^2),
              \quad a_1 = 0, \quad a_2 = \lambda \mathbf{1}

    Args:
        width: D.
        hidden: the width between the two layers.
        num_coefficients: K.
        init_lambda: λ, where every coefficient starts, to the noise of the weights.
        generator: where the noise comes from.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_coefficients: int,
        init_lambda: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.hidden = hidden
        self.num_coefficients = num_coefficients
        self.inner = noisy_linear(width, hidden, 0.0, generator)
        self.out = noisy_linear(hidden, num_coefficients, init_lambda, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Router.forward`."""
        return self.out(torch.relu(self.inner(tokens)))  # (B, T, K)

    def pooled(self, tokens: Tensor) -> Tensor:
        """See `Router.pooled`: the last layer is linear, and sees the mean of its inputs."""
        return exact_linear(self.out, self.last_inputs(tokens))  # (B, K)

    def last_layer(self) -> nn.Linear:
        """See `Router.last_layer`."""
        return self.out

    def last_inputs(self, tokens: Tensor) -> Tensor:
        """See `Router.last_inputs`: the mean of what the tokens excite between the two layers."""
        return mean_over_tokens(torch.relu(self.inner(tokens)))  # (B, hidden)

    def spec(self) -> dict[str, Any]:
        """See `Router.spec`."""
        return {
            "kind": "mlp",
            "width": self.width,
            "hidden": self.hidden,
            "num_coefficients": self.num_coefficients,
        }


@final
class LayerEncodedRouter(Router):
    r"""A shared router that also sees which layer it decides for: a position code is prepended to every token.

    .. math:: c_l = \big[\sin(l\,\omega_i)\big]_{i<p/2} \oplus \big[\cos(l\,\omega_i)\big]_{i<p/2}, \qquad
              \omega_i = 10000^{-2i/p}

    Args:
        shared: the router of all layers; its width is D + p.
        layer_index: l, from 0.
        dim: p, even and at least 2.

    Raises:
        ConfigError: if `dim` is odd or below 2.

    Source: E-WEMoE, arXiv 2410.21804.
    """

    code: Tensor

    def __init__(self, shared: Router, layer_index: int, dim: int) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ConfigError(f"`position_encoding_dim`={dim} is not an even number of at least 2; 8 is usual")
        self.shared = shared
        self.layer_index = layer_index
        self.num_coefficients = shared.num_coefficients
        self.dim = dim
        self.register_buffer("code", layer_code(layer_index, dim), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Router.forward`."""
        coefficients: Tensor = self.shared(self._with_code(tokens))  # (B, T, K)
        return coefficients

    def pooled(self, tokens: Tensor) -> Tensor:
        """See `Router.pooled`."""
        return self.shared.pooled(self._with_code(tokens))  # (B, K)

    def last_layer(self) -> nn.Linear | None:
        """See `Router.last_layer`: the shared router's."""
        return self.shared.last_layer()

    def last_inputs(self, tokens: Tensor) -> Tensor:
        """See `Router.last_inputs`."""
        return self.shared.last_inputs(self._with_code(tokens))

    def _with_code(self, tokens: Tensor) -> Tensor:
        code = self.code.to(tokens).expand(*tokens.shape[:2], -1)  # (B, T, p)
        return torch.cat([code, tokens], dim=-1)  # (B, T, p + D)

    def spec(self) -> dict[str, Any]:
        """See `Router.spec`."""
        return {
            "kind": "layer_encoded",
            "layer_index": self.layer_index,
            "dim": self.dim,
            "shared": self.shared.spec(),
        }

    def shared_part(self) -> Router:
        """See `Router.shared_part`: the router of all layers."""
        return self.shared


def layer_code(layer_index: int, dim: int) -> Tensor:
    """Return the position code of a layer; the formula is that of `LayerEncodedRouter`.

    Args:
        layer_index: l, from 0.
        dim: p, even.

    Shape:
        → (p,).
    """
    steps = torch.arange(dim // 2, dtype=torch.float64)
    angles = layer_index * 10000.0 ** (-2.0 * steps / dim)  # (p/2,)
    return torch.cat([angles.sin(), angles.cos()]).float()  # (p,)


def make_router(
    router_hidden_layers: int,
    width: int,
    num_coefficients: int,
    init_lambda: float,
    *,
    hidden: int,
    generator: torch.Generator | None = None,
) -> Router:
    """Make the router that `router_hidden_layers` stands for: it counts linear layers.

    Args:
        router_hidden_layers: 0 (constant), 1 (linear) or 2 (two layers with a ReLU).
        width: D.
        num_coefficients: K.
        init_lambda: λ, where every coefficient starts.
        hidden: the width between two layers.
        generator: where the noise of the weights comes from.

    Raises:
        ConfigError: if `router_hidden_layers` is not 0, 1 or 2.
    """
    if router_hidden_layers == 0:
        return ConstantRouter(num_coefficients, init_lambda)
    if router_hidden_layers == 1:
        return LinearRouter(width, num_coefficients, init_lambda, generator)
    if router_hidden_layers == 2:
        return MLPRouter(width, hidden, num_coefficients, init_lambda, generator)
    raise ConfigError(f"`router_hidden_layers`={router_hidden_layers} is not possible; choose 0, 1 or 2")


def empty_router(spec: dict[str, Any], shared: nn.Module | None = None) -> Router:
    """Make a router with the shapes that a spec describes and values that are still to be loaded.

    Args:
        spec: what `Router.spec` returned.
        shared: what it shares with the router of an earlier layer, if it does: that router's `shared_part`, or that
            router itself if it has none.

    Raises:
        ConfigError: if the kind of router is unknown, or `shared` is not what the spec describes.
    """
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are never used, nor missed by the user's stream
        return _empty_router(spec, shared)


def _empty_router(spec: dict[str, Any], shared: nn.Module | None) -> Router:
    kind = spec["kind"]
    if kind == "layer_encoded":
        inner = _empty_router(spec["shared"], shared)
        return LayerEncodedRouter(inner, spec["layer_index"], spec["dim"])
    if kind == "recurrent":
        cell = shared if shared is not None else RecurrentCell(spec["state_width"])
        if not isinstance(cell, RecurrentCell) or cell.state_width != spec["state_width"]:
            raise ConfigError(f"a router that is {spec} shares a cell of its width with others, not {_called(cell)}")
        return RecurrentRouter(cell, spec["layer_index"], spec["width"], spec["num_coefficients"])
    if shared is not None:
        if not isinstance(shared, Router) or shared.spec() != spec:
            raise ConfigError(f"layers that share a router that is {spec} cannot share {_called(shared)}")
        return shared
    if kind == "constant":
        return ConstantRouter(spec["num_coefficients"])
    if kind == "linear":
        return LinearRouter(spec["width"], spec["num_coefficients"])
    if kind == "mlp":
        return MLPRouter(spec["width"], spec["hidden"], spec["num_coefficients"])
    if kind == "projection":
        return ProjectionRouter(spec["width"], spec["num_tasks"], spec["num_coefficients"], spec["rank"])
    raise ConfigError(
        f"router of kind `{kind}` is unknown; known are constant, linear, mlp, projection, layer_encoded, recurrent"
    )


def _called(module: nn.Module) -> str:
    """Return what an error says of something that was to be shared."""
    if isinstance(module, RecurrentCell):
        return f"a cell of width {module.state_width}"
    return f"one that is {module.spec()}" if isinstance(module, Router) else f"a `{type(module).__name__}`"
