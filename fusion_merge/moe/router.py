"""Routers: who decides the merging coefficients of a layer, token by token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_merge.errors import ConfigError
from fusion_merge.moe.precision import exact

_WEIGHT_STD = 0.01


class Router(nn.Module, ABC):
    """Decides the merging coefficients: raw values, neither normalised nor bounded."""

    num_coefficients: int

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """Return coefficients for each token; the layer averages them.

        Args:
            tokens: the input of the MLP.

        Shape:
            (B, T, D) → (B, T, K).
        """

    def pooled(self, tokens: Tensor) -> Tensor:
        """Return the mean coefficients of each sample's tokens, in float32 at least.

        Args:
            tokens: the input of the MLP.

        Shape:
            (B, T, D) → (B, K).
        """
        return _mean(self(tokens))

    def readout(self, tokens: Tensor) -> tuple[Tensor, nn.Linear]:
        """Return what the last linear layer reads of each sample, and that layer: `pooled` is its output.

        Args:
            tokens: the input of the MLP.

        Shape:
            (B, T, D) → (B, F).

        Raises:
            ConfigError: if this kind of router has no such layer.
        """
        raise ConfigError(f"`{type(self).__name__}` does not end in a linear layer of its own that could be solved for")

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Return what `empty_router` needs to make a router of the same shapes, as plain JSON values."""


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
        self.out = _linear(width, num_coefficients, init_lambda, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Router.forward`."""
        return self.out(tokens)  # (B, T, K)

    def pooled(self, tokens: Tensor) -> Tensor:
        """See `Router.pooled`: of a linear map, the mean of the outputs is the output of the mean."""
        return _exact_linear(self.out, _mean(tokens))  # (B, K)

    def readout(self, tokens: Tensor) -> tuple[Tensor, nn.Linear]:
        """See `Router.readout`: the mean token."""
        return _mean(tokens), self.out  # (B, D)

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
        self.inner = _linear(width, hidden, 0.0, generator)
        self.out = _linear(hidden, num_coefficients, init_lambda, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Router.forward`."""
        return self.out(torch.relu(self.inner(tokens)))  # (B, T, K)

    def pooled(self, tokens: Tensor) -> Tensor:
        """See `Router.pooled`: the last layer is linear, and sees the mean of its inputs."""
        features, out = self.readout(tokens)
        return _exact_linear(out, features)  # (B, K)

    def readout(self, tokens: Tensor) -> tuple[Tensor, nn.Linear]:
        """See `Router.readout`: the mean of what the tokens excite between the two layers."""
        return _mean(torch.relu(self.inner(tokens))), self.out  # (B, hidden)

    def spec(self) -> dict[str, Any]:
        """See `Router.spec`."""
        return {
            "kind": "mlp",
            "width": self.width,
            "hidden": self.hidden,
            "num_coefficients": self.num_coefficients,
        }


@final
class ProjectionRouter(Router):
    r"""Chooses by how much of a sample lies in each task's right singular subspace, and learns what to add to that.

    .. math:: e_n = \frac{\sum_t \lVert V_n x_t \rVert^2}{\sum_t \lVert x_t \rVert^2}, \qquad
              z = \frac{e - \operatorname{mean}(e)}{\operatorname{std}(e)}, \qquad
              g_{nj} = \operatorname{softmax}(\kappa z)_n + A x + a

    1 - e is the relative residual of the projection. κ starts at 3, A and a at zero, and these three are adapted; V is
    fixed. `pooled` is no mean over `forward`, which looks at each token by itself.

    Args:
        width: D.
        num_tasks: N.
        num_coefficients: K, a multiple of N.
        rank: R, the directions of each task, at most D.

    Source: after MASS, arXiv 2504.05342 (which projects at one layer and routes whole models), and SMILE, 2408.10174.
    """

    subspaces: Tensor

    def __init__(self, width: int, num_tasks: int, num_coefficients: int, rank: int) -> None:
        super().__init__()
        self.width = width
        self.num_tasks = num_tasks
        self.num_coefficients = num_coefficients
        self.rank = min(rank, width)
        self.register_buffer("subspaces", torch.zeros(num_tasks, self.rank, width))
        self.sharpness = nn.Parameter(torch.tensor(3.0))
        self.out = _linear(width, num_coefficients, 0.0, None)
        self.out.weight.data.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Router.forward`."""
        alone = tokens.flatten(0, 1).unsqueeze(1)  # (B·T, 1, D)
        return self.pooled(alone).unflatten(0, tokens.shape[:2])  # (B, T, K)

    def pooled(self, tokens: Tensor) -> Tensor:
        """See `Router.pooled`."""
        x = exact(tokens)  # (B, T, D)
        with torch.autocast(x.device.type, enabled=False):
            inside = F.linear(x, self.subspaces.to(x.dtype).flatten(0, 1)).square().sum(dim=1)  # (B, N·R)
            whole = x.square().sum(dim=(1, 2)).clamp_min(torch.finfo(x.dtype).tiny)  # (B,)
            shares = inside.unflatten(1, (self.num_tasks, -1)).sum(dim=-1) / whole.unsqueeze(1)  # (B, N)
            centred = shares - shares.mean(dim=1, keepdim=True)
            spread = centred.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
            chosen = torch.softmax(self.sharpness * centred / spread, dim=1)  # (B, N)
        each = chosen.repeat_interleave(self.num_coefficients // self.num_tasks, dim=1)  # (B, K)
        return each + _exact_linear(self.out, _mean(tokens))

    def spec(self) -> dict[str, Any]:
        """See `Router.spec`."""
        spec = {"width": self.width, "num_tasks": self.num_tasks, "num_coefficients": self.num_coefficients}
        return {"kind": "projection", **spec, "rank": self.rank}


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


def empty_router(spec: dict[str, Any]) -> Router:
    """Make a router with the shapes that a spec describes and values that are still to be loaded.

    Args:
        spec: what `Router.spec` returned.

    Raises:
        ConfigError: if the kind of router is unknown.
    """
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are never used, nor missed by the user's stream
        return _empty_router(spec)


def _empty_router(spec: dict[str, Any]) -> Router:
    kind = spec["kind"]
    if kind == "layer_encoded":
        return LayerEncodedRouter(empty_router(spec["shared"]), spec["layer_index"], spec["dim"])
    if kind == "constant":
        return ConstantRouter(spec["num_coefficients"])
    if kind == "linear":
        return LinearRouter(spec["width"], spec["num_coefficients"])
    if kind == "mlp":
        return MLPRouter(spec["width"], spec["hidden"], spec["num_coefficients"])
    if kind == "projection":
        return ProjectionRouter(spec["width"], spec["num_tasks"], spec["num_coefficients"], spec["rank"])
    raise ConfigError(f"router of kind `{kind}` is unknown; known are constant, linear, mlp, projection, layer_encoded")


def _mean(values: Tensor) -> Tensor:
    """Return the mean over tokens, in float32 at least: (B, T, …) → (B, …)."""
    return exact(values).mean(dim=1)


def _exact_linear(layer: nn.Linear, means: Tensor) -> Tensor:
    """Apply a layer in the precision of its input, mixed precision or not: (B, D) → (B, K)."""
    with torch.autocast(means.device.type, enabled=False):
        return F.linear(means, layer.weight.to(means.dtype), layer.bias.to(means.dtype))


def _linear(inputs: int, outputs: int, bias: float, generator: torch.Generator | None) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, device=torch.get_default_device())
    with torch.no_grad():
        layer.weight.normal_(0.0, _WEIGHT_STD, generator=generator)
        layer.bias.fill_(bias)
    return layer
