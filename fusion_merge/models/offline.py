"""Whether the hub may be asked, and how to do without it for a while."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from types import ModuleType
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
from huggingface_hub import constants
from transformers.utils import hub

log = logging.getLogger(__name__)

_SWITCHES: tuple[tuple[ModuleType, str], ...] = (
    (constants, "HF_HUB_OFFLINE"),
    (datasets.config, "HF_HUB_OFFLINE"),
    (hub, "_is_offline_mode"),  # before transformers 5
)
"""Where each library keeps what `HF_HUB_OFFLINE` said when it was imported."""

_WHILE = 60.0
"""Seconds for which the hub's name is not looked up anew."""

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


@contextmanager
def asking_the_hub(path: str = "") -> Iterator[None]:
    """Ask the hub inside, unless nobody here knows where it is, as without a network: then as in `without_network`.

    Whoever asks all the same waits for half a minute of retries, for each file.

    Args:
        path: what is wanted; where it is a path that exists, nothing is looked up.
    """
    asked = not is_offline() and not os.path.exists(path)  # noqa: PTH110 - of what can be no path, too
    lost = asked and not _is_known(urlsplit(constants.ENDPOINT).hostname or "", int(time.monotonic() // _WHILE))
    with without_network() if lost else nullcontext():
        yield


@lru_cache(maxsize=1)
def _is_known(host: str, _while: int) -> bool:
    """Return whether the name of a machine can be looked up, or somebody else does that."""
    if getproxies():
        return True
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror:
        log.warning("no network: `%s` is not known here, and only the caches are looked in", host)
        return False
    return True
