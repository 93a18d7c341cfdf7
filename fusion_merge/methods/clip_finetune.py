"""Fine-tuning: one tower a task, against the task's zero-shot head. It makes the models that others merge."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import nn

from fusion_merge.adaptation.finetune import finetune
from fusion_merge.adaptation.runtime import make_fabric, placement_of
from fusion_merge.files import check_writable
from fusion_merge.methods.base import Method
from fusion_merge.models.clip import (
    build_tower,
    canonical_names,
    module_config,
    module_state,
    save_tower,
    vision_config,
)
from fusion_merge.models.sources import LazyState, find_files
from fusion_merge.models.task_models import TaskModels
from fusion_merge.options import option
from fusion_merge.pools.loaders import adaptation_loader, fitting_workers
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.processes import together
from fusion_merge.registry import register_method

if TYPE_CHECKING:
    from fusion_merge.adaptation.runtime import Fabric

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@final
@register_method("clip_finetune")
@dataclass(kw_only=True)
class CLIPFinetuneAlgorithm(Method):
    r"""Fine-tune the pretrained tower on each task's training images; the head stays the zero-shot one.

    .. math:: \theta_n = \arg\min_\theta \mathbb{E}_{(x, y)}\, \mathrm{CE}\big(z_n(x; \theta), y\big)

    Each tower is written to `output/TASK` as `config.json` and `model.safetensors`, and read back from there when
    it is asked for, so that what is scored is what was stored. With `fast_dev_run` nothing is written.

    Source: Ilharco et al., ICLR 2023, appendix B (AdamW, cosine decay with warm-up, frozen classification layer).
    """

    min_models: ClassVar[int] = 0
    makes_one_model: ClassVar[bool] = False
    trains: ClassVar[bool] = True

    output: str | None = option(None, help="folder for the towers, one subfolder a task; null keeps them in memory")
    dtype: str = option("float32", help="precision of the stored weights", choices=tuple(_DTYPES))
    lr: float = option(1e-5, help="highest learning rate", above=0.0)
    weight_decay: float = option(0.1, help="weight decay of AdamW", minimum=0.0)
    warmup_steps: int = option(200, help="steps over which the learning rate rises", minimum=0)
    max_steps: int = option(4000, help="steps a task", minimum=1)
    batch_size: int = option(128, help="images a step", minimum=1)
    label_smoothing: float = option(0.0, help="share of each target spread over all classes", minimum=0.0, below=1.0)
    num_workers: int = option(8, help="the most worker processes; sized to the machine", minimum=0)
    seed: int = option(0, help="of the image order", minimum=0)
    fast_dev_run: bool = option(False, help="take a single step a task, to try things out")

    def check(self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None = None) -> None:
        """See `Method.check`: the training images, and where the towers will go."""
        super().check(modelpool, taskpool)
        modelpool.task_pool("train").check()
        if self.output is not None:
            check_writable(self.output, "method.output", kind="folder")

    def run(
        self,
        modelpool: CLIPVisionModelPool,
        taskpool: CLIPVisionModelTaskPool | None = None,
        fabric: Fabric | None = None,
    ) -> TaskModels:
        """See `Method.run`: fine-tune on the pool's `train_datasets`, one task after the other."""
        self.check(modelpool, taskpool)
        tasks = modelpool.task_pool("train")
        fabric = fabric if fabric is not None else make_fabric()
        dtype = _DTYPES[self.dtype]
        folder = None if self.output is None else Path(self.output).expanduser()
        loaders: dict[str, Callable[[], nn.Module]] = {}
        for index, name in enumerate(tasks.task_names):
            tower = self._tune(modelpool, tasks, name, index, fabric)
            if folder is None or self.fast_dev_run:  # a trial must not take the place of real towers
                loaders[name] = _kept(tower, dtype, where=f"the tower of `{name}`")
                continue
            with together():
                if fabric.is_global_zero:
                    save_tower(tower, folder / name, dtype)
                    log.info("fine-tuned `%s`, saved to %s", name, folder / name)
            loaders[name] = partial(_read, folder / name)
        if folder is not None and self.fast_dev_run:
            log.info("a trial run: nothing was written to %s", folder)
        return TaskModels(loaders)

    def _tune(
        self,
        modelpool: CLIPVisionModelPool,
        tasks: CLIPVisionModelTaskPool,
        name: str,
        index: int,
        fabric: Fabric,
    ) -> nn.Module:
        with together():
            tower, head = modelpool.load_pretrained_model(), tasks.head(name)
            loader = adaptation_loader(
                tasks.images(name),
                self.batch_size,
                self.seed * 1009 + index,
                workers=fitting_workers(self.num_workers, 1),
                placement=placement_of(fabric),
            )
        steps = 1 if self.fast_dev_run else self.max_steps
        losses = finetune(
            tower,
            head,
            iter(loader),
            fabric=fabric,
            lr=self.lr,
            weight_decay=self.weight_decay,
            warmup_steps=min(self.warmup_steps, steps // 2),
            max_steps=steps,
            label_smoothing=self.label_smoothing,
            description=f"fine-tuning {name}",
        )
        if fabric.is_global_zero:
            last = losses[-max(1, len(losses) // 10) :]
            log.info(
                "`%s`: loss %.3f at first, %.3f over the last %d steps",
                name,
                losses[0],
                sum(last) / len(last),
                len(last),
            )
        return nn.Module.to(tower, "cpu")


def _kept(tower: nn.Module, dtype: torch.dtype, *, where: str) -> Callable[[], nn.Module]:
    """Keep a tower in memory, rounded as if it had been stored, and return what makes a copy of it."""
    state = {n: t.to(dtype).float() if t.is_floating_point() else t for n, t in module_state(tower).items()}
    return partial(build_tower, module_config(tower), state, where=where)


def _read(folder: Path) -> nn.Module:
    """Read a tower that `save_tower` wrote, in float32."""
    where = f"the tower in `{folder}`"
    files = find_files(str(folder))
    return build_tower(vision_config(files.config, where=where), LazyState(files.weights, canonical_names), where=where)
