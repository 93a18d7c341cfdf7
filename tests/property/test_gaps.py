"""A vector is what its values and gaps say, whatever its zeros are like."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_merge.moe.gaps import decode, encode


@st.composite
def vectors(draw) -> torch.Tensor:
    """Runs of zeros of any length, about the widest gap of a byte above all, between other numbers."""
    parts = []
    for _ in range(draw(st.integers(1, 6))):
        zeros = draw(st.one_of(st.integers(0, 3), st.integers(250, 260), st.integers(505, 515), st.integers(0, 1100)))
        parts += [torch.zeros(zeros), torch.arange(1.0, 1.0 + draw(st.integers(0, 4)))]
    return torch.cat([*parts, torch.ones(1)] if draw(st.booleans()) else [torch.zeros(1), *parts])


@settings(deadline=None, max_examples=200, derandomize=True)
@given(vectors(), st.sampled_from([1, 2, 7, 64, 256, 300, 5000]))
def test_blocks_are_decoded_one_by_one_to_the_vector(vector, block):
    values, gaps, starts = encode(vector, block)
    bounds = starts.tolist()
    assert len(values) == len(gaps) == bounds[-1]
    assert gaps.dtype == torch.uint8
    found = [
        decode(values[begin:end], gaps[begin:end], torch.zeros(len(part)))
        for begin, end, part in zip(bounds, bounds[1:], vector.split(block), strict=False)
    ]
    assert torch.equal(torch.cat(found), vector)
    assert len(values) <= vector.count_nonzero() + len(found) + len(vector) // 255
