"""What the routed methods share: build, adapt, keep."""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_merge.adaptation.checkpoint import (
    add_coefficients,
    check_routers,
    load_coefficients,
    load_routers,
    save_routers,
)
from fusion_merge.adaptation.loop import OPTIMIZERS, AdaptationRecord, adapt
from fusion_merge.adaptation.objectives import OBJECTIVES, make_objective
from fusion_merge.adaptation.progress import Progress
from fusion_merge.adaptation.runtime import check_precision, make_fabric
from fusion_merge.adaptation.streams import close_streams, open_progress, task_streams
from fusion_merge.errors import AdaptationError, ConfigError
from fusion_merge.files import check_writable
from fusion_merge.methods.base import Method
from fusion_merge.models.clip import empty_tower, load_tower_state, vision_backbone
from fusion_merge.models.clip_config import plain_config
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.moe import Experts, Routing, find_mlps, make_router, route_mlps, set_routing, upcycle_mlps
from fusion_merge.moe.experts import TaskVector, empty_experts
from fusion_merge.moe.layer import router_parameters
from fusion_merge.moe.selection import Selection
from fusion_merge.moe.upcycle import EXPERT_DTYPES, MakeRouter, stored
from fusion_merge.options import option
from fusion_merge.pools.adaptation_pools import TTA_SPLITS, adaptation_pools
from fusion_merge.pools.loaders import Placement, evaluation_loader
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.revisions import adapted_origins
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.processes import together
from fusion_merge.task_vectors import StaticMerge, scaled

if TYPE_CHECKING:
    from fusion_merge.adaptation.runtime import Fabric

log = logging.getLogger(__name__)

Builder = Callable[["MoEMethod", CLIPVisionModelPool, torch.device], MergedCLIPVisionModel]

_MEASURED = 64  # images of each task by which its mean coefficients are measured


@dataclasses.dataclass(kw_only=True)
class MoEMethod(Method):
    r"""Everything outside the MLPs is merged by task arithmetic; each MLP becomes a routed mixture of experts.

    .. math:: \theta = \theta_0 + \lambda \sum_n \tau_n \ \text{outside the MLPs}, \qquad
              \min_\phi \sum_n \mathbb{E}_x\, H\big(\operatorname{softmax} z_n(x; \phi)\big)

    A concrete method says which experts and which router a layer gets.
    """

    trains: ClassVar[bool] = True
    routed: ClassVar[bool] = True

    router_hidden_layers: int = option(2, help="linear layers of a router", choices=(0, 1, 2), shapes_model=True)
    init_lambda: float = option(
        0.3, help="λ: static weight of task vectors and start of coefficients", shapes_model=True
    )
    expert_dtype: str = option(
        "float32", help="what the experts are stored in; products are formed in float32", choices=tuple(EXPERT_DTYPES)
    )
    batch_reduce: bool = option(True, help="one merged weight a batch during adaptation, instead of one a sample")
    inference_batch_reduce: bool = option(False, help="one merged weight a batch after adaptation too")
    objective: str = option("entropy", help="what adaptation minimises", choices=tuple(OBJECTIVES))
    optimizer: str = option("adam", help="the optimiser of the routers", choices=tuple(OPTIMIZERS))
    lr: float = option(1e-4, help="learning rate", above=0.0)
    max_steps: int = option(1000, help="adaptation steps; each takes one batch of each task", minimum=0)
    batch_size: int = option(16, help="images of each task a step", minimum=1)
    use_grad_accumulate: bool = option(True, help="backward after each task: the same gradient in less memory")
    tta_split: str = option("test", help="adapt on what is scored, or on another split of it", choices=TTA_SPLITS)
    num_workers: int = option(16, help="the most worker processes a task; sized to the machine", minimum=0)
    devices: int | str = option(1, help="devices; on the command line the same as `fabric.devices`")
    seed: int = option(0, help="of router initialisation and image order", minimum=0)
    checkpoint: bool | str = option(False, help="path of routers to load instead of adapting")
    save_checkpoint: bool | str = option(False, help="path to save the adapted routers to")
    save_every: int = option(50, help="steps between two savings of the adaptation's state in `cache_dir`", minimum=1)
    resume: bool = option(False, help="go on from the state in `cache_dir`, if there is one")
    cache_dir: str | None = option(None, help="folder of the adaptation's state; null keeps none")
    fast_dev_run: bool = option(False, help="take a single step, to try things out")

    record: AdaptationRecord | None = dataclasses.field(default=None, init=False, repr=False)
    """What happened during the last adaptation."""
    builder: Builder | None = dataclasses.field(default=None, init=False, repr=False)
    """What gives the model that is not adapted yet, if not `build`; see `BuiltOnce`."""
    adapted_on: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict, init=False, repr=False)
    """Where the images of the last adaptation came from, by task."""
    _progress: Progress | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check all options."""
        super().__post_init__()
        for key in ("checkpoint", "save_checkpoint"):
            if getattr(self, key) is True:
                raise ConfigError(f"`{key}`=True says not where; give a path, or false")
        if self.resume and self.cache_dir is None:
            raise ConfigError("`resume`=True needs the folder that holds the adaptation's state; give `cache_dir`")

    @abstractmethod
    def make_experts(self, path: str, task_vectors: Sequence[TaskVector], device: torch.device) -> Experts:
        """Return the bank of one linear layer, on the CPU.

        Args:
            path: the layer's name, for errors.
            task_vectors: its N task vectors, on the CPU.
            device: where to do what is costly.
        """

    @abstractmethod
    def experts_spec(self, num_tasks: int, in_features: int, out_features: int) -> dict[str, Any]:
        """Return the `Experts.spec` of what `make_experts` makes of such a layer, without any weight.

        Args:
            num_tasks: N.
            in_features: I.
            out_features: O.
        """

    def router_maker(self, generator: torch.Generator) -> MakeRouter:
        """Return what makes the routers of a model, layer after layer; by default each layer has its own.

        Args:
            generator: where random weights come from.
        """
        return lambda index, width, count: make_router(
            self.router_hidden_layers, width, count, self.init_lambda, hidden=width, generator=generator
        )

    def make_selection(self) -> Selection | None:
        """Return how many coefficients take part; by default all."""
        return None

    def after_adaptation(self, model: MergedCLIPVisionModel) -> None:
        """Do what is left to do with routers that were adapted or loaded; by default nothing.

        A router checkpoint holds them as they were before this.

        Args:
            model: the model, changed in place.
        """

    def check_shapes(self, config: CLIPVisionConfig, num_tasks: int) -> None:
        """Refuse a tower, or a number of tasks, that the options do not fit; by default none.

        Args:
            config: the tower's configuration.
            num_tasks: N.

        Raises:
            ConfigError: if they do not fit.
        """

    def adaptation_pools(
        self,
        modelpool: CLIPVisionModelPool,
        taskpool: CLIPVisionModelTaskPool | None = None,
        names: Sequence[str] | None = None,
    ) -> dict[str, CLIPVisionModelTaskPool]:
        """Return, for each task, the pool whose images are adapted on.

        Args:
            modelpool: the models.
            taskpool: what is scored, if there is any.
            names: which tasks; by default all.

        Raises:
            FusionMergeError: if a task has no such images.
        """
        return adaptation_pools(modelpool, taskpool, self.tta_split, names)

    def check(self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None = None) -> None:
        """See `Method.check`: also the images to adapt on, or the checkpoint to load instead."""
        self.check_shapes(modelpool.config(), len(modelpool.model_names))
        super().check(modelpool, taskpool)
        if self.checkpoint:
            check_routers(str(self.checkpoint), self._belongs_to(modelpool))
        elif self.max_steps > 0:
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
    ) -> MergedCLIPVisionModel:
        """Build the routed model, adapt its routers (or load them), and return it on the Fabric's device, in eval mode.

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
            build = partial(self.builder, self) if self.builder else self.build
            model = build(modelpool, fabric.device)
            fabric.to_device(model)
            if self.checkpoint:
                load_routers(str(self.checkpoint), model, self._belongs_to(modelpool))
        if not self.checkpoint and self.max_steps > 0:
            pools = self.adaptation_pools(modelpool, taskpool)
            self._adapt(model, modelpool, pools, fabric)
            self.adapted_on = adapted_origins(pools)
        with together():
            keep = str(self.save_checkpoint) if self.save_checkpoint and fabric.is_global_zero else None
            if keep is not None:
                save_routers(keep, model, self._belongs_to(modelpool))
                log.info("routers saved to %s", keep)
            self.after_adaptation(model)
            set_routing(model, Routing.BATCH if self.inference_batch_reduce else Routing.SAMPLE)
            self._measure(model, pools)
            if keep is not None:
                add_coefficients(keep, model)
        return model

    def _measure(self, model: MergedCLIPVisionModel, pools: Mapping[str, CLIPVisionModelTaskPool]) -> None:
        """Tell the model the mean coefficients of each task: from its checkpoint, or from the images adapted on."""
        if self.checkpoint:
            load_coefficients(str(self.checkpoint), model)
        for name, pool in pools.items():
            images = evaluation_loader(
                pool.images(name), _MEASURED, workers=0, placement=Placement(), limit=_MEASURED, replace=True
            )
            model.measure(name, (pixels for pixels, _ in images))

    def build(self, modelpool: CLIPVisionModelPool, device: torch.device | None = None) -> MergedCLIPVisionModel:
        """Build the routed model on the CPU, its routers not adapted yet.

        Args:
            modelpool: the models; not changed.
            device: where to do what is costly, such as decompositions; by default the CPU.
        """
        pretrained = modelpool.state(PRETRAINED)
        finetuned = [modelpool.state(name) for name in modelpool.model_names]
        backbone = vision_backbone(empty_tower(modelpool.config()))
        mlps = tuple(f"{name}." for name in find_mlps(backbone))
        static = StaticMerge(pretrained, finetuned, scaled(self.init_lambda), leave=mlps)
        load_tower_state(backbone, static, where="the static merge")

        def make_experts(path: str, task_vectors: Sequence[TaskVector]) -> Experts:
            experts = self.make_experts(path, task_vectors, device or torch.device("cpu"))
            return stored(experts, self.expert_dtype, path)

        with tqdm(mlps, desc="building experts", unit="layer", disable=None) as bar:
            tower = upcycle_mlps(
                backbone,
                pretrained,
                finetuned,
                make_experts=make_experts,
                make_router=self.router_maker(torch.Generator().manual_seed(self.seed)),
                routing=Routing.BATCH if self.batch_reduce else Routing.SAMPLE,
                selection=self.make_selection(),
                task_names=modelpool.model_names,
                progress=bar.update,
                in_place=True,
            )
        return MergedCLIPVisionModel.from_tower(
            tower,
            tasks=modelpool.model_names,
            method=self.method_name,
            method_options=self.options(),
            base_model=modelpool.base_model,
            models={name: modelpool.describe(name) for name in modelpool.model_names},
        )

    def skeleton(self, config: CLIPVisionConfig, num_tasks: int) -> MergedCLIPVisionModel:
        """Return the routed model that `build` would give, on the meta device: its shapes, without memory for values.

        A sparse bank may really be a little smaller, where magnitudes are equal, or larger, where gaps are wide.

        Args:
            config: the tower's configuration.
            num_tasks: N, at least 1; the tasks are called by their numbers.

        Raises:
            ConfigError: if the options do not fit that tower or number of tasks.
        """
        if num_tasks < 1:
            raise ConfigError(f"`num_tasks`={num_tasks} is below 1; experts are made of at least one task's model")
        self.check_shapes(config, num_tasks)

        def make_bank(_path: str, linear: nn.Linear) -> Experts:
            spec = self.experts_spec(num_tasks, linear.in_features, linear.out_features)
            bank = empty_experts(spec, linear.in_features, linear.out_features)
            return bank.to(EXPERT_DTYPES[self.expert_dtype])

        with torch.device("meta"):
            tower = route_mlps(
                vision_backbone(CLIPVisionModel(config)),
                make_bank=make_bank,
                make_router=self.router_maker(torch.Generator("cpu")),
                routing=Routing.BATCH if self.batch_reduce else Routing.SAMPLE,
                selection=self.make_selection(),
            )
            return MergedCLIPVisionModel.from_tower(
                tower,
                tasks=[str(n) for n in range(num_tasks)],
                method=self.method_name,
                method_options=self.options(),
                base_model="",
            )

    def on_run_end(self) -> None:
        """See `Method.on_run_end`: forget where the adaptation was, unless it was interrupted."""
        if self._progress is not None and not (self.record is not None and self.record.interrupted):
            self._progress.forget()

    def _adapt(
        self,
        model: MergedCLIPVisionModel,
        modelpool: CLIPVisionModelPool,
        pools: Mapping[str, CLIPVisionModelTaskPool],
        fabric: Fabric,
    ) -> None:
        with together():
            progress = self._progress = self._open_progress(modelpool, pools, fabric)
            streams = task_streams(
                pools,
                fabric,
                batch_size=self.batch_size,
                seed=self.seed,
                num_workers=self.num_workers,
                start=progress.step if progress is not None else 0,
            )
        try:
            self.record = adapt(
                model,
                router_parameters(model),
                streams,
                fabric=fabric,
                objective=make_objective(self.objective),
                optimizer=self.optimizer,
                lr=self.lr,
                max_steps=1 if self.fast_dev_run else self.max_steps,
                use_grad_accumulate=self.use_grad_accumulate,
                progress=progress,
            )
        except AdaptationError:  # in all processes: what is averaged over them is no number, or the step is
            with together():
                if self.save_checkpoint and fabric.is_global_zero:
                    save_routers(str(self.save_checkpoint), model, self._belongs_to(modelpool))
                    log.warning("the last good routers are saved to %s", self.save_checkpoint)
            raise
        finally:
            close_streams(streams)

    def _open_progress(
        self, modelpool: CLIPVisionModelPool, pools: Mapping[str, CLIPVisionModelTaskPool], fabric: Fabric
    ) -> Progress | None:
        if self.cache_dir is None or self.fast_dev_run:
            return None
        deciding = ["objective", "optimizer", "lr", "batch_size", "batch_reduce", "use_grad_accumulate", "expert_dtype"]
        belongs_to = self._belongs_to(modelpool) | {"tower": plain_config(modelpool.config())}
        belongs_to["adaptation"] = {name: getattr(self, name) for name in [*deciding, "seed"]}
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
