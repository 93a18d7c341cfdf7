"""One step's passes through the model: the gradient, and what was seen on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, final

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from fusion_merge.adaptation.objectives import Objective, expert_labels
from fusion_merge.adaptation.rollback import RollbackGuard
from fusion_merge.adaptation.runtime import averaged, gathered
from fusion_merge.models.clip import pooled_output


@dataclass(frozen=True)
class TaskStream:
    """What adaptation sees of a task. Labels are never looked at.

    Attributes:
        batches: endless batches of images and of their positions among the task's images.
        head: the task's head.
        num_classes: C.
        expert: gives the logits of the task's own expert (B, C) for positions (B,), if there is one.
    """

    batches: Iterator[tuple[Tensor, Any]]
    head: nn.Module
    num_classes: int
    expert: Callable[[Tensor], Tensor] | None = None


class Seen(NamedTuple):
    """What was seen in one step, of all processes.

    Attributes:
        losses: each task's value of the objective, unweighted, also where it is trained with another loss; that loss
            where it is not finite.
        predictions: each task's predicted classes, (B,).
        means: each task's mean prediction, (C,).
        agreement: the share of a task's predictions that are its expert's, in 0-1, where that was looked at.
        images: of each task.
    """

    losses: dict[str, float]
    predictions: dict[str, Tensor]
    means: dict[str, Tensor]
    agreement: dict[str, float]
    images: int


@final
class Passes:
    """Forms the gradient of one batch of each task.

    Args:
        model: the model as Fabric wrapped it.
        streams: the tasks.
        fabric: where to compute.
        objective: see `adapt`.
        use_grad_accumulate: run backward after each task.
        mixed_tasks: put all batches through the model as one.
        keeper: what says how a task's loss is weighed, and whether it is formed from its expert's labels.
    """

    def __init__(
        self,
        model: Any,
        streams: Mapping[str, TaskStream],
        fabric: Fabric,
        objective: Callable[..., Tensor],
        use_grad_accumulate: bool,
        mixed_tasks: bool,
        keeper: RollbackGuard | None,
    ) -> None:
        self._model, self._streams, self._fabric = model, streams, fabric
        if isinstance(objective, Objective):
            objective = replace(objective, average=partial(averaged, fabric))
        self._objective, self._keeper = objective, keeper
        self._accumulate = use_grad_accumulate and not mixed_tasks
        self._mixed = mixed_tasks
        self._asks = bool(getattr(objective, "needs_experts", False))

    def gradient(self, batches: Mapping[str, tuple[Tensor, Any]], optimizer: torch.optim.Optimizer) -> Seen:
        """Form the gradient, and return what was seen.

        Args:
            batches: each task's images (B, 3, height, width) and their positions (B,).
            optimizer: of the parameters whose gradient is formed.
        """
        optimizer.zero_grad()
        features = self._all_features(batches) if self._mixed else {}
        losses: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        logits: dict[str, Tensor] = {}
        experts: dict[str, Tensor] = {}
        for index, (name, stream) in enumerate(self._streams.items()):
            last = index == len(self._streams) - 1
            with self._fabric.no_backward_sync(self._model, enabled=self._accumulate and not last):
                pixels, positions = batches[name]
                pooled = features[name] if self._mixed else self._features(pixels)
                scores = stream.head(pooled)
                if stream.expert is not None and (self._asks or self._keeper is not None):
                    experts[name] = stream.expert(positions).to(scores.device)
                value = self._value(scores, experts.get(name))
                loss = self._weight(name) * self._loss(name, value, scores, experts.get(name))
                if self._accumulate:
                    self._fabric.backward(loss)
                    loss = loss.detach()
            losses[name], logits[name] = loss, scores.detach()
            values[name] = torch.where(loss.detach().isfinite(), value.detach(), loss.detach())
        if not self._accumulate:
            self._fabric.backward(torch.stack(list(losses.values())).sum())
        return self._seen(torch.stack(list(values.values())), logits, experts)

    def _features(self, pixels: Tensor) -> Tensor:
        return pooled_output(self._model(pixel_values=self._fabric.to_device(pixels)))

    def _all_features(self, batches: Mapping[str, tuple[Tensor, Any]]) -> dict[str, Tensor]:
        sizes = [len(pixels) for pixels, _ in batches.values()]
        together = self._features(torch.cat([pixels for pixels, _ in batches.values()]))
        return dict(zip(batches, together.split(sizes), strict=True))

    def _rescued(self, name: str) -> bool:
        return self._keeper is not None and self._keeper.by_expert(name)

    def _weight(self, name: str) -> float:
        return 1.0 if self._keeper is None else self._keeper.weight(name)

    def _value(self, scores: Tensor, expert: Tensor | None) -> Tensor:
        value: Tensor = self._objective(scores, expert) if self._asks else self._objective(scores)
        return value

    def _loss(self, name: str, value: Tensor, scores: Tensor, expert: Tensor | None) -> Tensor:
        """Return what a task is trained with: the objective's value, or what took its place."""
        if expert is not None and self._rescued(name):
            return expert_labels(scores, expert, float(getattr(self._objective, "temperature", 1.0)))
        return value

    def _seen(self, losses: Tensor, logits: Mapping[str, Tensor], experts: Mapping[str, Tensor]) -> Seen:
        values = averaged(self._fabric, losses).tolist()
        choices = {name: scores.argmax(dim=-1) for name, scores in logits.items()}
        predictions = {name: gathered(self._fabric, chosen) for name, chosen in choices.items()}
        if self._keeper is None:
            return Seen(dict(zip(logits, values, strict=True)), predictions, {}, {}, 0)
        means = {name: averaged(self._fabric, s.float().softmax(dim=-1).mean(dim=0)) for name, s in logits.items()}
        agreement = {
            name: averaged(self._fabric, (choices[name] == expert.argmax(dim=-1)).float().mean()).item()
            for name, expert in experts.items()
        }
        return Seen(
            dict(zip(logits, values, strict=True)), predictions, means, agreement, len(next(iter(predictions.values())))
        )
