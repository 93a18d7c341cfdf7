"""Starts of routers: exact linear algebra, in one pass."""

from __future__ import annotations

import pytest
import torch

from fusion_merge import EWEMoEAlgorithm, RankOneMoEAlgorithm, WEMoEAlgorithm
from fusion_merge.adaptation import starts
from fusion_merge.adaptation.starts import projection_start, ridge_solution, ridge_start
from fusion_merge.errors import AdaptationError, ConfigError
from fusion_merge.methods.fusion_moe import FusionMoEAlgorithm
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.moe import LinearRouter, moe_layers, record_coefficients, set_routing
from fusion_merge.moe.projection_router import ProjectionRouter

SMALL = {"rank_k": 4, "max_steps": 0, "num_workers": 0}


@pytest.fixture
def images() -> dict[str, torch.Tensor]:
    """Two kinds of images that are easily told apart."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 20, 3, 16, 16, generator=generator)
    return {"cats": noise[0] + 1, "dogs": noise[1] - 1}


def test_ridge_solution_is_the_minimum_of_its_objective():
    generator = torch.Generator().manual_seed(0)
    h, goal = (torch.randn(12, n, generator=generator, dtype=torch.float64) for n in (5, 3))
    weights = torch.rand(12, generator=generator, dtype=torch.float64)
    weights /= weights.sum()
    slope, intercept = ridge_solution(h, goal, weights, 0.1)
    centred = h - weights @ h
    scale = 0.1 * (weights @ centred.square()).mean()

    def objective(a, b):
        return (weights * (h @ a.T + b - goal).square().sum(1)).sum() + scale * a.square().sum()

    a, b = slope.clone().requires_grad_(), intercept.clone().requires_grad_()
    for gradient in torch.autograd.grad(objective(a, b), (a, b)):
        assert gradient.abs().max() < 1e-12


def test_ridge_solution_survives_features_that_do_not_vary():
    slope, intercept = ridge_solution(
        torch.ones(4, 3).double(), torch.eye(4).double(), torch.full((4,), 0.25).double(), 0.1
    )
    assert not slope.any()
    torch.testing.assert_close(intercept, torch.full((4,), 0.25).double())


@pytest.mark.parametrize("depth", [1, 2])
def test_after_a_ridge_start_each_block_gives_an_image_its_own_task_s_experts(modelpool, images, depth):
    model = FusionMoEAlgorithm(**SMALL, router_start="constant", router_hidden_layers=depth).run(modelpool)
    before = {name: p.clone() for name, p in model.named_parameters() if ".out." not in name}
    ridge_start(model, images)
    with record_coefficients(model) as record:
        model(torch.cat(list(images.values())))
    assert len(record) == 4  # MLP and attention of two layers
    for (values,) in record.values():
        own = values.view(40, 2, 4).mean(dim=2)  # (B, N)
        assert (own[:20, 0] > own[:20, 1]).all()
        assert (own[20:, 1] > own[20:, 0]).all()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_one_pass_solves_what_pass_after_pass_would(modelpool, images):
    one = FusionMoEAlgorithm(**SMALL, router_start="constant").run(modelpool)
    other = FusionMoEAlgorithm(**SMALL, router_start="constant").run(modelpool)
    ridge_start(one, images)
    pixels, goal = torch.cat(list(images.values())), torch.eye(2, dtype=torch.float64).repeat_interleave(20, dim=0)
    for block in moe_layers(other).values():
        seen = []
        handle = block.register_forward_pre_hook(
            lambda _, args, named, seen=seen: seen.append((args or tuple(named.values()))[0]), with_kwargs=True
        )
        with torch.no_grad():
            other(pixels)
        handle.remove()
        weights = torch.full((40,), 1 / 40).double()
        slope, intercept = ridge_solution(seen[0].mean(dim=1).double(), goal, weights, 1e-3)
        block.router.out.weight.data.copy_(slope.repeat_interleave(4, dim=0))
        block.router.out.bias.data.copy_(intercept.repeat_interleave(4))
    for own, expected in zip(moe_layers(one).values(), moe_layers(other).values(), strict=True):
        torch.testing.assert_close(own.router.out.weight, expected.router.out.weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(one(pixels).pooler_output, other(pixels).pooler_output, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("targets", ["mlp", "attention", "all"])
def test_no_mlp_and_no_attention_sees_all_images_of_a_start_at_once(modelpool, images, targets, monkeypatch):
    """But each router is solved from all of them, and the model is as it was but for its routers."""
    monkeypatch.setattr(starts, "CHUNK", 7)
    model, same = (
        FusionMoEAlgorithm(**SMALL, router_start="constant", targets=targets).run(modelpool) for _ in range(2)
    )
    sizes = []
    for name, module in model.named_modules():
        if name.endswith(("fc1", "q_proj")):
            module.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    ridge_start(model, images)
    assert set(sizes) == {7, 40 % 7}
    monkeypatch.setattr(starts, "CHUNK", 1000)
    ridge_start(same, images)
    for (name, value), expected in zip(model.named_parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-3, rtol=1e-3, msg=name)
    sizes.clear()
    with torch.no_grad():
        model(images["cats"])
    assert set(sizes) == {20}


def test_a_ridge_start_leaves_the_routing_as_it_was(modelpool, images):
    model = FusionMoEAlgorithm(**SMALL, router_start="constant").run(modelpool)
    set_routing(model, "batch")
    ridge_start(model, images)
    assert {str(block.routing) for block in moe_layers(model).values()} == {"batch"}


def test_a_method_that_starts_by_ridge_takes_seeded_images_of_each_task(modelpool):
    first, again, other = (FusionMoEAlgorithm(**SMALL, start_images=5, seed=s).run(modelpool) for s in (0, 0, 1))
    states = [{n: p for n, p in m.named_parameters() if ".router." in n} for m in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_projection_routers_hold_what_the_bank_stores(modelpool):
    model = RankOneMoEAlgorithm(**SMALL, router_start="projection", start_rank=4).run(modelpool)
    for block in moe_layers(model).values():
        router = block.router
        assert isinstance(router, ProjectionRouter)
        for task, subspace in enumerate(router.subspaces):
            stored = block.fc1.experts.right[4 * task : 4 * task + 4]
            torch.testing.assert_close(subspace @ subspace.T, torch.eye(4), atol=1e-5, rtol=0)
            torch.testing.assert_close(stored @ subspace.T @ subspace, stored, atol=1e-5, rtol=1e-4)


def test_a_sample_inside_a_task_s_subspace_is_given_that_task():
    router = ProjectionRouter(width=6, num_tasks=3, num_coefficients=6, rank=2)
    router.subspaces.copy_(torch.eye(6).view(3, 2, 6))
    tokens = torch.zeros(3, 4, 6)
    for task in range(3):
        tokens[task, :, 2 * task : 2 * task + 2] = torch.randn(4, 2)
    coefficients = router.pooled(tokens)
    torch.testing.assert_close(coefficients.sum(dim=1), torch.full((3,), 2.0))  # of each task twice, as R is 2
    assert (coefficients.view(3, 3, 2).mean(2).argmax(dim=1) == torch.arange(3)).all()
    assert (coefficients.max(dim=1).values > 0.9).all()


def test_a_projection_router_learns_what_to_add():
    router = ProjectionRouter(width=6, num_tasks=3, num_coefficients=6, rank=2)
    router.subspaces.normal_(generator=torch.Generator().manual_seed(0))
    router.pooled(torch.randn(2, 4, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())
    assert router(torch.randn(2, 4, 6)).shape == (2, 4, 6)


def test_a_token_of_zeros_is_no_division_by_zero():
    router = ProjectionRouter(width=6, num_tasks=3, num_coefficients=3, rank=2)
    torch.testing.assert_close(router.pooled(torch.zeros(1, 2, 6)), torch.full((1, 3), 1 / 3))


def test_a_model_with_projection_routers_is_saved_and_read_again(modelpool, images, tmp_path):
    model = FusionMoEAlgorithm(**SMALL, router_start="projection").run(modelpool)
    model.save_pretrained(tmp_path / "merged")
    again = MergedCLIPVisionModel.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(images["cats"]).pooler_output, model(images["cats"]).pooler_output)


def test_starts_need_a_router_for_each_layer(modelpool, images):
    with pytest.raises(ConfigError, match="`router_start`=ridge needs a router for each layer; choose `shared_gate`"):
        EWEMoEAlgorithm(router_start="ridge")
    model = EWEMoEAlgorithm(max_steps=0).run(modelpool)
    for start in (lambda: ridge_start(model, images), lambda: projection_start(model, 2)):
        with pytest.raises(AdaptationError, match="these share one"):
            start()


def test_starts_that_do_not_go_with_a_router_are_refused(modelpool, images):
    with pytest.raises(ConfigError, match="`router_start`=ridge needs routers with an input"):
        WEMoEAlgorithm(router_start="ridge", router_hidden_layers=0)
    model = WEMoEAlgorithm(max_steps=0, router_hidden_layers=0).run(modelpool)
    with pytest.raises(ConfigError, match="a `ConstantRouter` has no linear layer at its end"):
        ridge_start(model, images)
    with pytest.raises(AdaptationError, match="cannot start a `ConstantRouter`"):
        projection_start(model, 2)


def test_images_of_all_tasks_in_one_batch_cannot_share_one_weight():
    with pytest.raises(ConfigError, match=r"`mixed_tasks`=True .* choose `mixed_tasks`=false or `batch_reduce`=false"):
        RankOneMoEAlgorithm(mixed_tasks=True)


def test_a_linear_router_reads_the_mean_token():
    router, tokens = LinearRouter(6, 3), torch.randn(2, 4, 6)
    features, out = router.last_inputs(tokens), router.last_layer()
    torch.testing.assert_close(features, tokens.mean(dim=1))
    torch.testing.assert_close(out(features), router.pooled(tokens))
