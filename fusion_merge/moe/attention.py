"""Attention whose projections have experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from torch import Tensor, nn

from fusion_merge.errors import ModelError
from fusion_merge.moe.layer import MoELinear, RoutedBlock, Routing
from fusion_merge.moe.router import Router
from fusion_merge.moe.selection import Selection

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The linear layers of an attention block, under the names that transformers gives them."""


@final
class MoEAttention(RoutedBlock):
    r"""Self-attention whose four projections are driven by one router, which reads the attention's input.

    .. math:: y = \mathrm{out}\big(\operatorname{attention}(\mathrm q(x; g), \mathrm k(x; g), \mathrm v(x; g)); g\big)

    Args:
        attention: a plain attention block with the children `PROJECTIONS`; it becomes part of this one, and its
            projections are replaced.
        projections: what takes their places.
        router: see `RoutedBlock`.
        routing: see `RoutedBlock`.
        selection: see `RoutedBlock`.

    Shape:
        those of the plain block; the first argument is its input (B, T, D).

    Raises:
        ConfigError: if the projections and the router do not agree on the number of coefficients.
    """

    kind: ClassVar[str] = "attention"

    def __init__(
        self,
        attention: nn.Module,
        projections: Mapping[str, MoELinear],
        router: Router,
        routing: Routing = Routing.SAMPLE,
        selection: Selection | None = None,
    ) -> None:
        super().__init__(projections, router, routing, selection)
        self._current = _Current()
        for name, projection in projections.items():
            attention.set_submodule(name, _Driven(projection, self._current))
        self.attention = attention

    def linears(self) -> dict[str, MoELinear]:
        """See `RoutedBlock.linears`."""
        return {name: self.attention.get_submodule(name).linear for name in PROJECTIONS}  # type: ignore[misc]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the plain block returns.

        Args:
            hidden_states: the block's input.
            *args: what the plain block takes besides.
            **kwargs: likewise.
        """
        self._current.coefficients = self.coefficients(hidden_states)  # (B, K) or (1, K)
        try:
            return self.attention(hidden_states, *args, **kwargs)
        finally:
            self._current.coefficients = None


class _Current:
    """The merging coefficients of the forward pass under way."""

    coefficients: Tensor | None = None


class _Driven(nn.Module):
    """A projection in the place of a plain one, which is called without coefficients."""

    def __init__(self, linear: MoELinear, current: _Current) -> None:
        super().__init__()
        self.linear = linear
        self._current = current

    def forward(self, x: Tensor) -> Tensor:
        coefficients = self._current.coefficients
        if coefficients is None:
            raise ModelError("a routed projection was called outside of its attention block; call the block")
        output: Tensor = self.linear(x, coefficients)
        return output


def attention_parts(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the projections of a plain attention block, in forward order.

    Args:
        block: a module with the children `PROJECTIONS`, all linear and of one input width.

    Raises:
        ModelError: if the module is not made like that.
    """
    children = dict(block.named_children())
    found = {name: children.get(name) for name in PROJECTIONS}
    linears = {name: child for name, child in found.items() if isinstance(child, nn.Linear)}
    if len(linears) != len(PROJECTIONS):
        raise ModelError(f"`{type(block).__name__}` is not an attention block with {', '.join(PROJECTIONS)}")
    return linears
