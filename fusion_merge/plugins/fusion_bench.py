"""Inside fusion_bench: our methods as its algorithms, and its model pools as ours. Written for version 0.2.33.

The only file that knows fusion_bench's names. Nothing of it is imported before this file is: its program does so where
a configuration names `FusionMergeAlgorithm`, and our methods where they are given one of its pools.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, final

from fusion_bench.method.base_algorithm import BaseAlgorithm
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.modelpool import CLIPVisionModelPool as ForeignModelPool
from fusion_bench.tasks.clip_classification import get_classnames_and_templates
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fusion_merge.errors import ConfigError
from fusion_merge.methods.base import Method
from fusion_merge.models.task_models import TaskModels
from fusion_merge.pools.model_pool import PLATFORMS, CLIPVisionModelPool
from fusion_merge.pools.references import reference_of
from fusion_merge.registry import get_method, object_from_config

log = logging.getLogger(__name__)

_MODELS = "_models"
_PROCESSOR = "_processor"
_PLATFORM = "_platform"
_DATASETS = {"train": "_train_datasets", "test": "_test_datasets"}
_TASK_POOL = "taskpool"
_META = ("_recursive_", "_usage_", "_version_")
"""Where fusion_bench keeps what its pools and its program were told, and what it tells each of its objects."""


@final
class FusionMergeAlgorithm(LightningFabricMixin, BaseAlgorithm):
    """One of our methods as an algorithm of fusion_bench, whose program runs it, and saves and scores the result.

    A routed method returns a `MergedCLIPVisionModel`, a static one a `CLIPVisionModel`.

    Args:
        algorithm: which of our methods: its class by its full name, or the name that it is registered under.
        **options: its options; `seed=None`, which is fusion_bench's default, means our default.

    Raises:
        FusionMergeError: if there is no such method, or an option is unknown or out of range.
    """

    def __init__(self, algorithm: str, **options: Any) -> None:
        super().__init__(**{key: options.pop(key) for key in _META if key in options})
        if options.get("seed", 0) is None:
            del options["seed"]
        self.algorithm = algorithm
        self.method = _method(algorithm, {key: _plain(value) for key, value in options.items()})

    @property
    def config(self) -> DictConfig:
        """What fusion_bench's YAML files say of this object: it can be made again from it."""
        return OmegaConf.create({**super().config, "algorithm": self.algorithm, **self.method.options()})

    def run(self, modelpool: ForeignModelPool) -> nn.Module:
        """Make one model of the pool; the pool is not changed.

        Args:
            modelpool: a CLIP model pool of fusion_bench. A task that it has no `test_datasets` of is adapted on the
                images of the program's task pool.

        Raises:
            FusionMergeError: if the pool does not fit the method.
        """
        scored = getattr(self._program, _TASK_POOL, None)
        model = self.method.run(own_pool(modelpool, scored), fabric=self._fabric_instance)
        if isinstance(model, TaskModels):
            raise ConfigError(
                f"`{self.algorithm}` makes one model a task, which fusion_bench cannot score as one model"
            )
        return model

    def on_run_end(self) -> None:
        """Let the method forget what it kept in case the run would not come to its end."""
        self.method.on_run_end()


def own_pool(pool: Any, scored: Any = None) -> CLIPVisionModelPool:
    """Return a CLIP model pool of fusion_bench as one of ours: the same models, processor, images and prompts.

    Models and images are read when they are needed, from where that pool would read them.

    Args:
        pool: the model pool.
        scored: a task pool of fusion_bench, whose images are adapted on where the model pool has none of a task.

    Raises:
        ConfigError: if it is another kind of pool.
    """
    if not isinstance(pool, ForeignModelPool):
        raise ConfigError(
            f"`modelpool` is a {type(pool).__name__} of fusion_bench; our methods merge CLIP vision models: choose "
            "`modelpool=CLIPVisionModelPool/NAME`"
        )
    test = _images(pool, "test")
    more = _table(getattr(scored, _DATASETS["test"], None))
    test |= {name: _task(name, _plain(more[name])) for name in pool.model_names if name in more and name not in test}
    return CLIPVisionModelPool(
        {name: _model(pool, name) for name in pool.all_model_names},
        processor=_Processor(pool) if getattr(pool, _PROCESSOR) is not None else None,
        train_datasets=_images(pool, "train"),
        test_datasets=test,
    )


class _Processor:
    """The processor of a pool of fusion_bench, read when it is needed."""

    def __init__(self, pool: ForeignModelPool) -> None:
        self._pool = pool

    @cached_property
    def _loaded(self) -> Any:
        return self._pool.load_processor()

    @property
    def image_processor(self) -> Any:
        return self._loaded.image_processor

    @property
    def tokenizer(self) -> Any:
        return self._loaded.tokenizer


def _method(algorithm: str, options: Mapping[str, Any]) -> Method:
    """Make one of our methods by the full name of its class, or the name that it is registered under."""
    if "." not in algorithm:
        cls = get_method(algorithm)
        algorithm = f"{cls.__module__}.{cls.__qualname__}"
    made: Method = object_from_config({"_target_": algorithm, **options}, "method", Method)
    if not made.makes_one_model or not made.makes_tower:
        raise ConfigError(f"`algorithm`={algorithm} does not merge models into one tower; choose a method that does")
    return made


def _model(pool: ForeignModelPool, name: str) -> Any:
    """Return where a model comes from, if we can read it as lazily as our own, or else the model itself."""
    source = _plain(getattr(pool, _MODELS)[name])
    on_hub = getattr(pool, _PLATFORM) in PLATFORMS and not (isinstance(source, str) and "://" in source)
    try:
        readable = on_hub and reference_of(source, f"model `{name}`") is not None
    except ConfigError:  # a key of `from_pretrained` that we do not pass on
        readable = False
    return source if readable else pool.load_model(name)


def _images(pool: ForeignModelPool, split: str) -> dict[str, Any]:
    """Return what a pool adapts on or trains on, with the class names and templates that fusion_bench scores with."""
    found = {}
    for name, source in _table(getattr(pool, _DATASETS[split])).items():
        plain: Any = _plain(source)
        if isinstance(plain, str):  # fusion_bench takes the name of a data set on its platform, and that split of it
            on_hub = getattr(pool, _PLATFORM) in PLATFORMS and "://" not in plain
            found[name] = _task(name, plain, split=split) if on_hub else _task(name, _loader(pool, split)(name))
        else:
            found[name] = _task(name, plain)
    return found


def _loader(pool: ForeignModelPool, split: str) -> Callable[[str], Any]:
    return pool.load_train_dataset if split == "train" else pool.load_test_dataset


def _task(name: str, data: Any, **spec: Any) -> dict[str, Any]:
    """Return a task as our pools take it, with fusion_bench's prompts where it knows the task."""
    spec = {"data": data, **spec}
    try:
        classnames, templates = get_classnames_and_templates(name)
    except (ValueError, ImportError):  # of one task fusion_bench names a file that it does not have
        log.info("fusion_bench knows no task `%s`: its class names are those of its data", name)
        return spec
    texts = _templates(name, templates, classnames)
    return spec | {"classnames": list(classnames), "by_position": True, "templates": texts}


def _templates(name: str, templates: Any, classnames: Any) -> list[str]:
    """Return templates that are functions as texts with a `{}` for the class name."""
    texts = [template("{}") for template in templates]
    for text, template in zip(texts, templates, strict=True):
        for classname in classnames:
            if text.replace("{}", classname) != template(classname):
                raise ConfigError(
                    f"a template of task `{name}` makes {template(classname)!r} of {classname!r}, but {text!r} of "
                    "'{}'; heads can be made only of templates that put the name, as it is, into a fixed text"
                )
    return texts


def _table(tasks: Any) -> Mapping[str, Any]:
    return tasks if tasks is not None else {}


def _plain(value: Any) -> Any:
    """Return a part of a configuration as plain values, and anything else as it is."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
