"""Patterns of visible keys as a value: against plain loops, and on every backend against the oracle."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sar_fast import Visibility, sar_attn_func, sar_attn_varlen_func
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


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_packed_sequences_are_as_one_by_one(backend, monkeypatch):
    if backend == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    D = 16
    ends = torch.tensor([0, 9, 29, 42], dtype=torch.int32)
    q, k, v = torch.randn(42, 4, D), torch.randn(42, 2, D), torch.randn(42, 2, D)
    blocks = torch.full((42,), -1)
    blocks[5:9], blocks[9:14], blocks[20:26], blocks[30:40] = 0, 0, 3, 1  # two neighbours share a number
    visual, text, prior = blocks >= 0, torch.zeros(42, dtype=torch.bool), torch.rand(42) / 42
    text[[8, 27, 28, 40, 41]] = True
    starts = torch.tensor([0, 3, 2])
    patterns = {
        "chunk": Visibility(chunk=6, chunk_start=starts),
        "prefix": Visibility(prefix=torch.tensor([4, 0, 13])),
        "blocks": Visibility(blocks=blocks),
    }
    for pattern in patterns.values():
        options = {"backend": backend, "beta": 0.01, "window_size": (4, -1), "return_stats": True}
        roles = (visual, text, prior)
        out, stats = sar_attn_varlen_func(q, k, v, ends, ends, 20, 20, *roles, visibility=pattern, **options)
        for s, (a, b) in enumerate(itertools.pairwise(ends.tolist())):
            own = Visibility(
                chunk=pattern.chunk,
                chunk_start=None if pattern.chunk_start is None else starts[s : s + 1],
                prefix=None if pattern.prefix is None else pattern.prefix[s : s + 1],
                blocks=None if pattern.blocks is None else blocks[a:b],
            )
            one = [x[None, a:b] for x in (q, k, v, *roles)]
            alone, own_stats = sar_attn_func(*one, visibility=own, **options)
            torch.testing.assert_close(out[a:b], alone[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(stats.head_weights[s], own_stats.head_weights[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Visibility(chunk=-1), ValueError, "chunk must be an int >= 0, 0 = off; got -1"),
        (lambda: Visibility(chunk_start=torch.zeros(2).long()), ValueError, "chunk_start needs chunk"),
        (lambda: Visibility(blocks=torch.zeros(5)), TypeError, "blocks must be a tensor of integers; got torch.flo"),
        (lambda: Visibility(prefix=[3]), TypeError, "prefix must be a tensor of integers; got list"),
        (
            lambda: Visibility(prefix=torch.ones(2).long(), blocks=torch.ones(2, 5).long()),
            ValueError,
            "prefix and blocks cannot be given together",
        ),
        (lambda: attend(Visibility(prefix=torch.ones(3).long())), ValueError, r"prefix must have shape \(2,\); got"),
        (lambda: attend(Visibility(blocks=torch.ones(2, 4).long())), ValueError, r"blocks must have shape \(2, 5\) or"),
        (lambda: attend(Visibility(blocks=torch.tensor([0, 1, 0, -1, 1]))), ValueError, "positions of a block must"),
        (lambda: attend(8192), TypeError, "visibility must be a sar_fast.Visibility or None; got int"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()


def attend(visibility: object) -> None:
    q = torch.randn(2, 5, 2, 8)
    marks = torch.zeros(2, 5, dtype=torch.bool)
    sar_attn_func(q, q, q, marks, marks, torch.zeros(2, 5), visibility=visibility)
