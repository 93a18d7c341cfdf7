"""What a merged model knows of its tasks' images: mean merging coefficients, and what its routers read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import CLIPVisionModel

from fusion_merge.errors import ModelError, nearest
from fusion_merge.models.clip import build_tower, vision_config
from fusion_merge.moe.features import record_last_inputs
from fusion_merge.moe.layer import moe_layers, record_coefficients
from fusion_merge.moe.refit import rows_of

if TYPE_CHECKING:
    from fusion_merge.models.merged import MergedCLIPVisionModel

KEPT_IMAGES = 64
"""The most images of a task whose router inputs are kept; a run measures by as many."""


def task_index(model: MergedCLIPVisionModel, task: str) -> int:
    """Return the place of a task among the merged ones.

    Args:
        model: the model.
        task: its name.

    Raises:
        ModelError: if it was not merged, or if no block of the model is routed by samples.
    """
    check_routed(model)
    if task not in model.config.tasks:
        raise ModelError(f"`{task}` was not merged; {nearest(task, model.config.tasks)}")
    return int(model.config.tasks.index(task))


def check_routed(model: MergedCLIPVisionModel) -> None:
    """Refuse a model whose experts are chosen token by token.

    Args:
        model: the model.

    Raises:
        ModelError: if it is one.
    """
    if model.config.linears:
        raise ModelError(
            f"experts of `{model.config.method}` are chosen for each token: no plain tower does the same for a task, "
            "and no coefficients belong to a whole image; take a method with routed blocks, such as wemoe"
        )


def check_images(model: MergedCLIPVisionModel, images: object, what: str) -> None:
    """Refuse what is no batch of images of the model's size.

    Args:
        model: the model.
        images: what was given for them.
        what: how errors call them.

    Raises:
        ModelError: if it is no tensor (B, channels, height, width).
    """
    config = vision_config(model.config.vision_config, where="the merged model")
    expected = (config.num_channels, config.image_size, config.image_size)
    if not isinstance(images, Tensor) or images.dim() != 4 or tuple(images.shape[1:]) != expected:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ModelError(
            f"{what} are {found}, not a tensor (B, {', '.join(map(str, expected))}) of preprocessed images"
        )


@torch.no_grad()
def measure(model: MergedCLIPVisionModel, task: str, batches: Iterable[Tensor]) -> Tensor:
    """See `MergedCLIPVisionModel.measure`."""
    index = task_index(model, task)
    blocks = moe_layers(model.vision_model)
    readable = all(block.router.last_layer() is not None for block in blocks.values())
    with record_coefficients(model.vision_model) as record, record_last_inputs(blocks if readable else {}) as inputs:
        for pixels in batches:
            model(pixels.to(model.device, model.dtype))
    if not all(record.values()):
        raise ModelError(f"there is no image of `{task}` to measure by; give at least one batch")
    means = torch.stack([torch.cat(values).mean(dim=0) for values in record.values()])  # (L, K)
    model.task_coefficients[index] = means.to(model.task_coefficients)
    if readable:
        kept = torch.stack([torch.cat(values)[:KEPT_IMAGES] for values in inputs.values()])  # (L, M, F + 1)
        here = kept.to(model.task_coefficients.device)
        model.task_inputs = _with_inputs(model.task_inputs, here, index, len(model.config.tasks))
    if task not in model.config.measured_tasks:
        model.config.measured_tasks.append(task)
    return means


def _with_inputs(known: Tensor | None, one: Tensor, index: int, num_tasks: int) -> Tensor:
    """Return the inputs of all tasks (N, L, M, F + 1) with those of one task replaced; rows of zeros are no images."""
    images = max(one.shape[1], 0 if known is None else known.shape[2])
    shape = (num_tasks, one.shape[0], images, one.shape[2])
    inputs = one.new_zeros(shape) if known is None else known.new_zeros(shape)
    if known is not None:
        inputs[: known.shape[0], :, : known.shape[2]] = known
    inputs[index] = 0
    inputs[index, :, : one.shape[1]] = one.to(inputs)
    return inputs


def knows_inputs(model: MergedCLIPVisionModel) -> bool:
    """Tell whether the model holds what its routers read of every task's images.

    Args:
        model: the model.
    """
    inputs = model.task_inputs
    return inputs is not None and bool((inputs[:, 0, :, -1].sum(dim=1) > 0).all())


@torch.no_grad()
def kept_coefficients(model: MergedCLIPVisionModel) -> list[Tensor]:
    """Return, for each block, the merging coefficients of the images whose router inputs are kept.

    Args:
        model: one that `knows_inputs`.

    Shape:
        → L tensors (N, M, K), in float32 at least; images that are not there have those of an input of zeros.
    """
    inputs = model.task_inputs
    if inputs is None:
        raise ModelError("the model holds no inputs of routers; call `measure(task, batches)` for each task")
    found = []
    for position, block in enumerate(moe_layers(model.vision_model).values()):
        rows = rows_of(block.router)
        exact = torch.promote_types(torch.promote_types(inputs.dtype, rows.dtype), torch.float32)
        values = inputs[:, position].to(rows.device, exact) @ rows.to(exact).T  # (N, M, K)
        found.append(block.selection(values.flatten(0, 1)).view_as(values))
    return found


@torch.no_grad()
def task_model(model: MergedCLIPVisionModel, task: str) -> CLIPVisionModel:
    """See `MergedCLIPVisionModel.task_model`."""
    index = task_index(model, task)
    if task not in model.config.measured_tasks:
        raise ModelError(f"the mean coefficients of `{task}` are not known; call `measure({task!r}, batches)`")
    layers = moe_layers(model.vision_model)
    state = {
        name: tensor
        for name, tensor in model.vision_model.state_dict().items()
        if not name.startswith(tuple(f"{layer}." for layer in layers))
    }
    for position, (name, layer) in enumerate(layers.items()):
        mean = model.task_coefficients[index, position, : layer.num_coefficients].unsqueeze(0)  # (1, K)
        for part, linear in layer.linears().items():
            delta = linear.experts.delta(mean.to(linear.base.weight.dtype))
            state[f"{name}.{part}.weight"] = linear.base.weight + delta.weight[0]
            state[f"{name}.{part}.bias"] = linear.base.bias + delta.bias[0]
    config = vision_config(model.config.vision_config, where="the merged model")
    tower = build_tower(config, {n: t.cpu() for n, t in state.items()}, where=f"the tower of `{task}`")
    return tower.to(model.device, model.dtype).requires_grad_(False).eval()  # type: ignore[arg-type]
