"""Resumable progress: everything that the rest of an adaptation depends on, in one file."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from fusion_merge.adaptation.checkpoint import check_belongs
from fusion_merge.errors import CheckpointError, reason
from fusion_merge.options import LARGEST
from fusion_merge.sealed import read_about, read_sealed, write_sealed

if TYPE_CHECKING:
    from fusion_merge.adaptation.guard import CollapseGuard
    from fusion_merge.adaptation.loop import AdaptationRecord
    from fusion_merge.adaptation.rollback import RollbackGuard

log = logging.getLogger(__name__)

FORMAT = 4  # goes up whenever the same adaptation would take other steps than before
_WHAT = "adaptation progress"


@final
class Progress:
    """Keeps where an adaptation is, so that one that was killed goes on and ends in the same bits.

    Kept are the trained parameters, the optimiser's state, the step (which is also the position in every task's
    images), the state of random numbers, and what was recorded so far.

    Args:
        path: the file; it is replaced whole or not at all.
        belongs_to: what the adaptation depends on, as plain values: progress of another one is refused.
        save_every: steps between two savings, at least 1.
        resume: go on from the file, if it is there; otherwise it is replaced at the first saving.

    Raises:
        CheckpointError: if the file is there, is to be resumed from, and cannot be read or does not fit.
    """

    def __init__(self, path: Path, belongs_to: Mapping[str, Any], save_every: int, *, resume: bool = False) -> None:
        self.path = path
        self.save_every = save_every
        self._belongs_to = {"version": FORMAT, **belongs_to}
        self.step = 0
        """The step to go on from."""
        if resume and path.is_file():
            self.step = int(self._checked(read_about(path, _WHAT))["step"])
        elif resume:
            log.info("no adaptation progress in %s: starting from the first step%s", path, self._another())

    def _another(self) -> str:
        """Return how the newest progress of the method that is there differs from what was looked for, in words."""
        files = self.path.parent.glob(f"{self.path.stem.rpartition('-')[0]}-*{self.path.suffix}")
        try:
            newest = max(files, key=lambda file: file.stat().st_mtime)
            stored = read_about(newest, _WHAT)["belongs_to"]
        except (ValueError, KeyError, OSError):  # there is none, or it is no use
            return ""
        try:
            check_belongs(newest, _WHAT, stored, self._belongs_to)
        except CheckpointError as error:
            return f"; {error}"
        return ""

    def due(self, step: int) -> bool:
        """Tell whether to save after this many steps.

        Args:
            step: the number of steps taken.
        """
        return step % self.save_every == 0

    def save(
        self,
        record: AdaptationRecord,
        guard: CollapseGuard,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        before: list[Tensor],
        precision: Mapping[str, Any],
        keeper: RollbackGuard | None = None,
    ) -> None:
        """Write the state after a step.

        Args:
            record: what happened so far.
            guard: the watch over collapsing tasks.
            parameters: what is trained.
            optimizer: its optimiser.
            before: the parameters before the last step, to which a step that goes wrong goes back.
            precision: the state of the loss scaling of mixed precision, if there is any.
            keeper: the guard that takes back what makes a task worse, if there is one.

        Raises:
            FusionMergeError: if the file cannot be written; an earlier one stays whole.
        """
        tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(parameters)}
        tensors |= {f"before.{i}": value for i, value in enumerate(before)}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        tensors["random"] = torch.get_rng_state()
        for task, values in record.losses.items():
            tensors[f"loss.{task}"] = torch.tensor(values, dtype=torch.float64)
        about = {
            "step": record.steps,
            "seconds": record.seconds,
            "guard": guard.state(),
            "precision": dict(precision),
            "belongs_to": self._belongs_to,
            "keeper": None if keeper is None else keeper.state(),
        }
        tensors |= {} if keeper is None else keeper.tensors()
        write_sealed(self.path, tensors, about)

    def restore(
        self,
        record: AdaptationRecord,
        guard: CollapseGuard,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        before: list[Tensor],
        keeper: RollbackGuard | None = None,
    ) -> dict[str, Any]:
        """Put back the state that was saved, if there is a step to go on from.

        Args:
            record: what happened so far; changed.
            guard: the watch over collapsing tasks; changed.
            parameters: what is trained; changed.
            optimizer: its optimiser; changed.
            before: the parameters before the last step; changed.
            keeper: the guard that takes back what makes a task worse, if there is one; changed.

        Returns:
            The state of the loss scaling of mixed precision.

        Raises:
            CheckpointError: if the file cannot be read, is damaged, or does not fit.
        """
        if self.step == 0:
            return {}
        tensors, stored = read_sealed(self.path, _WHAT)
        about = self._checked(stored)
        state = _optimizer_state(tensors)
        self._check_tensors(tensors, state, record, parameters)
        try:
            guard.restore(about["guard"])
            if keeper is not None:
                keeper.restore(about["keeper"], tensors)
            torch.set_rng_state(tensors["random"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise self._unusable(f"its description cannot be gone on from ({reason(error)})") from error
        for index, parameter in enumerate(parameters):
            parameter.data.copy_(tensors[f"parameter.{index}"])
        before[:] = [tensors[f"before.{index}"] for index in range(len(parameters))]
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        for task in record.losses:
            record.losses[task] = tensors[f"loss.{task}"].tolist()
        record.steps, record.seconds = self.step, about["seconds"]
        record.collapsed = guard.collapsed
        record.interventions = [] if keeper is None else keeper.interventions
        log.info("going on from step %d, saved in %s", self.step, self.path)
        return dict(about["precision"])

    def forget(self) -> None:
        """Remove the file: it is not needed any more."""
        self.path.unlink(missing_ok=True)

    def _checked(self, about: dict[str, Any]) -> dict[str, Any]:
        if not about.keys() >= {"step", "seconds", "guard", "precision", "belongs_to"}:
            raise self._unusable("it does not say what it is")
        check_belongs(self.path, _WHAT, about["belongs_to"], self._belongs_to)
        step, seconds = about["step"], about["seconds"]
        if type(step) is not int or not 0 <= step <= LARGEST:
            raise self._unusable(f"`step` is {step!r}")
        if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
            raise self._unusable(f"`seconds` is {seconds!r}")
        for key in ("guard", "precision"):
            if not isinstance(about[key], dict):
                raise self._unusable(f"`{key}` is {about[key]!r}")
        if wrong := _guard_problem(about["guard"]):
            raise self._unusable(f"`guard` has {wrong}")
        return about

    def _check_tensors(
        self,
        tensors: Mapping[str, Tensor],
        state: Mapping[int, Mapping[str, Tensor]],
        record: AdaptationRecord,
        parameters: list[nn.Parameter],
    ) -> None:
        """Refuse tensors that are not those of this adaptation, before anything is put back."""
        expected = {f"{kind}.{i}": p.shape for kind in ("parameter", "before") for i, p in enumerate(parameters)}
        expected |= {f"loss.{task}": torch.Size([self.step]) for task in record.losses}
        expected["random"] = torch.get_rng_state().shape
        kept = [name for name in tensors if name.startswith("guard.") and name.rpartition(".")[2].isdecimal()]
        places = {name: int(name.rpartition(".")[2]) for name in kept}
        expected |= {name: parameters[i].shape for name, i in places.items() if i < len(parameters)}
        every = next(iter(state.values()), {})  # an optimiser keeps the same of every parameter
        for i, p in enumerate(parameters if state else []):
            expected |= {f"optimizer.{i}.{k}": p.shape if t.ndim else t.shape for k, t in every.items()}
        for name in sorted(expected.keys() | tensors.keys()):
            shape = tensors[name].shape if name in tensors else None
            if shape != expected.get(name):
                raise self._unusable(f"`{name}` is of shape {shape} there and {expected.get(name)} here")
            whole = tensors[name].dtype == torch.uint8 if name == "random" else tensors[name].is_floating_point()
            if not whole or not torch.isfinite(tensors[name]).all():
                raise self._unusable(f"`{name}` holds something else than finite numbers")

    def _unusable(self, why: str) -> CheckpointError:
        return CheckpointError(f"`{self.path}` is not {_WHAT}: {why}; delete it, or start without `resume`")


def _optimizer_state(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        _, index, key = (*name.split(".", 2), "", "")[:3]
        if name.startswith("optimizer.") and index.isdecimal():
            state.setdefault(int(index), {})[key] = tensor
    return state


def _guard_problem(guard: Mapping[str, Any]) -> str | None:
    """Return what is wrong with what a guard is said to have seen."""
    for key, kinds in (("recent", (list,)), ("steps", (list,)), ("first", (int, float)), ("collapsed", (int,))):
        table = guard.get(key)
        if not isinstance(table, dict):
            return f"`{key}`={table!r}"
        for task, value in table.items():
            numbers = value if isinstance(value, list) else [value]
            if not isinstance(value, kinds) or not all(type(n) in (int, float) and n >= 0 for n in numbers):
                return f"`{key}.{task}`={value!r}"
    return None
