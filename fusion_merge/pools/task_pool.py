"""Task pools: what a merged model is scored on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from tqdm.auto import tqdm
from transformers import CLIPModel

from fusion_merge.errors import ConfigError, DataError, ModelError, nearest
from fusion_merge.models.clip import (
    Processor,
    check_whole_clip,
    load_clip,
    load_processor,
    pooled_output,
    split_processor,
)
from fusion_merge.models.sources import find_files, split_source
from fusion_merge.models.task_models import TaskModels
from fusion_merge.pools.datasets import ImageTask, make_task
from fusion_merge.pools.heads import ZeroShotHead, zero_shot_head
from fusion_merge.pools.loaders import Placement, TaskImages, evaluation_loader, fitting_workers

RESERVED = ("average", "baselines", "model_info", "run")
"""Names that a report uses for itself: no task may have them."""

Report = dict[str, Any]


class TaskPool(ABC):
    """What a merged model is scored on."""

    @abstractmethod
    def evaluate(self, model: nn.Module | TaskModels, **options: Any) -> Report:
        """Score a model.

        Args:
            model: what to score.
            **options: what the concrete pool takes.
        """


@final
class DummyTaskPool(TaskPool):
    """Scores nothing: reports the size of the model alone."""

    def evaluate(self, model: nn.Module | TaskModels, **options: Any) -> Report:
        """See `TaskPool.evaluate`."""
        return {} if isinstance(model, TaskModels) else {"model_info": model_info(model)}


@final
class CLIPVisionModelTaskPool(TaskPool):
    """Scores a CLIP vision tower on classification tasks, each with its frozen zero-shot head.

    Args:
        tasks: for each task, a dataset or a mapping as `make_task` takes it.
        test_datasets: the same under the name that fusion_bench uses; give one of the two.
        clip_model: the CLIP model whose text tower and visual projection make the heads: a folder, a hub id, or a
            `CLIPModel`. By default the `_pretrained_` model of the model pool.
        base_model: the same under the name that fusion_bench uses.
        processor: its processor: a folder, a hub id, or a `CLIPProcessor`. By default that of `clip_model`.
        batch_size: images a batch, at least 1.
        num_workers: the most worker processes that read images; sized to the machine.
        dataloader_kwargs: `batch_size` and `num_workers` under the names that fusion_bench uses.
        fast_dev_run: score one batch a task, to try things out.
        split: the split to take of data that have several, where a task names none; by default `test`.

    Raises:
        ConfigError: if an option is out of range.
        DataError: if a task is not usable; see `make_task`.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any] | None = None,
        *,
        test_datasets: Mapping[str, Any] | None = None,
        clip_model: str | CLIPModel | None = None,
        base_model: str | None = None,
        processor: Any = None,
        batch_size: int = 128,
        num_workers: int = 8,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        fast_dev_run: bool = False,
        split: str | None = None,
    ) -> None:
        specs = dict(tasks or {}) | dict(test_datasets or {})
        if not specs:
            raise DataError("the task pool has no tasks; give `tasks={name: {data: …}}`, or take `taskpool=dummy`")
        for name in specs:
            if name in RESERVED:
                raise DataError(f"a task cannot be called `{name}`: the report needs that name; choose another")
        self.batch_size, self.num_workers = _loader_options(batch_size, num_workers, dataloader_kwargs or {})
        self.fast_dev_run = fast_dev_run
        self.split = split
        self._clip_source = clip_model or base_model
        self._processor_source = processor
        self.specs = specs
        self._tasks: dict[str, ImageTask] = {}
        self._images: dict[str, TaskImages] = {}
        self._heads: dict[str, ZeroShotHead] = {}

    @property
    def task_names(self) -> list[str]:
        """The tasks, in order."""
        return list(self.specs)

    def use_pretrained(self, clip_model: Any, processor: Any = None) -> None:
        """Take head and processor from here where the pool was not told of any.

        Args:
            clip_model: a folder, a hub id, or a `CLIPModel`.
            processor: a folder, a hub id, or a `CLIPProcessor`; by default that of `clip_model`.
        """
        if self._clip_source is None:
            self._clip_source = clip_model
        if self._processor_source is None:
            self._processor_source = processor

    def task(self, name: str) -> ImageTask:
        """Return a task; its data are opened once.

        Args:
            name: one of `task_names`.

        Raises:
            DataError: if the name is unknown or the data are not usable.
        """
        if name not in self.specs:
            raise DataError(f"task `{name}` is not in the task pool; {nearest(name, self.specs)}")
        if name not in self._tasks:
            self._tasks[name] = make_task(name, self.specs[name], split=self.split)
        return self._tasks[name]

    def images(self, name: str) -> TaskImages:
        """Return a task's preprocessed images; small ones are preprocessed once.

        Args:
            name: one of `task_names`.
        """
        if name not in self._images:
            self._images[name] = TaskImages(self.task(name), self.processor.preprocess)
        return self._images[name]

    def head(self, name: str) -> ZeroShotHead:
        """Return a task's zero-shot head; it is computed once.

        Args:
            name: one of `task_names`.
        """
        if name not in self._heads:
            self._heads[name] = zero_shot_head(self.clip_model, self.processor.tokenizer, self.task(name))
        return self._heads[name]

    @cached_property
    def clip_model(self) -> CLIPModel:
        """The CLIP model that makes the heads."""
        source = self._clip_source
        if isinstance(source, CLIPModel):
            return source
        if not isinstance(source, str):
            raise ModelError(
                "the task pool knows no CLIP model with a text tower for its heads; "
                "give `clip_model` as a folder or hub id"
            )
        check_whole_clip(find_files(source).config, where=f"`{source}`")
        path, revision = split_source(source)
        return load_clip(path, where=f"`{source}`", **({"revision": revision} if revision else {}))

    @cached_property
    def processor(self) -> Processor:
        """The processor of images and prompts."""
        source = self._processor_source if self._processor_source is not None else self._clip_source
        if not isinstance(source, str):
            return split_processor(source)
        path, revision = split_source(source)
        return load_processor(path, where=f"`{source}`", **({"revision": revision} if revision else {}))

    def check(self) -> None:
        """Open every task's data and the processor, so that what is wrong is said before any weight is read.

        Raises:
            FusionMergeError: if data, processor or CLIP model are not usable.
        """
        for name in tqdm(self.task_names, desc="opening datasets", leave=False, disable=None):
            self.task(name)
        if isinstance(self._clip_source, str):
            check_whole_clip(find_files(self._clip_source).config, where=f"`{self._clip_source}`")
        self.processor  # noqa: B018 (read once, and kept)

    def evaluate(
        self,
        model: nn.Module | TaskModels,
        *,
        placement: Placement | None = None,
        tasks: Sequence[str] | None = None,
        label: str = "evaluating",
        **options: Any,
    ) -> Report:
        """Score a model on every task.

        Args:
            model: a vision tower of any kind, or one tower a task.
            placement: where to compute and which share of the images; by default where the model is, all of them.
            tasks: which tasks; by default all of the pool.
            label: what the progress bar says.
            **options: nothing else.

        Returns:
            `model_info` (for a single model), for each task `accuracy` (share of 0-1) and `loss` (mean
            cross-entropy), and their `average`.
        """
        if options:
            raise ConfigError(f"`{next(iter(options))}` is not an option of the task pool's evaluation")
        report: Report = {} if isinstance(model, TaskModels) else {"model_info": model_info(model)}
        names = list(tasks) if tasks is not None else self.task_names
        for name in (bar := tqdm(names, desc=label, unit="task", disable=None)):
            bar.set_postfix_str(name)
            tower = model[name] if isinstance(model, TaskModels) else model
            report[name] = self._score(tower, name, placement or Placement(_device(tower)))
        scores = [report[name] for name in names]
        if scores:
            report["average"] = {k: sum(s[k] for s in scores) / len(scores) for k in ("accuracy", "loss")}
        return report

    @torch.no_grad()  # not inference mode: images and heads made here are adapted on later
    def _score(self, tower: nn.Module, name: str, placement: Placement) -> dict[str, float]:
        tower = tower.to(placement.device).eval()
        head = self.head(name).to(placement.device)
        classes = len(self.task(name).classnames)
        accuracy = MulticlassAccuracy(max(classes, 2), average="micro").to(placement.device)
        loss = MeanMetric().to(placement.device)
        loader = evaluation_loader(
            self.images(name),
            self.batch_size,
            workers=fitting_workers(self.num_workers, 1),
            placement=placement,
            limit=self.batch_size if self.fast_dev_run else None,
        )
        dtype = next((p.dtype for p in tower.parameters()), torch.float32)
        for pixels, labels in loader:
            labels = labels.to(placement.device)
            with placement.autocast():
                logits = head(pooled_output(tower(pixels.to(placement.device, dtype)))).float()  # (B, C)
            accuracy.update(logits.argmax(dim=-1), labels)
            loss.update(F.cross_entropy(logits, labels, reduction="none"))
        return {"accuracy": accuracy.compute().item(), "loss": loss.compute().item()}


def _loader_options(batch_size: Any, num_workers: Any, more: Mapping[str, Any]) -> tuple[int, int]:
    """Return batch size and number of workers; fusion_bench's further options may say what is done anyway."""
    fixed = {"pin_memory": (True, False), "drop_last": (False,), "shuffle": (False,)}
    options = {"batch_size": batch_size, "num_workers": num_workers, **more}
    known = ("batch_size", "num_workers", *fixed)
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"`{key}` is not an option of `dataloader_kwargs`; {nearest(key, known)}")
        if key in fixed and value not in fixed[key]:
            raise ConfigError(f"`{key}`={value!r} is not possible: each image is scored once, in order")
    for key, least in (("batch_size", 1), ("num_workers", 0)):
        if type(options[key]) is not int or options[key] < least:
            raise ConfigError(f"`{key}`={options[key]!r} of the task pool is not a whole number of at least {least}")
    return options["batch_size"], options["num_workers"]


def model_info(model: nn.Module) -> dict[str, float]:
    """Return how many parameters a model has and trains; a shared one counts once.

    Args:
        model: any module.
    """
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return {
        "trainable_params": trainable,
        "all_params": total,
        "trainable_percentage": trainable / total if total else 0.0,
    }


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
