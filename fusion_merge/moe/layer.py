"""The routed layers: a linear layer with experts, and blocks of them that one router drives, such as an MLP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.moe.experts import Experts
from fusion_merge.moe.router import Router
from fusion_merge.moe.selection import SelectAll, Selection


class Routing(StrEnum):
    """What a router's output is averaged over.

    SAMPLE: over the tokens of each sample, so that each sample has its own merged weights and its output does not
    depend on its batch mates. BATCH: over the samples too, so that the whole batch shares one merged weight.
    """

    SAMPLE = "sample"
    BATCH = "batch"

    @classmethod
    def _missing_(cls, value: object) -> Routing:
        raise ConfigError(f"`routing`={value!r} is not possible; choose sample or batch")


@final
class MoELinear(nn.Module):
    """A frozen linear layer and what its experts add to it.

    Args:
        base: the pretrained layer, with a bias; its parameters are frozen.
        experts: the bank.

    Raises:
        ModelError: if the layer has no bias.
    """

    def __init__(self, base: nn.Linear, experts: Experts) -> None:
        super().__init__()
        if base.bias is None:
            raise ModelError("a linear layer without a bias cannot be upcycled")
        self.base = base.requires_grad_(False)
        self.experts = experts
        experts.lay_out(base)

    def forward(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """Return the output under the given merging coefficients.

        Args:
            x: the layer's input.
            coefficients: one row a sample, or a single row for the whole batch.

        Shape:
            x (B, T, I), coefficients (B, K) or (1, K) → (B, T, O).

        Raises:
            ModelError: if the base was unfrozen.
        """
        if self.base.weight.requires_grad:
            raise ModelError("the base of a routed layer is frozen, and gets no gradient: leave `requires_grad` off")
        output: Tensor = self.experts(x, coefficients, self.base)
        return output


class RoutedBlock(nn.Module, ABC):
    r"""A block of linear layers with experts that one router drives.

    .. math:: g = m\big(\operatorname{mean}_{\text{tokens}[,\text{batch}]} r(x)\big)

    Args:
        linears: the block's linear layers by name, in forward order; the subclass has them as submodules.
        router: r; several blocks may share one.
        routing: what the router's output is averaged over.
        selection: m; by default every coefficient takes part.

    Raises:
        ConfigError: if the layers and the router do not agree on the number of coefficients.
    """

    kind: ClassVar[str]
    """What a spec calls such a block."""

    def __init__(
        self,
        linears: Mapping[str, MoELinear],
        router: Router,
        routing: Routing = Routing.SAMPLE,
        selection: Selection | None = None,
    ) -> None:
        super().__init__()
        counts = (*(linear.experts.num_coefficients for linear in linears.values()), router.num_coefficients)
        if len(set(counts)) != 1:
            raise ConfigError(f"{', '.join(linears)} and router have {counts} coefficients; they must agree")
        self.router = router
        self.routing = Routing(routing)
        self.selection = selection if selection is not None else SelectAll()
        self.over_processes = False
        """Whether batch routing averages over the batches of all processes too, as if they were one batch."""

    @property
    def num_coefficients(self) -> int:
        """K, the merging coefficients of this block."""
        return self.router.num_coefficients

    @abstractmethod
    def linears(self) -> dict[str, MoELinear]:
        """Return the block's linear layers by the names that they have in a plain block, in forward order."""

    def coefficients(self, tokens: Tensor) -> Tensor:
        """Return the merging coefficients after averaging and selection, both in float32 at least.

        Args:
            tokens: the block's input.

        Shape:
            (B, T, D) → (B, K) under sample routing, (1, K) under batch routing.
        """
        routed = self.router.pooled(tokens)  # (B, K)
        if self.routing is Routing.BATCH:
            routed = routed.mean(dim=0, keepdim=True)  # (1, K)
            if self.over_processes:
                routed = _MeanOverProcesses.apply(routed)
        selected: Tensor = self.selection(routed)
        return selected.to(tokens.dtype)

    def spec(self) -> dict[str, Any]:
        """Return what `empty_block` needs to make a block of the same shapes, as plain JSON values."""
        return {
            "kind": self.kind,
            "linears": {name: linear.experts.spec() for name, linear in self.linears().items()},
            "router": self.router.spec(),
            "routing": str(self.routing),
            "selection": self.selection.spec(),
        }


@final
class MoEMLP(RoutedBlock):
    r"""A transformer MLP whose two linear layers are driven by one router.

    .. math:: y = \mathrm{fc}_2\big(\phi(\mathrm{fc}_1(x; g)); g\big)

    Args:
        fc1: the first layer, D → hidden.
        activation: φ.
        fc2: the second layer, hidden → D.
        router: see `RoutedBlock`.
        routing: see `RoutedBlock`.
        selection: see `RoutedBlock`.

    Shape:
        (B, T, D) → (B, T, D).

    Raises:
        ConfigError: if fc1, fc2 and the router do not agree on the number of coefficients.
    """

    kind: ClassVar[str] = "mlp"

    def __init__(
        self,
        fc1: MoELinear,
        activation: nn.Module,
        fc2: MoELinear,
        router: Router,
        routing: Routing = Routing.SAMPLE,
        selection: Selection | None = None,
    ) -> None:
        super().__init__({"fc1": fc1, "fc2": fc2}, router, routing, selection)
        self.fc1 = fc1
        self.activation = activation
        self.fc2 = fc2

    def linears(self) -> dict[str, MoELinear]:
        """See `RoutedBlock.linears`."""
        return {"fc1": self.fc1, "fc2": self.fc2}

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the MLP's output; shapes as in the class docstring.

        Args:
            hidden_states: the MLP's input.
        """
        coefficients = self.coefficients(hidden_states)  # (B, K) or (1, K)
        hidden = self.activation(self.fc1(hidden_states, coefficients))  # (B, T, hidden)
        output: Tensor = self.fc2(hidden, coefficients)  # (B, T, D)
        return output


class _MeanOverProcesses(torch.autograd.Function):
    """The mean over processes, whose gradient reaches all of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _mean_over_processes(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # every process sees the mean, so each value is responsible for a share of every process's loss
        return _mean_over_processes(gradient)


def _mean_over_processes(value: Tensor) -> Tensor:
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def mlp_parts(mlp: nn.Module) -> tuple[nn.Linear, nn.Module, nn.Linear]:
    """Return fc1, the activation and fc2 of a plain transformer MLP.

    Args:
        mlp: a module whose children are the linear layers `fc1` and `fc2` and one activation.

    Raises:
        ModelError: if the module is not made like that.
    """
    children = dict(mlp.named_children())
    fc1, fc2 = children.pop("fc1", None), children.pop("fc2", None)
    if not isinstance(fc1, nn.Linear) or not isinstance(fc2, nn.Linear) or len(children) != 1:
        raise ModelError(f"`{type(mlp).__name__}` is not an MLP made of fc1, one activation and fc2")
    (activation,) = children.values()
    return fc1, activation, fc2


def moe_layers(model: nn.Module) -> dict[str, RoutedBlock]:
    """Return the routed blocks of a model by name, in forward order.

    Args:
        model: any module.

    Raises:
        ModelError: if there is none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RoutedBlock)}
    if not layers:
        raise ModelError(f"`{type(model).__name__}` has no routed layer; upcycle it first")
    return layers


def set_routing(model: nn.Module, routing: Routing | str) -> None:
    """Set what every routed block of a model averages its router's output over.

    Args:
        model: a model with at least one routed block.
        routing: `sample` or `batch`.

    Raises:
        ModelError: if the model has no routed block.
    """
    for layer in moe_layers(model).values():
        layer.routing = Routing(routing)


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all routers, a shared router's once: what adaptation trains.

    Args:
        model: a model with at least one routed block.

    Raises:
        ModelError: if the model has no routed block.
    """
    routers = nn.ModuleList([layer.router for layer in moe_layers(model).values()])
    return list(routers.parameters())


@contextmanager
def record_coefficients(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the merging coefficients of every routed block while the context lasts.

    Args:
        model: a model with at least one routed block.

    Yields:
        For each layer, one tensor a forward pass: (B, K) under sample routing, (1, K) under batch routing.
    """
    record: dict[str, list[Tensor]] = {}
    handles = []
    for name, layer in moe_layers(model).items():
        values = record.setdefault(name, [])

        def keep(_module: nn.Module, _args: Any, output: Tensor, values: list[Tensor] = values) -> None:
            values.append(output.detach().to("cpu", torch.float32))

        handles.append(layer.selection.register_forward_hook(keep))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
