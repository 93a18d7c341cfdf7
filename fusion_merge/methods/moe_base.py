"""What the routed methods share: build, adapt, keep."""

from __future__ import annotations

import dataclasses
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_merge.adaptation.checkpoint import add_coefficients, load_coefficients, router_state
from fusion_merge.adaptation.starts import STARTS, projection_start, ridge_start
from fusion_merge.errors import ConfigError
from fusion_merge.methods.adapted_base import AdaptedMethod
from fusion_merge.models.clip import empty_tower, load_tower_state, vision_backbone
from fusion_merge.models.measuring import KEPT_IMAGES
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.models.parameters import moved_most
from fusion_merge.moe import Experts, Routing, find_blocks, make_router, route_mlps, set_routing, upcycle_mlps
from fusion_merge.moe.blocks import TARGETS, check_layers, chosen_blocks, layer_of, layers_of
from fusion_merge.moe.experts import TaskVector, empty_experts
from fusion_merge.moe.projection_router import ProjectionRouter
from fusion_merge.moe.selection import Selection
from fusion_merge.moe.upcycle import EXPERT_DTYPES, MakeRouter, stored
from fusion_merge.options import option
from fusion_merge.pools.loaders import Placement, adaptation_loader, evaluation_loader
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.task_vectors import StaticMerge, scaled

if TYPE_CHECKING:
    from fusion_merge.adaptation.runtime import Fabric

Builder = Callable[["MoEMethod", CLIPVisionModelPool, torch.device], MergedCLIPVisionModel]

log = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class MoEMethod(AdaptedMethod):
    r"""Everything else is merged by task arithmetic; each MLP, or attention too, becomes a routed mixture of experts.

    .. math:: \theta = \theta_0 + \lambda \sum_n \tau_n \ \text{outside the MLPs}, \qquad
              \min_\phi \sum_n \mathbb{E}_x\, H\big(\operatorname{softmax} z_n(x; \phi)\big)

    A concrete method says which experts and which router a layer gets.
    """

    routed: ClassVar[bool] = True
    adapted_part: ClassVar[str] = "routers"
    deciding: ClassVar[tuple[str, ...]] = (*AdaptedMethod.deciding, "batch_reduce", "expert_dtype", "start_images")

    router_hidden_layers: int = option(2, help="linear layers of a router", choices=(0, 1, 2), shapes_model=True)
    init_lambda: float | None = option(
        0.3,
        help="λ: static weight of task vectors and start of coefficients; null is one over the number of tasks",
        shapes_model=True,
    )
    expert_dtype: str = option(
        "float32", help="what the experts are stored in; products are formed in float32", choices=tuple(EXPERT_DTYPES)
    )
    targets: str = option(
        "mlp", help="what gets experts: MLPs, attention, or all", choices=tuple(TARGETS), shapes_model=True
    )
    layers: str | list[int] = option(
        "all",
        help="which layers do: all, a list from 0 such as [0, 3], or critical:K, the K that fine-tuning moved most",
        shapes_model=True,
    )
    router_start: str = option(
        "constant",
        help="where routers start: at λ, by projection on tasks' subspaces, or by ridge regression on a few images",
        choices=STARTS,
        shapes_model=True,
    )
    start_images: int = option(64, help="images of each task that `router_start=ridge` looks at", minimum=1)
    start_rank: int = option(
        16, help="directions of each task that `router_start=projection` looks at", minimum=1, shapes_model=True
    )
    batch_reduce: bool = option(True, help="one merged weight a batch during adaptation, instead of one a sample")
    inference_batch_reduce: bool = option(False, help="one merged weight a batch after adaptation too")

    builder: Builder | None = dataclasses.field(default=None, init=False, repr=False)
    """What gives the model that is not adapted yet, if not `build`; see `BuiltOnce`."""

    def __post_init__(self) -> None:
        """Check all options.

        Raises:
            ConfigError: if one is out of range, or does not go with another.
        """
        super().__post_init__()
        if self.mixed_tasks and self.batch_reduce:
            raise ConfigError(
                "`mixed_tasks`=True puts the images of all tasks into one batch, and `batch_reduce`=True gives a batch "
                "one merged weight; choose `mixed_tasks`=false or `batch_reduce`=false"
            )
        check_layers(self.layers)
        if self.router_start == "ridge" and self.router_hidden_layers == 0:
            raise ConfigError("`router_start`=ridge needs routers with an input; choose `router_hidden_layers` 1 or 2")

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

    def static_weight(self, num_tasks: int) -> float:
        """Return λ.

        Args:
            num_tasks: N.
        """
        return 1 / num_tasks if self.init_lambda is None else self.init_lambda

    def router_maker(self, generator: torch.Generator, num_tasks: int) -> MakeRouter:
        """Return what makes the routers of a model, layer after layer; by default each layer has its own.

        Args:
            generator: where random weights come from.
            num_tasks: N.
        """
        weight = self.static_weight(num_tasks)
        return lambda index, width, count: make_router(
            self.router_hidden_layers, width, count, weight, hidden=width, generator=generator
        )

    def _router_maker(self, generator: torch.Generator, num_tasks: int) -> MakeRouter:
        if self.router_start == "projection":
            return lambda index, width, count: ProjectionRouter(width, num_tasks, count, self.start_rank)
        return self.router_maker(generator, num_tasks)

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
        """Refuse a tower, or a number of tasks, that the options do not fit: layers that it does not have.

        Args:
            config: the tower's configuration.
            num_tasks: N.

        Raises:
            ConfigError: if they do not fit.
        """
        check_layers(self.layers, config.num_hidden_layers)

    def routed_blocks(self, backbone: nn.Module, order: Callable[[list[str]], list[str]]) -> list[str]:
        """Return the names of the blocks that get experts, in forward order.

        Args:
            backbone: the plain vision tower.
            order: sorts blocks by how far fine-tuning moved them.
        """
        blocks = list(find_blocks(backbone, self.targets))
        return chosen_blocks(blocks, layers_of(self.layers, blocks, order))

    def check(self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None = None) -> None:
        """See `AdaptedMethod.check`: also the options against the shape of the tower."""
        self.check_shapes(modelpool.config(), len(modelpool.model_names))
        super().check(modelpool, taskpool)

    def start(self, modelpool: CLIPVisionModelPool, fabric: Fabric) -> MergedCLIPVisionModel:
        """See `AdaptedMethod.start`."""
        build = partial(self.builder, self) if self.builder else self.build
        return build(modelpool, fabric.device)

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """See `AdaptedMethod.trained`: all routers, a shared one once."""
        return router_state(model)

    @property
    def looks_at_images(self) -> bool:
        """See `AdaptedMethod.looks_at_images`: routers that start from images need them without any step too."""
        return super().looks_at_images or self.router_start == "ridge"

    def prepare(
        self, model: MergedCLIPVisionModel, pools: Mapping[str, CLIPVisionModelTaskPool], fabric: Fabric
    ) -> None:
        """See `AdaptedMethod.prepare`: start routers from a few images of each task."""
        if self.router_start != "ridge":
            return
        begun = time.perf_counter()
        images = {}
        for index, (name, pool) in enumerate(pools.items()):
            own = pool.images(name)
            order = self.seed * 1009 + index  # as adaptation will see them
            loader = adaptation_loader(
                own, min(self.start_images, len(own)), order, workers=0, placement=Placement(fabric.device)
            )
            images[name] = next(iter(loader))[0]
        ridge_start(model, images)
        count = sum(len(batch) for batch in images.values())
        if fabric.is_global_zero:
            log.info("routers start from %d images (ridge regression, %.1f s)", count, time.perf_counter() - begun)

    def finish(
        self, model: MergedCLIPVisionModel, pools: Mapping[str, CLIPVisionModelTaskPool], keep: str | None
    ) -> MergedCLIPVisionModel:
        """See `AdaptedMethod.finish`: route each sample by itself, and measure each task's mean coefficients."""
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
                pool.images(name), KEPT_IMAGES, workers=0, placement=Placement(), limit=KEPT_IMAGES, replace=True
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
        chosen = self.routed_blocks(backbone, partial(moved_most, pretrained, finetuned))
        if str(self.layers).startswith("critical"):
            log.info("experts in the layers %s, which fine-tuning moved most", sorted({layer_of(n) for n in chosen}))
        leave = tuple(f"{name}." for name in chosen)
        static = StaticMerge(pretrained, finetuned, scaled(self.static_weight(len(finetuned))), leave=leave)
        load_tower_state(backbone, static, where="the static merge")

        def make_experts(path: str, task_vectors: Sequence[TaskVector]) -> Experts:
            experts = self.make_experts(path, task_vectors, device or torch.device("cpu"))
            return stored(experts, self.expert_dtype, path)

        with tqdm(chosen, desc="building experts", unit="layer", disable=None) as bar:
            tower = upcycle_mlps(
                backbone,
                pretrained,
                finetuned,
                make_experts=make_experts,
                make_router=self._router_maker(torch.Generator().manual_seed(self.seed), len(finetuned)),
                routing=Routing.BATCH if self.batch_reduce else Routing.SAMPLE,
                selection=self.make_selection(),
                chosen=chosen,
                task_names=modelpool.model_names,
                progress=bar.update,
                in_place=True,
            )
        if self.router_start == "projection":
            projection_start(tower, len(finetuned))
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
            backbone = vision_backbone(CLIPVisionModel(config))
            tower = route_mlps(
                backbone,
                make_bank=make_bank,
                make_router=self._router_maker(torch.Generator("cpu"), num_tasks),
                routing=Routing.BATCH if self.batch_reduce else Routing.SAMPLE,
                selection=self.make_selection(),
                chosen=self.routed_blocks(backbone, list),
            )
            return MergedCLIPVisionModel.from_tower(
                tower,
                tasks=[str(n) for n in range(num_tasks)],
                method=self.method_name,
                method_options=self.options(),
                base_model="",
            )
