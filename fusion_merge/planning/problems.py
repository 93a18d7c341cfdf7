"""Everything that is wrong with a configuration at once, each with its way out; nothing but headers is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fusion_merge.errors import FusionMergeError
from fusion_merge.methods.adapted_base import AdaptedMethod
from fusion_merge.methods.base import Method
from fusion_merge.methods.clip_finetune import CLIPFinetuneAlgorithm
from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.methods.regmean import RegMeanAlgorithm
from fusion_merge.methods.static_base import StaticMethod
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool


class Problems(list[str]):
    """What is wrong, each once and in one line."""

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note an error of the library instead of raising it."""
        try:
            yield
        except FusionMergeError as error:
            self.note(error)

    def note(self, error: FusionMergeError) -> None:
        """Note an error, unless it is there already, perhaps with its place before it.

        Args:
            error: the error.
        """
        text = " ".join(str(error).split())
        if not any(text in other for other in self):
            self.append(text)


def check_models(problems: Problems, modelpool: CLIPVisionModelPool, method: Method | None) -> None:
    """Note what is wrong with each model, from configurations and file headers.

    Args:
        problems: where to.
        modelpool: the models.
        method: what is made of them, if that is known.
    """
    least = 0 if method is None else method.min_models
    with problems.noted():
        modelpool.check_number(least)
    for name in (PRETRAINED, *modelpool.model_names):
        with problems.noted():
            modelpool.check_model(name)
    if isinstance(method, MoEMethod):
        with problems.noted():
            method.check_shapes(modelpool.config(), len(modelpool.model_names))
    if isinstance(method, StaticMethod):
        with problems.noted():
            method.check_fit(modelpool)


def check_tasks(problems: Problems, taskpool: CLIPVisionModelTaskPool, names: Sequence[str] | None = None) -> None:
    """Note what is wrong with what makes the heads, with the processor, and with each task's data.

    Args:
        problems: where to.
        taskpool: the tasks.
        names: which tasks; by default all.
    """
    with problems.noted():
        taskpool.check_clip()
    for name in taskpool.task_names if names is None else names:
        with problems.noted():
            taskpool.task(name)
    with problems.noted():
        taskpool.check_processor()


def pools_of(
    problems: Problems, method: Method, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None
) -> dict[str, CLIPVisionModelTaskPool]:
    """Return, for each task whose images the method looks at, the pool of them; note what is wrong with them.

    Args:
        problems: where to.
        method: the method.
        modelpool: the models.
        taskpool: what is scored, if there is any.
    """
    pools: dict[str, CLIPVisionModelTaskPool] = {}
    if isinstance(method, CLIPFinetuneAlgorithm):
        with problems.noted():
            pool = modelpool.task_pool("train")
            pools = dict.fromkeys(pool.task_names, pool)
    elif isinstance(method, RegMeanAlgorithm) or (
        isinstance(method, AdaptedMethod) and method.looks_at_images and not method.checkpoint
    ):
        for name in modelpool.model_names:
            with problems.noted():
                pools |= method.adaptation_pools(modelpool, taskpool, [name])
    for pool in dict.fromkeys(pools.values()):
        if pool is not taskpool:  # whose tasks are looked at anyway
            check_tasks(problems, pool, [name for name in pools if pools[name] is pool])
    return pools
