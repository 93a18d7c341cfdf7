"""The shape of a CLIP model and of a routed one: what follows from configurations alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from fusion_merge.methods.base import Method
from fusion_merge.models.clip import expected_shapes
from fusion_merge.models.ensemble import TowerEnsemble
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.moe import MoEAttention, moe_layers
from fusion_merge.moe.blocks import layer_of
from fusion_merge.moe.layer import MoEMLP, router_parameters
from fusion_merge.moe.projection import projection_layers
from fusion_merge.moe.router import Router
from fusion_merge.pools.task_pool import model_info

FLOAT = 4
"""Bytes of a float32."""

_DESCRIBED = 90
"""Bytes that a file spends on the kind, shape and place of a tensor, beside its name."""

_INDENT = 12
"""Bytes around a class name in a configuration."""


@dataclass(frozen=True)
class Geometry:
    """The shape of one transformer tower.

    Attributes:
        layers: how many.
        width: D.
        hidden: the width inside an MLP.
        tokens: T, of one image or prompt.
        inputs: the numbers in one image; 0 of a text tower.
        side: of one image, in pixels; 0 of a text tower.
        activation: what `hidden_act` is called.
        numbers: all weights.
    """

    layers: int
    width: int
    hidden: int
    tokens: int
    inputs: int
    side: int
    activation: str
    numbers: int

    @property
    def kept_by_activation(self) -> int:
        """How many tensors as wide as the MLP its activation keeps for the backward pass."""
        return 2 if self.activation == "quick_gelu" else 1

    @property
    def mlp_products(self) -> int:
        """Multiplications of all MLPs for one image."""
        return 2 * self.layers * self.tokens * self.width * self.hidden

    @property
    def products(self) -> int:
        """Multiplications of one image's forward pass."""
        projections = 4 * self.layers * self.tokens * self.width**2
        attention = 2 * self.layers * self.tokens**2 * self.width
        embedding = self.inputs * self.width
        return projections + attention + embedding + self.mlp_products

    @property
    def matrix(self) -> int:
        """Numbers in one weight of an MLP."""
        return self.width * self.hidden


def vision_geometry(config: CLIPVisionConfig) -> Geometry:
    """Return the shape of a vision tower.

    Args:
        config: its configuration.
    """
    sizes: Any = config  # transformers 5 declares more types than were let through
    return Geometry(
        layers=sizes.num_hidden_layers,
        width=sizes.hidden_size,
        hidden=sizes.intermediate_size,
        tokens=(sizes.image_size // sizes.patch_size) ** 2 + 1,
        inputs=sizes.num_channels * sizes.image_size**2,
        side=sizes.image_size,
        activation=sizes.hidden_act,
        numbers=sum(torch.Size(shape).numel() for shape in expected_shapes(config).values()),
    )


def text_geometry(config: CLIPConfig, tokens: int) -> Geometry:
    """Return the shape of a whole CLIP model's text tower; `numbers` counts the whole model's.

    Args:
        config: the configuration of the whole model.
        tokens: of the longest prompt.
    """
    text: Any = config.text_config
    with torch.device("meta"):
        numbers = sum(p.numel() for p in CLIPModel(config).parameters())
    return Geometry(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        hidden=text.intermediate_size,
        tokens=min(tokens, text.max_position_embeddings),
        inputs=0,
        side=0,
        activation=text.hidden_act,
        numbers=numbers,
    )


@dataclass(frozen=True)
class ModelSize:
    """The size of the finished model.

    Attributes:
        parameters: all of them.
        trainable: those of the routers.
        experts: those of the expert banks.
        bytes: of all tensors, in memory and on disk alike; heads, and what routers read, are among them.
        router_bytes: of what is trained.
        kind: of the banks: dense, sparse, low_rank; None for a plain tower.
        coefficients: K, of one layer.
        router_widths: for each layer, the numbers that its router keeps of one token for the backward pass.
        router_inputs: the numbers that the last layer of a router reads of an image, one for its bias among them; 0
            where not every router ends in such a layer.
        mlps: routed MLPs.
        attentions: routed attention blocks.
        first: the first layer with a routed block; what comes before it keeps nothing for the backward pass.
        passes: what a forward pass multiplies beside a plain tower's, where it is no routed MLP that adds to it.
        head_bytes: of the heads of its tasks.
        input_bytes: of what its routers read of some images of each task.
        described: bytes of the names and shapes of all tensors, and of its configuration, where it has one of its own.
    """

    parameters: int
    trainable: int
    experts: int
    bytes: int
    router_bytes: int = 0
    kind: str | None = None
    coefficients: int = 0
    router_widths: tuple[int, ...] = ()
    router_inputs: int = 0
    mlps: int = 0
    attentions: int = 0
    first: int = 0
    passes: float = 1.0
    head_bytes: int = 0
    input_bytes: int = 0
    described: int = 0

    @property
    def banks(self) -> tuple[int, int]:
        """Banks of experts of linear layers in MLPs, and in attention."""
        return 2 * self.mlps, 4 * self.attentions

    @property
    def built_bytes(self) -> int:
        """Bytes before the model is given heads and measured."""
        return self.bytes - self.head_bytes - self.input_bytes


@dataclass(frozen=True)
class Heads:
    """The heads that a merged model holds of its tasks.

    Attributes:
        width: D, of the vision tower.
        projection: P, the width of the common space.
        classnames: of each task that has a head.
    """

    width: int
    projection: int
    classnames: Mapping[str, Sequence[str]]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors: projection and logit scale once, and the embeddings of all classes."""
        classes = sum(len(names) for names in self.classnames.values())
        return FLOAT * (self.projection * (self.width + classes) + 1) if self.classnames else 0

    @property
    def text(self) -> int:
        """Bytes of what describes them on disk."""
        names = [name for names in self.classnames.values() for name in names]
        return _DESCRIBED * (2 * len(self.classnames) + 2) + sum(len(json.dumps(name)) + _INDENT for name in names)


def plain_size(geometry: Geometry) -> ModelSize:
    """Return the size of a plain tower in float32.

    Args:
        geometry: its shape.
    """
    return ModelSize(geometry.numbers, 0, 0, FLOAT * geometry.numbers)


def model_size(
    method: Method, config: CLIPVisionConfig, num_tasks: int, *, heads: Heads | None = None, images: int = 0
) -> ModelSize:
    """Return the size of the model that a method makes, from its skeleton.

    Args:
        method: the method.
        config: the tower's configuration.
        num_tasks: N.
        heads: those that the model is given, if it is of a kind that holds some.
        images: of each task, of which it keeps what its routers read, where they end in a layer that reads something.

    Raises:
        ConfigError: if the options do not fit that tower or number of tasks.
    """
    model = method.skeleton(config, num_tasks)
    if model is None:
        return plain_size(vision_geometry(config))
    info = model_info(model)
    if not isinstance(model, MergedCLIPVisionModel) or not model.config.moe:
        size = ModelSize(
            parameters=int(info["all_params"]),
            trainable=int(info["trainable_params"]),
            experts=0,
            bytes=FLOAT * int(info["all_params"]),
            passes=_passes(model),
        )
        return _holding(size, model, heads) if isinstance(model, MergedCLIPVisionModel) else size
    size = _routed_size(model)
    read = num_tasks * len(size.router_widths) * images * size.router_inputs
    return _holding(size, model, heads, FLOAT * read)


def _routed_size(model: MergedCLIPVisionModel) -> ModelSize:
    """Return the size of a model with routed blocks, as it is built."""
    info, blocks = model_info(model), moe_layers(model.vision_model)
    layers = list(blocks.values())
    banks = [linear.experts for layer in layers for linear in layer.linears().values()]
    return ModelSize(
        parameters=int(info["all_params"]),
        trainable=int(info["trainable_params"]),
        experts=sum(p.numel() for bank in banks for p in bank.parameters()),
        bytes=sum(t.numel() * t.element_size() for t in model.own_state().values()),
        router_bytes=sum(p.numel() * p.element_size() for p in router_parameters(model.vision_model)),
        kind=str(banks[0].spec()["kind"]),
        coefficients=layers[0].num_coefficients,
        router_widths=tuple(_kept_by_router(layer.router.spec()) for layer in layers),
        router_inputs=_read_by_routers([layer.router for layer in layers]),
        mlps=sum(isinstance(layer, MoEMLP) for layer in layers),
        attentions=sum(isinstance(layer, MoEAttention) for layer in layers),
        first=min(map(layer_of, blocks)),
    )


def _holding(size: ModelSize, model: MergedCLIPVisionModel, heads: Heads | None, inputs: int = 0) -> ModelSize:
    """Return the size of a merged model with all that it holds beside its tower, and of what describes it on disk."""
    held = heads.bytes if heads is not None else 0
    names = sum(len(name) + _DESCRIBED for name in model.own_state())
    text = names + len(model.config.to_json_string()) + (heads.text if heads is not None else 0)
    return replace(size, bytes=size.bytes + held + inputs, head_bytes=held, input_bytes=inputs, described=text)


def _read_by_routers(routers: Sequence[Router]) -> int:
    last = [router.last_layer() for router in routers]
    widths = [layer.in_features + 1 for layer in last if layer is not None]
    return max(widths) if len(widths) == len(routers) else 0


def _kept_by_router(spec: Mapping[str, Any]) -> int:
    """Return how many numbers a router keeps of one token; its input is not among them, unless it is a copy."""
    if spec["kind"] == "layer_encoded":
        inner = spec["shared"]
        return int(inner.get("width", 0)) + _kept_by_router(inner)
    return int(spec.get("hidden", 0))


def _passes(model: nn.Module) -> float:
    """Return the multiplications of a pass through all linear layers, beside those of the plain ones."""
    if isinstance(model, TowerEnsemble):
        return float(len(model.towers))
    plain = added = 0
    for layer in projection_layers(model).values():
        plain += layer.base.weight.numel()
        added += layer.gate.numel() + layer.top_k * (layer.left[0].numel() + layer.right[0].numel())
    return 1.0 + added / max(1, plain)
