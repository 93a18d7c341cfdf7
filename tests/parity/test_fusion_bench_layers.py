"""Our routed layers against those of fusion-bench 0.2.33: the same weights in both, the same outputs and gradients.

What differs on purpose (and is tested as such below):

- The reference merges one sample at a time; ours builds no merged weight (low rank) or all at once. Rounding differs.
- The reference's entropy has 1e-8 inside the logarithm; ours uses log-softmax.
- The reference stops with an empty error where an expert equals the pretrained model; ours adds zero experts.
- The reference changes the modules that it is given; ours never does.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from helpers import ToyTower, random_linear
from torch import Tensor, nn

from fusion_merge.adaptation.loop import adapt
from fusion_merge.adaptation.objectives import mean_entropy
from fusion_merge.adaptation.passes import TaskStream
from fusion_merge.adaptation.runtime import make_fabric
from fusion_merge.moe import (
    DenseExperts,
    LayerEncodedRouter,
    LowRankExperts,
    Router,
    Routing,
    SoftTopK,
    SparseExperts,
    make_router,
    upcycle_mlps,
)
from fusion_merge.moe.layer import router_parameters

pytest.importorskip("fusion_bench", reason="fusion-bench is a development dependency")

WIDTH, HIDDEN, TASKS, RANK, BATCH, TOKENS = 12, 20, 4, 3, 5, 7
LAMBDA, RATIO, CODE = 0.3, 0.8, 8


@pytest.fixture(scope="module")
def reference():
    """The reference's modules; they warn on import, which is no business of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fusion_bench.method.we_moe.entropy_loss import entropy_loss
        from fusion_bench.models import rankone_moe, sparse_we_moe, we_moe
    return SimpleNamespace(
        dense=we_moe.WeightEnsemblingMoE,
        sparse=sparse_we_moe.SparseWeightEnsemblingMoE,
        sparse_shared=sparse_we_moe.SparseWeightEnsemblingMoE_ShardGate,
        shared_gate=sparse_we_moe.construct_weight_ensembling_gate,
        low_rank=rankone_moe.RankOneMoE,
        not_trained=rankone_moe.ExpertNotTrainedError,
        entropy=entropy_loss,
    )


@pytest.fixture
def double_precision():
    """Fabric gives back what a model returns in the default precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _words(options: dict[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in options.items()]


# what a case is made of: method, router depth, routing, and what that method has besides
WEMOE = [("wemoe", {})]
E_WEMOE = [("e_wemoe", {"shared": s, "code": c}) for s, c in ((False, 0), (True, 0), (True, CODE))]
RANKONE = [("rankone_moe", {"select": k}) for k in (-1, 1, TASKS * RANK // 2, TASKS * RANK)]
CASES = [
    pytest.param(method, depth, routing, options, id="-".join([method, str(depth), routing, *_words(options)]))
    for method, options in WEMOE + E_WEMOE + RANKONE
    for depth in (0, 1, 2)
    for routing in Routing
]


@pytest.mark.parametrize(("method", "depth", "routing", "options"), CASES)
def test_outputs_and_router_gradients_agree(reference, record_property, method, depth, routing, options):
    ours, theirs = _pair(reference, method, depth, routing, **options)
    tokens = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5))
    towards = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(6))
    worst_output = 0.0
    for own, other in zip(ours.layers, theirs.layers, strict=True):
        output, expected = own(tokens), other(tokens)
        worst_output = max(worst_output, (output - expected).abs().max().item() / expected.abs().max().item())
        (output * towards).sum().backward()
        (expected * towards).sum().backward()
    assert worst_output <= 1e-5
    pairs = _router_pairs(ours, theirs)
    assert all(q.grad.norm() > 1e-3 for _, q in pairs)  # else there is nothing to compare
    gradients = [_distance(p.grad, q.grad) for p, q in pairs]
    assert max(gradients) <= 1e-4
    record_property("output", worst_output)
    record_property("gradient", max(gradients))


@pytest.mark.parametrize(("method", "options"), WEMOE + E_WEMOE[1:] + RANKONE[::2])
@pytest.mark.parametrize("routing", Routing)
@pytest.mark.parametrize("use_grad_accumulate", [True, False])
def test_five_adam_steps_agree(
    reference, double_precision, record_property, method, options, routing, use_grad_accumulate
):
    """In double precision, so that only the mathematics is compared; and see `test_entropies_differ_by_…`."""
    ours, theirs = _pair(reference, method, 2, routing, **options)
    heads = [random_linear(WIDTH, 6, seed=n, dtype=torch.float64).requires_grad_(False) for n in range(TASKS)]
    generator = torch.Generator().manual_seed(7)
    batches = torch.randn(5, TASKS, BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64)

    losses = []
    optimizer = torch.optim.Adam([q for _, q in _router_pairs(ours, theirs)], lr=1e-2)
    for step in batches:
        per_task = [reference.entropy(heads[n](theirs(pixels))) for n, pixels in enumerate(step)]
        torch.stack(per_task).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in per_task])

    streams = {
        str(n): TaskStream(((pixels, None) for pixels in batches[:, n]), heads[n], num_classes=6) for n in range(TASKS)
    }
    record = adapt(
        ours,
        router_parameters(ours),
        streams,
        fabric=make_fabric(accelerator="cpu", precision="64-true"),
        objective=mean_entropy,
        lr=1e-2,
        max_steps=5,
        use_grad_accumulate=use_grad_accumulate,
    )
    own_losses = torch.tensor([record.losses[str(n)] for n in range(TASKS)]).T
    torch.testing.assert_close(own_losses, torch.tensor(losses), atol=1e-6, rtol=1e-6)
    routers = [_distance(p, q) for p, q in _router_pairs(ours, theirs)]
    assert max(routers) <= 1e-5
    record_property("losses", (own_losses - torch.tensor(losses)).abs().max().item())
    record_property("routers", max(routers))


def test_entropies_differ_by_the_constant_inside_the_logarithm_alone(reference):
    logits = 3 * torch.randn(64, 10, dtype=torch.float64)
    torch.testing.assert_close(mean_entropy(logits), reference.entropy(logits), atol=10 * 1e-8, rtol=0)
    with_zeros = torch.tensor([[80.0, -80.0]], dtype=torch.float16)
    assert mean_entropy(with_zeros) == 0
    assert reference.entropy(with_zeros).isnan()


def test_an_expert_equal_to_the_pretrained_model_is_an_empty_error_there_and_zero_experts_here(reference):
    pretrained, finetuned = _towers()
    finetuned[1].load_state_dict(pretrained.state_dict())
    with pytest.raises(reference.not_trained):
        _theirs(reference, "rankone_moe", 1, Routing.SAMPLE, pretrained, finetuned)
    layer = _ours("rankone_moe", 1, Routing.SAMPLE, pretrained, finetuned).layers[0]
    assert not layer.fc1.experts.right[RANK : 2 * RANK].any()
    assert layer.fc1.experts.right[:RANK].any()


def test_models_given_to_the_reference_are_changed_and_those_given_to_us_are_not(reference):
    pretrained, finetuned = _towers()
    before = copy.deepcopy([m.state_dict() for m in (pretrained, *finetuned)])
    _ours("wemoe", 1, Routing.SAMPLE, pretrained, finetuned)
    after = [m.state_dict() for m in (pretrained, *finetuned)]
    assert all(torch.equal(a[n], b[n]) for a, b in zip(after, before, strict=True) for n in a)
    expert = copy.deepcopy(finetuned[0].layers[0])
    reference.dense(WIDTH, copy.deepcopy(pretrained.layers[0]), [expert], batch_first=True)
    assert not torch.equal(expert.fc1.weight, finetuned[0].layers[0].fc1.weight)


def _towers() -> tuple[ToyTower, list[ToyTower]]:
    """A pretrained tower of two MLPs and TASKS fine-tuned ones."""
    generator = torch.Generator().manual_seed(0)
    pretrained = ToyTower(WIDTH, HIDDEN, depth=2)
    for parameter in pretrained.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    finetuned = [copy.deepcopy(pretrained) for _ in range(TASKS)]
    for parameter in (p for tower in finetuned for layer in tower.layers for p in layer.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pretrained, finetuned


def _pair(
    reference: SimpleNamespace, method: str, depth: int, routing: Routing, **options
) -> tuple[ToyTower, ToyTower]:
    """Ours and theirs with the same base, experts and routers; the routers tell samples apart."""
    pretrained, finetuned = _towers()
    ours = _ours(method, depth, routing, pretrained, finetuned, **options)
    theirs = _theirs(reference, method, depth, routing, pretrained, finetuned, **options)
    generator = torch.Generator().manual_seed(1)
    for own, other in _router_pairs(ours, theirs):
        own.data += 0.2 * torch.randn(own.shape, generator=generator)
        other.data.copy_(own.data)
    return ours, theirs


def _ours(
    method: str,
    depth: int,
    routing: Routing,
    pretrained: ToyTower,
    finetuned: Sequence[ToyTower],
    *,
    select: int = -1,
    shared: bool = False,
    code: int = 0,
) -> ToyTower:
    make_experts = {
        "wemoe": lambda _path, vectors: DenseExperts.from_task_vectors(vectors),
        "e_wemoe": lambda _path, vectors: SparseExperts.from_task_vectors(vectors, RATIO),
        "rankone_moe": lambda _path, vectors: LowRankExperts.from_task_vectors(vectors, RANK, LAMBDA),
    }[method]
    one: list[Router] = []
    generator = torch.Generator().manual_seed(2)

    def router(index: int, width: int, count: int) -> Router:
        if not shared or not one:
            hidden = 2 * count if method == "rankone_moe" else width + code
            one.append(make_router(depth, width + code, count, LAMBDA, hidden=hidden, generator=generator))
        return LayerEncodedRouter(one[-1], index, code) if code else one[-1]

    return upcycle_mlps(
        pretrained,
        pretrained.state_dict(),
        [tower.state_dict() for tower in finetuned],
        make_experts=make_experts,
        make_router=router,
        routing=routing,
        selection=SoftTopK(select) if select > 0 else None,
    )


def _theirs(
    reference: SimpleNamespace,
    method: str,
    depth: int,
    routing: Routing,
    pretrained: ToyTower,
    finetuned: Sequence[ToyTower],
    *,
    select: int = -1,
    shared: bool = False,
    code: int = 0,
) -> ToyTower:
    tower = copy.deepcopy(pretrained)
    gate = reference.shared_gate(WIDTH + code, TASKS, LAMBDA, depth) if shared else None
    common = {"init_lambda": LAMBDA, "batch_first": True, "batch_reduce": routing is Routing.BATCH}
    for index in range(len(tower.layers)):
        base = copy.deepcopy(pretrained.layers[index])
        experts = [copy.deepcopy(t.layers[index]) for t in finetuned]  # they are changed
        if method == "wemoe":
            layer = reference.dense(WIDTH, base, experts, router_hidden_layers=depth, **common)
        elif method == "rankone_moe":
            layer = reference.low_rank(
                WIDTH,
                base,
                experts,
                router_hidden_layers=depth,
                rank_k=RANK,
                select_k=select,
                svd_accelerator="cpu",
                **common,
            )
        elif gate is None:
            layer = reference.sparse(WIDTH, base, experts, router_hidden_layers=depth, tv_prune_ratio=RATIO, **common)
        else:
            layer = reference.sparse_shared(
                WIDTH,
                base,
                experts,
                router_hidden_layers=depth,
                tv_prune_ratio=RATIO,
                sharedgate=gate,
                layer_idx=index,
                position_encoding=bool(code),
                position_encoding_dim=code,
                **common,
            )
        tower.layers[index] = layer
    return tower


def _router_pairs(ours: ToyTower, theirs: ToyTower) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The parameters of all routers in both, in the same order, a shared router's once."""
    pairs = {
        id(own): (own, other)
        for layer, reference in zip(ours.layers, theirs.layers, strict=True)
        for own, other in zip(layer.router.parameters(), reference.gate.parameters(), strict=True)
    }
    return list(pairs.values())


def _distance(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm().clamp_min(1e-12)).item()
