"""What the last, linear layer of a router reads: the one thing that its coefficients depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusion_merge.moe.layer import RoutedBlock, moe_layers
from fusion_merge.moe.router import Router


def inner_router(router: Router) -> Router:
    """Return the router whose coefficients these are: of one that is shared and sees its layer, the shared one.

    Args:
        router: any router.
    """
    part = router.shared_part()
    return part if isinstance(part, Router) else router


def last_inputs(router: Router, tokens: Tensor) -> Tensor:
    r"""Return what a router's last layer reads of each sample, and a one for its bias.

    .. math:: h = \big[\operatorname{mean}_t \phi(x_t); 1\big], \qquad g = [A\; a]\, h

    with φ what comes before that layer: nothing in a linear router.

    Args:
        router: one that has a `last_layer`.
        tokens: the block's input.

    Shape:
        (B, T, D) → (B, F + 1), in float32 at least.

    Raises:
        ConfigError: if the router has no such layer.
    """
    means = router.last_inputs(tokens)  # (B, F)
    return torch.cat([means, means.new_ones(len(means), 1)], dim=1)  # (B, F + 1)


@contextmanager
def record_inputs(blocks: dict[str, RoutedBlock]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the inputs of blocks while the context lasts.

    Args:
        blocks: the blocks by name.

    Yields:
        For each block, one tensor (B, T, D) a forward pass.
    """
    record: dict[str, list[Tensor]] = {name: [] for name in blocks}
    with before_blocks(blocks, lambda name, _block, tokens: record[name].append(tokens)):
        yield record


@contextmanager
def record_last_inputs(blocks: dict[str, RoutedBlock]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what the last layers of blocks' routers read while the context lasts.

    Args:
        blocks: blocks by name, whose routers all have a `last_layer`.

    Yields:
        For each block, one tensor (B, F + 1) a forward pass, on the CPU.
    """
    record: dict[str, list[Tensor]] = {name: [] for name in blocks}

    def keep(name: str, block: RoutedBlock, tokens: Tensor) -> None:
        record[name].append(last_inputs(block.router, tokens).detach().cpu())

    with before_blocks(blocks, keep):
        yield record


@contextmanager
def before_blocks(blocks: dict[str, RoutedBlock], do: Callable[[str, RoutedBlock, Tensor], None]) -> Iterator[None]:
    """Let something be done with each block's input before the block uses it, while the context lasts.

    Args:
        blocks: the blocks by name.
        do: takes a block's name, the block, and its input (B, T, D).
    """
    handles = []
    for name, block in blocks.items():

        def hook(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
            do(name, module, args[0] if args else kwargs["hidden_states"])

        handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_chunks(modules: Sequence[nn.Module], size: int) -> Iterator[None]:
    """Let modules compute their outputs for a few samples at a time while the context lasts: the same, in less memory.

    Hooks see whole batches. Where a module returns a tuple, what follows the first tensor is that of the first samples.

    Args:
        modules: what treats each sample by itself, such as MLPs and attention; the first argument is the batch.
        size: samples at a time, at least 1.
    """
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = partial(_chunked, module.forward, size)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _chunked(forward: Callable[..., Any], size: int, *args: Any, **kwargs: Any) -> Any:
    batch, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
    outputs = [forward(chunk, *args, **kwargs) for chunk in batch.split(size)]
    if isinstance(outputs[0], tuple):
        return (torch.cat([first for first, *_ in outputs]), *outputs[0][1:])
    return torch.cat(outputs)


def blocks_by_router(model: nn.Module) -> list[dict[str, RoutedBlock]]:
    """Return the routed blocks of a model in forward order, those that share a router together.

    Args:
        model: a model with at least one routed block.

    Raises:
        ModelError: if there is none.
    """
    groups: dict[int, dict[str, RoutedBlock]] = {}
    for name, block in moe_layers(model).items():
        groups.setdefault(id(inner_router(block.router)), {})[name] = block
    return list(groups.values())
