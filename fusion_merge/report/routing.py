"""How a routed model weighs its experts on each task's images."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_merge.models.clip import pooled_output
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.moe import record_coefficients
from fusion_merge.pools.loaders import Placement, evaluation_loader
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool


@torch.no_grad()
def routing_weights(
    model: MergedCLIPVisionModel,
    taskpool: CLIPVisionModelTaskPool,
    *,
    placement: Placement,
    images: int = 128,
) -> dict[str, Tensor]:
    """Return the mean merging coefficient that each task's images give to each task's experts, layer by layer.

    A bank with several experts a task (low rank) gives their mean.

    Args:
        model: a routed model.
        taskpool: the tasks whose images are routed.
        placement: where to compute.
        images: at most this many images a task.

    Shape:
        for each task → (L, N).
    """
    weights: dict[str, Tensor] = {}
    num_tasks = len(model.config.tasks)
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
        layers = [torch.cat(values).mean(dim=0).view(num_tasks, -1).mean(dim=1) for values in record.values()]  # (N,)
        weights[name] = torch.stack(layers)  # (L, N)
    return weights
