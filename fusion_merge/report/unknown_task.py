"""Scores of a routed model that is not told the tasks of the images: it has to find them first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from fusion_merge.errors import ConfigError, nearest
from fusion_merge.methods.base import Method
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.models.unknown_task import WAYS, observe
from fusion_merge.pools.loaders import Placement, evaluation_loader, fitting_workers
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool, TaskPool
from fusion_merge.processes import exchange, together

WITHOUT = (None, False)
"""What the option `unknown_task` says where no such scores are wanted."""


def check_unknown_task(config: Mapping[str, Any], method: Method, taskpool: TaskPool) -> None:
    """Check whether and how a model is to be scored without being told the tasks.

    Args:
        config: the resolved configuration.
        method: what makes the model.
        taskpool: what it is scored on.

    Raises:
        ConfigError: if there is no such way, or the model or the task pool are not of the kind that it takes.
    """
    by = config.get("unknown_task")
    if by in WITHOUT:
        return
    if by not in WAYS:
        raise ConfigError(
            f"`unknown_task`={by!r} is no way to find an image's task; {nearest(str(by), WAYS)} or take false"
        )
    if not method.routed:
        raise ConfigError(f"`unknown_task`={by}: `{method.method_name}` makes no routed model; leave it out")
    if getattr(method, "inference_batch_reduce", False):
        raise ConfigError(
            f"`unknown_task`={by} needs coefficients of single images; set `inference_batch_reduce=false`"
        )
    if not isinstance(taskpool, CLIPVisionModelTaskPool):
        raise ConfigError(f"`unknown_task`={by}: this task pool scores nothing; leave it out")
    if by == "agreement" and getattr(method, "router_hidden_layers", None) == 0:
        raise ConfigError(
            "`unknown_task`=agreement needs routers that look at images; choose `router_hidden_layers` 1 or 2, or "
            "`unknown_task`=projection"
        )
    looked = getattr(method, "looks_at_images", True) or getattr(method, "checkpoint", False)
    if by == "agreement" and not looked:
        raise ConfigError(
            "`unknown_task`=agreement compares with coefficients that are measured after adaptation, and with "
            "`max_steps`=0 there is none; take steps, or `unknown_task`=projection"
        )


def give_heads(model: nn.Module | Any, taskpool: TaskPool) -> None:
    """Let a routed model hold the heads of its tasks, where the task pool has them; its embeddings are made anyway.

    Args:
        model: the model; one of another kind holds none.
        taskpool: the tasks.
    """
    if not isinstance(model, MergedCLIPVisionModel) or not isinstance(taskpool, CLIPVisionModelTaskPool):
        return
    tasks = [task for task in model.config.tasks if task in taskpool.task_names]
    model.set_heads({t: taskpool.head(t) for t in tasks}, {t: taskpool.task(t).classnames for t in tasks})


@torch.no_grad()
def unknown_task_scores(
    model: nn.Module | Any, taskpool: TaskPool, config: Mapping[str, Any], placement: Placement
) -> dict[str, Any]:
    """Return what a model scores that has to find the task of each image; nothing where that is not asked for.

    Args:
        model: the model.
        taskpool: the tasks; those that were merged are scored.
        config: the resolved configuration, with `unknown_task`.
        placement: where to compute, and which share of the images.

    Returns:
        `by`, the way; for each merged task, and their `average`, the `accuracy`, for which both the task and the class
        have to be right, and the `task_accuracy`, for which the task has to, both shares of 0-1.
    """
    by = config.get("unknown_task")
    if by in WITHOUT or not isinstance(model, MergedCLIPVisionModel):
        return {}
    if not isinstance(taskpool, CLIPVisionModelTaskPool):
        return {}
    tasks = [task for task in model.config.tasks if task in taskpool.task_names]
    scores: dict[str, Any] = {}
    for task in tqdm(tasks, desc=f"finding tasks by {by}", unit="task", disable=None):
        scores[task] = _scores(model, taskpool, task, str(by), placement)
    if tasks:
        keys = ("accuracy", "task_accuracy")
        scores["average"] = {key: sum(scores[t][key] for t in tasks) / len(tasks) for key in keys}
    return {"by": by, **scores} if tasks else {}


def _scores(
    model: MergedCLIPVisionModel, taskpool: CLIPVisionModelTaskPool, task: str, by: str, placement: Placement
) -> dict[str, float]:
    loader = evaluation_loader(
        taskpool.images(task),
        taskpool.batch_size,
        workers=fitting_workers(taskpool.num_workers, 1),
        placement=placement,
        limit=taskpool.batch_size if taskpool.fast_dev_run else None,
    )
    model = model.to(placement.device).eval()  # type: ignore[arg-type]
    head, index = taskpool.head(task).to(placement.device), model.config.tasks.index(task)
    right = found = count = 0
    with together():
        for pixels, labels in loader:
            with placement.autocast():
                pooled, fits = observe(model, pixels, by)
            own = (fits.argmax(dim=1) == index).to(placement.device)  # (B,)
            hit = head(pooled.float()).argmax(dim=-1) == labels.to(placement.device)  # (B,)
            found, right = found + int(own.sum()), right + int((own & hit).sum())
            count += len(labels)
    right, found, count = (sum(each) for each in zip(*exchange((right, found, count)), strict=True))
    return {"accuracy": right / max(1, count), "task_accuracy": found / max(1, count)}
