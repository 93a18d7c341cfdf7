"""The blocks of a plain model that can be routed: which there are, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn

from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.moe.attention import MoEAttention, attention_parts
from fusion_merge.moe.experts import Experts, empty_experts
from fusion_merge.moe.layer import MoELinear, MoEMLP, RoutedBlock, Routing, mlp_parts
from fusion_merge.moe.router import Router, empty_router
from fusion_merge.moe.selection import Selection, empty_selection

TARGETS = {"mlp": ("mlp",), "attention": ("attention",), "all": ("attention", "mlp")}
"""Which kinds of blocks get experts, by the name of the choice."""


def find_blocks(model: nn.Module, targets: str = "mlp") -> dict[str, nn.Module]:
    """Return the plain blocks of a model that can be routed by name, in forward order.

    Args:
        model: any module with MLPs made of `fc1`, one activation and `fc2`, or attention with `PROJECTIONS`.
        targets: one of `TARGETS`.

    Raises:
        ConfigError: if there is no such choice.
        ModelError: if there is no such block.
    """
    if targets not in TARGETS:
        raise ConfigError(f"`targets`={targets!r} is not possible; choose {' or '.join(TARGETS)}")
    found = {name: module for name, module in model.named_modules() if _kind(module) in TARGETS[targets]}
    if not found:
        parts = {"mlp": "MLP made of fc1, one activation and fc2", "attention": "attention with q, k, v and out_proj"}
        raise ModelError(f"`{type(model).__name__}` has no {' or '.join(parts[kind] for kind in TARGETS[targets])}")
    return found


def is_block(module: nn.Module) -> bool:
    """Tell whether a module is an MLP or attention, routed or one that could be.

    Args:
        module: any module.
    """
    return isinstance(module, RoutedBlock) or _kind(module) is not None


def plain_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a plain block by name, in forward order.

    Args:
        block: one that `find_blocks` returned.

    Raises:
        ModelError: if it is neither an MLP nor attention.
    """
    if _kind(block) == "attention":
        return attention_parts(block)
    fc1, _, fc2 = mlp_parts(block)
    return {"fc1": fc1, "fc2": fc2}


def routed_block(
    block: nn.Module,
    make_bank: Callable[[str, nn.Linear], Experts],
    make_router: Callable[[int, int], Router],
    routing: Routing,
    selection: Selection | None,
) -> RoutedBlock:
    """Return the routed block that takes the place of a plain one; the plain one's layers become part of it.

    Args:
        block: one that `find_blocks` returned.
        make_bank: makes the bank of a linear layer, given its name and the layer.
        make_router: makes the router, given the input width and the number of coefficients.
        routing: what the router's output is averaged over.
        selection: how many of the coefficients take part.
    """
    plain = plain_linears(block)
    linears = {name: MoELinear(linear, make_bank(name, linear)) for name, linear in plain.items()}
    first = next(iter(linears.values()))
    router = make_router(first.base.in_features, first.experts.num_coefficients)
    if _kind(block) == "attention":
        return MoEAttention(block, linears, router, routing, selection)
    return MoEMLP(linears["fc1"], mlp_parts(block)[1], linears["fc2"], router, routing, selection)


def empty_block(spec: Mapping[str, Any], block: nn.Module, shared_router: nn.Module | None = None) -> RoutedBlock:
    """Make a routed block with the shapes that a spec describes and values that are still to be loaded.

    Args:
        spec: what `RoutedBlock.spec` returned.
        block: the plain block to take the base layers from.
        shared_router: the router, or the part of one, that this block shares with an earlier one, if it does.

    Raises:
        ModelError: if the spec is one of another kind of block.
    """
    if _kind(block) != spec["kind"]:
        raise ModelError(f"a routed block of kind {spec['kind']!r} cannot take the place of `{type(block).__name__}`")

    def make_router(_width: int, _count: int) -> Router:
        return empty_router(spec["router"], shared_router)

    def make_bank(name: str, linear: nn.Linear) -> Experts:
        return empty_experts(spec["linears"][name], linear.in_features, linear.out_features)

    return routed_block(block, make_bank, make_router, Routing(spec["routing"]), empty_selection(spec["selection"]))


def check_layers(layers: str | list[int], count: int | None = None) -> int | None:
    """Refuse a choice of layers that no model has, or that one of so many layers does not.

    Args:
        layers: `all`, numbers from 0, or `critical:K`.
        count: how many layers the model has; None where that is not known yet.

    Returns:
        K, where that is the choice.

    Raises:
        ConfigError: if the choice is of another form, names a layer twice, or one that is not there.
    """
    if isinstance(layers, list):
        if not layers or len(set(layers)) < len(layers) or not all(0 <= n < (count or n + 1) for n in layers):
            there = "from 0 on" if count is None else f"among 0-{count - 1}"
            raise ConfigError(f"`layers`={layers} is not possible; choose different ones {there}, or all")
        return None
    word, _, number = layers.partition(":")
    if layers == "all":
        return None
    if word != "critical" or not number.isdecimal() or not 1 <= int(number) <= (count or int(number)):
        last = "1" if count is None else str(count - 1)
        raise ConfigError(
            f"`layers`={layers!r} is not possible; choose all, a list such as [0, {last}], or critical:K with K "
            + ("at least 1" if count is None else f"in 1-{count}")
        )
    return int(number)


def layers_of(layers: str | list[int], blocks: list[str], order: Callable[[list[str]], list[str]]) -> list[int]:
    """Return the numbers of the layers that a choice stands for.

    Args:
        layers: `all`, numbers from 0, or `critical:K`, the K layers with the block that was moved most.
        blocks: the names of all blocks that may be routed.
        order: sorts blocks by how far fine-tuning moved them.

    Raises:
        ConfigError: if the choice is not possible.
    """
    there = sorted({layer_of(block) for block in blocks})
    critical = check_layers(layers, len(there))
    if critical is None:
        return list(layers) if isinstance(layers, list) else there
    ranked = dict.fromkeys(layer_of(block) for block in order(blocks))
    return sorted(list(ranked)[:critical])


def chosen_blocks(blocks: Sequence[str], layers: Collection[int]) -> list[str]:
    """Return the names of the blocks that lie in some of the layers, in their order.

    Args:
        blocks: names such as `encoder.layers.3.mlp`; the number in them tells the layer.
        layers: which layers.
    """
    return [name for name in blocks if layer_of(name) in layers]


def layer_of(name: str) -> int:
    """Return the number of the layer that a block belongs to; 0 where its name has none.

    Args:
        name: such as `encoder.layers.3.mlp`.
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), 0)


def _kind(module: nn.Module) -> str | None:
    for kind, parts in (("mlp", mlp_parts), ("attention", attention_parts)):
        try:
            parts(module)
        except ModelError:
            continue
        return kind
    return None
