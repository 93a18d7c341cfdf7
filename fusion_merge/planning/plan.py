"""The plan of a run: what it does, what it needs, how long it takes, and what is wrong, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fusion_merge.methods.clip_finetune import CLIPFinetuneAlgorithm
from fusion_merge.planning.disk import Writing, writings
from fusion_merge.planning.duration import REPEATED, times
from fusion_merge.planning.geometry import FLOAT, ModelSize
from fusion_merge.planning.load import Parts, make_load, steps_of
from fusion_merge.planning.machine import available_memory, measure_speed
from fusion_merge.planning.memory import Phase, memory_phases
from fusion_merge.planning.needs import Load
from fusion_merge.planning.problems import Problems
from fusion_merge.pools.datasets import ImageTask
from fusion_merge.pools.loaders import fitting_workers
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool

_WORKER = 60 * 10**6
"""Bytes that a loader process changes of the memory that it shares, and so has for itself."""


@dataclass
class Plan:
    """What a run needs; parts that could not be told because of a problem are empty.

    Attributes:
        method: its name.
        device: where it computes.
        processes: that compute together.
        runs: how often it adapts and scores: a protocol may do so more than once.
        tasks: for each task, `classes`, `scored`, `scored_on`, `adapted`, `adapted_on`, `model`; those that are known.
        model: the size of the finished model.
        phases: of memory.
        workers_bytes: what loader processes take beside the process itself.
        available: bytes of memory that are free, on the host and on the device; None where that is not known.
        writings: what is written, and where.
        seconds: of each phase.
        problems: why the run cannot start.
        warnings: what it may fail for.
    """

    method: str
    device: str
    processes: int = 1
    runs: int = 1
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: ModelSize | None = None
    phases: list[Phase] = field(default_factory=list)
    workers_bytes: int = 0
    available: dict[str, int | None] = field(default_factory=dict)
    writings: list[Writing] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes in the process at the peak of all phases."""
        return max((p.host_bytes for p in self.phases), default=0)

    @property
    def device_peak(self) -> int:
        """Bytes on the GPU at the peak of all phases."""
        return max((p.device_bytes for p in self.phases), default=0)


def make_plan(parts: Parts, config: Mapping[str, Any], output_dir: Path, problems: Problems) -> Plan:
    """Return the plan of a run from configurations and file headers alone.

    Args:
        parts: what it is made of.
        config: the resolved configuration.
        output_dir: where reports go.
        problems: what is wrong already; what is found here is added.
    """
    plan = Plan(parts.method.method_name, str(parts.device), parts.processes, parts.runs)
    plan.tasks = _tasks(parts, problems)
    with problems.noted():
        load = make_load(parts, config, problems)
        plan.model = load.model
        plan.phases = memory_phases(load)
        plan.writings = writings(parts, load, config, output_dir, len(plan.tasks))
        plan.workers_bytes = _workers_bytes(parts, load)
        plan.seconds = _seconds(parts, load, problems)
    plan.available["host"] = available_memory(torch.device("cpu"))
    if parts.device.type == "cuda":
        plan.available["device"] = available_memory(parts.device)
    plan.problems, plan.warnings = list(problems), _warnings(plan)
    return plan


def _tasks(parts: Parts, problems: Problems) -> dict[str, dict[str, Any]]:
    """Return what is known of each task; what is wrong with one was noted before."""
    scored = parts.taskpool.task_names if parts.taskpool is not None else []
    known = parts.modelpool.model_names
    tasks: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys([*known, *parts.pools, *scored]):
        row: dict[str, Any] = {"model": parts.modelpool.describe(name) if name in known else None}
        for verb, pool in (("adapted", parts.pools.get(name)), ("scored", parts.taskpool if name in scored else None)):
            if pool is None:
                continue
            with problems.noted():
                task = pool.task(name)
                row |= {"classes": len(task.classnames), verb: len(task), f"{verb}_on": _split(pool, name, task)}
        tasks[name] = row
    return tasks


def _split(pool: CLIPVisionModelTaskPool, name: str, task: ImageTask) -> str:
    """Return which split a task's images are: what was found, or else asked for, or else nothing but the data."""
    spec = pool.specs[name]
    asked = spec.get("split") if isinstance(spec, Mapping) else None
    return str(getattr(task, "split", None) or asked or pool.split or getattr(task.data, "split", None) or "all")


def _workers(parts: Parts, load: Load) -> int:
    """Return how many processes read images for evaluation; none where all images are in memory."""
    if parts.taskpool is None or all(images.cached for images in load.scored.values()):
        return 0
    return fitting_workers(parts.taskpool.num_workers, 1)


def _workers_bytes(parts: Parts, load: Load) -> int:
    """Return what loader processes take: each prepares two batches ahead."""
    evaluating = _workers(parts, load) * (_WORKER + 2 * FLOAT * load.evaluation_batch * load.tower.inputs)
    large = [name for name, images in load.adapted.items() if not images.cached]
    if load.training is None or not large:
        return evaluating
    each = fitting_workers(getattr(parts.method, "num_workers", 0), len(load.adapted))
    adapting = len(large) * each * (_WORKER + 2 * FLOAT * load.training.batch_size * load.tower.inputs)
    return evaluating + adapting  # those of adaptation live as long as its batches are asked for


def _seconds(parts: Parts, load: Load, problems: Problems) -> dict[str, float]:
    """Return the seconds of each phase, by a measurement of this machine."""
    pool = parts.taskpool or next(iter(parts.pools.values()), None)
    preprocess = None
    if pool is not None:
        with problems.noted():
            preprocess = pool.processor.preprocess
    batch = load.training.batch_size if load.training is not None else max(1, load.evaluation_batch)
    speed = measure_speed(load.tower, parts.device, batch, preprocess)
    steps = steps_of(parts.method, len(load.adapted))
    once = times(load, speed, steps=steps, workers=_workers(parts, load), processes=parts.processes)
    return {phase: seconds * (parts.runs if phase in REPEATED else 1) for phase, seconds in once.items()}


def _warnings(plan: Plan) -> list[str]:
    """Return what the run may fail for on this machine as it is now."""
    found = []
    for where, peak in (("host", plan.processes * plan.peak + plan.workers_bytes), ("device", plan.device_peak)):
        free = plan.available.get(where)
        if free is not None and peak > free:
            found.append(
                f"memory: the run needs about {peak / 1e9:.1f} GB at its peak, and {free / 1e9:.1f} GB are free on the "
                f"{where}; {_way_out(plan, where)}"
            )
    disks: dict[int, list[Writing]] = {}
    for writing in plan.writings:
        disks.setdefault(writing.disk, []).append(writing)
    for together in disks.values():
        free, total = together[0].free, sum(w.bytes for w in together)
        if free is not None and total > free:
            places = ", ".join(f"`{w.path}`" for w in together)
            found.append(
                f"disk: {total / 1e9:.1f} GB will be written to {places}, and {free / 1e9:.1f} GB are free there; "
                "make room, or name other places"
            )
    return found


def _way_out(plan: Plan, where: str) -> str:
    """Return what makes the largest phase smaller, where an option does."""
    sizes = {p.name: p.host_bytes if where == "host" else p.device_bytes for p in plan.phases}
    largest = max(sizes, key=sizes.__getitem__)
    smaller = "a smaller `method.batch_size`"
    if plan.method != CLIPFinetuneAlgorithm.method_name:
        smaller = f"`method.use_grad_accumulate=true` and `method.mixed_tasks=false`, or {smaller}"
    options = {
        "starting routers": "a smaller `method.start_images`",
        "adapting": smaller,
        "evaluating": "a smaller `taskpool.batch_size`",
        "baselines": "`baselines=[]`",
    }
    advice = f"try {options[largest]}" if largest in options else "free some memory there"
    return f"the peak is in {largest}: {advice}"
