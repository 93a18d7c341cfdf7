"""What every router is, and what routers are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

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
        return mean_over_tokens(self(tokens))

    def last_layer(self) -> nn.Linear | None:
        """Return the layer whose rows are the experts', one a coefficient; None where a router ends in no such layer.

        `pooled` is its output for `last_inputs`.
        """
        return None

    def last_inputs(self, tokens: Tensor) -> Tensor:
        """Return what the last layer reads of each sample, in float32 at least.

        Args:
            tokens: the block's input.

        Shape:
            (B, T, D) → (B, F).

        Raises:
            ConfigError: if this kind of router has no such layer.
        """
        raise ConfigError(f"a `{type(self).__name__}` has no linear layer at its end that reads the block's input")

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Return what `empty_router` needs to make a router of the same shapes, as plain JSON values."""

    def shared_part(self) -> nn.Module | None:
        """Return the part of this router that those of other layers may hold too; by default there is none.

        A router of several layers that is the very same object in each is shared as a whole, and needs no such part.
        """
        return None


def mean_over_tokens(values: Tensor) -> Tensor:
    """Return the mean over tokens, in float32 at least.

    Args:
        values: something of each token.

    Shape:
        (B, T, …) → (B, …).
    """
    return exact(values).mean(dim=1)


def exact_linear(layer: nn.Linear, means: Tensor) -> Tensor:
    """Apply a layer in the precision of its input, mixed precision or not.

    Args:
        layer: the layer, in any precision.
        means: its input.

    Shape:
        (B, I) → (B, O).
    """
    with torch.autocast(means.device.type, enabled=False):
        return F.linear(means, layer.weight.to(means.dtype), layer.bias.to(means.dtype))


def noisy_linear(inputs: int, outputs: int, bias: float, generator: torch.Generator | None) -> nn.Linear:
    """Return a layer whose weights are noise of a standard deviation of 0.01.

    Args:
        inputs: I.
        outputs: O.
        bias: every bias.
        generator: where the noise comes from.
    """
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, device=torch.get_default_device())
    with torch.no_grad():
        layer.weight.normal_(0.0, _WEIGHT_STD, generator=generator)
        layer.bias.fill_(bias)
    return layer
