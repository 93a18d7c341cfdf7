"""Whole models beside a plain CLIP tower of the same shape: evaluation, and one adaptation step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from benchmarks.layers import make_bank, make_mlps
from benchmarks.report import OURS_TO_FLOOR, Row, Target, timed_row
from benchmarks.settings import BATCH, CLASSES, METHODS, Geometry, Settings
from benchmarks.timing import compare
from fusion_merge import MergedCLIPVisionModel, get_method
from fusion_merge.adaptation.loop import adapt
from fusion_merge.adaptation.objectives import mean_entropy
from fusion_merge.adaptation.passes import TaskStream
from fusion_merge.adaptation.runtime import make_fabric
from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.models.clip import pooled_output, vision_backbone
from fusion_merge.moe import Experts, Routing, find_mlps, route_mlps
from fusion_merge.moe.layer import router_parameters
from fusion_merge.pools.heads import ZeroShotHead

_MODEL, _STEP = 1.4, 1.3
_PROJECTION = 512


def make_method(name: str, geometry: Geometry, **options: object) -> MoEMethod:
    """Make a method with its defaults, and the rank of a geometry.

    Args:
        name: one of `METHODS`.
        geometry: the shape.
        **options: others than the defaults.
    """
    rank = {"rank_k": geometry.rank} if name == "rankone_moe" else {}
    made: MoEMethod = get_method(name)(**rank, **options)
    return made


def make_tower(geometry: Geometry) -> CLIPVisionModel:
    """Make a random CLIP tower, frozen.

    Args:
        geometry: the shape.
    """
    torch.manual_seed(0)
    return CLIPVisionModel(geometry.config()).eval().requires_grad_(False)


def make_model(name: str, tower: CLIPVisionModel, settings: Settings, routing: Routing) -> MergedCLIPVisionModel:
    """Make a routed model whose layers all have copies of one bank, each in memory of its own.

    Args:
        name: one of `METHODS`.
        tower: the plain tower.
        settings: of the run.
        routing: what coefficients are averaged over.
    """
    base, tuned = make_mlps(settings.geometry, settings.tasks)
    rank, method = settings.geometry.rank, make_method(name, settings.geometry)
    banks = {
        part: make_bank(name, getattr(base, part), [getattr(mlp, part) for mlp in tuned], rank)
        for part in ("fc1", "fc2")
    }

    def copied(path: str, _linear: nn.Linear) -> Experts:
        return copy.deepcopy(banks[path.rpartition(".")[2]])

    make_router = method.router_maker(torch.Generator().manual_seed(0), settings.tasks)
    routed = route_mlps(vision_backbone(tower), make_bank=copied, make_router=make_router, routing=routing)
    tasks = [str(n) for n in range(settings.tasks)]
    return MergedCLIPVisionModel.from_tower(routed, tasks=tasks, method=name, method_options={}, base_model="random")


def make_pixels(geometry: Geometry) -> Tensor:
    """Make a batch of noise.

    Args:
        geometry: says how large images are.
    """
    return torch.randn(BATCH, 3, geometry.image, geometry.image, generator=torch.Generator().manual_seed(2))


def model_rows(settings: Settings) -> Iterator[Row]:
    """Time the evaluation of a batch, each image routed by itself.

    Args:
        settings: of the run.
    """
    tower, pixels = make_tower(settings.geometry), make_pixels(settings.geometry)

    @torch.no_grad()
    def run(model: Callable[..., object]) -> None:
        model(pixel_values=pixels)

    note = f"{settings.geometry}, batch {BATCH}, without gradients. The floor is a plain CLIP tower of the same shape."
    for name in ("rankone_moe", "wemoe"):
        model = make_model(name, tower, settings, Routing.SAMPLE)
        found = compare({"floor": partial(run, tower), "ours": partial(run, model)}, settings)
        target = Target(OURS_TO_FLOOR, _MODEL) if name == "rankone_moe" else None
        title = f"{METHODS[name]}, whole model, sample routing, forward"
        yield timed_row("model", title, found, target=target, note=note)


def make_head(geometry: Geometry, seed: int) -> ZeroShotHead:
    """Make a random zero-shot head.

    Args:
        geometry: says how wide the tower is.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(_PROJECTION, geometry.width, generator=generator) / math.sqrt(geometry.width)
    embeddings = F.normalize(torch.randn(CLASSES, _PROJECTION, generator=generator), dim=-1)
    return ZeroShotHead(projection, torch.tensor(math.log(100.0)), embeddings)


def step_rows(settings: Settings) -> Iterator[Row]:
    """Time one adaptation step over all tasks, batch routing.

    Args:
        settings: of the run.
    """
    tower, pixels = make_tower(settings.geometry), make_pixels(settings.geometry)
    heads = [make_head(settings.geometry, seed) for seed in range(settings.tasks)]
    fabric = make_fabric(devices=1, accelerator="cpu")

    def step(model: MergedCLIPVisionModel) -> None:
        streams = {str(n): TaskStream(repeat((pixels, None)), head, CLASSES) for n, head in enumerate(heads)}
        options = {"optimizer": "adam", "max_steps": 1, "use_grad_accumulate": True}
        adapt(model, router_parameters(model), streams, fabric=fabric, objective=mean_entropy, **options)

    def floor() -> None:
        for head in heads:
            mean_entropy(head(pooled_output(tower(pixel_values=pixels)))).backward()

    def want_gradient(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        arguments[0].requires_grad_()

    next(iter(find_mlps(vision_backbone(tower)).values())).register_forward_pre_hook(want_gradient)
    names = ("rankone_moe", "wemoe")
    models = {name: make_model(name, copy.deepcopy(tower), settings, Routing.BATCH) for name in names}
    found = compare({"floor": floor, **{name: partial(step, model) for name, model in models.items()}}, settings)
    note = f"{settings.geometry}, {settings.tasks} tasks × {BATCH} images, {CLASSES} classes a head, Adam, backward "
    note += "after each task; images are at hand. The floor is as many passes, forward and backward, of a plain frozen "
    note += "tower under the same heads and objective, with the gradient back to the input of the first MLP: as far as "
    note += "it has to go to reach every router, and not through the patch embedding."
    for name in names:
        title = f"{METHODS[name]}, one adaptation step, batch routing"
        target = Target(OURS_TO_FLOOR, _STEP)
        yield timed_row("step", title, found, ours=name, target=target, note=note)
