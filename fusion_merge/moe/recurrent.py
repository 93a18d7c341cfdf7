"""Routers that remember: each layer's router also sees what the routers of the layers before it saw."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.moe.router_base import Router, exact_linear, mean_over_tokens, noisy_linear


@final
class RecurrentCell(nn.Module):
    r"""A gated recurrent unit that is the same in all layers, and the state that it carries from layer to layer.

    .. math:: s_l = \mathrm{GRU}(z_l, s_{l-1}), \qquad s_{-1} = 0

    Weights start uniform in ±1/√h, biases at zero. A pass begins at layer 0, whatever was before it, visits every
    layer once in order, and ends at the last one; then nothing is left of it, its graph included. A pass that an
    error broke off leaves its state to the next one, or to `reset`. Each thread has passes of its own. Copies and
    files hold no state. Layers that are computed again in the backward pass (activation checkpointing) are out of
    order, which is an error.

    Args:
        state_width: h, at least 1.
        generator: where the noise of the weights comes from.

    Raises:
        ConfigError: if `state_width` is below 1.
    """

    def __init__(self, state_width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if state_width < 1:
            raise ConfigError(f"`router_state_width`={state_width} is below 1; 64 is usual")
        self.state_width = state_width
        self.gru = nn.utils.skip_init(nn.GRUCell, state_width, state_width, device=torch.get_default_device())
        bound = state_width**-0.5
        with torch.no_grad():
            for weight in (self.gru.weight_ih, self.gru.weight_hh):
                weight.uniform_(-bound, bound, generator=generator)
            for bias in (self.gru.bias_ih, self.gru.bias_hh):
                bias.zero_()
        self.num_layers = 0
        """How many layers a pass has: one more than the highest index of a router that was made with this cell."""
        self._passes: dict[int, tuple[int, Tensor]] = {}  # by thread: which layer is next, and the state before it

    def forward(self, inputs: Tensor, layer_index: int) -> Tensor:
        """Return the state after a layer, and keep it for the next one, if there is one.

        Args:
            inputs: z, in float32 at least.
            layer_index: l, from 0.

        Shape:
            (B, h) → (B, h).

        Raises:
            ModelError: if it is not this layer's turn, or the batch is not the one that the pass began with.
        """
        state = self._before(inputs, layer_index)  # (B, h)
        weights = (self.gru.weight_ih, self.gru.weight_hh, self.gru.bias_ih, self.gru.bias_hh)
        with torch.autocast(inputs.device.type, enabled=False):
            state = torch.gru_cell(inputs, state, *(weight.to(inputs.dtype) for weight in weights))
        if layer_index + 1 < self.num_layers:
            self._passes[threading.get_ident()] = (layer_index + 1, state)
        return state

    def reset(self) -> None:
        """Forget passes that were broken off, and free what they hold."""
        self._passes.clear()

    def _before(self, inputs: Tensor, layer_index: int) -> Tensor:
        """Return the state before a layer; from here on there is no pass, unless this layer goes on with it."""
        under_way = self._passes.pop(threading.get_ident(), None)
        if layer_index == 0:
            return inputs.new_zeros(inputs.shape[0], self.state_width)
        if under_way is None:
            raise ModelError(
                f"the recurrent router of layer {layer_index} was called, but no pass through the model is under way; "
                "call the layers in order, from layer 0, each once"
            )
        expected, state = under_way
        if layer_index != expected:
            raise ModelError(
                f"the recurrent router of layer {layer_index} was called where it was the turn of layer {expected}; "
                "call the layers in order, each once (activation checkpointing calls them twice: leave it off)"
            )
        if state.shape[0] != inputs.shape[0]:
            raise ModelError(
                f"the recurrent router of layer {layer_index} was called with {inputs.shape[0]} samples in a pass of "
                f"{state.shape[0]}; begin a new batch at layer 0"
            )
        return state.to(inputs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_passes": {}}  # copies begin anew: a state belongs to a pass, not to the module


@final
class RecurrentRouter(Router):
    r"""The router of one layer, whose decision depends on those of the layers before it.

    .. math:: z_l = P_l \operatorname{mean}_t x_{l,t} + p_l, \qquad s_l = \mathrm{GRU}(z_l, s_{l-1}), \qquad
              g_l = A_l s_l + a_l, \\
              P_l, A_l \sim \mathcal N(0, 0.01^2), \quad p_l = 0, \quad a_l = \lambda \mathbf{1}

    P and A are the layer's own, the GRU is one for all layers. There is one state a sample: the tokens are averaged
    first, so the coefficients of all tokens of a sample are equal. Each call of `forward` or `pooled` is this
    layer's turn in the pass, so a layer calls one of them once.

    Args:
        cell: what the routers of all layers share.
        layer_index: l, from 0.
        width: D.
        num_coefficients: K.
        init_lambda: λ, where every coefficient starts, to the noise of the weights.
        generator: where the noise comes from.

    Raises:
        ConfigError: if `layer_index` is below 0.

    Source: RMoE, arXiv 2408.06793; there each token has a state of its own and the output goes through a softmax
    and top-k. Here an image is routed as a whole, and coefficients are as raw as those of other routers.
    """

    def __init__(
        self,
        cell: RecurrentCell,
        layer_index: int,
        width: int,
        num_coefficients: int,
        init_lambda: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if layer_index < 0:
            raise ConfigError(f"`layer_index`={layer_index} is below 0; layers are counted from 0")
        self.cell = cell
        self.layer_index = layer_index
        self.width = width
        self.num_coefficients = num_coefficients
        self.inner = noisy_linear(width, cell.state_width, 0.0, generator)
        self.out = noisy_linear(cell.state_width, num_coefficients, init_lambda, generator)
        cell.num_layers = max(cell.num_layers, layer_index + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Router.forward`: what `pooled` returns, for every token."""
        coefficients = self.pooled(tokens).to(tokens.dtype).unsqueeze(1)  # (B, 1, K)
        return coefficients.expand(-1, tokens.shape[1], -1)  # (B, T, K)

    def pooled(self, tokens: Tensor) -> Tensor:
        """See `Router.pooled`.

        Raises:
            ModelError: if it is not this layer's turn, or the batch is not the one that the pass began with.
        """
        inputs = exact_linear(self.inner, mean_over_tokens(tokens))  # (B, h)
        state: Tensor = self.cell(inputs, self.layer_index)  # (B, h)
        return exact_linear(self.out, state)  # (B, K)

    def spec(self) -> dict[str, Any]:
        """See `Router.spec`."""
        return {
            "kind": "recurrent",
            "layer_index": self.layer_index,
            "width": self.width,
            "state_width": self.cell.state_width,
            "num_coefficients": self.num_coefficients,
        }

    def shared_part(self) -> RecurrentCell:
        """See `Router.shared_part`: the recurrent unit."""
        return self.cell


def recurrent_router_maker(
    state_width: int, init_lambda: float, generator: torch.Generator | None = None
) -> Callable[[int, int, int], RecurrentRouter]:
    """Return what makes the recurrent routers of a model, layer after layer, around one cell.

    It takes the layer's index, the input width and the number of coefficients. Index 0 begins a model: it makes the
    cell, on the default device of that moment.

    Args:
        state_width: h, at least 1.
        init_lambda: λ, where every coefficient starts, to the noise of the weights.
        generator: where the noise comes from.

    Raises:
        ConfigError: if `state_width` is below 1.
        ModelError: by what is returned, if the first index is not 0.
    """
    if state_width < 1:
        raise ConfigError(f"`router_state_width`={state_width} is below 1; 64 is usual")
    cell: RecurrentCell | None = None

    def make(index: int, width: int, count: int) -> RecurrentRouter:
        nonlocal cell
        if index == 0:
            cell = RecurrentCell(state_width, generator)
        if cell is None:
            raise ModelError(f"the first recurrent router made is that of layer {index}; begin with layer 0")
        return RecurrentRouter(cell, index, width, count, init_lambda, generator)

    return make
