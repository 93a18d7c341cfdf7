"""A sparse vector in blocks: the values that are not zero, and how far each is from the one before it, in a byte each.

Every block begins with an entry of its own, and where a gap is too wide for a byte, entries lie between: these are
entries like others, whose value is zero. So the places of a block's entries are the running sums of its gaps.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WIDEST = 255


def encode(vector: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the entries of a vector that are not zero, and where they are.

    Args:
        vector: the vector.
        block: how many of its places make a block, at least 1; the last block may be shorter.

    Shape:
        vector (P,) → values (S,), gaps (S,) uint8, starts (blocks + 1,) int32: where each block's entries begin
        among the S, and the end.
    """
    firsts = torch.arange(0, len(vector), block, device=vector.device)  # (blocks,)
    taken = vector != 0
    taken[firsts] = True
    places = taken.nonzero()[:, 0]
    gaps = places.diff(prepend=places[:1])
    gaps[places % block == 0] = 0
    between = (gaps - 1).clamp(min=0) // _WIDEST  # entries that lie between one and the one before it
    ends = (between + 1).cumsum(dim=0)  # (entries,): how many there are up to and with each
    stored = torch.full((int(ends[-1]),), _WIDEST, dtype=torch.uint8, device=vector.device)
    stored[ends - 1] = (gaps - _WIDEST * between).to(torch.uint8)
    values = vector.new_zeros(len(stored))
    values[ends - 1] = vector[places]
    starts = torch.cat([ends[torch.searchsorted(places, firsts)] - 1, ends[-1:]])  # (blocks + 1,)
    return values, stored, starts.to(torch.int32)


def decode(values: Tensor, gaps: Tensor, block: Tensor) -> Tensor:
    """Put the entries of one block into their places.

    Args:
        values: the values of its entries.
        gaps: their gaps.
        block: the whole block, of zeros; changed.

    Shape:
        values (s,), gaps (s,), block (P,) → (P,).
    """
    return block.scatter_(0, gaps.cumsum(dim=0), values.to(block.dtype))
