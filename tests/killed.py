"""An adaptation that a test kills, in a process of its own."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from helpers import random_linear, upcycled_toy
from torch import nn

from fusion_merge.adaptation.loop import AdaptationRecord, adapt
from fusion_merge.adaptation.objectives import mean_entropy
from fusion_merge.adaptation.passes import TaskStream
from fusion_merge.adaptation.progress import Progress
from fusion_merge.adaptation.runtime import make_fabric
from fusion_merge.moe import Routing
from fusion_merge.moe.layer import router_parameters

TASKS = ("cats", "dogs")
BELONGS_TO = {"method": "toy"}


def batches(seed: int, start: int = 0, pause: float = 0.0, broken_at: int = -1) -> Iterator[tuple[torch.Tensor, None]]:
    """Batches that are a function of their position; one may be broken."""
    for position in itertools.count(start):
        generator = torch.Generator().manual_seed(1_000_003 * seed + position)
        time.sleep(pause)
        pixels = torch.randn(4, 3, 6, generator=generator)
        yield pixels * (torch.nan if position == broken_at else 1.0), None


def adapted(
    progress: Progress | None,
    max_steps: int,
    *,
    optimizer: str = "adam",
    pause: float = 0.0,
    fabric: Any = None,
    model: nn.Module | None = None,
    broken_at: int = -1,
) -> tuple[nn.Module, AdaptationRecord]:
    """Adapt a toy from where its progress is."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = progress.step if progress is not None else 0
    heads = [random_linear(6, 4, seed=i).requires_grad_(False) for i in range(len(TASKS))]
    streams = {t: TaskStream(batches(i, start, pause, broken_at), heads[i], num_classes=4) for i, t in enumerate(TASKS)}
    model = model or upcycled_toy(routing=Routing.BATCH)

    def objective(logits: torch.Tensor) -> torch.Tensor:
        return mean_entropy(logits * (1 + 0.1 * torch.rand(1)))  # one that draws random numbers

    record = adapt(
        model,
        router_parameters(model),
        streams,
        fabric=fabric or make_fabric(accelerator="cpu"),
        objective=objective,
        optimizer=optimizer,
        lr=1e-2,
        max_steps=max_steps,
        progress=progress,
    )
    return model, record


def go_on(file: Path, max_steps: int, started: Any) -> None:
    """Go on with an adaptation, saving after every step, and tell when it begins."""
    started.set()
    adapted(Progress(file, BELONGS_TO, 1, resume=True), max_steps, pause=1e-3)
