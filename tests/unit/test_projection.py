"""Linear layers with experts chosen by projection, and the method that makes them."""

from __future__ import annotations

import pytest
import torch
from helpers import ToyTower, random_linear, random_task_vectors, toy_states
from runs import random_tower
from torch.nn import functional as F

from fusion_merge import CLIPVisionModelPool, MergedCLIPVisionModel, SmileAlgorithm
from fusion_merge.errors import CheckpointError, ConfigError, ModelError
from fusion_merge.moe.experts import TaskVector
from fusion_merge.moe.projection import (
    ProjectionMoELinear,
    empty_projection,
    projection_layer,
    projection_layers,
    upcycle_linears,
)

N, OUT, IN = 3, 7, 5


def layer(**options) -> tuple[ProjectionMoELinear, list[TaskVector], torch.nn.Linear]:
    base, vectors = random_linear(IN, OUT), random_task_vectors(N, OUT, IN)
    return projection_layer(base, vectors, **{"rank": -1, "gate_rank": 2, "top_k": 1} | options), vectors, base


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(2))


def test_a_token_takes_the_expert_on_whose_subspace_it_projects_most():
    """The definition, token by token, with the whole decomposition of the library that computes it."""
    made, vectors, base = layer()
    x = tokens(11)
    subspaces = [torch.linalg.svd(v.weight).Vh[:2] for v in vectors]
    for token, output in zip(x, made(x), strict=True):
        chosen = vectors[max(range(N), key=lambda n: (subspaces[n] @ token).norm().item())]
        expected = F.linear(token, base.weight + chosen.weight, base.bias + chosen.bias)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_all_experts_are_weighted_by_the_softmax_of_their_projections():
    made, vectors, base = layer(top_k=N)
    x = tokens(4)
    shares = made.scores(x).softmax(dim=-1)  # (4, N)
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(4))
    weight = base.weight + torch.einsum("tn,noi->toi", shares, torch.stack([v.weight for v in vectors]))
    bias = base.bias + shares @ torch.stack([v.bias for v in vectors])
    torch.testing.assert_close(made(x), torch.einsum("toi,ti->to", weight, x) + bias, rtol=1e-4, atol=1e-5)


def test_two_of_three_experts_share_the_whole_weight():
    made, vectors, base = layer(top_k=2)
    x = tokens(1)
    top = made.scores(x)[0].topk(2)
    shares = top.values.softmax(dim=0)
    weight = base.weight + sum(s * vectors[i].weight for s, i in zip(shares, top.indices, strict=True))
    bias = base.bias + sum(s * vectors[i].bias for s, i in zip(shares, top.indices, strict=True))
    torch.testing.assert_close(made(x), F.linear(x, weight, bias), rtol=1e-4, atol=1e-5)


def test_experts_are_the_best_approximations_of_their_rank():
    made, vectors, _ = layer(rank=2)
    for n, vector in enumerate(vectors):
        u, s, vh = torch.linalg.svd(vector.weight, full_matrices=False)
        torch.testing.assert_close(made.left[n] @ made.right[n], (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-4, atol=1e-5)


def test_the_gate_may_be_of_the_fine_tuned_weights():
    made, vectors, base = layer(gate_on_difference=False)
    for n, vector in enumerate(vectors):
        expected = torch.linalg.svd(base.weight + vector.weight).Vh[:2]
        torch.testing.assert_close(made.gate[n].T @ made.gate[n], expected.T @ expected, rtol=1e-4, atol=1e-5)


def test_an_output_depends_on_no_other_token():
    made, _, _ = layer()
    x = tokens(2, 3)
    alone = torch.stack([made(token[None])[0] for token in x.reshape(-1, IN)]).reshape(2, 3, OUT)
    torch.testing.assert_close(made(x), alone)


def test_an_expert_that_changes_nothing_is_not_preferred():
    vectors = random_task_vectors(N, OUT, IN)
    vectors[1] = TaskVector(torch.zeros(OUT, IN), torch.zeros(OUT))
    made = projection_layer(random_linear(IN, OUT), vectors, rank=2, gate_rank=2, top_k=1)
    assert (made.scores(tokens(20))[:, 1] == 0).all()
    assert (made.scores(tokens(20)).argmax(dim=-1) != 1).all()


def test_directions_that_are_nothing_but_rounding_attract_no_token():
    """A LoRA adapter, which knows its rank, and the same weights in a file give the same choices."""
    generator = torch.Generator().manual_seed(0)
    base = random_linear(32, 40)
    factors = [(torch.randn(40, 3, generator=generator), torch.randn(3, 32, generator=generator)) for _ in range(N)]
    exact = [TaskVector(left @ right, torch.zeros(40), (left, right)) for left, right in factors]
    rounded = [TaskVector((base.weight + v.weight) - base.weight, v.bias) for v in exact]
    made = [projection_layer(base, v, rank=3, gate_rank=8, top_k=1) for v in (exact, rounded)]
    for layer_made in made:
        assert ((layer_made.gate.norm(dim=2) - 1).abs() < 1e-5).sum() == 3 * N
        assert (layer_made.gate[:, 3:] == 0).all()
    x = torch.randn(50, 32, generator=generator)
    torch.testing.assert_close(made[0](x), made[1](x), rtol=1e-3, atol=1e-3)


def test_more_experts_than_there_are_cannot_be_taken():
    with pytest.raises(ConfigError, match="`top_k`=4 is not in 1-3"):
        layer(top_k=4)


def test_a_spec_gives_a_layer_of_the_same_shapes():
    made, _, base = layer(rank=2, gate_rank=3, top_k=2)
    empty = empty_projection(made.spec(), base)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in made.state_dict().items()}
    assert empty.top_k == 2
    with pytest.raises(ConfigError, match="kind `other` is unknown"):
        empty_projection(made.spec() | {"kind": "other"}, base)


def test_layers_that_no_model_changed_stay_plain():
    tower, finetuned = toy_states()
    pretrained = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    for state in finetuned:
        for part in ("weight", "bias"):
            state[f"layers.0.fc2.{part}"] = pretrained[f"layers.0.fc2.{part}"].clone()
    model = ToyTower()

    def make(linear, vectors):
        return projection_layer(linear, vectors, rank=2, gate_rank=1, top_k=1)

    changed = upcycle_linears(model, pretrained, finetuned, make)
    assert changed == ["layers.0.fc1", "layers.1.fc1", "layers.1.fc2"]
    assert list(projection_layers(model)) == changed
    assert torch.equal(model.layers[0].fc2.weight, pretrained["layers.0.fc2.weight"])


# SMILE


def smile(**options) -> SmileAlgorithm:
    return SmileAlgorithm(**{"k": -1, "gate_k": 2} | options)


def pixels() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_every_linear_layer_of_the_tower_is_routed(modelpool):
    layers = projection_layers(smile().run(modelpool))
    assert len(layers) == 2 * 6
    assert {name.split(".")[-1] for name in layers} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


def test_one_task_s_copies_give_that_task_s_model(pool_dir):
    """Whichever expert a token takes, it is the same; what is no linear layer is averaged, and so the same too."""
    models = {"_pretrained_": str(pool_dir / "pretrained"), "a": str(pool_dir / "cats"), "b": str(pool_dir / "cats")}
    pool = CLIPVisionModelPool(models)
    merged = smile(average_experts=True).run(pool)
    with torch.no_grad():
        expected = pool.load_model("a")(pixels()).pooler_output
        torch.testing.assert_close(merged(pixels()).pooler_output, expected, rtol=1e-3, atol=1e-4)


def test_what_is_no_linear_layer_is_pretrained_or_averaged(modelpool):
    name = "encoder.layers.0.layer_norm1.weight"
    base = modelpool.state("_pretrained_")[name]
    mean = sum(modelpool.state(task)[name] for task in modelpool.model_names) / 2
    for average, expected in ((False, base), (True, mean)):
        own = smile(average_experts=average).run(modelpool).vision_model.state_dict()[name]
        torch.testing.assert_close(own, expected)


def test_a_saved_model_computes_the_same_without_the_pool(modelpool, tmp_path):
    model = smile(k=4, top_k=2).run(modelpool)
    with torch.no_grad():
        expected = model(pixels()).pooler_output
        model.save_pretrained(tmp_path / "merged")
        loaded = MergedCLIPVisionModel.from_pretrained(tmp_path / "merged")
        assert torch.equal(loaded(pixels()).pooler_output, expected)
    assert loaded.config.tasks == modelpool.model_names


def test_a_configuration_that_routes_no_linear_layer_is_refused(modelpool, tmp_path):
    model = smile().run(modelpool)
    model.config.linears["encoder.layers.9.mlp.fc1"] = next(iter(model.config.linears.values()))
    model.save_pretrained(tmp_path / "merged")
    with pytest.raises(CheckpointError, match=r"routes `encoder\.layers\.9\.mlp\.fc1`, which is not a linear layer"):
        MergedCLIPVisionModel.from_pretrained(tmp_path / "merged")


def test_no_plain_tower_does_the_same(modelpool):
    model = smile().run(modelpool)
    for ask in (lambda: model.task_model("cats"), lambda: model.measure("cats", [pixels()])):
        with pytest.raises(ModelError, match="`smile` are chosen for each token"):
            ask()


def test_the_skeleton_has_the_shapes_of_the_model(modelpool):
    method = smile(k=3)
    made, bare = method.run(modelpool), method.skeleton(modelpool.config(), 2)
    shapes = [{n: t.shape for n, t in model.own_state().items() if "task_c" not in n} for model in (made, bare)]
    assert shapes[0] == shapes[1]
    assert all(parameter.is_meta for parameter in bare.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k": 17}, "`k`=17 is not in 1-16"),
        ({"gate_k": 0}, "`gate_k`=0"),
        ({"top_k": 3}, "`top_k`=3 is above the number of experts, 2"),
    ],
)
def test_ranks_that_no_layer_has_are_refused(options, match, modelpool):
    with pytest.raises(ConfigError, match=match):
        smile(**options).run(modelpool)


def test_models_that_are_all_pretrained_are_refused(pool_dir):
    same = {name: str(pool_dir / "pretrained") for name in ("_pretrained_", "a", "b")}
    with pytest.raises(ModelError, match="no fine-tuned model differs"):
        smile().run(CLIPVisionModelPool(same))


def test_another_tower_is_none():
    assert projection_layers(random_tower(0)) == {}
