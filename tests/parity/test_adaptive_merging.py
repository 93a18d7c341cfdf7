"""AdaMerging's merge and SMILE's layers against those of fusion-bench 0.2.33.

What differs on purpose: the reference gives an expert that changes nothing arbitrary directions to project on.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import random_linear, random_task_vectors
from runs import random_tower
from torch import nn

from fusion_merge.adaptation.objectives import mean_entropy
from fusion_merge.models.clip import canonical_names, module_config, module_state, pooled_output
from fusion_merge.models.coefficients import CoefficientMerge
from fusion_merge.moe.projection import projection_layer

pytest.importorskip("fusion_bench", reason="fusion-bench is a development dependency")


@pytest.fixture(scope="module")
def reference():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fusion_bench.models.smile_moe.linear_from_module import SmileMoELinear
        from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel
        from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel
    return {"smile": SmileMoELinear, "layer_wise": LayerWiseMergedModel, "task_wise": TaskWiseMergedModel}


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("kind", ["layer_wise", "task_wise"])
def test_merges_and_gradients_are_the_reference_s(kind, clamp, reference):
    towers = [random_tower(seed).double() for seed in range(4)]
    layer_wise = kind == "layer_wise"
    base, *finetuned = (module_state(tower) for tower in towers)
    ours = CoefficientMerge(
        module_config(towers[0]), base, finetuned, init_values=0.3, layer_wise=layer_wise, clamp=clamp
    ).double()
    generator = torch.Generator().manual_seed(0)
    start = 1.4 * torch.rand(ours.coefficients.shape, generator=generator, dtype=torch.float64) - 0.2
    ours.coefficients.data.copy_(start)
    with torch.no_grad():  # build_tower keeps single precision
        for index, name in enumerate(ours.tensor_names):
            dict(ours.tower.named_parameters())[name].copy_(base[name])
            getattr(ours, f"task_vectors_{index}").copy_(torch.stack([s[name] - base[name] for s in finetuned]))
    weights = start.clone() if layer_wise else start[:, 0].clone()
    theirs = reference[kind](weights, *_pretrained_and_finetuned(towers), clamp_weights=clamp, strict=False)
    theirs.merge_weights()
    merged = theirs._merged_state_dict
    names = canonical_names(merged)
    for name, tensor in ours.merged().items():
        torch.testing.assert_close(tensor, merged[names[name]], rtol=1e-12, atol=1e-12)
    pixels = torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)
    mean_entropy(pooled_output(ours(pixels))).backward()
    mean_entropy(pooled_output(theirs(pixel_values=pixels))).backward()
    gradient = ours.coefficients.grad if layer_wise else ours.coefficients.grad[:, 0]
    assert gradient.abs().max() > 0
    torch.testing.assert_close(gradient, theirs.merge_weight.grad, rtol=1e-8, atol=1e-12)


def _pretrained_and_finetuned(towers: list[nn.Module]) -> tuple[nn.Module, list[nn.Module]]:
    base, *finetuned = copy.deepcopy(towers)
    return base.requires_grad_(True), finetuned


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("use_diff", [True, False])
@pytest.mark.parametrize(("rank", "gate_rank"), [(3, 2), (-1, 1), (5, 5)])
def test_smile_s_layers_are_the_reference_s(top_k, use_diff, rank, gate_rank, reference):
    base, vectors = random_linear(8, 11, dtype=torch.float64), random_task_vectors(4, 11, 8, dtype=torch.float64)
    options = {"rank": rank, "gate_rank": gate_rank, "top_k": top_k, "gate_on_difference": use_diff}
    ours = projection_layer(copy.deepcopy(base), vectors, **options)
    experts = []
    for vector in vectors:
        expert = copy.deepcopy(base)
        expert.weight.data += vector.weight
        expert.bias.data += vector.bias
        experts.append(expert)
    theirs = reference["smile"](
        copy.deepcopy(base), experts, gate_k=gate_rank, k=rank, top_k=top_k, routing_use_diff=use_diff
    )
    x = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
