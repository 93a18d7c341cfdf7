"""The embedded pool: tasks are found, and an eighth one is added to seven, nearly as well as if all had been merged."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fusion_merge import CLIPVisionModelPool, CLIPVisionModelTaskPool, MergedCLIPVisionModel, RankOneMoEAlgorithm
from fusion_merge.models.clip import pooled_output
from fusion_merge.moe import moe_layers, set_routing
from fusion_merge.moe.features import record_last_inputs
from fusion_merge.moe.refit import Moments, grown_rows, moments, resized
from fusion_merge.zoo import tiny8

TASKS = list(tiny8.TASKS)
LAST = TASKS[-1]


@pytest.fixture(scope="module")
def tasks() -> CLIPVisionModelTaskPool:
    data = {task: f"zoo://tiny8/{task}" for task in TASKS}
    return CLIPVisionModelTaskPool(data, clip_model="zoo://tiny8/pretrained", num_workers=0)


@pytest.fixture(scope="module")
def images(tasks) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each task 164 images: the first 64 to learn from, the others to score."""
    found = {}
    for task in TASKS:
        pool = tasks.images(task)
        pairs = [pool[i] for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:164].tolist()]
        found[task] = torch.stack([p for p, _ in pairs]), torch.tensor([int(label) for _, label in pairs])
    return found


def _pool(names: Sequence[str]) -> CLIPVisionModelPool:
    return CLIPVisionModelPool({n: f"zoo://tiny8/{n.strip('_')}" for n in ("_pretrained_", *names)})


def _merged(names: Sequence[str], images) -> MergedCLIPVisionModel:
    """Merge tasks, each router by ridge regression on 64 images a task, block after block."""
    model = RankOneMoEAlgorithm(rank_k=16, init_lambda=0.125).build(_pool(names))
    set_routing(model, "sample")
    for name, block in moe_layers(model.vision_model).items():
        inputs = []
        for task in names:
            with record_last_inputs({name: block}) as record, torch.no_grad():
                model.vision_model(images[task][0][:64])
            inputs.append(record[name][0])
        each = [moments(one.unsqueeze(0)) for one in inputs]
        width = each[0].second.shape[0]
        none = Moments(torch.zeros(width, width).double(), torch.zeros(width).double())
        rows, known = torch.zeros(0, width), none
        for new in each:
            rows = grown_rows(rows, known, new, 16, 1e-3)
            known = Moments(known.second + new.second, known.mean + new.mean)
        resized(block.router, rows)
    for task in names:
        model.measure(task, [images[task][0][:64]])
    return model


@torch.no_grad()
def _accuracies(model, tasks, images, names: Sequence[str]) -> dict[str, float]:
    found = {}
    for task in names:
        pixels, labels = images[task][0][64:], images[task][1][64:]
        found[task] = (tasks.head(task)(pooled_output(model(pixels))).argmax(dim=1) == labels).float().mean().item()
    return found


@pytest.fixture(scope="module")
def all_eight(images) -> MergedCLIPVisionModel:
    return _merged(TASKS, images)


@pytest.mark.parametrize(("by", "points"), [("agreement", 3), ("projection", 6)])
def test_an_unknown_task_costs_few_points_on_images_that_were_not_looked_at(all_eight, tasks, images, by, points):
    model = all_eight
    model.set_heads({t: tasks.head(t) for t in TASKS}, {t: tasks.task(t).classnames for t in TASKS})
    known, unknown = _accuracies(model, tasks, images, TASKS), {}
    for task in TASKS:
        answer = model.predict(images[task][0][64:], by=by)
        found = torch.tensor([name == task for name in answer.tasks])
        unknown[task] = (found & (answer.labels == images[task][1][64:])).float().mean().item()
    assert sum(known.values()) / 8 > 0.9
    assert 100 * (sum(known.values()) - sum(unknown.values())) / 8 <= points


def test_an_eighth_task_is_added_to_seven_and_dropped_again(all_eight, tasks, images):
    seven = TASKS[:-1]
    model = _merged(seven, images)
    before = _accuracies(model, tasks, images, seven)
    model.add_task(LAST, _pool([LAST]).load_model(LAST), images[LAST][0][:64])
    after = _accuracies(model, tasks, images, TASKS)
    full = _accuracies(all_eight, tasks, images, TASKS)
    assert after[LAST] >= full[LAST] - 0.03
    assert sum(before[t] - after[t] for t in seven) / 7 < 0.02
    model.drop_task(LAST)
    again = _accuracies(model, tasks, images, seven)
    assert sum(before[t] - again[t] for t in seven) / 7 < 0.02
