"""Zero-shot classification heads: made once from class names and templates, then frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel

from fusion_merge.models.clip import Tokenizer, text_embeddings
from fusion_merge.models.heads import ZeroShotHead as ZeroShotHead
from fusion_merge.pools.datasets import ImageTask


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
