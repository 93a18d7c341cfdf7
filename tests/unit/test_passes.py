"""One step's passes: what is trained, and what is written down of it."""

from __future__ import annotations

import itertools
import math
from typing import Any

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


def passes_of(experts: dict[str, torch.Tensor], accumulate: bool, mixed: bool) -> tuple[Passes, Tower, nn.Linear, Any]:
    """The passes of a tower that two tasks share, with their experts' logits; its head, and its optimiser."""
    tower, head = Tower(), nn.Linear(12, 4, bias=False)
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(tower, torch.optim.SGD(tower.parameters(), lr=0.1))
    streams = {
        task: TaskStream(itertools.repeat(None), head, 4, logits.__getitem__) for task, logits in experts.items()
    }
    passes = Passes(model, streams, fabric, make_objective("entropy"), accumulate, mixed, Keeper())
    return passes, tower, head, optimizer


@pytest.fixture
def images() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {task: torch.randn(5, 3, 2, 2, generator=generator) for task in ("cats", "dogs")}


@pytest.fixture
def experts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {task: torch.randn(5, 4, generator=generator) for task in ("cats", "dogs")}


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_a_task_with_another_loss_is_trained_by_it_and_written_down_by_the_objective(
    images, experts, accumulate, mixed
):
    passes, tower, head, optimizer = passes_of(experts, accumulate, mixed)
    seen = passes.gradient({task: (pixels, torch.arange(5)) for task, pixels in images.items()}, optimizer)
    logits = {task: head(tower(pixels)) for task, pixels in images.items()}
    for task, value in seen.losses.items():
        assert value == pytest.approx(mean_entropy(logits[task]).item())
    loss = expert_labels(logits["cats"], experts["cats"], 1.0) + 0.25 * mean_entropy(logits["dogs"])
    (expected,) = torch.autograd.grad(loss, [tower.scale])
    torch.testing.assert_close(tower.scale.grad, expected)


def test_a_loss_that_is_no_number_is_written_down_whatever_the_objective_says(images, experts):
    experts["cats"][0, 0] = torch.inf
    passes, _, _, optimizer = passes_of(experts, True, False)
    seen = passes.gradient({task: (pixels, torch.arange(5)) for task, pixels in images.items()}, optimizer)
    assert math.isnan(seen.losses["cats"])
    assert math.isfinite(seen.losses["dogs"])
