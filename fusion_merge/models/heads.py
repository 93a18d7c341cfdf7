"""Classification heads: of one task, and those of all tasks that a merged model holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_merge.errors import ModelError


@final
class ZeroShotHead(nn.Module):
    r"""The frozen head of one task on top of any CLIP vision tower.

    .. math:: z = e^{s}\, \frac{P h}{\lVert P h \rVert}\, E^\top

    with h the pooled output, P the visual projection, s the logit scale and E the class embeddings.

    Args:
        projection: P, the weight of `visual_projection`.
        logit_scale: s.
        embeddings: E, rows of unit length.

    Shape:
        projection (P, D), logit_scale (), embeddings (C, P); forward (B, D) → (B, C).

    Source: Radford et al. 2021 (CLIP), §3.1.4.
    """

    projection: Tensor
    logit_scale: Tensor
    embeddings: Tensor

    def __init__(self, projection: Tensor, logit_scale: Tensor, embeddings: Tensor) -> None:
        super().__init__()
        self.register_buffer("projection", projection.detach().clone())
        self.register_buffer("logit_scale", logit_scale.detach().clone())
        self.register_buffer("embeddings", embeddings.detach().clone())

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the logits of the task's classes; shapes as in the class docstring.

        Args:
            pooled: the vision tower's pooled output.
        """
        features = F.normalize(F.linear(pooled.to(self.projection.dtype), self.projection), dim=-1)  # (B, P)
        return self.logit_scale.exp() * F.linear(features, self.embeddings)  # (B, C)


@final
class TaskHeads(nn.Module):
    """The heads of several tasks; a projection and a logit scale that they share are held once.

    Args:
        heads: a head for each task.
        classnames: the names of each task's classes, in the order of the head's logits.

    Raises:
        ModelError: if a task lacks a head or names, or if their numbers differ.
    """

    def __init__(self, heads: Mapping[str, ZeroShotHead], classnames: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        if lone := sorted(heads.keys() ^ classnames.keys()):
            lacking = "class names" if lone[0] in heads else "head"
            raise ModelError(
                f"there is no {lacking} of `{lone[0]}`; give each task a head and the names of its classes"
            )
        self.classnames = {task: [str(name) for name in classnames[task]] for task in heads}
        self._common: dict[str, int] = {}
        for task, head in heads.items():
            if not isinstance(head, ZeroShotHead):
                raise ModelError(f"the head of `{task}` is a {type(head).__name__}; give a ZeroShotHead")
            self._add(task, head)

    @property
    def tasks(self) -> list[str]:
        """The tasks that have a head."""
        return list(self.classnames)

    def head(self, task: str) -> ZeroShotHead:
        """Return a task's head by itself, in float32 at least.

        Args:
            task: one of `tasks`.

        Raises:
            ModelError: if it has none.
        """
        if task not in self._common:
            raise ModelError(f"there is no head of `{task}`; give one of every task to `set_heads(heads, classnames)`")
        held = self._held(task)
        return ZeroShotHead(*(t.to(torch.promote_types(t.dtype, torch.float32)) for t in held))

    def heads(self) -> dict[str, ZeroShotHead]:
        """Return every task's head, in the precision that it is held in."""
        return {task: ZeroShotHead(*self._held(task)) for task in self.tasks}

    def _held(self, task: str) -> tuple[Tensor, Tensor, Tensor]:
        common, own = self._common[task], self.tasks.index(task)
        projection, scale = self.get_buffer(f"projection_{common}"), self.get_buffer(f"logit_scale_{common}")
        return projection, scale, self.get_buffer(f"embeddings_{own}")

    def spec(self) -> list[dict[str, Any]]:
        """Return what `empty` needs to make heads of the same shapes, as plain JSON values."""
        return [
            {
                "task": task,
                "classnames": names,
                "common": self._common[task],
                "width": int(self.get_buffer(f"embeddings_{own}").shape[1]),
            }
            for own, (task, names) in enumerate(self.classnames.items())
        ]

    @classmethod
    def empty(cls, spec: Sequence[Mapping[str, Any]], width: int) -> TaskHeads:
        """Make heads with the shapes that a spec describes and values that are still to be loaded.

        Args:
            spec: what `spec` returned.
            width: D, of the vision tower.
        """
        heads = cls({}, {})
        for own, about in enumerate(spec):
            common, names = int(about["common"]), list(about["classnames"])
            heads.classnames[about["task"]], heads._common[about["task"]] = names, common
            heads.register_buffer(f"projection_{common}", torch.zeros(about["width"], width))
            heads.register_buffer(f"logit_scale_{common}", torch.zeros(()))
            heads.register_buffer(f"embeddings_{own}", torch.zeros(len(names), about["width"]))
        return heads

    def _add(self, task: str, head: ZeroShotHead) -> None:
        if len(head.embeddings) != len(self.classnames[task]):
            raise ModelError(
                f"the head of `{task}` has {len(head.embeddings)} classes and there are "
                f"{len(self.classnames[task])} names; give one name a class"
            )
        parts = {"projection": head.projection, "logit_scale": head.logit_scale}
        seen = sorted(set(self._common.values()))
        same = (n for n in seen if all(_equal(self.get_buffer(f"{k}_{n}"), t) for k, t in parts.items()))
        common = next(same, len(seen))
        if common == len(seen):
            for name, tensor in parts.items():
                self.register_buffer(f"{name}_{common}", tensor.detach().clone())
        self.register_buffer(f"embeddings_{len(self._common)}", head.embeddings.detach().clone())
        self._common[task] = common


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.device == second.device and torch.equal(first, second)
