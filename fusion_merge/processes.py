"""Several processes that compute one thing: where one of them fails, none waits for it in vain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import distributed

from fusion_merge.errors import FusionMergeError, LostProcessError, ProcessError, reason

T = TypeVar("T")

_SIGNS = ("/gloo/", "Connection closed by peer", "Connection reset by peer")
"""What torch's messages say where the other end of a connection is gone."""


def world_size() -> int:
    """Return how many processes compute together; 1 where none were started."""
    started = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if started else 1


def exchange(value: T) -> list[T]:
    """Return the values of all processes, in their order; each must call this.

    Args:
        value: this process's, anything that can be pickled.
    """
    values = [value] * world_size()
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """Let an error that one process meets end all of them; each must come here, and say nothing to others inside.

    Raises:
        ProcessError: where another process failed; it says which, and why.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the others must know
        failure = error
    try:
        messages = exchange(failure and (str(failure) or type(failure).__name__))
    except RuntimeError:  # the others are gone already: what happened here comes first
        if failure is None:
            raise
        messages = []
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise ProcessError(f"process {rank} failed: {message}")


@contextmanager
def in_company() -> Iterator[None]:
    """Part from the other processes at the end, and say clearly where one of them is gone, such as one that was killed.

    Raises:
        LostProcessError: where a message to or from another process could not be passed on.
    """
    try:
        yield
    except FusionMergeError:
        raise
    except RuntimeError as error:  # gloo has no error of its own
        lost = isinstance(error, distributed.DistBackendError) or any(sign in str(error) for sign in _SIGNS)
        if world_size() == 1 or not lost:
            raise
        raise LostProcessError(
            f"another process is gone ({reason(error)}): look at its messages; the run cannot go on without it"
        ) from error
    finally:
        if world_size() > 1:  # or its threads may still run when the interpreter ends
            distributed.destroy_process_group()
