"""One step's passes: what is trained, and what is written down of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from fusion_merge.adaptation.objectives import expert_labels, make_objective, mean_entropy
from fusion_merge.adaptation.passes import Passes, TaskStream


class Tower(nn.Module):
    """Images of 3 × 2 × 2 to 12 features, scaled by what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 12))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.scale * pixel_values.flatten(1)


class Keeper:
    """A guard that gave the cats their expert's labels, and the dogs a quarter of their weight."""

    def by_expert(self, task: str) -> bool:
        return task == "cats"

    def weight(self, task: str) -> float:
        return {"cats": 1.0, "dogs": 0.25}[task]


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_a_task_with_another_loss_is_trained_by_it_and_written_down_by_the_objective(accumulate, mixed):
    generator = torch.Generator().manual_seed(0)
    images = {task: torch.randn(5, 3, 2, 2, generator=generator) for task in ("cats", "dogs")}
    experts = {task: torch.randn(5, 4, generator=generator) for task in images}
    head = nn.Linear(12, 4, bias=False)
    fabric = Fabric(accelerator="cpu", devices=1)
    tower = Tower()
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    model, optimizer = fabric.setup(tower, optimizer)
    streams = {task: TaskStream(itertools.repeat(None), head, 4, experts[task].__getitem__) for task in images}
    passes = Passes(model, streams, fabric, make_objective("entropy"), accumulate, mixed, Keeper())

    seen = passes.gradient({task: (pixels, torch.arange(5)) for task, pixels in images.items()}, optimizer)

    logits = {task: head(tower(pixels)) for task, pixels in images.items()}
    for task, value in seen.losses.items():
        assert value == pytest.approx(mean_entropy(logits[task]).item())
    loss = expert_labels(logits["cats"], experts["cats"], 1.0) + 0.25 * mean_entropy(logits["dogs"])
    (expected,) = torch.autograd.grad(loss, [tower.scale])
    torch.testing.assert_close(tower.scale.grad, expected)
