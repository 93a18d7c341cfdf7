"""From task pools to what adaptation reads: endless batches of each task's images, from where it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from fusion_merge.adaptation.experts import ExpertLogits
from fusion_merge.adaptation.passes import TaskStream
from fusion_merge.adaptation.progress import Progress
from fusion_merge.adaptation.runtime import Fabric, placement_of
from fusion_merge.pools.batches import LoadedBatches
from fusion_merge.pools.loaders import EndlessBatches, adaptation_loader, fitting_workers
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool


def task_streams(
    pools: Mapping[str, CLIPVisionModelTaskPool],
    fabric: Fabric,
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
    start: int = 0,
    max_steps: int = 0,
    load_expert: Callable[[str], nn.Module] | None = None,
) -> dict[str, TaskStream]:
    """Return the stream of each task.

    Args:
        pools: for each task, the pool that has its images and head.
        fabric: where they go, and which share of them this process takes.
        batch_size: images of each task a step.
        seed: of the image order; each task has another.
        num_workers: the most worker processes a task; sized to the machine.
        start: the step to begin at.
        max_steps: the step to end at; an expert is asked about the images until then.
        load_expert: gives a task's own expert, where it may be asked.
    """
    placement = placement_of(fabric)
    workers = fitting_workers(num_workers, len(pools))
    streams = {}
    for index, (name, pool) in enumerate(pools.items()):
        images, head, order = pool.images(name), pool.head(name).to(fabric.device), seed * 1009 + index
        share = {"rank": placement.rank, "world_size": placement.world_size}
        sampler = EndlessBatches(len(images), batch_size, order, **share)
        expert = None
        if load_expert is not None:
            needed, load = range(start * batch_size, max_steps * batch_size), partial(load_expert, name)
            seen = chain.from_iterable(sampler)
            expert = ExpertLogits(load, head, images, seen, needed, fabric=fabric, workers=workers)
        loader = adaptation_loader(
            images, batch_size, order, workers=workers, placement=placement, start=start, positions=True
        )
        streams[name] = TaskStream(iter(loader), head, len(pool.task(name).classnames), expert)
    return streams


def close_streams(streams: Mapping[str, TaskStream]) -> None:
    """End the worker processes that read images, whatever still refers to them, such as the traceback of an error.

    Args:
        streams: what `task_streams` returned.
    """
    for stream in streams.values():
        if isinstance(stream.batches, LoadedBatches):
            stream.batches.close()


def open_progress(
    folder: str,
    name: str,
    belongs_to: Mapping[str, Any],
    pools: Mapping[str, CLIPVisionModelTaskPool],
    fabric: Fabric,
    *,
    save_every: int,
    resume: bool,
) -> Progress:
    """Return where the state of one adaptation is kept: its file is named after all that it depends on.

    Images, processors and heads are known by their content, wherever they come from; of a dataset that is too large
    for memory, 16 images are looked at.

    Args:
        folder: where the file is.
        name: what the file's name begins with.
        belongs_to: the model and the options that the adaptation depends on, as plain values.
        pools: for each task, the pool that has its images.
        fabric: where it is computed.
        save_every: steps between two savings.
        resume: go on from the file, if it is there.

    Raises:
        CheckpointError: if there is a file to go on from, and it cannot be read or does not fit.
    """
    whole = {
        **belongs_to,
        "images": {task: pool.images(task).fingerprint() for task, pool in pools.items()},
        "heads": {task: pool.head_fingerprint(task) for task, pool in pools.items()},
        "processes": fabric.world_size,
        "precision": str(fabric.strategy.precision.precision),
    }
    key = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]
    return Progress(Path(folder).expanduser() / f"{name}-{key}.progress", whole, save_every, resume=resume)
