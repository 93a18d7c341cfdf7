"""Task pools: what a merged model is scored on."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel

from fusion_merge.errors import ConfigError, DataError, ModelError, nearest, reason
from fusion_merge.models.clip import (
    Processor,
    check_whole_clip,
    load_clip,
    load_processor,
    split_processor,
)
from fusion_merge.models.clip_config import plain_config
from fusion_merge.models.sources import fingerprint
from fusion_merge.models.task_models import TaskModels
from fusion_merge.pools.base import DummyTaskPool as DummyTaskPool
from fusion_merge.pools.base import Report
from fusion_merge.pools.base import TaskPool as TaskPool
from fusion_merge.pools.datasets import ImageTask, make_task
from fusion_merge.pools.heads import ZeroShotHead, prompts_of, zero_shot_head
from fusion_merge.pools.images import OnBadImage
from fusion_merge.pools.loaders import Placement, TaskImages, evaluation_loader, fitting_workers
from fusion_merge.pools.pool_options import (
    bad_image_option,
    clip_source,
    loader_options,
    made_from,
    processor_source,
    task_specs,
)
from fusion_merge.pools.reading import Purpose
from fusion_merge.pools.references import Reference
from fusion_merge.pools.scoring import Counts, count
from fusion_merge.pools.scoring import model_info as model_info
from fusion_merge.pools.specs import with_split
from fusion_merge.processes import together

log = logging.getLogger(__name__)

RESERVED = ("average", "averages", "baselines", "evaluation", "model_info", "routings", "run", "unknown_task")
"""Names that a report uses for itself: no task may have them."""


@final
class CLIPVisionModelTaskPool(TaskPool):
    """Scores a CLIP vision tower on classification tasks, each with its frozen zero-shot head.

    Args:
        tasks: for each task, a dataset or a mapping as `make_task` takes it.
        test_datasets: the same under the name that fusion_bench uses; a task may be in one of the two.
        clip_model: the CLIP model whose text tower and visual projection make the heads: a folder, a hub id, a config
            with `_target_` or `path`, or a `CLIPModel`. By default the `_pretrained_` model of the model pool.
        base_model: the same under the name that fusion_bench uses.
        processor: its processor: a folder, a hub id, a config with `_target_` or `path`, or a `CLIPProcessor`. By
            default that of `clip_model`.
        batch_size: images a batch, at least 1.
        num_workers: the most worker processes that read images; sized to the machine.
        dataloader_kwargs: `batch_size` and `num_workers` under the names that fusion_bench uses.
        fast_dev_run: score one batch a task, to try things out.
        split: the split to take, where a task names none. By default `test`, or else `validation`, or else the only
            one.
        purpose: what the images are for; the model pool makes pools to adapt and to fine-tune on.
        on_bad_image: `error`, or `skip`: an image that cannot be decoded or preprocessed is left out of scores, and
            the next good one takes its place in adaptation. A file that is not there is always an error.

    Raises:
        ConfigError: if an option is out of range.
        DataError: if a task is not usable; see `make_task`.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any] | None = None,
        *,
        test_datasets: Mapping[str, Any] | None = None,
        clip_model: str | Path | Mapping[str, Any] | CLIPModel | None = None,
        base_model: str | Path | Mapping[str, Any] | CLIPModel | None = None,
        processor: Any = None,
        batch_size: int = 128,
        num_workers: int = 8,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        fast_dev_run: bool = False,
        split: str | None = None,
        purpose: Purpose = Purpose.SCORING,
        on_bad_image: str = "error",
    ) -> None:
        specs = task_specs(tasks, test_datasets)
        if not specs:
            raise DataError("the task pool has no tasks; give `tasks={name: {data: …}}`, or take `taskpool=dummy`")
        for name in specs:
            if name in RESERVED:
                raise DataError(f"a task cannot be called `{name}`: the report needs that name; choose another")
        if type(fast_dev_run) is not bool:
            raise ConfigError(f"`fast_dev_run`={fast_dev_run!r} of the task pool is neither true nor false")
        self.batch_size, self.num_workers = loader_options(batch_size, num_workers, dataloader_kwargs or {})
        self.on_bad_image = bad_image_option(on_bad_image, "task pool")
        self.fast_dev_run = fast_dev_run
        self.split = split
        self.purpose = purpose
        self._clip_source = clip_source(clip_model, base_model)
        self._processor_source = processor_source(processor)
        self.specs = specs
        self._tasks: dict[str, ImageTask] = {}
        self._images: dict[str, TaskImages] = {}
        self._heads: dict[str, ZeroShotHead] = {}
        self._origin: CLIPVisionModelTaskPool | None = None
        self._splits: dict[tuple[str, ...], CLIPVisionModelTaskPool] = {}
        self._told: set[str] = set()

    @property
    def task_names(self) -> list[str]:
        """The tasks, in order."""
        return list(self.specs)

    def on_other_images(self, specs: Mapping[str, Any], purpose: Purpose | None = None) -> CLIPVisionModelTaskPool:
        """Return a pool of the same tasks on other images: CLIP model, processor and heads are shared.

        Args:
            specs: the images of some of the tasks, or all, as the constructor takes them; class names and templates
                must be the same.
            purpose: what those images are for; by default the same.
        """
        other = copy.copy(self)
        other._origin, other._splits = self, {}
        other.specs, other._tasks, other._images = dict(specs), {}, {}
        other.purpose = self.purpose if purpose is None else purpose
        return other

    def on_split(self, split: str, names: Sequence[str]) -> CLIPVisionModelTaskPool:
        """Return a pool of some of the tasks on another split of the same data, to adapt on; it is made once.

        Args:
            split: the split.
            names: the tasks.
        """
        key = (split, *names)
        if key not in self._splits:
            specs = {name: with_split(self.specs[name], split) for name in names}
            self._splits[key] = self.on_other_images(specs, Purpose.ADAPTATION)
        return self._splits[key]

    @property
    def clip_source(self) -> Any:
        """Where the CLIP model that makes the heads comes from: a reference, an object, a config, or None."""
        return self._clip_source

    @property
    def processor_source(self) -> Any:
        """Where the processor comes from: a reference, an object or a config; by default where the CLIP model does."""
        return self._processor_source if self._processor_source is not None else self._clip_source

    def use_pretrained(self, clip_model: Any, processor: Any = None) -> None:
        """Take head and processor from here where the pool was not told of any.

        Args:
            clip_model: as in the constructor.
            processor: as in the constructor.
        """
        if self._clip_source is None:
            self._clip_source = clip_source(clip_model, None)
        if self._processor_source is None:
            self._processor_source = processor_source(processor)

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
            self._tasks[name] = make_task(name, self.specs[name], split=self.split, purpose=self.purpose)
        return self._tasks[name]

    def images(self, name: str) -> TaskImages:
        """Return a task's preprocessed images; small ones are preprocessed once.

        Args:
            name: one of `task_names`.
        """
        if name not in self._images:
            images = TaskImages(self.task(name), self.processor.preprocess, on_bad_image=self.on_bad_image)
            self._check_size(images.shape, f"for task `{name}`")
            self._images[name] = images
        return self._images[name]

    def forget_images(self) -> None:
        """Let go of the preprocessed images, those of other splits too."""
        self._images.clear()
        for pool in self._splits.values():
            pool.forget_images()

    def check_processor(self) -> None:
        """Refuse a processor that makes images of another size than the CLIP model takes.

        Raises:
            FusionMergeError: if it does, or cannot be read.
        """
        processor = self.processor
        try:
            black = processor.preprocess(Image.new("RGB", (4, 4)))
        except Exception as error:  # processors raise errors of every kind
            raise DataError(f"the processor cannot preprocess a picture: {reason(error)}; give another") from error
        self._check_size(tuple(black.shape), "of any picture")

    def _check_size(self, found: tuple[int, ...], what: str) -> None:
        clip = self.clip_config()
        if clip is None:
            return
        config: Any = clip.vision_config
        expected = (config.num_channels, config.image_size, config.image_size)
        if found != expected:
            raise DataError(
                f"the processor makes images of shape {found} {what}, but the CLIP model takes {expected}; "
                "give the `processor` that belongs to it, and images in three channels"
            )

    def head(self, name: str) -> ZeroShotHead:
        """Return a task's zero-shot head; it is computed once.

        Args:
            name: one of `task_names`.
        """
        if name not in self._heads:
            self._heads[name] = zero_shot_head(self.clip_model, self.processor.tokenizer, self.task(name))
        return self._heads[name]

    def head_fingerprint(self, name: str) -> str:
        """Return a short name for what a task's head is made of: the prompts, their tokens, and the CLIP model.

        Args:
            name: one of `task_names`.
        """
        task = self.task(name)
        prompts = prompts_of(task.classnames, task.templates)
        tokens = self.processor.tokenizer(text=prompts, padding=True, return_tensors="pt")["input_ids"].tolist()
        made_of = json.dumps([prompts, tokens, self._clip_fingerprint])
        return hashlib.sha256(made_of.encode()).hexdigest()[:16]

    @cached_property
    def _clip_fingerprint(self) -> list[Any]:
        if self._origin is not None:
            return self._origin._clip_fingerprint
        return [fingerprint(self.clip_model.state_dict()), plain_config(self.clip_model.config)]

    @cached_property
    def clip_model(self) -> CLIPModel:
        """The CLIP model that makes the heads."""
        if self._origin is not None:
            return self._origin.clip_model
        source = self._clip_source
        self.check_clip()
        if isinstance(source, Reference):
            path, options = source.arguments()
            return load_clip(path, where=f"`{source}`", **options)
        made = made_from(source, "clip_model") if isinstance(source, Mapping) else source
        if not isinstance(made, CLIPModel):
            raise ModelError(f"`clip_model` is a {type(made).__name__}; give a folder, a hub id, or a CLIPModel")
        return made

    @cached_property
    def processor(self) -> Processor:
        """The processor of images and prompts."""
        if self._origin is not None:
            return self._origin.processor
        source = self.processor_source
        if isinstance(source, Reference):
            path, options = source.arguments()
            return load_processor(path, where=f"`{source}`", **options)
        return split_processor(made_from(source, "processor") if isinstance(source, Mapping) else source)

    def check(self) -> None:
        """Open every task's data and the processor, so that what is wrong is said before any weight is read.

        Raises:
            FusionMergeError: if data, processor or CLIP model are not usable.
        """
        self.check_clip()
        for name in tqdm(self.task_names, desc="opening datasets", leave=False, disable=None):
            self.task(name)
        self.check_processor()

    def check_clip(self) -> None:
        """Refuse a pool that cannot make heads, as far as it can be told from headers.

        Raises:
            FusionMergeError: if the CLIP model is missing, or has no text tower.
        """
        source = self._clip_source
        if isinstance(source, Reference):
            check_whole_clip(source.config(), where=f"`{source}`")
            path = Path(source.source).expanduser()
            if path.is_file() and path.name != "model.safetensors":
                raise ModelError(f"`{source}` is one file; give the folder of a whole CLIP model as `clip_model`")
        elif not isinstance(source, CLIPModel | Mapping):
            raise ModelError(
                "the task pool knows no CLIP model with a text tower for its heads; "
                "give `clip_model` as a folder or hub id"
            )

    def clip_config(self) -> CLIPConfig | None:
        """Return the configuration of the CLIP model that makes the heads; None where only making it would tell.

        Raises:
            ModelError: if it cannot be read.
        """
        source = self._clip_source
        if isinstance(source, Reference):
            return CLIPConfig.from_dict(dict(source.files().config))
        return source.config if isinstance(source, CLIPModel) else None

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
            cross-entropy), and their `average`; where bad images are skipped also how many a task had, `skipped`.
        """
        if options:
            raise ConfigError(f"`{next(iter(options))}` is not an option of the task pool's evaluation")
        report: Report = {} if isinstance(model, TaskModels) else {"model_info": model_info(model)}
        names = list(tasks) if tasks is not None else self.task_names
        for name in (bar := tqdm(names, desc=label, unit="task", disable=None)):
            bar.set_postfix_str(name)
            with together() if placement is not None and placement.world_size > 1 else nullcontext():
                tower = model[name] if isinstance(model, TaskModels) else model
                counts = self._count(tower, name, placement or Placement(_device(tower)))
            report[name] = counts.scores(name)
            self._tell_skipped(name, report[name])
        scores = [report[name] for name in names]
        if scores:
            report["average"] = {k: sum(s[k] for s in scores) / len(scores) for k in ("accuracy", "loss")}
        return report

    def _count(self, tower: nn.Module, name: str, placement: Placement) -> Counts:
        """Count over this process's share of a task's images."""
        if self.task(name).label_column is None:
            raise DataError(f"task `{name}` has no labels to score on; its images can only be adapted on")
        loader = evaluation_loader(
            self.images(name),
            self.batch_size,
            workers=fitting_workers(self.num_workers, 1),
            placement=placement,
            limit=self.batch_size if self.fast_dev_run else None,
        )
        counts = count(tower, self.head(name), loader, len(self.task(name).classnames), placement)
        counts.skipped.update(len(loader.bad))
        return counts

    def _tell_skipped(self, name: str, scores: dict[str, float]) -> None:
        """Say once a task how many bad images are left out of its scores, in the scores too if it is asked for."""
        skipped = int(scores.pop("skipped"))
        if self.on_bad_image is OnBadImage.SKIP:
            scores["skipped"] = skipped
        if skipped and name not in self._told:
            self._told.add(name)
            bad = self.images(name).bad.values()  # those that this process met with
            example = f", such as: {next(iter(bad))}" if bad else ""
            log.warning("`%s`: %d bad images are left out of the scores%s", name, skipped, example)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
