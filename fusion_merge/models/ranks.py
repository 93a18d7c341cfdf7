"""Truncated decompositions of a tower: which ranks it allows, and where to compute them."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig

from fusion_merge.errors import ConfigError, reason


def check_rank(rank: int, config: CLIPVisionConfig) -> int:
    """Refuse a rank that the layers of a tower do not have.

    Args:
        rank: rank-one experts a task, or -1 for full rank.
        config: the tower's configuration.

    Returns:
        The rank that it stands for in an MLP.

    Raises:
        ConfigError: if it is not possible.
    """
    limit = min(config.hidden_size, config.intermediate_size)
    if rank == 0 or rank > limit:
        raise ConfigError(
            f"`rank_k`={rank} is not in 1-{limit}, the possible ranks at `encoder.layers.0.mlp.fc1` "
            f"({config.intermediate_size} x {config.hidden_size}); choose 1-{limit}, or -1 for full rank"
        )
    return int(limit) if rank == -1 else rank


def check_select_k(select_k: int, experts: int) -> None:
    """Refuse a number of coefficients to keep that a layer does not have.

    Args:
        select_k: how many to keep, or -1 for all.
        experts: how many rank-one experts a layer has.

    Raises:
        ConfigError: if it is not possible.
    """
    if select_k == 0 or select_k > experts:
        raise ConfigError(
            f"`select_k`={select_k} is not in 1-{experts}, the number of experts of a layer; "
            f"choose 1-{experts}, or -1 for all of them"
        )


def svd_device(accelerator: str, auto: torch.device) -> torch.device:
    """Return the device that `svd_accelerator` stands for.

    Args:
        accelerator: `auto`, or a device such as `cpu` or `cuda`.
        auto: what `auto` is.

    Raises:
        ConfigError: if the machine has no such device.
    """
    if accelerator == "auto":
        return auto
    try:
        device = torch.device("cuda" if accelerator == "gpu" else accelerator)
        torch.empty(1, device=device).item()  # no value comes back from `meta`
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"`svd_accelerator`={accelerator!r} is not on this machine ({reason(error)}); choose `auto` or `cpu`"
        ) from error
    return device
