"""What a model costs: parameters, bytes on disk, and the time of a forward pass."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusion_merge.errors import ModelError
from fusion_merge.models.clip import module_config, pooled_output, save_tower
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.models.task_models import TaskModels
from fusion_merge.pools.loaders import Placement, evaluation_loader
from fusion_merge.pools.scoring import model_info
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool

_TURNS = 5, 101
"""The fewest and the most turns that times are the median of."""

_SECONDS = 3.0
"""After so long, no more turns than the fewest are taken."""


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Attributes:
        trainable: how many parameters were trained.
        stored: how many parameters the model has; several towers add up.
        megabytes: 10⁶ bytes of its files, or of its tensors where it was not saved.
        saved: whether it was saved, so that the bytes are those of files.
    """

    trainable: int
    stored: int
    megabytes: float
    saved: bool


def size_of(
    model: nn.Module | TaskModels,
    folder: Path,
    *,
    keep: bool,
    scores: Mapping[str, float] | None = None,
    command: str = "",
) -> Size:
    """Save a model, and return how large it is.

    Several towers are saved one after the other, each into a folder of its task's name. A module that is no CLIP vision
    tower, such as an ensemble, is not saved: its tensors are counted.

    Args:
        model: the model; not changed, but that a routed one is told what it scores.
        folder: where to save it.
        keep: leave the files there; without, each tower's are removed once they are counted.
        scores: accuracies in 0-1 by task, for a routed model's card.
        command: what made the model, for its card.
    """
    if not isinstance(model, TaskModels):
        return _saved(model, folder, keep=keep, scores=scores or {}, command=command)
    sizes = [_saved(tower, folder / task, keep=keep) for task, tower in model.items()]
    totals = (sum(s.trainable for s in sizes), sum(s.stored for s in sizes), sum(s.megabytes for s in sizes))
    return Size(*totals, saved=all(s.saved for s in sizes))


def _saved(
    model: nn.Module, folder: Path, *, keep: bool, scores: Mapping[str, float] | None = None, command: str = ""
) -> Size:
    info = model_info(model)
    counts = int(info["trainable_params"]), int(info["all_params"])
    if isinstance(model, MergedCLIPVisionModel):
        model.save_pretrained(folder)
        model.add_scores(folder, scores or {}, command)
    elif is_tower(model):
        save_tower(model, folder)
    else:
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
        return Size(*counts, sum(t.numel() * t.element_size() for t in tensors) / 1e6, saved=False)
    megabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    if not keep:
        shutil.rmtree(folder)
    return Size(*counts, megabytes, saved=True)


def is_tower(model: nn.Module) -> bool:
    """Tell whether a module is one CLIP vision tower, routed or plain.

    Args:
        model: any module.
    """
    try:
        module_config(model)
    except ModelError:
        return False
    return True


def sample_images(taskpool: CLIPVisionModelTaskPool, count: int) -> Tensor:
    """Return preprocessed images of a task pool, about as many of each task.

    Args:
        taskpool: the tasks.
        count: how many; fewer where the tasks have fewer.

    Shape:
        (B, 3, height, width).
    """
    names = taskpool.task_names
    share = -(-count // len(names))
    parts = []
    for name in names[: -(-count // share)]:
        images = taskpool.images(name)
        loader = evaluation_loader(images, share, workers=0, placement=Placement(), limit=share, replace=True)
        parts += [pixels for pixels, _ in loader]
    return torch.cat(parts)[:count]  # (B, 3, height, width)


@torch.no_grad()
def inference_cost(
    model: nn.Module | TaskModels, plain: nn.Module, pixels: Tensor, placement: Placement, *, quick: bool = False
) -> float:
    """Return how long a forward pass of a model takes over that of a plain tower: the median of ratios.

    Both take turns in this process, so that what else the machine does slows down both. Of several towers, one a task,
    a single one is timed: an image passes through the one of its task.

    Args:
        model: the model.
        plain: the plain tower.
        pixels: a batch of images.
        placement: where to compute.
        quick: take no more turns than the fewest, to try things out.

    Shape:
        pixels (B, 3, height, width).
    """
    tower = next(iter(model.values())) if isinstance(model, TaskModels) else model
    towers = [m.to(placement.device).eval() for m in (tower, plain)]
    batches = [pixels.to(placement.device, next((p.dtype for p in m.parameters()), torch.float32)) for m in towers]
    for module, batch in zip(towers, batches, strict=True):
        _pass(module, batch, placement)  # warm: the first pass is slower
    ratios: list[float] = []
    start = time.perf_counter()
    fewest, most = _TURNS[0], _TURNS[0] if quick else _TURNS[1]
    while len(ratios) < fewest or (len(ratios) < most and time.perf_counter() - start < _SECONDS):
        own, reference = (_pass(m, b, placement) for m, b in zip(towers, batches, strict=True))
        ratios.append(own / reference)
    return statistics.median(ratios)


def _pass(module: nn.Module, batch: Tensor, placement: Placement) -> float:
    _wait(placement.device)
    start = time.perf_counter()
    with placement.autocast():
        output: Any = pooled_output(module(batch))
    _wait(placement.device)
    del output
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
