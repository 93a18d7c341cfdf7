"""Towers that are merged anew in each pass: what AdaMerging adapts."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers import TASKS, copied
from runs import module_pool, random_tower, tensors_of

from fusion_merge import LayerWiseAdaMergingAlgorithm, TaskWiseAdaMergingAlgorithm
from fusion_merge.adaptation.objectives import mean_entropy
from fusion_merge.errors import CheckpointError, ModelError
from fusion_merge.models.clip import module_config, module_state, pooled_output
from fusion_merge.models.coefficients import CoefficientMerge
from fusion_merge.task_vectors import task_arithmetic

BOTH = pytest.mark.parametrize("cls", [TaskWiseAdaMergingAlgorithm, LayerWiseAdaMergingAlgorithm])
QUICK = {"max_steps": 3, "batch_size": 4, "num_workers": 0, "lr": 0.01}


def merge(**options: Any) -> CoefficientMerge:
    towers = [random_tower(seed) for seed in range(3)]
    base, *finetuned = (module_state(tower) for tower in towers)
    options = {"init_values": 0.3, "layer_wise": True} | options
    return CoefficientMerge(module_config(towers[0]), base, finetuned, **options)


@pytest.mark.parametrize("layer_wise", [True, False])
def test_equal_coefficients_are_task_arithmetic(layer_wise):
    base, *finetuned = (module_state(random_tower(seed)) for seed in range(3))
    expected = task_arithmetic(base, finetuned, 0.3)
    merged = merge(layer_wise=layer_wise).merged()
    assert merged.keys() == {name for name, tensor in expected.items() if tensor.is_floating_point()}
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name])


def test_there_is_a_coefficient_for_each_task_or_for_each_task_and_tensor():
    model = merge()
    assert merge(layer_wise=False).coefficients.shape == (2, 1)
    assert model.coefficients.shape == (2, len(model.tensor_names))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["coefficients"]


def test_a_coefficient_moves_its_own_tensor_of_its_own_task():
    model = merge(init_values=0.0)
    before = copied(model.merged())
    with torch.no_grad():
        model.coefficients[1, 0] = 1.0
    after, name = model.merged(), model.tensor_names[0]
    assert [n for n in before if not torch.equal(before[n], after[n])] == [name]
    torch.testing.assert_close(after[name], module_state(random_tower(2))[name])


def test_the_gradient_is_that_of_finite_differences():
    model, pixels = merge(layer_wise=True), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.double()

    def loss() -> torch.Tensor:
        return mean_entropy(pooled_output(model(pixels.double())))

    loss().backward()
    step = 1e-6
    for place in ((0, 0), (1, 5), (0, model.coefficients.shape[1] - 1)):
        with torch.no_grad():
            model.coefficients[place] += step
            above = loss()
            model.coefficients[place] -= 2 * step
            below = loss()
            model.coefficients[place] += step
        expected = ((above - below) / (2 * step)).item()
        assert model.coefficients.grad[place].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_clamped_coefficients_count_within_0_and_1():
    free, clamped = merge(clamp=False), merge(clamp=True)
    for model in (free, clamped):
        with torch.no_grad():
            model.coefficients[0], model.coefficients[1] = -0.5, 1.5
    with torch.no_grad():
        free.coefficients.clamp_(0, 1)
    for name, tensor in clamped.merged().items():
        assert torch.equal(tensor, free.merged()[name])


def test_the_plain_tower_computes_what_the_merge_does():
    model = merge()
    with torch.no_grad():
        model.coefficients.uniform_(0, 0.5, generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = pooled_output(model(pixels))
        torch.testing.assert_close(pooled_output(model.to_tower()(pixels)), expected)


def test_models_of_another_shape_are_refused():
    base, other = random_tower(0), random_tower(1, intermediate_size=32)
    with pytest.raises(ModelError, match=r"mlp\.fc1"):
        CoefficientMerge(
            module_config(base), module_state(base), [module_state(other)], init_values=0.3, layer_wise=True
        )


# The methods


@BOTH
def test_what_is_returned_is_the_merge_at_the_adapted_coefficients(cls, modelpool, caplog):
    method = cls(**QUICK)
    with caplog.at_level(logging.INFO):
        merged = module_state(method.run(modelpool))
    assert "merging coefficients" in caplog.text
    assert method.coefficients.shape[0] == len(TASKS)
    assert (method.coefficients != 0.3).all()
    base = modelpool.state("_pretrained_")
    vectors = [{n: modelpool.state(task)[n] - base[n] for n in base} for task in TASKS]
    model = CoefficientMerge(modelpool.config(), base, [base], init_values=0.0, layer_wise=True)
    for index, name in enumerate(model.tensor_names):
        own = method.coefficients[:, index if method.coefficients.shape[1] > 1 else 0]
        expected = base[name] + sum(c * vector[name] for c, vector in zip(own, vectors, strict=True))
        torch.testing.assert_close(merged[name], expected, rtol=1e-4, atol=1e-6)


@BOTH
def test_nothing_in_the_merged_tower_requires_gradients(cls, modelpool):
    assert not any(p.requires_grad for p in cls(**QUICK).run(modelpool).parameters())


def test_task_wise_moves_all_tensors_of_a_task_alike(modelpool):
    method = TaskWiseAdaMergingAlgorithm(**QUICK)
    method.run(modelpool)
    assert method.coefficients.shape == (len(TASKS), 1)


def test_a_checkpoint_of_the_other_kind_is_refused(modelpool, tmp_path):
    TaskWiseAdaMergingAlgorithm(**QUICK, save_checkpoint=str(tmp_path / "c")).run(modelpool)
    with pytest.raises(CheckpointError, match=r"coefficient checkpoint .* does not fit: `method`"):
        LayerWiseAdaMergingAlgorithm(checkpoint=str(tmp_path / "c")).run(modelpool)


@BOTH
def test_an_adaptation_goes_on_where_it_was_killed(cls, pool_dir, tmp_path):
    whole = tensors_of(cls(**QUICK).run(module_pool(pool_dir)))
    half = QUICK | {"max_steps": 2, "cache_dir": str(tmp_path), "save_every": 1}
    cls(**half).run(module_pool(pool_dir))  # which keeps its state, as the program did not say that the run is over
    resumed = cls(**half | {"max_steps": 3, "resume": True})
    went_on = tensors_of(resumed.run(module_pool(pool_dir)))
    assert resumed.record.resumed_at == 2
    assert all(torch.equal(whole[name], went_on[name]) for name in whole)
