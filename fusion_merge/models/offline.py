"""Whether the hub may be asked, and how to do without it for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import datasets
from huggingface_hub import constants
from transformers.utils import hub

_SWITCHES: tuple[tuple[ModuleType, str], ...] = (
    (constants, "HF_HUB_OFFLINE"),
    (datasets.config, "HF_HUB_OFFLINE"),
    (hub, "_is_offline_mode"),  # before transformers 5
)
"""Where each library keeps what `HF_HUB_OFFLINE` said when it was imported."""

WAY_OUT = "bring it there with `fusion_merge fetch` and the same options"
"""What helps where something is in no cache."""


def is_offline() -> bool:
    """Return whether the hub is not to be asked."""
    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def without_network() -> Iterator[None]:
    """Ask no hub inside: what is not in the caches is not to be had, as with `HF_HUB_OFFLINE=1`."""
    before = [(module, name, getattr(module, name)) for module, name in _SWITCHES if hasattr(module, name)]
    try:
        for module, name, _ in before:
            setattr(module, name, True)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
