"""What methods that adapt share: build, adapt few parameters on unlabelled images or load them, keep them."""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from fusion_merge.adaptation.checkpoint import check_trained, load_trained, save_trained
from fusion_merge.adaptation.experts import ExpertLogits
from fusion_merge.adaptation.loop import AdaptationRecord, adapt
from fusion_merge.adaptation.objectives import Objective, make_objective
from fusion_merge.adaptation.optimization import OPTIMIZERS, SCHEDULES
from fusion_merge.adaptation.progress import Progress
from fusion_merge.adaptation.runtime import check_precision, make_fabric
from fusion_merge.adaptation.streams import close_streams, open_progress, task_streams
from fusion_merge.errors import AdaptationError, ConfigError
from fusion_merge.files import check_writable
from fusion_merge.methods.base import Method
from fusion_merge.models.clip_config import plain_config
from fusion_merge.options import option
from fusion_merge.pools.adaptation_pools import TTA_SPLITS
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.revisions import adapted_origins
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.processes import together

if TYPE_CHECKING:
    from fusion_merge.adaptation.runtime import Fabric

log = logging.getLogger(__name__)

GUARDS = ("watch", "rollback")
"""What is done about tasks that degrade."""


@dataclasses.dataclass(kw_only=True)
class AdaptedMethod(Method):
    r"""A method with few parameters that are adapted on unlabelled images at test time.

    .. math:: \min_\phi \sum_n \mathbb{E}_x\, H\big(\operatorname{softmax} z_n(x; \phi)\big)

    A concrete method says what is adapted, and what comes of it.
    """

    trains: ClassVar[bool] = True
    adapted_part: ClassVar[str] = "parameters"
    """What is adapted, in a word, for messages: `routers`, for example."""
    deciding: ClassVar[tuple[str, ...]] = (
        *("objective", "objective_temperature", "tsallis_order", "optimizer", "lr", "lr_schedule", "warmup_steps"),
        *("weight_decay", "batch_size", "use_grad_accumulate", "mixed_tasks", "guard", "patience", "seed"),
    )
    """The options that an adaptation's course depends on, beside those that shape the model."""

    objective: str = option(
        "entropy", help="what adaptation minimises: entropy, expert_labels, infomax, tsallis, or a weighted sum of them"
    )
    objective_temperature: float = option(1.0, help="temperature of `expert_labels`", above=0.0)
    tsallis_order: float = option(2.0, help="order of `tsallis`", above=0.0)
    optimizer: str = option("adam", help="the optimiser of what is adapted", choices=tuple(OPTIMIZERS))
    lr: float = option(1e-4, help="learning rate, at its highest", above=0.0)
    lr_schedule: str = option("constant", help="how it goes on after warm-up", choices=SCHEDULES)
    warmup_steps: int = option(0, help="steps over which it rises", minimum=0)
    weight_decay: float = option(0.0, help="weight decay of what is adapted", minimum=0.0)
    max_steps: int = option(1000, help="adaptation steps; each takes one batch of each task", minimum=0)
    batch_size: int = option(16, help="images of each task a step", minimum=1)
    use_grad_accumulate: bool = option(True, help="backward after each task: the same gradient in less memory")
    mixed_tasks: bool = option(False, help="put the batches of all tasks through the model as one")
    guard: str = option(
        "watch", help="of tasks that degrade: warn, or roll back to their best and mend their loss", choices=GUARDS
    )
    patience: int = option(0, help="steps without improvement after which `guard=rollback` ends; 0 never", minimum=0)
    tta_split: str = option("test", help="adapt on what is scored, or on another split of it", choices=TTA_SPLITS)
    num_workers: int = option(16, help="the most worker processes a task; sized to the machine", minimum=0)
    devices: int | str = option(1, help="devices; on the command line the same as `fabric.devices`")
    seed: int = option(0, help="of the image order, and of what is drawn at the start", minimum=0)
    checkpoint: bool | str = option(False, help="path of what was adapted before, to load instead of adapting")
    save_checkpoint: bool | str = option(False, help="path to save what was adapted to")
    save_every: int = option(50, help="steps between two savings of the adaptation's state in `cache_dir`", minimum=1)
    resume: bool = option(False, help="go on from the state in `cache_dir`, if there is one")
    cache_dir: str | None = option(None, help="folder of the adaptation's state; null keeps none")
    fast_dev_run: bool = option(False, help="take a single step, to try things out")

    _objective: Objective = dataclasses.field(init=False, repr=False)
    record: AdaptationRecord | None = dataclasses.field(default=None, init=False, repr=False)
    """What happened during the last adaptation."""
    adapted_on: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict, init=False, repr=False)
    """Where the images of the last adaptation came from, by task."""
    _progress: Progress | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check all options."""
        super().__post_init__()
        for key in ("checkpoint", "save_checkpoint"):
            if getattr(self, key) is True:
                raise ConfigError(f"`{key}`=True says not where; give a path, or false")
        self._objective = make_objective(
            self.objective, temperature=self.objective_temperature, order=self.tsallis_order
        )
        alone = self.batch_size == 1 and self.devices in (1, "1")
        if alone and any(name == "infomax" for name, _ in self._objective.terms):
            raise ConfigError(
                "`batch_size`=1 makes infomax zero in one process, as a prediction is its own mean; choose 2 or more"
            )
        if self.patience and self.guard != "rollback":
            raise ConfigError(f"`patience`={self.patience} is that of a guard that acts; choose `guard`=rollback too")
        if self.resume and self.cache_dir is None:
            raise ConfigError("`resume`=True needs the folder that holds the adaptation's state; give `cache_dir`")

    @abstractmethod
    def start(self, modelpool: CLIPVisionModelPool, fabric: Fabric) -> nn.Module:
        """Return the model that is not adapted yet.

        Args:
            modelpool: the models; not changed.
            fabric: where it will be adapted.
        """

    @abstractmethod
    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return what is adapted, by name.

        Args:
            model: what `start` returned.
        """

    @property
    def looks_at_images(self) -> bool:
        """Whether images are needed, unless a checkpoint is loaded."""
        return self.max_steps > 0

    def prepare(self, model: Any, pools: Mapping[str, CLIPVisionModelTaskPool], fabric: Fabric) -> None:
        """Do what comes before the first step, such as looking at a few images; by default nothing.

        Args:
            model: what `start` returned, on its device; may be changed.
            pools: for each task, the pool of its images.
            fabric: where to compute.
        """
        return

    def finish(self, model: Any, pools: Mapping[str, CLIPVisionModelTaskPool], keep: str | None) -> Any:
        """Return what the method makes of the adapted model; by default the model itself.

        Args:
            model: what `start` returned, adapted.
            pools: for each task that was adapted on, the pool of its images.
            keep: where the adapted parameters were saved, if they were, by this process.
        """
        return model

    def check(self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None = None) -> None:
        """See `Method.check`: also the images to adapt on, or the checkpoint to load instead."""
        super().check(modelpool, taskpool)
        if self.checkpoint:
            check_trained(str(self.checkpoint), self._belongs_to(modelpool), self.adapted_part)
        elif self.looks_at_images:
            for pool in set(self.adaptation_pools(modelpool, taskpool).values()):
                pool.check()
            if self.cache_dir is not None:
                check_writable(self.cache_dir, "method.cache_dir", kind="folder")
        if self.save_checkpoint:
            check_writable(str(self.save_checkpoint), "method.save_checkpoint")

    def run(
        self,
        modelpool: CLIPVisionModelPool,
        taskpool: CLIPVisionModelTaskPool | None = None,
        fabric: Fabric | None = None,
    ) -> Any:
        """Build the model, adapt it (or load what was adapted), and return it on the Fabric's device, in eval mode.

        Args:
            modelpool: the models; not changed.
            taskpool: the tasks, where the model pool has no `test_datasets`.
            fabric: where to compute; by default a new one on what the machine has.

        Raises:
            FusionMergeError: if pool, tasks or checkpoint do not fit.
        """
        self.check(modelpool, taskpool)
        fabric = fabric if fabric is not None else make_fabric(devices=self.devices)
        check_precision(fabric)
        self.record, self.adapted_on = None, {}
        pools: dict[str, CLIPVisionModelTaskPool] = {}
        with together():
            model = self.start(modelpool, fabric)
            fabric.to_device(model)
            if self.checkpoint:
                belongs_to = self._belongs_to(modelpool)
                load_trained(str(self.checkpoint), self.trained(model), belongs_to, self.adapted_part)
        if not self.checkpoint and self.looks_at_images:
            pools = self.adaptation_pools(modelpool, taskpool)
            self._adapt(model, modelpool, pools, fabric)
            self.adapted_on = adapted_origins(pools)
        with together():
            keep = str(self.save_checkpoint) if self.save_checkpoint and fabric.is_global_zero else None
            if keep is not None:
                save_trained(keep, self.trained(model), self._belongs_to(modelpool))
                log.info("%s saved to %s", self.adapted_part, keep)
            return self.finish(model, pools, keep)

    @property
    def _steps(self) -> int:
        return 1 if self.fast_dev_run else self.max_steps

    @property
    def asks_experts(self) -> bool:
        """Whether each task's own fine-tuned model is asked about the images that are adapted on."""
        return self._objective.needs_experts or self.guard == "rollback"

    def on_run_end(self) -> None:
        """See `Method.on_run_end`: forget where the adaptation was, unless it was interrupted."""
        if self._progress is not None and not (self.record is not None and self.record.interrupted):
            self._progress.forget()

    def _adapt(
        self,
        model: nn.Module,
        modelpool: CLIPVisionModelPool,
        pools: Mapping[str, CLIPVisionModelTaskPool],
        fabric: Fabric,
    ) -> None:
        with together():
            progress = self._progress = self._open_progress(modelpool, pools, fabric)
            if progress is None or progress.step == 0:
                self.prepare(model, pools, fabric)
            if self.max_steps == 0:
                return
            streams = task_streams(
                pools,
                fabric,
                batch_size=self.batch_size,
                seed=self.seed,
                num_workers=self.num_workers,
                start=progress.step if progress is not None else 0,
                max_steps=self._steps,
                load_expert=modelpool.load_model if self.asks_experts else None,
            )
            if self.asks_experts:
                for stream in streams.values():
                    if isinstance(stream.expert, ExpertLogits):
                        stream.expert.prepare()
        try:
            self.record = adapt(
                model,
                list(self.trained(model).values()),
                streams,
                fabric=fabric,
                objective=self._objective,
                optimizer=self.optimizer,
                lr=self.lr,
                lr_schedule=self.lr_schedule,
                warmup_steps=self.warmup_steps,
                weight_decay=self.weight_decay,
                max_steps=self._steps,
                use_grad_accumulate=self.use_grad_accumulate,
                mixed_tasks=self.mixed_tasks,
                rollback=self.guard == "rollback",
                patience=self.patience,
                progress=progress,
                what=self.adapted_part,
            )
        except AdaptationError:  # in all processes: what is averaged over them is no number, or the step is
            with together():
                if self.save_checkpoint and fabric.is_global_zero:
                    save_trained(str(self.save_checkpoint), self.trained(model), self._belongs_to(modelpool))
                    log.warning("the last good %s are saved to %s", self.adapted_part, self.save_checkpoint)
            raise
        finally:
            close_streams(streams)

    def _open_progress(
        self, modelpool: CLIPVisionModelPool, pools: Mapping[str, CLIPVisionModelTaskPool], fabric: Fabric
    ) -> Progress | None:
        if self.cache_dir is None or self.fast_dev_run:
            return None
        belongs_to = self._belongs_to(modelpool) | {"tower": plain_config(modelpool.config())}
        course = (*self.deciding, "max_steps") if self.lr_schedule == "cosine" else self.deciding
        belongs_to["adaptation"] = {name: getattr(self, name) for name in course}
        how: dict[str, Any] = {"save_every": self.save_every, "resume": self.resume}
        progress = open_progress(self.cache_dir, self.method_name, belongs_to, pools, fabric, **how)
        if progress.step > self.max_steps:
            raise ConfigError(
                f"`max_steps`={self.max_steps}: the adaptation in `{progress.path}` is at step {progress.step} "
                f"already; choose at least {progress.step}, or start without `resume`"
            )
        return progress

    def _belongs_to(self, modelpool: CLIPVisionModelPool) -> dict[str, Any]:
        shaping = [f.name for f in dataclasses.fields(self) if f.metadata.get("shapes_model")]
        return {
            "method": self.method_name,
            "options": {name: getattr(self, name) for name in shaping},
            "tasks": modelpool.model_names,
            "fingerprints": modelpool.fingerprints(),
        }
