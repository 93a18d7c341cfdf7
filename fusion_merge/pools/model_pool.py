"""Model pools: the pretrained model and the models that were fine-tuned from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from hydra.utils import instantiate
from torch import nn
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel

from fusion_merge.errors import ConfigError, ModelError, nearest
from fusion_merge.models.clip import (
    build_tower,
    canonical_names,
    expected_shapes,
    module_config,
    module_state,
    vision_config,
)
from fusion_merge.models.sources import LazyState, find_files, fingerprint
from fusion_merge.models.task_models import TaskModels
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.task_vectors import State, check_same_shape_tables, shapes_of

PRETRAINED = "_pretrained_"

ModelSource = str | nn.Module | Mapping[str, Any]
"""A folder, a file, a hub id (`owner/name@revision`), `zoo://…`, a module, or a config with `_target_` or `path`."""


@final
class CLIPVisionModelPool:
    """A pool of CLIP vision towers of one architecture; weights are read when they are needed.

    Names that begin and end with an underscore are not tasks; `_pretrained_` is the model that the others were
    fine-tuned from.

    Args:
        models: for each name, where the model comes from.
        processor: the processor, if it is not that of `_pretrained_`: a folder, a hub id, or a `CLIPProcessor`.
        train_datasets: for each task, labelled images to fine-tune on.
        test_datasets: for each task, images to adapt on and to score on.
        fast_dev_run: read one batch a task, to try things out.

    Raises:
        ConfigError: if there are no models, or no `_pretrained_` among them.
    """

    def __init__(
        self,
        models: Mapping[str, ModelSource],
        *,
        processor: Any = None,
        train_datasets: Mapping[str, Any] | None = None,
        test_datasets: Mapping[str, Any] | None = None,
        fast_dev_run: bool = False,
        platform: str = "hf",
    ) -> None:
        if models.get(PRETRAINED) is None:
            raise ConfigError(
                f"the model pool has no `{PRETRAINED}` among {', '.join(models) or 'nothing'}; "
                f"give `models={{{PRETRAINED}: PATH_OR_HUB_ID, TASK: PATH_OR_HUB_ID, …}}`"
            )
        if platform != "hf":
            raise ConfigError(f"`platform`={platform!r} is not supported; only `hf` is")
        self._sources = {name: source for name, source in models.items() if source is not None}
        self.processor = processor
        self.train_datasets = dict(train_datasets or {})
        self.test_datasets = dict(test_datasets or {})
        self.fast_dev_run = fast_dev_run
        self._states: dict[str, tuple[CLIPVisionConfig, State]] = {}
        self._fingerprints: dict[str, str] = {}
        self._task_pools: dict[str, CLIPVisionModelTaskPool] = {}

    @property
    def model_names(self) -> list[str]:
        """The tasks whose models are merged, in order."""
        return [name for name in self._sources if not (name.startswith("_") and name.endswith("_"))]

    @property
    def all_model_names(self) -> list[str]:
        """Every model's name, special ones included."""
        return list(self._sources)

    @property
    def base_model(self) -> str:
        """Where `_pretrained_` comes from, in words."""
        return self.describe(PRETRAINED)

    def describe(self, name: str) -> str:
        """Return where a model comes from, in words.

        Args:
            name: one of `all_model_names`.
        """
        source = self._source(name)
        if isinstance(source, Mapping):
            return str(source.get("path") or source.get("pretrained_model_name_or_path") or source.get("_target_"))
        return source if isinstance(source, str) else f"a {type(source).__name__}"

    def config(self, name: str = PRETRAINED) -> CLIPVisionConfig:
        """Return a model's vision configuration.

        Args:
            name: one of `all_model_names`.
        """
        return self._open(name)[0]

    def state(self, name: str) -> State:
        """Return a model's tensors in float32 under canonical names, each read when it is asked for.

        Args:
            name: one of `all_model_names`.

        Raises:
            ModelError: if the model cannot be found or read.
        """
        return self._open(name)[1]

    def load_model(self, name: str) -> CLIPVisionModel:
        """Return a copy of a model, in float32.

        Args:
            name: one of `all_model_names`.

        Raises:
            ModelError: if the model cannot be found or read, or lacks tensors.
        """
        config, state = self._open(name)
        return build_tower(config, state, where=self._call(name)).requires_grad_(False)

    def load_pretrained_model(self) -> CLIPVisionModel:
        """Return a copy of the pretrained model, in float32."""
        return self.load_model(PRETRAINED)

    def fine_tuned_models(self) -> TaskModels:
        """Return the fine-tuned models beside each other, each loaded when it is asked for."""
        return TaskModels({name: lambda name=name: self.load_model(name) for name in self.model_names})  # type: ignore[misc]

    def fingerprints(self) -> dict[str, str]:
        """Return a short name for the content of each model, by which a router checkpoint knows its pool."""
        for name in (PRETRAINED, *self.model_names):
            if name not in self._fingerprints:
                self._fingerprints[name] = fingerprint(self.state(name))
        return dict(self._fingerprints)

    def check(self, min_models: int = 1) -> None:
        """Refuse a pool that cannot be merged, from file headers alone.

        Args:
            min_models: how many fine-tuned models there must be.

        Raises:
            ModelError: if a model is missing or has other tensors; the message names the first that differ.
        """
        if len(self.model_names) < min_models:
            raise ModelError(
                f"the model pool has {len(self.model_names)} fine-tuned model(s) beside `{PRETRAINED}`, "
                f"but this method needs at least {min_models}; add them under `models`"
            )
        reference = expected_shapes(self.config())
        for name in (PRETRAINED, *self.model_names):
            check_same_shape_tables(reference, shapes_of(self.state(name)), where=self._call(name))

    def task_pool(self, split: str = "test") -> CLIPVisionModelTaskPool:
        """Return a task pool over the pool's own datasets.

        Args:
            split: `test` or `train`.

        Raises:
            ConfigError: if the pool has no such datasets.
        """
        if split not in self._task_pools:
            datasets = self.train_datasets if split == "train" else self.test_datasets
            if not datasets:
                raise ConfigError(f"the model pool has no `{split}_datasets`; give them, or a task pool with tasks")
            pool = CLIPVisionModelTaskPool(datasets, fast_dev_run=self.fast_dev_run, split=split)
            self.lend_pretrained(pool)
            self._task_pools[split] = pool
        return self._task_pools[split]

    def lend_pretrained(self, task_pool: CLIPVisionModelTaskPool) -> None:
        """Let a task pool make its heads from `_pretrained_` where it was told of nothing else.

        Args:
            task_pool: the task pool.
        """
        source = self._source(PRETRAINED)
        clip = source if isinstance(source, CLIPModel) else _path_of(source)
        task_pool.use_pretrained(clip, self.processor)

    def _source(self, name: str) -> ModelSource:
        if name not in self._sources:
            raise ModelError(f"model `{name}` is not in the pool; {nearest(name, self._sources)}")
        return self._sources[name]

    def _call(self, name: str) -> str:
        return f"model `{name}` ({self.describe(name)})"

    def _open(self, name: str) -> tuple[CLIPVisionConfig, State]:
        if name not in self._states:
            self._states[name] = self._read(name, self._source(name))
        return self._states[name]

    def _read(self, name: str, source: ModelSource) -> tuple[CLIPVisionConfig, State]:
        path = _path_of(source)
        if path is not None:
            try:
                files = find_files(path)
            except ModelError as error:
                raise ModelError(f"model `{name}`: {error}") from error
            config = vision_config(files.config, where=self._call(name))
            state = LazyState(files.weights, canonical_names)
            if not state:
                raise ModelError(f"{self._call(name)} holds no tensor of a CLIP vision tower")
            return config, state
        module = self._instantiate(name, source) if isinstance(source, Mapping) else source
        if not isinstance(module, nn.Module):
            raise ModelError(f"{self._call(name)} is a {type(module).__name__}, not a path, a hub id or a module")
        tensors = {
            n: t.to("cpu", torch.float32) if t.is_floating_point() else t for n, t in module_state(module).items()
        }
        return module_config(module), tensors

    def _instantiate(self, name: str, source: Mapping[str, Any]) -> Any:
        try:
            return instantiate(source)
        except Exception as error:  # what a config calls may fail in any way
            raise ModelError(f"{self._call(name)} cannot be made from its config: {error}") from error


def _path_of(source: ModelSource) -> str | None:
    """Return the path or hub id that a source names, if it names one."""
    if isinstance(source, str):
        return source
    if isinstance(source, Mapping):
        path = source.get("path") or source.get("pretrained_model_name_or_path")
        target = str(source.get("_target_", ""))
        if path is not None and (
            not target or target.endswith(("CLIPModel.from_pretrained", "CLIPVisionModel.from_pretrained"))
        ):
            revision = source.get("revision")
            return f"{path}@{revision}" if revision else str(path)
    return None
