"""Fine-tuning: one tower a task, against the task's zero-shot head. It makes the models that others merge."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import nn

from fusion_merge.adaptation.finetune import finetune
from fusion_merge.adaptation.runtime import make_fabric, placement_of
from fusion_merge.files import check_writable
from fusion_merge.methods.base import Method
from fusion_merge.models.clip import build_tower, module_state, save_tower
from fusion_merge.models.task_models import TaskModels
from fusion_merge.options import option
from fusion_merge.pools.loaders import adaptation_loader, fitting_workers
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
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

    Each tower is written to `output/TASK` as `config.json` and `model.safetensors`, and read back from there, so
    that what is scored is what was stored.

    Source: Ilharco et al., ICLR 2023, appendix B (AdamW, cosine decay with warm-up, frozen classification layer).
    """

    min_models: ClassVar[int] = 0
    makes_one_model: ClassVar[bool] = False

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
            check_writable(self.output, "method.output")

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
        towers: dict[str, nn.Module] = {}
        for index, name in enumerate(tasks.task_names):
            tower = self._tune(modelpool, tasks, name, index, fabric)
            if self.output is not None and fabric.is_global_zero:
                save_tower(tower, Path(self.output).expanduser() / name, _DTYPES[self.dtype])
                log.info("fine-tuned `%s`, saved to %s", name, Path(self.output) / name)
            stored = {n: t.to(_DTYPES[self.dtype]).float() for n, t in module_state(tower).items()}
            towers[name] = build_tower(modelpool.config(), stored, where=f"the tower of `{name}`")
        return TaskModels({name: lambda tower=tower: tower for name, tower in towers.items()})  # type: ignore[misc]

    def _tune(
        self,
        modelpool: CLIPVisionModelPool,
        tasks: CLIPVisionModelTaskPool,
        name: str,
        index: int,
        fabric: Fabric,
    ) -> nn.Module:
        tower = modelpool.load_pretrained_model()
        workers = fitting_workers(self.num_workers, 1)
        loader = adaptation_loader(
            tasks.images(name),
            self.batch_size,
            self.seed * 1009 + index,
            workers=workers,
            placement=placement_of(fabric),
        )
        finetune(
            tower,
            tasks.head(name),
            iter(loader),
            fabric=fabric,
            lr=self.lr,
            weight_decay=self.weight_decay,
            warmup_steps=min(self.warmup_steps, self.max_steps // 2),
            max_steps=1 if self.fast_dev_run else self.max_steps,
            label_smoothing=self.label_smoothing,
            description=f"fine-tuning {name}",
        )
        return nn.Module.to(tower, "cpu")
