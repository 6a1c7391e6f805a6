"""Patterns of visible keys as a value: against plain loops, and on every backend against the oracle."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sar_fast import Visibility
from sar_fast.visibility import as_mask, query_positions


def by_loops(Sq, Sk, *, causal, window, chunk, starts, blocks, real):
    """(B, 1, Sq, Sk) bool, from the words of Visibility's docstring."""
    B = len(starts)
    seen = torch.zeros(B, 1, Sq, Sk, dtype=torch.bool)
    left, right = window
    for b in range(B):
        for row in range(Sq):
            i = row + Sk - Sq
            for j in range(Sk):
                allowed = (not causal or j <= i) and (left < 0 or j >= i - left) and (right < 0 or j <= i + right)
                allowed = allowed and (chunk == 0 or (j - starts[b]) // chunk == (i - starts[b]) // chunk)
                together = blocks[b][i] >= 0 and blocks[b][i] == blocks[b][j] if i >= 0 else False
                seen[b, 0, row, j] = (allowed or together) and real[b][j]
    return seen


def runs(draw, length: int) -> list[int]:
    """Block numbers in which the positions of a block follow one another."""
    numbers, block = [], 0
    while len(numbers) < length:
        inside, count = draw(st.booleans()), draw(st.integers(1, 5))
        numbers += [block if inside else -1] * count
        block += 1
    return numbers[:length]


@st.composite
def patterns(draw):
    B, Sk = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    Sq = draw(st.integers(1, Sk))
    pads = [draw(st.integers(0, Sk - 1)) for _ in range(B)]
    real = [[j >= pad for j in range(Sk)] for pad in pads]
    blocks = [[-1] * pad + runs(draw, Sk - pad) for pad in pads] if draw(st.booleans()) else [[-1] * Sk] * B
    chunk = draw(st.sampled_from([0, 1, 3, 8]))
    window = draw(st.integers(-1, 6)), draw(st.integers(-1, 6))
    return {
        "Sq": Sq, "Sk": Sk, "causal": draw(st.booleans()), "window": window, "chunk": chunk,
        "starts": pads if chunk and draw(st.booleans()) else [0] * B, "blocks": blocks, "real": real,
    }  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(patterns())
def test_bounds_are_what_loops_say(pattern):
    Sq, Sk, real = pattern["Sq"], pattern["Sk"], torch.tensor(pattern["real"])
    B, chunk = real.shape[0], pattern["chunk"]
    visibility = Visibility(
        chunk=chunk,
        chunk_start=torch.tensor(pattern["starts"]) if chunk else None,
        blocks=torch.tensor(pattern["blocks"]),
    )
    visibility.check(B, Sk, torch.device("cpu"))
    assert bool(visibility.follows(Sk, real.device, real))
    position = query_positions(Sq, Sk, real.device)
    bounds = visibility.bounds(position, Sk, causal=pattern["causal"], window=pattern["window"], real=real)
    seen = real[:, None, None, :].expand(B, 1, Sq, Sk)
    if bounds.given:
        assert all(x is None or (x.dtype == torch.int32 and x.shape in ((B, Sq), (1, Sq))) for x in bounds)
        seen = seen & as_mask(bounds, Sk, (B, Sq))
    # where a query is padding, what it sees is read by nobody
    asks = real[:, None, Sk - Sq :, None]
    assert torch.equal(seen & asks, by_loops(**pattern) & asks)
