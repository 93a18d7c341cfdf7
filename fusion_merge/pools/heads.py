"""Zero-shot classification heads: made once from class names and templates, then frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from fusion_merge.models.clip import Tokenizer, text_embeddings
from fusion_merge.pools.datasets import ImageTask


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


def zero_shot_head(model: CLIPModel, tokenizer: Tokenizer, task: ImageTask) -> ZeroShotHead:
    """Make the head of a task: each class is the mean of its prompts' embeddings, of unit length.

    Args:
        model: a CLIP model with its text tower.
        tokenizer: its tokenizer or processor.
        task: the task, with its class names and templates.
    """
    embeddings = class_embeddings(model, tokenizer, task.classnames, task.templates)
    return ZeroShotHead(model.visual_projection.weight, model.logit_scale, embeddings)


def class_embeddings(
    model: CLIPModel, tokenizer: Tokenizer, classnames: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Embed each class name in each template, average over templates, and scale to unit length.

    Args:
        model: a CLIP model with its text tower.
        tokenizer: its tokenizer or processor.
        classnames: one name a class.
        templates: prompts with a `{}` for the class name.

    Shape:
        → (C, P).
    """
    each = text_embeddings(model, tokenizer, prompts_of(classnames, templates))  # (C·templates, P)
    mean = torch.stack([group.mean(dim=0) for group in each.split(len(templates))])  # (C, P)
    return F.normalize(mean, dim=-1)


def prompts_of(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return each class name in each template, class after class.

    Args:
        classnames: one name a class.
        templates: prompts with a `{}` for the class name.
    """
    return [template.replace("{}", name) for name in classnames for template in templates]
