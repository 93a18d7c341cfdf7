"""The adaptation loop: entropy minimisation of routers on unlabelled images."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm.auto import tqdm

from fusion_merge.adaptation.guard import CollapseGuard
from fusion_merge.adaptation.objectives import Objective
from fusion_merge.adaptation.runtime import finish_logs, log_metrics
from fusion_merge.errors import AdaptationError, ConfigError, nearest
from fusion_merge.models.clip import pooled_output

log = logging.getLogger(__name__)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class TaskStream:
    """What adaptation sees of a task: endless batches of images, and the task's head. Labels are never looked at."""

    batches: Iterator[tuple[Tensor, Any]]
    head: nn.Module
    num_classes: int


@dataclass
class AdaptationRecord:
    """What happened during adaptation.

    Attributes:
        steps: how many steps were taken.
        interrupted: whether it ended early, by Ctrl-C.
        entropy: for each task, the entropy of each step, in nats.
        collapsed: tasks that collapsed to one class, and at which step.
        seconds: how long it took.
    """

    steps: int = 0
    interrupted: bool = False
    entropy: dict[str, list[float]] = field(default_factory=dict)
    collapsed: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def adapt(
    model: nn.Module,
    parameters: list[nn.Parameter],
    streams: Mapping[str, TaskStream],
    *,
    fabric: Fabric,
    objective: Objective,
    optimizer: str = "adam",
    lr: float = 1e-4,
    max_steps: int = 1000,
    use_grad_accumulate: bool = True,
) -> AdaptationRecord:
    r"""Minimise the sum over tasks of the objective, by the given parameters alone.

    .. math:: \min_\phi \sum_n \frac1B \sum_{i \le B} H\big(\operatorname{softmax} z_n(x_{ni}; \phi)\big)

    Each step takes one batch of each task. Ctrl-C ends adaptation after the step under way and keeps the parameters
    as they are; a second one interrupts for good.

    Args:
        model: the model, called with `pixel_values`; changed in place.
        parameters: what is trained.
        streams: for each task, its batches and head.
        fabric: where to compute.
        objective: a scalar of one task's logits.
        optimizer: one of `OPTIMIZERS`, without weight decay or schedule.
        lr: the learning rate, above 0.
        max_steps: how many steps, at least 0.
        use_grad_accumulate: run backward after each task: the same gradient in less memory.

    Raises:
        AdaptationError: if the loss of a task is not a number; the parameters stay as they were before that step.
        ConfigError: if there is no such optimizer, or no task.
    """
    if not streams:
        raise ConfigError("there is no task to adapt on; give at least one")
    record = AdaptationRecord(entropy={name: [] for name in streams})
    guard = CollapseGuard({name: stream.num_classes for name, stream in streams.items()})
    wrapped, optim = fabric.setup(model, make_optimizer(optimizer, parameters, lr))
    wrapped.eval()
    start = time.perf_counter()
    bar = tqdm(
        range(max_steps),
        desc="adapting routers",
        unit="step",
        disable=None if fabric.is_global_zero else True,
    )
    try:
        with _interruptible() as interrupted, bar:
            for step in bar:
                metrics = _step(wrapped, optim, streams, fabric, objective, step, guard, use_grad_accumulate)
                record.steps = step + 1
                record.collapsed = guard.collapsed
                for name in streams:
                    record.entropy[name].append(metrics[f"entropy/{name}"])
                bar.set_postfix(entropy=f"{metrics['entropy/mean']:.3f}")
                log_metrics(fabric, metrics, step)
                if interrupted.is_set():
                    record.interrupted = True
                    log.warning(
                        "interrupted after step %d of %d: going on with the routers as they are",
                        step + 1,
                        max_steps,
                    )
                    break
    finally:
        finish_logs(fabric)
    record.seconds = time.perf_counter() - start
    return record


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    streams: Mapping[str, TaskStream],
    fabric: Fabric,
    objective: Objective,
    step: int,
    guard: CollapseGuard,
    use_grad_accumulate: bool,
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    losses = []
    optimizer.zero_grad()
    for index, (name, stream) in enumerate(streams.items()):
        last = index == len(streams) - 1
        pixels = fabric.to_device(next(stream.batches)[0])
        with fabric.no_backward_sync(model, enabled=use_grad_accumulate and not last):
            logits = stream.head(pooled_output(model(pixel_values=pixels)))
            loss = objective(logits)
            metrics[f"entropy/{name}"] = value = loss.item()
            if not torch.isfinite(loss):
                raise AdaptationError(
                    f"the loss of task `{name}` is {value} at step {step}; the routers are those of the step before: "
                    "try a smaller `lr`, or look for broken images or weights"
                )
            if use_grad_accumulate:
                fabric.backward(loss)
            else:
                losses.append(loss)
        metrics[f"top_class_share/{name}"] = guard.update(step, name, logits)
    if losses:
        fabric.backward(torch.stack(losses).sum())
    optimizer.step()
    values = [metrics[f"entropy/{name}"] for name in streams]
    return {"entropy/mean": sum(values) / len(values), **metrics}


def make_optimizer(name: str, parameters: list[nn.Parameter], lr: float, **options: Any) -> torch.optim.Optimizer:
    """Make an optimizer by name.

    Args:
        name: one of `OPTIMIZERS`.
        parameters: what it trains.
        lr: the learning rate, above 0.
        **options: further options of that optimizer.

    Raises:
        ConfigError: if there is no such optimizer.
    """
    if name.lower() not in OPTIMIZERS:
        raise ConfigError(f"`optimizer`={name!r} is unknown; {nearest(name, OPTIMIZERS)}")
    return OPTIMIZERS[name.lower()](parameters, lr=lr, **options)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag, so that no step is left half done; the second one interrupts."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = signal.getsignal(signal.SIGINT)

    def on_interrupt(_signal: int, _frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
