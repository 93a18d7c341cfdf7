"""Upcycling: MLPs, and attention, of a statically merged model become mixtures of experts made of task vectors."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.moe.blocks import find_blocks, plain_linears, routed_block
from fusion_merge.moe.experts import Experts
from fusion_merge.moe.layer import Routing
from fusion_merge.moe.router import Router
from fusion_merge.moe.selection import Selection
from fusion_merge.moe.vectors import PARTS, LayerTaskVectors, TaskVector
from fusion_merge.task_vectors import State

log = logging.getLogger(__name__)

EXPERT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What expert banks can be stored in."""

MakeExperts = Callable[[str, Sequence[TaskVector]], Experts]
"""Makes a bank from the layer's name and its task vectors, which are best gone through once: they are read anew."""

MakeBank = Callable[[str, nn.Linear], Experts]
"""Makes a bank from the layer's name and the layer alone."""

MakeRouter = Callable[[int, int, int], Router]
"""Makes a router from the layer's index, the input width and the number of coefficients."""


def find_mlps(model: nn.Module) -> dict[str, nn.Module]:
    """Return the plain MLPs of a model by name, in forward order.

    Args:
        model: any module whose MLPs are made of `fc1`, one activation and `fc2`.

    Raises:
        ModelError: if there is none.
    """
    return find_blocks(model, "mlp")


def upcycle_mlps(
    merged: nn.Module,
    pretrained: State,
    finetuned: Sequence[State],
    *,
    make_experts: MakeExperts,
    make_router: MakeRouter,
    routing: Routing | str,
    selection: Selection | None = None,
    chosen: Sequence[str] | None = None,
    task_names: Sequence[str] | None = None,
    progress: Callable[[], object] | None = None,
    in_place: bool = False,
) -> nn.Module:
    """Return a copy of a statically merged model whose MLPs, or other blocks, are routed.

    The base inside each routed block is the *pretrained* block, not the merged one. States are read one tensor at a
    time. Inputs are never changed, unless `merged` is to be.

    Args:
        merged: the statically merged model; of the blocks that are routed the shapes alone matter.
        pretrained: the state that every model was fine-tuned from, under the names of `merged`.
        finetuned: the N fine-tuned states, under the names of `merged`.
        make_experts: makes the bank of one linear layer.
        make_router: makes (or hands out again) the router of one block.
        routing: what the routers' outputs are averaged over.
        selection: how many of the coefficients take part; by default all.
        chosen: the names of the blocks to route, among those of `find_blocks`; by default all MLPs.
        task_names: how notes call the N models; by default their numbers.
        progress: called when a block is done.
        in_place: route the blocks of `merged` itself, which saves the memory of a copy.

    Raises:
        ModelError: if there is no fine-tuned model, or no MLP that can be upcycled.

    Source: WEMoE, arXiv 2402.00433, §4; upcycling after Komatsuzaki et al. 2023.
    """
    names = list(task_names) if task_names is not None else [str(i) for i in range(len(finetuned))]
    unchanged = dict.fromkeys(names, 0)
    layers = sum(len(plain_linears(block)) for block in _blocks(merged, chosen).values())
    if not finetuned:
        raise ModelError("there is no fine-tuned model to make experts of; give at least one")

    def make_bank(path: str, linear: nn.Linear) -> Experts:
        _load_pretrained(linear, pretrained, path)

        vectors = LayerTaskVectors(pretrained, finetuned, path)
        bank = make_experts(path, vectors)
        for index in vectors.zero:
            unchanged[names[index]] += 1
        return bank

    model = route_mlps(
        merged,
        make_bank=make_bank,
        make_router=make_router,
        routing=routing,
        selection=selection,
        chosen=chosen,
        progress=progress,
        in_place=in_place,
    )
    _tell_unchanged(unchanged, layers)
    return model


def route_mlps(
    model: nn.Module,
    *,
    make_bank: MakeBank,
    make_router: MakeRouter,
    routing: Routing | str,
    selection: Selection | None = None,
    chosen: Sequence[str] | None = None,
    progress: Callable[[], object] | None = None,
    in_place: bool = False,
) -> nn.Module:
    """Return a copy of a model whose MLPs, or other blocks, are routed, with their own layers as bases.

    No task vector is needed.

    Args:
        model: any model with plain blocks, on the meta device too.
        make_bank: makes the bank of one linear layer of the copy.
        make_router: makes (or hands out again) the router of one block.
        routing: what the routers' outputs are averaged over.
        selection: how many of the coefficients take part; by default all.
        chosen: the names of the blocks to route, among those of `find_blocks`; by default all MLPs.
        progress: called when a block is done.
        in_place: route the blocks of `model` itself.

    Raises:
        ModelError: if there is no block that can be upcycled.
    """
    routed = (model if in_place else copy.deepcopy(model)).requires_grad_(False)
    for index, (name, block) in enumerate(_blocks(routed, chosen).items()):
        inside = partial(_within, name, make_bank)
        own_router = partial(make_router, index)
        made = routed_block(block, inside, own_router, Routing(routing), copy.deepcopy(selection))
        routed.set_submodule(name, made)
        if progress is not None:
            progress()
    return routed


def _within(block: str, make_bank: MakeBank, name: str, linear: nn.Linear) -> Experts:
    path = f"{block}.{name}"
    if linear.bias is None:
        raise ModelError(f"`{path}` has no bias; only linear layers with a bias can be upcycled")
    return make_bank(path, linear)


def _blocks(model: nn.Module, chosen: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the blocks to route by name, in forward order."""
    if chosen is None:
        return find_mlps(model)
    blocks = find_blocks(model, "all")
    if missing := sorted(set(chosen) - blocks.keys()):
        raise ModelError(f"`{missing[0]}` of `{type(model).__name__}` is not an MLP or attention that can be routed")
    return {name: block for name, block in blocks.items() if name in set(chosen)}


def stored(experts: Experts, dtype: str, path: str) -> Experts:
    """Return a bank in the precision that it is stored in.

    Args:
        experts: the bank, changed.
        dtype: one of `EXPERT_DTYPES`.
        path: the layer's name, for the error.

    Raises:
        ConfigError: if that cannot hold the bank's values.
    """
    experts = experts.to(EXPERT_DTYPES[dtype])
    if not all(torch.isfinite(torch.stack(p.aminmax())).all() for p in experts.parameters() if p.numel()):
        raise ConfigError(f"`expert_dtype`={dtype} cannot hold the experts of `{path}`; choose bfloat16 or float32")
    return experts


def _load_pretrained(linear: nn.Linear, pretrained: State, path: str) -> None:
    for part in PARTS:
        getattr(linear, part).data.copy_(pretrained[f"{path}.{part}"])


def _tell_unchanged(unchanged: Mapping[str, int], layers: int) -> None:
    """Say which tasks have experts of zeros, and what follows."""
    static = [task for task, count in unchanged.items() if count == layers]
    if static:
        tasks = ", ".join(f"`{task}`" for task in static)
        log.info(
            "no expert of task %s changes a layer: the model equals the pretrained one in all %d routed layers, "
            "as with LoRA on attention alone and routed MLPs; what it changes elsewhere is merged statically, and %s",
            tasks,
            layers,
            "routers have nothing to choose from: the result is task arithmetic"
            if len(static) == len(unchanged)
            else "routers choose among the experts of the other tasks",
        )
    for task, count in unchanged.items():
        if 0 < count < layers:
            log.info(
                "`%s` equals the pretrained model in %d of %d routed layers: it adds zero experts there",
                task,
                count,
                layers,
            )
