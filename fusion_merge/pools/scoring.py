"""Accuracy and loss of a vision tower on one task's images, in one process or in several."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from fusion_merge.errors import DataError, ModelError
from fusion_merge.models.clip import pooled_output
from fusion_merge.models.ensemble import combined_logits
from fusion_merge.pools.loaders import Placement


@dataclass(frozen=True)
class Counts:
    """What was counted over this process's share of the images.

    Attributes:
        accuracy: of the largest logit.
        loss: the cross-entropy.
        scored: how many images these are of.
        skipped: how many bad images were left out; whoever reads the images counts them.
    """

    accuracy: MulticlassAccuracy
    loss: MeanMetric
    scored: SumMetric
    skipped: SumMetric

    def scores(self, task: str) -> dict[str, float]:
        """Return `accuracy` (share of 0-1), `loss` (mean cross-entropy) and `skipped` over all processes' images.

        Args:
            task: the task's name, for errors.

        Raises:
            DataError: if there was no good image.
            ModelError: if the loss is no finite number.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The ``compute`` method")  # a process may have had no batch
            scored, skipped = int(self.scored.compute().item()), int(self.skipped.compute().item())
            if scored == 0 and skipped > 0:
                raise DataError(f"all {skipped} images of task `{task}` that were to be scored are bad")
            scores = {"accuracy": self.accuracy.compute().item(), "loss": self.loss.compute().item()}
        if not math.isfinite(scores["loss"]):
            raise ModelError(
                f"the loss on task `{task}` is no finite number: the model's outputs are not; choose smaller merging "
                "coefficients, or look for broken weights"
            )
        return {**scores, "skipped": skipped}


@torch.no_grad()  # not inference mode: images and heads made here are adapted on later
def count(
    tower: nn.Module,
    head: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    placement: Placement,
) -> Counts:
    """Score a tower on batches of labelled images.

    Args:
        tower: the vision tower; it is moved to the placement's device.
        head: the task's head.
        batches: images (B, 3, height, width) and labels (B,): this process's share.
        num_classes: the number of classes.
        placement: where to compute, and whether there are other processes that have shares of their own.
    """
    device, several = placement.device, placement.world_size > 1
    tower, head = tower.to(device).eval(), head.to(device)
    accuracy = MulticlassAccuracy(max(num_classes, 2), average="micro", sync_on_compute=several).to(device)
    loss = MeanMetric(nan_strategy=math.inf, sync_on_compute=several).to(device)  # NaN must not be left out
    scored, skipped = (SumMetric(sync_on_compute=several).to(device) for _ in range(2))
    dtype = next((p.dtype for p in tower.parameters()), torch.float32)
    for pixels, labels in batches:
        labels = labels.to(device)
        with placement.autocast():
            pooled = pooled_output(tower(pixels.to(device, dtype)))  # (B, D), or (N, B, D) of an ensemble
        logits = combined_logits(tower, head(pooled.float()).float())  # (B, C); in full precision, as in adaptation
        accuracy.update(logits.argmax(dim=-1), labels)
        loss.update(F.cross_entropy(logits, labels, reduction="none"))
        scored.update(len(labels))
    return Counts(accuracy, loss, scored, skipped)


def model_info(model: nn.Module) -> dict[str, float]:
    """Return how many parameters a model has and trains; a shared one counts once.

    Args:
        model: any module.
    """
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return {
        "trainable_params": trainable,
        "all_params": total,
        "trainable_percentage": trainable / total if total else 0.0,
    }
