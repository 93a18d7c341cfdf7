"""The parts that a merged model's configuration stands for, made empty before they are loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusion_merge.errors import CheckpointError, ConfigError
from fusion_merge.models.clip import vision_backbone
from fusion_merge.models.merged_config import MergedCLIPVisionConfig
from fusion_merge.moe.blocks import empty_block, find_blocks
from fusion_merge.moe.projection import empty_projection, find_linears

_PASSED_ALONG = ("adapter_kwargs", "trust_remote_code", "safe_serialization", "save_peft_format")


def chosen_dtype(*given: Any) -> torch.dtype | None:
    """Return the dtype that was asked for, by object or by name; `auto` and None mean as it is stored.

    Args:
        *given: the values of all options that may say it.

    Raises:
        ConfigError: if it is no dtype.
    """
    wanted = next((value for value in given if value not in (None, "auto")), None)
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if wanted is not None and not isinstance(found, torch.dtype):
        raise ConfigError(f"`dtype`={wanted!r} is not a dtype; choose float32, float16, bfloat16 or auto")
    return found


def refuse_unknown(options: dict[str, Any], where: str) -> None:
    """Refuse options that are not known; what transformers passes along without a value is not one.

    Args:
        options: what is left of the options.
        where: whose they are, for the error.

    Raises:
        ConfigError: if there is one.
    """
    for name, value in options.items():
        if value is not None and not name.startswith("_") and name not in _PASSED_ALONG:
            raise ConfigError(f"`{name}` is not an option of {where}")


def install_empty_layers(tower: nn.Module, config: MergedCLIPVisionConfig) -> None:
    """Put routed layers into a plain tower, their values still to be loaded.

    Args:
        tower: the tower; changed.
        config: which layers are routed, and how.

    Raises:
        CheckpointError: if the tower has no such layers.
    """
    backbone = vision_backbone(tower)
    blocks = find_blocks(backbone, "all") if config.moe else {}
    plain = find_linears(backbone) if config.linears else {}
    for name, spec in config.linears.items():
        if name not in plain:
            raise CheckpointError(f"the configuration routes `{name}`, which is not a linear layer of the vision tower")
        backbone.set_submodule(name, empty_projection(spec, plain[name]))
    shared: nn.Module | None = None
    for name, spec in config.moe.items():
        if name not in blocks:
            raise CheckpointError(f"the configuration routes `{name}`, which is no MLP or attention of the tower")
        layer = empty_block(spec, blocks[name], shared)
        backbone.set_submodule(name, layer)
        if config.shared_router:
            shared = layer.router.shared_part() or layer.router
