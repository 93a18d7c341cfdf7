"""The adaptation loop: entropy minimisation of few parameters, such as routers, on unlabelled images."""

from __future__ import annotations

import copy
import logging
import math
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
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from fusion_merge.adaptation.guard import CollapseGuard
from fusion_merge.adaptation.objectives import Objective
from fusion_merge.adaptation.progress import Progress
from fusion_merge.adaptation.runtime import (
    any_process,
    averaged,
    check_precision,
    finish_logs,
    gathered,
    log_metrics,
)
from fusion_merge.errors import AdaptationError, ConfigError, nearest, reason
from fusion_merge.models.clip import pooled_output
from fusion_merge.moe import RoutedBlock
from fusion_merge.processes import together

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
        resumed_at: the step that this run went on from; 0 if it began at the beginning.
        interrupted: whether it ended early, by Ctrl-C.
        entropy: for each task, the entropy of each step, in nats; the mean over processes.
        collapsed: tasks that collapsed to one class, and the step at which that began.
        seconds: how long it took.
        trained: how many numbers were adapted.
    """

    steps: int = 0
    resumed_at: int = 0
    interrupted: bool = False
    entropy: dict[str, list[float]] = field(default_factory=dict)
    collapsed: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    trained: int = 0

    def told(self) -> dict[str, Any]:
        """Return what a report says of it, as plain values: all but the course of the entropy."""
        return {name: value for name, value in vars(self).items() if name != "entropy"}


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
    progress: Progress | None = None,
    what: str = "routers",
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
        progress: where the state is kept, and where to go on from; `streams` must begin at its step.
        what: what the parameters are, in a word, for messages.

    Raises:
        AdaptationError: if the loss of a task is not a number; the parameters are the last ones with which every loss
            was a number.
        ConfigError: if there is no such optimizer, or no task, or if the precision is too low to train in.
    """
    if not streams:
        raise ConfigError("there is no task to adapt on; give at least one")
    check_precision(fabric)
    record = AdaptationRecord(entropy={name: [] for name in streams}, trained=sum(p.numel() for p in parameters))
    guard = CollapseGuard({name: stream.num_classes for name, stream in streams.items()})
    _leave_frozen_tensors_alone(model)
    wrapped, optim = fabric.setup(model, make_optimizer(optimizer, parameters, lr))
    wrapped.eval()
    update = _Update(parameters, optim, what)
    scaling = fabric.strategy.precision
    found = copy.deepcopy(scaling.state_dict())  # of the loss, where precision is mixed
    if progress is not None:
        with together():
            scaling.load_state_dict(progress.restore(record, guard, parameters, optim, update.before))
        record.resumed_at = record.steps
    for step in range(record.steps):  # so that the log is whole, whatever became of the earlier one
        log_metrics(fabric, {f"entropy/{name}": values[step] for name, values in record.entropy.items()}, step)
    start = time.perf_counter() - record.seconds
    try:
        with (
            _interruptible() as interrupted,
            _global_batches(model, fabric),
            _bar(record, max_steps, fabric, what) as bar,
        ):
            for step in bar:
                with together():  # an image that one process cannot read ends all of them
                    pixels = {name: next(stream.batches)[0] for name, stream in streams.items()}
                losses, predictions = _gradient(wrapped, optim, streams, pixels, fabric, objective, use_grad_accumulate)
                _refuse_nan(losses, update, step)
                update.take(step)
                metrics = _take_down(record, guard, losses, predictions)
                _tell(bar, metrics["entropy/mean"], record.steps, max_steps, fabric)
                record.seconds = time.perf_counter() - start
                record.interrupted = any_process(fabric, interrupted.is_set())
                last = record.interrupted or record.steps == max_steps
                if progress is not None and (last or progress.due(record.steps)):
                    with together():
                        if fabric.is_global_zero:
                            progress.save(record, guard, parameters, optim, update.before, scaling.state_dict())
                log_metrics(fabric, metrics, step)
                if record.interrupted:
                    _tell_of_interruption(record.steps, max_steps, what, kept=progress is not None)
                    break
    finally:
        finish_logs(fabric)
        scaling.load_state_dict(found)  # another adaptation with this Fabric begins as this one did
    return record


def _bar(record: AdaptationRecord, max_steps: int, fabric: Fabric, what: str) -> Any:
    return tqdm(
        range(record.steps, max_steps),
        initial=record.steps,
        total=max_steps,
        desc=f"adapting {what}",
        unit="step",
        disable=None if fabric.is_global_zero else True,
    )


def _take_down(
    record: AdaptationRecord, guard: CollapseGuard, losses: Mapping[str, float], predictions: Mapping[str, Tensor]
) -> dict[str, float]:
    """Put a step that was taken into the record, and return what is logged of it."""
    metrics = {"entropy/mean": sum(losses.values()) / len(losses)}
    for name, loss in losses.items():
        record.entropy[name].append(loss)
        metrics[f"entropy/{name}"] = loss
        metrics[f"top_class_share/{name}"] = guard.update(record.steps, name, predictions[name])
    record.steps += 1
    record.collapsed = guard.collapsed
    return metrics


def _tell(bar: Any, entropy: float, steps: int, max_steps: int, fabric: Fabric) -> None:
    """Show how far adaptation is: on the bar, or where there is no terminal in ten lines."""
    bar.set_postfix(entropy=f"{entropy:.3f}")
    if bar.disable and fabric.is_global_zero and steps % max(1, max_steps // 10) == 0:
        log.info("step %d of %d, entropy %.3f", steps, max_steps, entropy)


def _tell_of_interruption(steps: int, max_steps: int, what: str, *, kept: bool) -> None:
    log.warning(
        "interrupted after step %d of %d: going on with the %s as they are (Ctrl-C again ends the run%s)",
        steps,
        max_steps,
        what,
        "; `method.resume=true` takes up the adaptation here" if kept else "",
    )


def _gradient(
    model: Any,
    optimizer: torch.optim.Optimizer,
    streams: Mapping[str, TaskStream],
    pixels: Mapping[str, Tensor],
    fabric: Fabric,
    objective: Objective,
    use_grad_accumulate: bool,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Form the gradient of one batch of each task; return each task's loss and predictions, those of all processes."""
    losses: dict[str, Tensor] = {}
    predictions: dict[str, Tensor] = {}
    optimizer.zero_grad()
    for index, (name, stream) in enumerate(streams.items()):
        last = index == len(streams) - 1
        with fabric.no_backward_sync(model, enabled=use_grad_accumulate and not last):
            logits = stream.head(pooled_output(model(pixel_values=fabric.to_device(pixels[name]))))
            loss = objective(logits)
            if use_grad_accumulate:
                fabric.backward(loss)
                loss = loss.detach()
        losses[name] = loss
        predictions[name] = gathered(fabric, logits.detach().argmax(dim=-1))
    stacked = torch.stack(list(losses.values()))
    if not use_grad_accumulate:
        fabric.backward(stacked.sum())
    values = averaged(fabric, stacked.detach()).tolist()
    return dict(zip(losses, values, strict=True)), predictions


@contextmanager
def _global_batches(model: nn.Module, fabric: Fabric) -> Iterator[None]:
    """Under batch routing, let all processes share the merged weights of the global batch."""
    layers = [m for m in model.modules() if isinstance(m, RoutedBlock)] if fabric.world_size > 1 else []
    for layer in layers:
        layer.over_processes = True
    try:
        yield
    finally:
        for layer in layers:
            layer.over_processes = False


class _Update:
    """Steps of an optimizer that can be taken back, so that a step gone wrong spoils nothing."""

    def __init__(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, what: str) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self.what = what
        self.before: list[Tensor] = []

    def take(self, step: int) -> None:
        self.before = [p.detach().clone() for p in self._parameters]
        try:
            self._optimizer.step()
        except RuntimeError as error:  # such as a step that no float can hold
            self.take_back()
            raise AdaptationError(
                f"the optimiser fails at step {step} ({reason(error)}); try a smaller `lr`"
            ) from error
        if not all(torch.isfinite(p).all() for p in self._parameters):
            self.take_back()
            raise AdaptationError(
                f"the {self.what} would not be finite after step {step}; they are kept as they were before it: "
                "try a smaller `lr`, or look for broken images or weights"
            )

    def take_back(self) -> None:
        """Put back the parameters that were there before the last step, if there was one."""
        for parameter, value in zip(self._parameters, self.before, strict=False):
            parameter.data.copy_(value)


def _refuse_nan(losses: dict[str, float], update: _Update, step: int) -> None:
    for name, loss in losses.items():
        if not math.isfinite(loss):
            update.take_back()
            raise AdaptationError(
                f"the loss of task `{name}` is {loss} at step {step}; the {update.what} are the last ones with which "
                "every loss was a number: try a smaller `lr`, or look for broken images or weights"
            )


def _leave_frozen_tensors_alone(model: nn.Module) -> None:
    """Tell DDP that only what is trained needs to be sent between processes: all of them read the same files.

    Frozen banks are large.
    """
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [*frozen, *(name for name, _ in model.named_buffers())]
    )


def make_optimizer(name: str, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Make an optimizer by name, without weight decay.

    Args:
        name: one of `OPTIMIZERS`.
        parameters: what it trains.
        lr: the learning rate, above 0.

    Raises:
        ConfigError: if there is no such optimizer.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"`optimizer`={name!r} is unknown; {nearest(name, OPTIMIZERS)}")
    return OPTIMIZERS[name](parameters, lr=lr, weight_decay=0.0)


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
