"""The errors of the library: each names the value, the place, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FusionMergeError(Exception):
    """Base class of every error that fusion_merge raises on purpose."""


class ConfigError(FusionMergeError, ValueError):
    """An option, method name or config key is unknown or out of range."""


class ModelError(FusionMergeError, ValueError):
    """A model cannot be found, read, or merged with the others."""


class DataError(FusionMergeError, ValueError):
    """A dataset cannot be found, read, or used for classification."""


class BadImageError(DataError):
    """An image cannot be decoded or preprocessed; the others of its dataset may well be good."""


class CheckpointError(FusionMergeError, ValueError):
    """A router checkpoint or a saved model does not fit."""


class AdaptationError(FusionMergeError, RuntimeError):
    """Test-time adaptation cannot go on."""


class ProcessError(FusionMergeError, RuntimeError):
    """Another of several processes failed, so that this one cannot go on."""


class LostProcessError(ProcessError):
    """Another of several processes is gone without a word; whatever waits for it, waits in vain."""


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none.

    Args:
        error: what somebody else's code raised.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that proposes the known names nearest to `name`.

    Args:
        name: what the user wrote.
        known: what would have been right.
    """
    options = sorted(set(known))
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean `{close[0]}`?"
    return f"known are: {', '.join(options)}" if options else "none are known here"
