"""Model pools: the pretrained model and the models that were fine-tuned from it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from hydra.utils import instantiate
from torch import nn
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel

from fusion_merge.errors import ConfigError, ModelError, nearest
from fusion_merge.models.clip import (
    build_tower,
    canonical_names,
    check_same_arithmetic,
    expected_shapes,
    module_config,
    module_state,
    vision_config,
)
from fusion_merge.models.lora import LoraState
from fusion_merge.models.revisions import hub_commit
from fusion_merge.models.sources import LazyState, ModelFiles, fingerprint
from fusion_merge.models.task_models import TaskModels
from fusion_merge.pools.pool_options import bad_image_option
from fusion_merge.pools.reading import Purpose
from fusion_merge.pools.references import Reference, check_table, reference_of
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.task_vectors import State, check_same_shape_tables, shapes_of

PRETRAINED = "_pretrained_"

PLATFORMS = ("hf", "huggingface")

ModelSource = str | Path | nn.Module | Mapping[str, Any]
"""A folder, a file, a hub id (`owner/name@revision`), `zoo://…`, a module, or a config with `_target_` or `path`.

Files may be those of a model or of a PEFT LoRA adapter, which is added to `_pretrained_`.
"""


_GEOMETRY = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size", "num_channels"),
)
_EXAMPLE = f"{{{PRETRAINED}: PATH_OR_HUB_ID, TASK: PATH_OR_HUB_ID, …}}"


@final
class CLIPVisionModelPool:
    """A pool of CLIP vision towers of one architecture; weights are read when they are needed.

    Names that begin and end with an underscore are not tasks; `_pretrained_` is the model that the others were
    fine-tuned from.

    Args:
        models: for each name, where the model comes from.
        processor: the processor, if it is not that of `_pretrained_`: a folder, a hub id, a config with `_target_`
            or `path`, or a `CLIPProcessor`.
        train_datasets: for each task, labelled images to fine-tune on.
        test_datasets: for each task, images to adapt on; where a task's `classnames` are given, they need no labels.
        fast_dev_run: read one batch a task, to try things out.
        platform: where hub ids are looked up; `hf`, or `huggingface`, is the only one.
        on_bad_image: what becomes of bad images of these datasets, `error` or `skip`; see `CLIPVisionModelTaskPool`.

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
        on_bad_image: str = "error",
    ) -> None:
        check_table(models, "models", _EXAMPLE)
        for option, value in (("train_datasets", train_datasets), ("test_datasets", test_datasets)):
            check_table(value, option, "{TASK: PATH_OR_HUB_ID, …}")
        if not models or models.get(PRETRAINED) is None:
            raise ConfigError(
                f"the model pool has no `{PRETRAINED}` among {', '.join(models or ()) or 'nothing'}; "
                f"give `models={_EXAMPLE}`"
            )
        if type(fast_dev_run) is not bool:
            raise ConfigError(f"`fast_dev_run`={fast_dev_run!r} of the model pool is neither true nor false")
        if platform not in PLATFORMS:
            raise ConfigError(f"`platform`={platform!r} is not supported; only `hf` is")
        self._sources = {name: source for name, source in models.items() if source is not None}
        self.processor = processor
        self.train_datasets = dict(train_datasets or {})
        self.test_datasets = dict(test_datasets or {})
        self.fast_dev_run = fast_dev_run
        self.on_bad_image = bad_image_option(on_bad_image, "model pool")
        self._states: dict[str, tuple[CLIPVisionConfig, State]] = {}
        self._fingerprints: dict[str, str] = {}
        self._commits: dict[str, str | None] = {}
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
        if reference := self.reference(name):
            return str(reference)
        return str(source.get("_target_")) if isinstance(source, Mapping) else f"a {type(source).__name__}"

    def revision(self, name: str) -> str | None:
        """Return the commit of a model from the hub as it was read, or None for one from elsewhere.

        Args:
            name: one of `all_model_names`.
        """
        self._open(name)
        return self._commits.get(name)

    def reference(self, name: str) -> Reference | None:
        """Return what a model's source refers to, or None where it is a module, or a config that makes one.

        Args:
            name: one of `all_model_names`.
        """
        return reference_of(self._source(name), f"model `{name}`")

    def files(self, name: str) -> tuple[Path, ...]:
        """Return the weight files of a model; none of one that is made, or in memory.

        Args:
            name: one of `all_model_names`.

        Raises:
            ModelError: if they cannot be found.
        """
        reference = self.reference(name)
        return reference.files().weights if reference is not None else ()

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
            ModelError: if a model is missing, has other tensors, or computes otherwise; the message names the first
                tensor or key that differs.
        """
        self.check_number(min_models)
        for name in (PRETRAINED, *self.model_names):
            self.check_model(name)

    def check_number(self, min_models: int) -> None:
        """Refuse a pool with too few models.

        Args:
            min_models: how many fine-tuned models there must be.

        Raises:
            ModelError: if there are fewer.
        """
        if len(self.model_names) < min_models:
            raise ModelError(
                f"the model pool has {len(self.model_names)} fine-tuned model(s) beside `{PRETRAINED}`, "
                f"but this method needs at least {min_models}; add them under `models`"
            )

    def check_model(self, name: str) -> None:
        """Refuse a model that is not like the pretrained one, from file headers alone.

        Args:
            name: one of `all_model_names`.

        Raises:
            ModelError: if it is missing, has other tensors, or computes otherwise.
        """
        state, reference = self.state(name), self.config()
        check_same_shape_tables(expected_shapes(reference), shapes_of(state), where=self._call(name))
        check_same_arithmetic(reference, self.config(name), where=self._call(name))

    def task_pool(self, split: str = "test") -> CLIPVisionModelTaskPool:
        """Return a task pool over the pool's own datasets.

        Args:
            split: `test` for the images to adapt on, `train` for those to fine-tune on.

        Raises:
            ConfigError: if the pool has no such datasets.
        """
        if split not in ("test", "train"):
            raise ConfigError(f"`split`={split!r} of the model pool's datasets is neither `test` nor `train`")
        if split not in self._task_pools:
            datasets = self.train_datasets if split == "train" else self.test_datasets
            if not datasets:
                raise ConfigError(f"the model pool has no `{split}_datasets`; give them, or a task pool with tasks")
            purpose = Purpose.FINE_TUNING if split == "train" else Purpose.ADAPTATION
            pool = CLIPVisionModelTaskPool(
                datasets, fast_dev_run=self.fast_dev_run, purpose=purpose, on_bad_image=self.on_bad_image
            )
            self.lend_pretrained(pool)
            self._task_pools[split] = pool
        return self._task_pools[split]

    def made_task_pools(self) -> list[CLIPVisionModelTaskPool]:
        """Return the task pools over the pool's own datasets that were made so far."""
        return list(self._task_pools.values())

    def on_other_images(self, test_datasets: Mapping[str, Any]) -> CLIPVisionModelPool:
        """Return a pool of the same models with other images to adapt on; what was read of the models is shared.

        Args:
            test_datasets: as in the constructor.
        """
        other = copy.copy(self)
        other.test_datasets, other._task_pools = dict(test_datasets), {}
        return other

    def lend_pretrained(self, task_pool: CLIPVisionModelTaskPool) -> None:
        """Let a task pool make its heads from `_pretrained_` where it was told of nothing else.

        Args:
            task_pool: the task pool.
        """
        source = self._source(PRETRAINED)
        task_pool.use_pretrained(
            source if isinstance(source, CLIPModel) else self.reference(PRETRAINED), self.processor
        )

    def check_heads(self, task_pool: CLIPVisionModelTaskPool) -> None:
        """Refuse a task pool whose heads are made by another kind of CLIP than the pool's models, from configurations.

        Args:
            task_pool: the task pool.

        Raises:
            ModelError: if the vision tower of that CLIP model is of another shape.
        """
        if task_pool.clip_source is None:  # those of `_pretrained_` are lent to it
            return
        task_pool.check_clip()
        clip = task_pool.clip_config()
        if clip is None:
            return
        for key in _GEOMETRY:
            theirs, ours = getattr(clip.vision_config, key), getattr(self.config(), key)
            if theirs != ours:
                raise ModelError(
                    f"the heads of the tasks come from a CLIP model with `{key}`={theirs} ({task_pool.clip_source}), "
                    f"but the models have {ours}; give the one that they were fine-tuned from as the task pool's "
                    "`clip_model`, or choose the task pool of that architecture"
                )

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
        reference = self.reference(name)
        if reference is not None:
            try:
                files = reference.files()
            except ModelError as error:
                raise ModelError(f"model `{name}`: {error}") from error
            self._commits[name] = hub_commit(files.weights)
            if files.is_adapter:
                return self._add(name, files, reference.base)
            config = vision_config(files.config, where=self._call(name))
            state = LazyState(files.weights, canonical_names)
            if not state:
                raise ModelError(f"{self._call(name)} holds no tensor of a CLIP vision tower")
            state.check_floating()
            return config, state
        module = self._instantiate(name, source) if isinstance(source, Mapping) else source
        if not isinstance(module, nn.Module):
            raise ModelError(f"{self._call(name)} is a {type(module).__name__}, not a path, a hub id or a module")
        tensors = {
            n: t.to("cpu", torch.float32) if t.is_floating_point() else t for n, t in module_state(module).items()
        }
        for tensor_name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ModelError(
                    f"{self._call(name)} holds {tensor.dtype} values in `{tensor_name}`; "
                    "give a model whose weights are floating-point numbers"
                )
            if not torch.isfinite(tensor).all():
                raise ModelError(f"{self._call(name)} holds NaN or infinite values in `{tensor_name}`")
        return module_config(module), tensors

    def _add(self, name: str, files: ModelFiles, base: str | None) -> tuple[CLIPVisionConfig, State]:
        """Return the pretrained model with an adapter."""
        if name == PRETRAINED:
            raise ModelError(f"{self._call(name)} is an adapter; give the model that it was made for as `{name}`")
        pretrained = self.reference(PRETRAINED)
        if base is not None and pretrained is not None and base != pretrained.source:
            raise ModelError(
                f"{self._call(name)} is to be added to `{base}`, but `{PRETRAINED}` is `{pretrained}`; "
                "leave out `base_model_name`, or give one model in both places"
            )
        config, state = self._open(PRETRAINED)
        return config, LoraState(state, files, where=self._call(name), base=self.base_model)

    def _instantiate(self, name: str, source: Mapping[str, Any]) -> Any:
        try:
            return instantiate(source)
        except Exception as error:  # what a config calls may fail in any way
            raise ModelError(f"{self._call(name)} cannot be made from its config: {error}") from error
