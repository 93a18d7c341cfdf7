"""What every routed method promises about tasks: they are found, added, dropped, and kept on disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import same_state

from fusion_merge import MergedCLIPVisionModel, get_method, list_methods
from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.models.clip import pooled_output
from fusion_merge.report.unknown_task import give_heads, unknown_task_scores

ROUTED = [name for name in list_methods() if issubclass(get_method(name), MoEMethod)]
SMALL: dict[str, dict[str, Any]] = {"rankone_moe": {"rank_k": 4}, "fusion_moe": {"rank_k": 4}}
"""What a method needs besides, to fit towers that are 16 wide."""


@pytest.mark.parametrize("targets", ["mlp", "all"])
@pytest.mark.parametrize("name", ROUTED)
def test_tasks_come_and_go_and_every_state_is_kept_on_disk(name, targets, modelpool, taskpool, tmp_path):
    method = get_method(name)(max_steps=2, batch_size=4, num_workers=0, targets=targets, **SMALL.get(name, {}))
    model = method.run(modelpool, taskpool)
    give_heads(model, taskpool)
    pixels = torch.stack([image for image, _ in taskpool.images("dogs")])

    def check(tasks: list[str], step: str) -> None:
        assert model.config.tasks == tasks
        model.save_pretrained(tmp_path / step)
        again = MergedCLIPVisionModel.from_pretrained(tmp_path / step)
        assert same_state(again.own_state(), model.own_state())
        for by in ("agreement", "projection"):
            first, second = model.predict(pixels, by=by), again.predict(pixels, by=by)
            assert first.tasks == second.tasks
            assert first.names == second.names
            assert set(first.tasks) <= set(tasks)
            assert torch.equal(first.scores, second.scores)

    check(["cats", "dogs"], "merged")
    head, names = taskpool.head("dogs"), taskpool.task("dogs").classnames
    model.add_task("hounds", modelpool.load_model("dogs"), pixels, head=head, classnames=names)
    check(["cats", "dogs", "hounds"], "grown")
    model.drop_task("dogs")
    check(["cats", "hounds"], "shrunk")
    with torch.no_grad():
        logits = head(pooled_output(model(pixels)))
    assert torch.equal(model.predict(pixels, "hounds").labels, logits.argmax(dim=1))


@pytest.mark.parametrize("by", ["agreement", "projection"])
@pytest.mark.parametrize("name", ROUTED)
def test_a_class_counts_only_where_its_task_is_right(name, by, modelpool, taskpool):
    method = get_method(name)(max_steps=2, batch_size=4, num_workers=0, **SMALL.get(name, {}))
    model = method.run(modelpool, taskpool)
    give_heads(model, taskpool)
    from fusion_merge.pools.loaders import Placement

    scores = unknown_task_scores(model, taskpool, {"unknown_task": by}, Placement())
    for task in ("cats", "dogs"):
        images, labels = zip(*((image, label) for image, label in taskpool.images(task)), strict=True)
        answer = model.predict(torch.stack(images), by=by)
        found = torch.tensor([name == task for name in answer.tasks])
        right = found & (answer.labels == torch.tensor(labels))
        assert scores[task]["accuracy"] == pytest.approx(right.float().mean().item())
        assert scores[task]["task_accuracy"] == pytest.approx(found.float().mean().item())
    assert scores["average"]["accuracy"] == pytest.approx((scores["cats"]["accuracy"] + scores["dogs"]["accuracy"]) / 2)
