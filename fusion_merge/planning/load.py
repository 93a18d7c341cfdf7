"""From a run's parts to what its memory and time depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from fusion_merge.adaptation.checkpoint import images_read
from fusion_merge.errors import FusionMergeError
from fusion_merge.methods.adamerging_base import AdaMergingMethod
from fusion_merge.methods.base import Method
from fusion_merge.methods.clip_finetune import CLIPFinetuneAlgorithm
from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.methods.regmean import RegMeanAlgorithm
from fusion_merge.methods.static_base import StaticMethod
from fusion_merge.models.measuring import KEPT_IMAGES
from fusion_merge.planning.geometry import (
    FLOAT,
    Geometry,
    Heads,
    model_size,
    plain_size,
    text_geometry,
    vision_geometry,
)
from fusion_merge.planning.machine import resident_now
from fusion_merge.planning.needs import Images, Load, Static, Training
from fusion_merge.planning.problems import Problems
from fusion_merge.pools.heads import prompts_of
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool

_LONGEST = 16  # of each task's prompts: so many of the longest are tokenized


@dataclass(frozen=True)
class Parts:
    """What a run is made of, as far as it could be made.

    Attributes:
        method: the method.
        modelpool: the models.
        taskpool: the tasks that are scored, if there are any.
        pools: for each task that is trained on, the pool of its images.
        device: where it will compute.
        processes: that compute together.
        runs: how often it adapts and scores.
    """

    method: Method
    modelpool: CLIPVisionModelPool
    taskpool: CLIPVisionModelTaskPool | None
    pools: Mapping[str, CLIPVisionModelTaskPool]
    device: torch.device
    processes: int = 1
    runs: int = 1


def make_load(parts: Parts, config: Mapping[str, Any], problems: Problems) -> Load:
    """Return what memory and time depend on.

    Args:
        parts: what the run is made of.
        config: the resolved configuration.
        problems: where problems of single tasks go.

    Raises:
        FusionMergeError: if the pretrained model's configuration or the method's options do not hold together.
    """
    method, modelpool, taskpool = parts.method, parts.modelpool, parts.taskpool
    base = resident_now()
    tower = vision_geometry(modelpool.config())
    adapted = _images(parts.pools, tower)
    size = plain_size(tower)
    if modelpool.model_names:
        held: dict[str, Any] = {"heads": _heads(parts), "images": _kept_images(method, adapted)}
        size = model_size(method, modelpool.config(), len(modelpool.model_names), **held)
    names = taskpool.task_names if taskpool is not None else []
    scored = _images({name: taskpool for name in names if taskpool is not None}, tower)
    if isinstance(method, CLIPFinetuneAlgorithm):
        scored = {name: images for name, images in scored.items() if name in adapted}
    pools = list(dict.fromkeys([*parts.pools.values(), *([taskpool] if taskpool is not None else [])]))
    counts, text = _prompts(pools), None
    with problems.noted():
        text = _text(pools, [*adapted, *scored])
    routings = _routings(method, config)
    return Load(
        tower=tower,
        model=size,
        num_models=len(modelpool.model_names) if method.min_models else 0,
        base=base,
        clip=text,
        prompts=max(counts, default=0),
        all_prompts=sum(counts),
        adapted=adapted,
        scored=scored,
        start_images=_start_images(method),
        training=_training(method, len(adapted)) if adapted else None,
        static=_static(method, len(modelpool.model_names)),
        evaluation_batch=taskpool.batch_size if taskpool is not None and scored else 0,
        scorings=len(routings),
        batch_routing="batch" in routings,
        baselines=_baselines(method, modelpool, config) if scored else (),
        number=FLOAT if getattr(method, "expert_dtype", "float32") == "float32" else 2,
        saves=bool(config.get("merged_model_save_path")),
        gpu=parts.device.type == "cuda",
        mapped=_mapped(modelpool),
        held=_held(method, tower, len(modelpool.model_names)),
    )


def _heads(parts: Parts) -> Heads | None:
    """Return the heads that a merged model is given: those of merged tasks that are scored; None without any."""
    pool = parts.taskpool
    config: Any = pool.clip_config() if pool is not None else None
    if pool is None or config is None:  # only making the CLIP model would tell its shape
        return None
    classnames = {}
    for name in parts.modelpool.model_names:
        if name not in pool.task_names:
            continue
        with suppress(FusionMergeError):  # noted before
            classnames[name] = pool.task(name).classnames
    return Heads(config.vision_config.hidden_size, config.projection_dim, classnames)


def _kept_images(method: Method, adapted: Mapping[str, Images]) -> int:
    """Return of how many images of each task the model keeps what its routers read: after adaptation, or as loaded."""
    if not isinstance(method, MoEMethod):
        return 0
    if method.checkpoint:
        try:
            return images_read(str(method.checkpoint))
        except FusionMergeError:  # noted before
            return 0
    return max((min(images.count, KEPT_IMAGES) for images in adapted.values()), default=0)


def steps_of(method: Method, tasks: int) -> int:
    """Return how many steps of training a method takes.

    Args:
        method: the method.
        tasks: that it trains on.
    """
    steps = int(getattr(method, "max_steps", 0))
    steps = min(1, steps) if getattr(method, "fast_dev_run", False) else steps
    return steps * tasks if isinstance(method, CLIPFinetuneAlgorithm) else steps


def _images(pools: Mapping[str, CLIPVisionModelTaskPool], tower: Geometry) -> dict[str, Images]:
    """Return the images of each task that can be opened."""
    found = {}
    for name, pool in pools.items():
        try:
            count = len(pool.task(name))
        except FusionMergeError:  # noted before
            continue
        used = min(count, pool.batch_size) if pool.fast_dev_run else count
        found[name] = Images(count, FLOAT * tower.inputs, used, len(pool.task(name).classnames))
    return found


def _start_images(method: Method) -> int:
    if not isinstance(method, MoEMethod) or method.router_start != "ridge" or method.checkpoint:
        return 0
    return method.start_images


def _training(method: Method, tasks: int) -> Training | None:
    if isinstance(method, CLIPFinetuneAlgorithm):
        return Training(method.batch_size, state=3, whole=True)
    steps = steps_of(method, tasks)
    if not isinstance(method, AdaMergingMethod | MoEMethod) or not steps:
        return None
    alive = 1 if method.use_grad_accumulate and not method.mixed_tasks else tasks
    common: dict[str, Any] = {
        "tasks": alive,
        "together": tasks if method.mixed_tasks else 1,
        "batches": tasks,
        "asked": steps * method.batch_size if method.asks_experts else 0,
    }
    if isinstance(method, AdaMergingMethod):
        merges = 1 if method.mixed_tasks else alive  # each pass has one of its own
        return Training(method.batch_size, state=1 + merges, whole=True, vectors=tasks, **common)
    return Training(
        method.batch_size,
        batch_routing=method.batch_reduce,
        state=(2 if method.optimizer == "sgd" else 4) + (tasks if method.guard == "rollback" else 0),
        **common,
    )


def _held(method: Method, tower: Geometry, num_models: int) -> int:
    """Return the bytes that an adaptation holds beside the model: all task vectors, and the pretrained tower."""
    return FLOAT * tower.numbers * (num_models + 1) if isinstance(method, AdaMergingMethod) else 0


def _static(method: Method, tasks: int) -> Static | None:
    if not isinstance(method, StaticMethod):
        return None
    decompositions = method.decompositions(tasks)
    if isinstance(method, RegMeanAlgorithm):
        return Static(method.readings, decompositions, method.num_regmean_examples, method.loading["batch_size"])
    return Static(method.readings, decompositions)


def _routings(method: Method, config: Mapping[str, Any]) -> set[str]:
    """Return the routings that the model is scored under, its own among them."""
    own = "batch" if getattr(method, "inference_batch_reduce", False) else "sample"
    return {own, *(config.get("evaluate_routings") or ())}


def _baselines(method: Method, modelpool: CLIPVisionModelPool, config: Mapping[str, Any]) -> tuple[str, ...]:
    several = len(modelpool.model_names) > 1
    return tuple(b for b in config["baselines"] if b != method.method_name and (several or b == "zero_shot"))


def _prompts(pools: Sequence[CLIPVisionModelTaskPool]) -> list[int]:
    """Return how many prompts each head has that is made."""
    counts = []
    for pool in pools:
        for name in pool.task_names:
            try:
                task = pool.task(name)
            except FusionMergeError:  # noted before
                continue
            counts.append(len(task.classnames) * len(task.templates))
    return counts


def _text(pools: Sequence[CLIPVisionModelTaskPool], tasks: Sequence[str]) -> Geometry | None:
    """Return the shape of what makes the heads, at the longest prompt."""
    config = pools[0].clip_config() if pools else None
    if config is None or not hasattr(config, "text_config"):
        return None
    prompts: list[str] = []
    for pool in pools:
        for name in pool.task_names:
            if name in tasks:
                task = pool.task(name)
                every = sorted(prompts_of(task.classnames, task.templates), key=len)
                prompts += every[-_LONGEST:]
    if not prompts:  # no task can be opened
        return None
    tokens = pools[0].processor.tokenizer(text=prompts, padding=True, return_tensors="pt")["input_ids"].shape[1]
    return text_geometry(config, int(tokens))


def _mapped(modelpool: CLIPVisionModelPool) -> int:
    """Return the bytes of torch files, which are mapped into memory, or read, and stay there."""
    files = {file for name in (PRETRAINED, *modelpool.model_names) for file in modelpool.files(name)}
    return sum(file.stat().st_size for file in files if file.suffix != ".safetensors")
