"""The names of tensors as users and other libraries write them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_merge.errors import ConfigError, nearest
from fusion_merge.models.clip import canonical_names, vision_backbone


def listed_tensors(option: str, names: Sequence[str] | None, known: Collection[str]) -> frozenset[str]:
    """Return the canonical names of the tensors that an option lists.

    Args:
        option: its name, for errors.
        names: names in any layout of checkpoints, such as `vision_model.post_layernorm.weight`; None stands for none.
        known: the canonical names that there are.

    Raises:
        ConfigError: names the first that is no tensor of the models.
    """
    found = set()
    for name in names or ():
        short = next(iter(canonical_names([name])), name)
        if short not in known:
            raise ConfigError(f"`{option}` has {name!r}, which is no tensor of the models; {nearest(short, known)}")
        found.add(short)
    return frozenset(found)


def linear_weights(config: CLIPVisionConfig) -> frozenset[str]:
    """Return the canonical names of the weights of all linear layers.

    Args:
        config: the tower's configuration.
    """
    with torch.device("meta"):
        backbone = vision_backbone(CLIPVisionModel(config))
    return frozenset(f"{name}.weight" for name, module in backbone.named_modules() if isinstance(module, nn.Linear))
