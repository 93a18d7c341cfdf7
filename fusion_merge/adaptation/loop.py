"""The adaptation loop: few parameters, such as routers, are adapted on unlabelled images."""

from __future__ import annotations

import copy
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from fusion_merge.adaptation.guard import CollapseGuard
from fusion_merge.adaptation.optimization import LearningRate, Update, make_optimizer
from fusion_merge.adaptation.passes import Passes, Seen, TaskStream
from fusion_merge.adaptation.progress import Progress
from fusion_merge.adaptation.rollback import Intervention, RollbackGuard
from fusion_merge.adaptation.runtime import (
    any_process,
    check_precision,
    finish_logs,
    log_metrics,
)
from fusion_merge.errors import ConfigError
from fusion_merge.moe import RoutedBlock
from fusion_merge.processes import together

log = logging.getLogger(__name__)


@dataclass
class AdaptationRecord:
    """What happened during adaptation.

    Attributes:
        steps: how many steps were taken.
        resumed_at: the step that this run went on from; 0 if it began at the beginning.
        interrupted: whether it ended early, by Ctrl-C.
        measure: what was minimised: `entropy`, in nats, or the `loss` of another objective.
        losses: for each task, the objective's value at each step, over all processes, even if another is trained by.
        collapsed: tasks that collapsed to one class, and the step at which that began.
        interventions: what was done for tasks that degraded, where a guard watched them; see `Intervention`.
        stopped: why adaptation ended early, if the guard ended it.
        seconds: how long it took.
        trained: how many numbers were adapted.
    """

    steps: int = 0
    resumed_at: int = 0
    interrupted: bool = False
    measure: str = "entropy"
    losses: dict[str, list[float]] = field(default_factory=dict)
    collapsed: dict[str, int] = field(default_factory=dict)
    interventions: list[Intervention] = field(default_factory=list)
    stopped: str | None = None
    seconds: float = 0.0
    trained: int = 0

    @property
    def taken_back(self) -> list[tuple[int, str]]:
        """The steps at which a guard put earlier parameters back, and for which tasks."""
        return [(done.step, done.task) for done in self.interventions]

    def told(self) -> dict[str, Any]:
        """Return what a report says of it, as plain values: all but the course of the losses."""
        told = {name: value for name, value in vars(self).items() if name != "losses"}
        return told | {"interventions": [asdict(done) for done in self.interventions]}


def adapt(
    model: nn.Module,
    parameters: list[nn.Parameter],
    streams: Mapping[str, TaskStream],
    *,
    fabric: Fabric,
    objective: Callable[..., Tensor],
    optimizer: str = "adam",
    lr: float = 1e-4,
    lr_schedule: str = "constant",
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_steps: int = 1000,
    use_grad_accumulate: bool = True,
    mixed_tasks: bool = False,
    rollback: bool = False,
    patience: int = 0,
    progress: Progress | None = None,
    what: str = "routers",
) -> AdaptationRecord:
    r"""Minimise the sum over tasks of the objective, by the given parameters alone.

    .. math:: \min_\phi \sum_n \frac1B \sum_{i \le B} \ell\big(z_n(x_{ni}; \phi)\big), \qquad
              \text{as published } \ell(z) = H(\operatorname{softmax} z)

    Each step takes one batch of each task. Ctrl-C ends adaptation after the step under way and keeps the parameters
    as they are; a second one interrupts for good.

    Args:
        model: the model, called with `pixel_values`; changed in place.
        parameters: what is trained.
        streams: for each task, its batches and head.
        fabric: where to compute.
        objective: a scalar of one task's logits; an `Objective` that needs them is given its expert's too.
        optimizer: one of `OPTIMIZERS`.
        lr: the highest learning rate, above 0.
        lr_schedule: how the learning rate goes on after warm-up; see `LearningRate`.
        warmup_steps: steps over which the learning rate rises.
        weight_decay: the optimiser's, at least 0.
        max_steps: how many steps, at least 0.
        use_grad_accumulate: run backward after each task: the same gradient in less memory.
        mixed_tasks: put the batches of all tasks through the model as one; they must be routed sample by sample.
        rollback: watch the tasks by a `RollbackGuard`, which takes back what makes one worse.
        patience: steps without improvement after which that guard ends adaptation; 0 never does.
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
    measure = str(getattr(objective, "measure", "entropy"))
    numbers = sum(p.numel() for p in parameters)
    record = AdaptationRecord(measure=measure, losses={name: [] for name in streams}, trained=numbers)
    num_classes = {name: stream.num_classes for name, stream in streams.items()}
    guard = CollapseGuard(num_classes)
    asked = all(stream.expert is not None for stream in streams.values())
    rescue = asked and not getattr(objective, "asks_experts_alone", False)
    keeper = RollbackGuard(num_classes, parameters, patience=patience, may_ask_experts=rescue) if rollback else None
    _leave_frozen_tensors_alone(model)
    wrapped, optim = fabric.setup(model, make_optimizer(optimizer, parameters, lr, weight_decay))
    wrapped.eval()
    update = Update(parameters, optim, LearningRate(lr, lr_schedule, warmup_steps, max_steps), what)
    passes = Passes(wrapped, streams, fabric, objective, use_grad_accumulate, mixed_tasks, keeper)
    scaling = fabric.strategy.precision
    found = copy.deepcopy(scaling.state_dict())  # of the loss, where precision is mixed
    if progress is not None:
        with together():
            scaling.load_state_dict(progress.restore(record, guard, parameters, optim, update.before, keeper))
        record.resumed_at = record.steps
    if keeper is not None and keeper.stopped is not None:  # it had ended before it was taken up again
        record.stopped, max_steps = keeper.stopped, record.steps
    for step in range(record.steps):  # so that the log is whole, whatever became of the earlier one
        log_metrics(fabric, {f"{measure}/{name}": values[step] for name, values in record.losses.items()}, step)
    start = time.perf_counter() - record.seconds
    try:
        with (
            _interruptible() as interrupted,
            _global_batches(model, fabric),
            _bar(record, max_steps, fabric, what) as bar,
        ):
            for step in bar:
                with together():  # an image that one process cannot read ends all of them
                    batches = {name: next(stream.batches) for name, stream in streams.items()}
                seen = passes.gradient(batches, optim)
                update.refuse_nan(seen.losses, step)
                update.take(step, keeper.pace if keeper is not None else 1.0)
                metrics = _take_down(record, guard, seen)
                if keeper is not None:
                    if keeper.update(step, seen.means, seen.agreement, update.before, optim, seen.images):
                        update.before = [p.detach().clone() for p in parameters]
                    record.interventions, record.stopped = keeper.interventions, keeper.stopped
                _tell(bar, measure, metrics[f"{measure}/mean"], record.steps, max_steps, fabric)
                record.seconds = time.perf_counter() - start
                record.interrupted = any_process(fabric, interrupted.is_set())
                last = record.interrupted or record.stopped is not None or record.steps == max_steps
                if progress is not None and (last or progress.due(record.steps)):
                    with together():
                        if fabric.is_global_zero:
                            state = scaling.state_dict()
                            progress.save(record, guard, parameters, optim, update.before, state, keeper)
                log_metrics(fabric, metrics, step)
                if record.interrupted:
                    _tell_of_interruption(record.steps, max_steps, what, kept=progress is not None)
                    break
                if record.stopped is not None:
                    log.info("adaptation ends after step %d of %d: %s", record.steps, max_steps, record.stopped)
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


def _take_down(record: AdaptationRecord, guard: CollapseGuard, seen: Seen) -> dict[str, float]:
    """Put a step that was taken into the record, and return what is logged of it."""
    metrics = {f"{record.measure}/mean": sum(seen.losses.values()) / len(seen.losses)}
    for name, loss in seen.losses.items():
        record.losses[name].append(loss)
        metrics[f"{record.measure}/{name}"] = loss
        metrics[f"top_class_share/{name}"] = guard.update(record.steps, name, seen.predictions[name])
    metrics |= {f"agreement/{name}": share for name, share in seen.agreement.items()}
    record.steps += 1
    record.collapsed = guard.collapsed
    return metrics


def _tell(bar: Any, measure: str, value: float, steps: int, max_steps: int, fabric: Fabric) -> None:
    """Show how far adaptation is: on the bar, or where there is no terminal in ten lines."""
    bar.set_postfix({measure: f"{value:.3f}"})
    if bar.disable and fabric.is_global_zero and steps % max(1, max_steps // 10) == 0:
        log.info("step %d of %d, %s %.3f", steps, max_steps, measure, value)


def _tell_of_interruption(steps: int, max_steps: int, what: str, *, kept: bool) -> None:
    log.warning(
        "interrupted after step %d of %d: going on with the %s as they are (Ctrl-C again ends the run%s)",
        steps,
        max_steps,
        what,
        "; `method.resume=true` takes up the adaptation here" if kept else "",
    )


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


def _leave_frozen_tensors_alone(model: nn.Module) -> None:
    """Tell DDP that only what is trained needs to be sent between processes: all of them read the same files.

    Frozen banks are large.
    """
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [*frozen, *(name for name, _ in model.named_buffers())]
    )


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
