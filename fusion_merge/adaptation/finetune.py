"""Supervised fine-tuning of one vision tower against a frozen zero-shot head."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from fusion_merge.adaptation.runtime import averaged
from fusion_merge.errors import AdaptationError
from fusion_merge.models.clip import pooled_output
from fusion_merge.processes import together


def finetune(
    tower: nn.Module,
    head: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    fabric: Fabric,
    lr: float,
    weight_decay: float,
    warmup_steps: int,
    max_steps: int,
    label_smoothing: float = 0.0,
    description: str = "fine-tuning",
) -> list[float]:
    r"""Minimise the cross-entropy of a frozen head on labelled images, by AdamW with warm-up and cosine decay.

    Args:
        tower: the vision tower; changed in place.
        head: the task's frozen head.
        batches: endless batches of images (B, 3, height, width) and labels (B,).
        fabric: where to compute.
        lr: the highest learning rate, above 0.
        weight_decay: AdamW's weight decay, at least 0.
        warmup_steps: steps over which the learning rate rises, from 0 at the first; below `max_steps`.
        max_steps: how many steps, at least 1.
        label_smoothing: the share of each target spread over all classes, in [0, 1).
        description: what the progress bar says.

    Returns:
        The loss of each step; the mean over processes.

    Raises:
        AdaptationError: if the loss is not a number.
    """
    tower.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(tower.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps, max_steps)
    wrapped, optim = fabric.setup(tower, optimizer)
    head = head.to(fabric.device)
    losses: list[float] = []
    quiet = None if fabric.is_global_zero else True
    for step in (bar := tqdm(range(max_steps), desc=description, unit="step", disable=quiet)):
        with together():  # an image that one process cannot read ends all of them
            batch = next(batches)
        pixels, labels = (fabric.to_device(t) for t in batch)
        optim.zero_grad()
        logits = head(pooled_output(wrapped(pixel_values=pixels)))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        losses.append(averaged(fabric, loss.detach()).item())
        if not math.isfinite(losses[-1]):
            raise AdaptationError(f"{description}: the loss is {losses[-1]} at step {step}; try a smaller `lr`")
        fabric.backward(loss)
        optim.step()
        schedule.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    tower.requires_grad_(False).eval()
    return losses
