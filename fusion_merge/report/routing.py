"""How a routed model weighs its experts on each task's images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion_merge.models.clip import pooled_output
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.moe import moe_layers, record_coefficients
from fusion_merge.moe.blocks import layer_of
from fusion_merge.pools.loaders import Placement, evaluation_loader
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool


def block_names(model: MergedCLIPVisionModel) -> list[str]:
    """Return what pictures call a model's routed blocks: the numbers of their layers, and `attn` where it is attention.

    Args:
        model: a routed model.
    """
    blocks = moe_layers(model.vision_model)
    return [f"{layer_of(name)}{' attn' if block.kind == 'attention' else ''}" for name, block in blocks.items()]


@torch.no_grad()
def routing_records(
    model: MergedCLIPVisionModel,
    taskpool: CLIPVisionModelTaskPool,
    *,
    placement: Placement,
    images: int = 128,
) -> dict[str, list[Tensor]]:
    """Return the merging coefficients that each image of each task gets, layer by layer.

    Args:
        model: a routed model.
        taskpool: the tasks whose images are routed.
        placement: where to compute.
        images: at most this many images a task.

    Shape:
        for each task → L tensors (B, K) under sample routing; under batch routing one row a batch.
    """
    records: dict[str, list[Tensor]] = {}
    dtype = next(model.parameters()).dtype
    for name in taskpool.task_names:
        loader = evaluation_loader(
            taskpool.images(name),
            min(images, 64),
            workers=0,
            placement=Placement(placement.device),
            limit=images,
            replace=True,
        )
        with record_coefficients(model) as record:
            for pixels, _ in loader:
                with placement.autocast():
                    pooled_output(model(pixels.to(placement.device, dtype)))
        records[name] = [torch.cat(values) for values in record.values()]
    return records


def mean_weights(records: Mapping[str, list[Tensor]], num_tasks: int) -> dict[str, Tensor]:
    """Return the mean merging coefficient that each task's images give to each task's experts, layer by layer.

    A bank with several experts a task (low rank) gives their mean.

    Args:
        records: what `routing_records` returned.
        num_tasks: N, how many tasks were merged.

    Shape:
        for each task → (L, N).
    """
    return {
        name: torch.stack([layer.mean(dim=0).view(num_tasks, -1).mean(dim=1) for layer in layers])
        for name, layers in records.items()
    }


def first_choices(records: Mapping[str, list[Tensor]], num_tasks: int) -> dict[str, Tensor]:
    r"""Return the share of each task's images whose largest coefficient is one of each task's experts, layer by layer.

    Where several are equally large, they share the image.

    .. math:: C_{t, l, n} = \frac{1}{B_t} \sum_{x \in t} \big[\operatorname{task}(\arg\max_k g_{l,k}(x)) = n\big]

    Args:
        records: what `routing_records` returned under sample routing.
        num_tasks: N, how many tasks were merged.

    Shape:
        for each task → (L, N); each row sums to 1.
    """
    chosen = {}
    for name, layers in records.items():
        largest = [(layer == layer.amax(dim=1, keepdim=True)).double() for layer in layers]  # (B, K)
        shares = [hits / hits.sum(dim=1, keepdim=True) for hits in largest]
        chosen[name] = torch.stack([s.view(len(s), num_tasks, -1).sum(dim=2).mean(dim=0) for s in shares])  # (L, N)
    return chosen


def routing_weights(
    model: MergedCLIPVisionModel,
    taskpool: CLIPVisionModelTaskPool,
    *,
    placement: Placement,
    images: int = 128,
) -> dict[str, Tensor]:
    """Return `mean_weights` of a model's `routing_records`.

    Args:
        model: a routed model.
        taskpool: the tasks whose images are routed.
        placement: where to compute.
        images: at most this many images a task.

    Shape:
        for each task → (L, N).
    """
    records = routing_records(model, taskpool, placement=placement, images=images)
    return mean_weights(records, len(model.config.tasks))
