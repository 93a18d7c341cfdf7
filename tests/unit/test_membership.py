"""Tasks that come to a merged model and leave it."""

from __future__ import annotations

import pytest
import torch
from helpers import copied, same_state
from runs import random_tower
from transformers import CLIPVisionModel

from fusion_merge import (
    CLIPVisionModelPool,
    EWEMoEAlgorithm,
    MergedCLIPVisionModel,
    RankOneMoEAlgorithm,
    SmileAlgorithm,
    WEMoEAlgorithm,
    set_routing,
)
from fusion_merge.errors import ConfigError, FusionMergeError, ModelError
from fusion_merge.models import membership
from fusion_merge.models.clip import module_state
from fusion_merge.moe import moe_layers
from fusion_merge.moe.refit import rows_of
from fusion_merge.pools.model_pool import PRETRAINED

METHODS = {
    "dense": WEMoEAlgorithm(init_lambda=0.2),
    "sparse_own": EWEMoEAlgorithm(tv_prune_ratio=0.5, shared_gate=False, router_hidden_layers=1),
    "sparse_shared": EWEMoEAlgorithm(tv_prune_ratio=0.5),
    "sparse_coded": EWEMoEAlgorithm(tv_prune_ratio=0.5, position_encoding=True, router_hidden_layers=1),
    "low_rank": RankOneMoEAlgorithm(rank_k=3),
    "low_rank_all": RankOneMoEAlgorithm(rank_k=3, targets="all"),
    "low_rank_select": RankOneMoEAlgorithm(rank_k=3, select_k=5, router_hidden_layers=2),
}


def _pixels(task: int, count: int = 10) -> torch.Tensor:
    """Images whose task can be told: each task has its own picture, and noise over it."""
    picture = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(50 + task))
    return picture + 0.1 * torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(task))


def _tower(modelpool) -> CLIPVisionModel:
    """A third fine-tuned tower."""
    tower = modelpool.load_model("cats")
    generator = torch.Generator().manual_seed(9)
    for parameter in tower.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return tower


def _measured(modelpool, method) -> MergedCLIPVisionModel:
    model = method.build(modelpool)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 2:
            parameter.data *= 20  # routers that tell samples apart
    set_routing(model, "sample")
    for task, name in enumerate(model.config.tasks):
        model.measure(name, [_pixels(task)])
    return model


def _bits(model) -> dict[str, torch.Tensor]:
    return copied(model.own_state())


@pytest.fixture(params=METHODS)
def model(request, modelpool) -> MergedCLIPVisionModel:
    return _measured(modelpool, METHODS[request.param])


def test_experts_of_an_added_task_are_those_of_a_merge_of_all(model, modelpool, pool_dir):
    tower = _tower(modelpool)
    before = copied(module_state(tower))
    model.add_task("birds", tower, _pixels(2))
    assert same_state(module_state(tower), before)
    models = {PRETRAINED: str(pool_dir / "pretrained"), "cats": str(pool_dir / "cats"), "dogs": str(pool_dir / "dogs")}
    processor = str(pool_dir / "pretrained")
    whole = CLIPVisionModelPool({**models, "birds": tower}, processor=processor)
    name = next(n for n, m in METHODS.items() if m.options() == model.config.method_options)
    full = METHODS[name].build(whole)
    for grown, made in zip(moe_layers(model).values(), moe_layers(full).values(), strict=True):
        for part, linear in grown.linears().items():
            given = torch.randn(2, grown.num_coefficients, generator=torch.Generator().manual_seed(0))
            pairs = zip(linear.experts.delta(given), made.linears()[part].experts.delta(given), strict=True)
            for found, expected in pairs:
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_routers_tell_of_the_new_task_by_its_images_and_know_the_old_ones(model, modelpool):
    model.add_task("birds", _tower(modelpool), _pixels(2).split(4), ridge=1e-4)
    assert model.config.tasks == ["cats", "dogs", "birds"]
    for task in range(3):
        assert model.identify(_pixels(task)).argmax(dim=1).tolist() == [task] * 10
    if model.config.shared_router or model.config.method_options.get("select_k", -1) > 0:
        return  # one last layer cannot fit each block, and a selection dampens coefficients
    own = torch.stack([model.task_coefficients[:, i].view(3, 3, -1).mean(dim=2) for i in range(len(moe_layers(model)))])
    assert (own[:, 2, 2] > 0.5).all()
    assert (own[:, :2, 2].abs() < 0.5).all()
    assert (own[:, 2, :2].abs() < 0.5).all()


def test_a_grown_model_comes_back_from_its_folder_and_so_does_a_shrunk_one(model, modelpool, tmp_path):
    model.add_task("birds", _tower(modelpool), _pixels(2))
    for step in ("grown", "shrunk"):
        if step == "shrunk":
            model.drop_task("cats")
        model.save_pretrained(tmp_path / step)
        again = MergedCLIPVisionModel.from_pretrained(tmp_path / step)
        assert same_state(again.own_state(), model.own_state())
        assert again.config.tasks == model.config.tasks == (["cats"] if step == "grown" else []) + ["dogs", "birds"]
        assert sorted(again.config.measured_tasks) == sorted(again.config.tasks)
        with torch.no_grad():
            assert torch.equal(again(_pixels(1)).pooler_output, model(_pixels(1)).pooler_output)
        again.task_model("birds")


def test_a_dropped_task_leaves_the_others_as_they_were(model):
    rows = [rows_of(layer.router) for layer in moe_layers(model).values()]
    half = [len(r) // 2 for r in rows]
    coefficients = model.task_coefficients.clone()
    model.drop_task("cats")
    for layer, before, each in zip(moe_layers(model).values(), rows, half, strict=True):
        assert torch.equal(rows_of(layer.router), before[each:])
        assert layer.num_coefficients == layer.router.num_coefficients == each
    assert model.config.tasks == model.config.measured_tasks == ["dogs"]
    assert "cats" not in model.config.models
    assert torch.equal(model.task_coefficients[0], coefficients[1, :, coefficients.shape[2] // 2 :])
    with torch.no_grad():
        assert model(_pixels(1)).pooler_output.isfinite().all()


def test_what_was_added_and_dropped_again_is_nearly_forgotten(modelpool):
    model = _measured(modelpool, METHODS["low_rank"])
    with torch.no_grad():
        before = [model(_pixels(task)).pooler_output for task in range(2)]
    model.add_task("birds", _tower(modelpool), _pixels(2))
    model.drop_task("birds")
    with torch.no_grad():
        for task, expected in enumerate(before):
            torch.testing.assert_close(model(_pixels(task)).pooler_output, expected, atol=2e-2, rtol=2e-2)


def test_a_constant_router_can_drop_but_not_add(modelpool):
    model = _measured(modelpool, WEMoEAlgorithm(router_hidden_layers=0))
    with pytest.raises(ModelError, match=r"ConstantRouter of `encoder\.layers\.0\.mlp` .* merge all tasks anew"):
        model.add_task("birds", _tower(modelpool), _pixels(2))
    model.drop_task("dogs")
    assert [layer.router.spec()["num_coefficients"] for layer in moe_layers(model).values()] == [1, 1]


def test_static_parts_move_only_where_the_pretrained_tower_is_given(modelpool):
    model = _measured(modelpool, METHODS["dense"])
    name = "post_layernorm.weight"
    before = model.vision_model.state_dict()[name].clone()
    tower, base = _tower(modelpool), modelpool.load_pretrained_model()
    vector = module_state(tower)[name] - module_state(base)[name]
    model.add_task("birds", module_state(tower), _pixels(2))
    assert torch.equal(model.vision_model.state_dict()[name], before)
    model.drop_task("birds")
    model.add_task("birds", tower, _pixels(2), pretrained=base)
    torch.testing.assert_close(model.vision_model.state_dict()[name], before + 0.2 * vector)
    model.drop_task("birds", tower, base)
    torch.testing.assert_close(model.vision_model.state_dict()[name], before)


def test_scores_of_the_model_before_are_not_those_of_the_model_after(modelpool):
    model = _measured(modelpool, METHODS["dense"])
    model.config.scores, model.config.command = {"cats": 0.9}, "fusion_merge"
    model.drop_task("dogs")
    assert (model.config.scores, model.config.command) == ({}, "")


# What cannot be done changes nothing


def _refused(model, error, match, act) -> None:
    state, config = _bits(model), model.config.to_dict()
    with pytest.raises(error, match=match):
        act()
    assert same_state(model.own_state(), state)
    assert model.config.to_dict() == config


def test_what_does_not_fit_is_refused(modelpool):
    model = _measured(modelpool, METHODS["low_rank"])
    tower, pixels = _tower(modelpool), _pixels(2)

    def adding(name="birds", source=tower, images=pixels, **options):
        return lambda: model.add_task(name, source, images, **options)

    broken = {**module_state(tower), "post_layernorm.weight": torch.full((16,), torch.nan)}
    other = random_tower(0, hidden_size=8)
    _refused(model, ModelError, "`cats` is merged already", adding("cats"))
    _refused(model, ConfigError, "is no name of a task", adding(""))
    _refused(model, ConfigError, "`ridge`=0 is not above 0", adding(ridge=0))
    _refused(model, ModelError, "the model of `birds` has `.*` of shape", adding(source=other))
    _refused(model, ModelError, "lacks", adding(source={"post_layernorm.weight": torch.ones(16)}))
    _refused(model, ModelError, "NaN", adding(source=broken))
    _refused(
        model, ModelError, "the model of `birds` is 'models/birds', which is not a model", adding(source="models/birds")
    )
    _refused(model, ModelError, r"images of `birds` are \(2, 3, 8, 8\)", adding(images=torch.zeros(2, 3, 8, 8)))
    _refused(model, ModelError, "there is no image of `birds`", adding(images=[]))
    _refused(model, ConfigError, "belong together", adding(classnames=["a"]))
    _refused(model, ModelError, "the pretrained model has `.*` of shape", adding(pretrained=other))
    _refused(model, ModelError, "did you mean `dogs`", lambda: model.drop_task("dgos"))
    _refused(model, ConfigError, "give both", lambda: model.drop_task("dogs", tower))
    model.drop_task("cats")
    _refused(model, ModelError, "`dogs` is the last task", lambda: model.drop_task("dogs"))


@pytest.mark.parametrize("name", ["dense", "sparse_coded", "low_rank_all", "low_rank_select"])
@pytest.mark.parametrize("act", ["add", "drop"])
def test_a_failure_on_the_way_changes_nothing(modelpool, monkeypatch, name, act):
    model = _measured(modelpool, METHODS[name])

    def fails(_model):
        raise MemoryError("no room")

    monkeypatch.setattr(membership, "_no_longer_as_scored", fails)
    with torch.no_grad():
        before = model(_pixels(0)).pooler_output
    adds = lambda: model.add_task("birds", _tower(modelpool), _pixels(2))  # noqa: E731
    _refused(model, MemoryError, "no room", adds if act == "add" else lambda: model.drop_task("cats"))
    with torch.no_grad():
        assert torch.equal(model(_pixels(0)).pooler_output, before)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".router." in n)


def test_tasks_that_were_not_measured_must_not_be_forgotten(modelpool):
    model = METHODS["dense"].build(modelpool)
    set_routing(model, "sample")
    model.measure("cats", [_pixels(0)])
    _refused(model, ModelError, "call `measure", lambda: model.add_task("birds", _tower(modelpool), _pixels(2)))


def test_experts_that_are_chosen_for_each_token_have_no_tasks_to_add(modelpool):
    model = SmileAlgorithm(k=4, gate_k=2).run(modelpool)
    for act in (lambda: model.add_task("x", _tower(modelpool), _pixels(2)), lambda: model.drop_task("cats")):
        with pytest.raises(FusionMergeError, match="for each token"):
            act()
