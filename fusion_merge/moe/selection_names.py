"""Selections by the names that options have."""

from __future__ import annotations

from collections.abc import Sequence

from fusion_merge.errors import ConfigError, nearest
from fusion_merge.moe.selection import Bounded, Chain, Selection, SoftTopK, TopK, TopP, TsallisTopP

SELECTIONS = ("all", "soft_top_k", "top_k", "top_p", "tsallis_top_p")
"""What `selection_named` knows."""


def selection_named(
    name: str,
    *,
    k: int,
    p: float,
    temperature: float,
    q: float,
    threshold: float,
    bounds: Sequence[float] | None,
) -> Selection | None:
    """Make the selection that options stand for, or None if every coefficient takes part as it is.

    Bounds come after the selection, which so sees what the router would like, not what bounds have made equal. An
    expert that is left out must keep the coefficient zero: bounds that exclude zero go with `all` alone.

    Args:
        name: one of `SELECTIONS`.
        k: for `soft_top_k` and `top_k`: how many to keep; -1 for all.
        p: for `top_p` and `tsallis_top_p`: how much probability is enough.
        temperature: for the same: of the softmax.
        q: for `tsallis_top_p`: the entropic index.
        threshold: for `tsallis_top_p`: the relative entropy above which all take part.
        bounds: the lowest and the highest coefficient, or None for no bounds.

    Raises:
        ConfigError: if the name is unknown, or an argument that it needs is out of range.
    """
    selection: Selection | None = None
    if name in ("soft_top_k", "top_k"):
        if k != -1:
            selection = TopK(k) if name == "top_k" else SoftTopK(k)
    elif name == "top_p":
        selection = TopP(p, temperature)
    elif name == "tsallis_top_p":
        selection = TsallisTopP(p, temperature, q, threshold)
    elif name != "all":
        raise ConfigError(f"`selection`={name!r} is unknown; {nearest(str(name), SELECTIONS)}")
    if bounds is None:
        return selection
    if len(bounds) != 2:
        raise ConfigError(f"`coefficient_bounds`={list(bounds)} are not two numbers; [0, 1] is usual")
    bounded = Bounded(*bounds)
    if selection is None:
        return bounded
    if not bounded.low <= 0 <= bounded.high:
        raise ConfigError(
            f"`coefficient_bounds`={list(bounds)} exclude 0, the coefficient of experts that `selection`={name} "
            "leaves out; choose a lower bound of at most 0 and a higher one of at least 0, or `selection`=all"
        )
    return Chain([selection, bounded])
