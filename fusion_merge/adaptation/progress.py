"""Resumable progress: everything that the rest of an adaptation depends on, in one file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from fusion_merge.adaptation.checkpoint import check_belongs
from fusion_merge.errors import CheckpointError
from fusion_merge.sealed import read_about, read_sealed, write_sealed

if TYPE_CHECKING:
    from fusion_merge.adaptation.guard import CollapseGuard
    from fusion_merge.adaptation.loop import AdaptationRecord

log = logging.getLogger(__name__)

FORMAT = 1
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
            log.info("no adaptation progress in %s: starting from the first step", path)

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
        precision: Mapping[str, Any],
    ) -> None:
        """Write the state after a step.

        Args:
            record: what happened so far.
            guard: the watch over collapsing tasks.
            parameters: what is trained.
            optimizer: its optimiser.
            precision: the state of the loss scaling of mixed precision, if there is any.

        Raises:
            FusionMergeError: if the file cannot be written; an earlier one stays whole.
        """
        tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(parameters)}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        tensors["random"] = torch.get_rng_state()
        for task, values in record.entropy.items():
            tensors[f"entropy.{task}"] = torch.tensor(values, dtype=torch.float64)
        about = {
            "step": record.steps,
            "seconds": record.seconds,
            "guard": guard.state(),
            "precision": dict(precision),
            "belongs_to": self._belongs_to,
        }
        write_sealed(self.path, tensors, about)

    def restore(
        self,
        record: AdaptationRecord,
        guard: CollapseGuard,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> dict[str, Any]:
        """Put back the state that was saved, if there is a step to go on from.

        Args:
            record: what happened so far; changed.
            guard: the watch over collapsing tasks; changed.
            parameters: what is trained; changed.
            optimizer: its optimiser; changed.

        Returns:
            The state of the loss scaling of mixed precision.

        Raises:
            CheckpointError: if the file cannot be read, is damaged, or does not fit.
        """
        if self.step == 0:
            return {}
        tensors, stored = read_sealed(self.path, _WHAT)
        about = self._checked(stored)
        for index, parameter in enumerate(parameters):
            parameter.data.copy_(tensors[f"parameter.{index}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index_text, key = name.split(".", 2)
                state.setdefault(int(index_text), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        torch.set_rng_state(tensors["random"])
        for task in record.entropy:
            record.entropy[task] = tensors[f"entropy.{task}"].tolist()
        record.steps, record.seconds = self.step, about["seconds"]
        guard.restore(about["guard"])
        record.collapsed = guard.collapsed
        log.info("going on from step %d, saved in %s", self.step, self.path)
        return dict(about["precision"])

    def forget(self) -> None:
        """Remove the file: it is not needed any more."""
        self.path.unlink(missing_ok=True)

    def _checked(self, about: dict[str, Any]) -> dict[str, Any]:
        if not {"step", "seconds", "guard", "precision", "belongs_to"} <= about.keys():
            raise CheckpointError(f"`{self.path}` is not {_WHAT}; delete it, or start without `resume`")
        check_belongs(self.path, _WHAT, about["belongs_to"], self._belongs_to)
        return about
