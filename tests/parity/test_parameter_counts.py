"""Parameter counts of the published towers, from configurations alone, and skeletons against models really built."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from helpers import TASKS
from runs import assert_same_bits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig

from fusion_merge import EWEMoEAlgorithm, MergedCLIPVisionModel, RankOneMoEAlgorithm, WEMoEAlgorithm
from fusion_merge.errors import ConfigError
from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.pools.task_pool import model_info


@dataclass(frozen=True)
class Tower:
    """A published vision tower: L layers of width d, MLPs of width f, and |θ| parameters in all."""

    layers: int
    d: int
    f: int
    heads: int
    patch: int
    size: int

    @property
    def config(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(
            hidden_size=self.d,
            intermediate_size=self.f,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            patch_size=self.patch,
            image_size=224,
        )


TOWERS = {
    "B/32": Tower(12, 768, 3072, 12, 32, 87_456_000),
    "B/16": Tower(12, 768, 3072, 12, 16, 85_799_424),
    "L/14": Tower(24, 1024, 4096, 16, 14, 303_179_776),
}
NUM_TASKS = (8, 20)
RATIO = 0.9

every_tower = pytest.mark.parametrize("name", TOWERS)
every_number = pytest.mark.parametrize("tasks", NUM_TASKS)


class HostMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made elsewhere than on the meta device."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.bytes += sum(t.numel() * t.element_size() for t in tensors if not t.is_meta)
        return result


def counts(method: MoEMethod, tower: Tower, tasks: int) -> tuple[int, int]:
    """Return how many parameters are trained and how many there are; no tensor may take memory."""
    with HostMemory() as memory:
        model = method.skeleton(tower.config, tasks)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert memory.bytes == 0
    info = model_info(model)
    return int(info["trainable_params"]), int(info["all_params"])


def router(depth: int, width: int, hidden: int, k: int) -> int:
    """methods.md §1.8."""
    return {0: k, 1: width * k + k, 2: width * hidden + hidden + hidden * k + k}[depth]


def kept(entries: int) -> int:
    """How many of `entries` distinct magnitudes are strictly above their 0.9 quantile, at 0.9·(entries - 1)."""
    return entries - (9 * (entries - 1) // 10 + 1)


# Published figures


def test_wemoe_of_eight_tasks_on_b32_has_the_published_counts():
    assert counts(WEMoEAlgorithm(), TOWERS["B/32"], 8) == (7_160_928, 547_970_400)


def test_rankone_moe_of_eight_tasks_on_b32_has_the_published_counts():
    assert counts(RankOneMoEAlgorithm(), TOWERS["B/32"], 8) == (2_362_368, 113_779_968)


# Published formulas


@every_tower
@every_number
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_wemoe_has_the_counts_of_the_formula(name, tasks, depth):
    t = TOWERS[name]
    trained = t.layers * router(depth, t.d, t.d, tasks)
    total = t.size + tasks * t.layers * (2 * t.d * t.f + t.d + t.f) + trained
    assert counts(WEMoEAlgorithm(router_hidden_layers=depth), t, tasks) == (trained, total)


@every_tower
@every_number
@pytest.mark.parametrize(
    ("depth", "shared", "code"), [(0, True, 0), (1, True, 8), (2, False, 0), (2, True, 0), (2, True, 8)]
)
def test_e_wemoe_has_the_counts_of_the_formula(name, tasks, depth, shared, code):
    t = TOWERS[name]
    width = t.d + code
    trained = (1 if shared else t.layers) * router(depth, width, width, tasks)
    total = t.size + tasks * t.layers * (2 * kept(t.d * t.f) + t.d + t.f) + trained
    options = {"tv_prune_ratio": RATIO, "shared_gate": shared, "position_encoding": code > 0}
    method = EWEMoEAlgorithm(router_hidden_layers=depth, **options)
    assert counts(method, t, tasks) == (trained, total)


@every_tower
@every_number
@pytest.mark.parametrize(("depth", "rank"), [(0, 32), (1, 16), (1, 32), (1, 64), (1, -1), (2, 32)])
def test_rankone_moe_has_the_counts_of_the_formula(name, tasks, depth, rank):
    t = TOWERS[name]
    k = min(t.d, t.f) if rank == -1 else rank
    coefficients = tasks * k
    trained = t.layers * router(depth, t.d, 2 * coefficients, coefficients)
    total = t.size + t.layers * tasks * (2 * (t.d + t.f) * k + t.d + t.f) + trained
    method = RankOneMoEAlgorithm(router_hidden_layers=depth, rank_k=rank)
    assert counts(method, t, tasks) == (trained, total)


# Skeletons


SPARSE = [
    {"tv_prune_ratio": ratio, "shared_gate": shared, "position_encoding": code, "position_encoding_dim": 4}
    for ratio, (shared, code) in product((0.0, 0.37, 0.9), ((True, False), (False, False), (True, True)))
]
METHODS = [
    *((WEMoEAlgorithm, {}),),
    *((EWEMoEAlgorithm, options) for options in SPARSE),
    *((RankOneMoEAlgorithm, {"rank_k": k, "select_k": s}) for k, s in ((3, -1), (3, 1), (3, 6), (-1, 5))),
]
CASES = [
    (cls, options | {"router_hidden_layers": depth})
    for (cls, options), depth in product(METHODS, (0, 1, 2))
    if depth or not options.get("position_encoding")
]


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_a_skeleton_has_the_shapes_of_the_model_that_is_built(cls, options, modelpool):
    method = cls(**options)
    skeleton, built = method.skeleton(modelpool.config(), len(TASKS)), method.build(modelpool)
    found, expected = shapes(built), shapes(skeleton)
    sparse = [name for name in expected if name.endswith((".values", ".gaps"))]
    for name in sparse:
        ((stored,), dtype), ((survivors,), expected_dtype) = found.pop(name), expected.pop(name)
        assert dtype == expected_dtype
        assert 0 <= stored - survivors <= 1  # a zero in the first place may be stored beside them
    assert found == expected
    assert trained(skeleton) == trained(built)
    for key in ("shared_router", "vision_config", "method", "method_options"):
        assert getattr(skeleton.config, key) == getattr(built.config, key)
    if not sparse:
        assert skeleton.config.moe == built.config.moe
        assert model_info(skeleton) == model_info(built)


@pytest.mark.parametrize(("cls", "options"), CASES[::4])
def test_a_skeleton_s_configuration_makes_the_same_model_again(cls, options, modelpool):
    skeleton = cls(**options).skeleton(modelpool.config(), 3)
    with torch.device("meta"):
        again = MergedCLIPVisionModel(skeleton.config)
    assert shapes(again) == shapes(skeleton)
    assert trained(again) == trained(skeleton)


def test_a_skeleton_does_not_touch_the_configuration_nor_the_random_stream(modelpool):
    config = modelpool.config()
    before, state = copy.deepcopy(config).to_dict(), torch.get_rng_state()
    WEMoEAlgorithm().skeleton(config, 2)
    assert config.to_dict() == before
    assert_same_bits({"rng": torch.get_rng_state()}, {"rng": state})


@pytest.mark.parametrize(
    ("method", "tasks", "match"),
    [
        (WEMoEAlgorithm(), 0, "`num_tasks`=0"),
        (RankOneMoEAlgorithm(rank_k=17), 2, "`rank_k`=17 is not in 1-16"),
        (RankOneMoEAlgorithm(rank_k=4, select_k=9), 2, "`select_k`=9 is not in 1-8"),
    ],
)
def test_a_skeleton_that_could_not_be_built_is_refused(method, tasks, match, modelpool):
    with pytest.raises(ConfigError, match=match):
        method.skeleton(modelpool.config(), tasks)


def shapes(model: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each tensor by name, a shared router's under each of its names."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
