"""Patterns of visible keys as a value: against plain loops, and on every backend against the oracle."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sar_fast import Visibility, sar_attn_func, sar_attn_varlen_func
from sar_fast.method.visibility import as_mask, query_positions
from sar_fast.reference import sar_attention_reference
from tests.helpers import BACKENDS, Case, assert_forward, assert_gradients, dtype_id, make_case


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


@dataclasses.dataclass
class PatternedCase(Case):
    """A case with a ``visibility``, which the reference takes as a dense mask."""

    def reference(self, **changes):
        options = {**self.options, **changes}
        visibility, causal = options.pop("visibility"), options.pop("causal", True)
        (Sq, Sk), window = (self.q.shape[1], self.k.shape[1]), options.pop("window_size", (-1, -1))
        real = options.get("key_padding_mask")
        bounds = visibility.bounds(query_positions(Sq, Sk, self.q.device), Sk, causal=causal, window=window, real=real)
        mask = as_mask(bounds, Sk, (self.q.shape[0], Sq))
        return Case(*self.tensors, options).reference(causal=False, attn_mask=mask)


def blocks_of(length: int, width: int) -> torch.Tensor:
    """(length,): every other stretch of ``width`` positions is a block."""
    number = torch.arange(length) // width
    return torch.where(number % 2 == 1, number, -1)


def patterned(name: str, Sq: int, Sk: int, **options) -> PatternedCase:
    third = Sk // 3
    visibility, limits = {
        "chunks": (Visibility(chunk=third), {}),
        "chunks that begin anywhere": (Visibility(chunk=third, chunk_start=torch.tensor([0, 3, third // 2])), {}),
        "chunks in both directions": (Visibility(chunk=third), {"causal": False}),
        "prefix": (Visibility(prefix=torch.tensor([third, 2 * third, 0])), {}),
        "blocks": (Visibility(blocks=blocks_of(Sk, third)), {}),
        "blocks over a window": (Visibility(blocks=blocks_of(Sk, third)), {"window_size": (third // 2, -1)}),
        "window over chunks": (Visibility(chunk=2 * third), {"window_size": (third, 2), "causal": False}),
    }[name]
    case = make_case(Sq, Sk, H=6, Hkv=2, Dv=24, beta=0.05, **limits, **options)
    return PatternedCase(*case.tensors, {**case.options, "visibility": visibility})


PATTERNS = (
    "chunks",
    "chunks that begin anywhere",
    "chunks in both directions",
    "prefix",
    "blocks",
    "blocks over a window",
    "window over chunks",
)
of_backends = pytest.mark.parametrize("backend", BACKENDS)
of_patterns = pytest.mark.parametrize("name", PATTERNS)


@pytest.mark.everyday(backend=["torch"])
@of_backends
@of_patterns
@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_backends_equal_the_reference_under_a_mask(name, backend, dtype, padding):
    case = patterned(name, 41, 41, dtype=dtype, padding=padding)
    assert_forward(case, backend)
    assert_gradients(case, backend, sav_grad=True)


@pytest.mark.everyday(Sq=[9])
@pytest.mark.everyday(Sq=[1], sav_grad=[True])
@of_backends
@of_patterns
@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant", "sav_grad"])
@pytest.mark.parametrize(("Sq", "Sk"), [(9, 37), (150, 301), (1, 40)])
def test_fewer_queries_than_keys(name, backend, Sq, Sk, sav_grad):
    """Also in several blocks of queries."""
    case = patterned(name, Sq, Sk)
    assert_forward(case, backend)
    assert_gradients(case, backend, sav_grad=sav_grad)


@of_backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_chunk_that_is_not_finite_stays_alone(backend, bad):
    """Queries of the other chunks, their gradients and the statistics do not show it; its own queries do."""
    S, chunk = 40, 8  # the last image token is in the third chunk
    case = make_case(S, layouts=("image",))
    case.text[:, : 3 * chunk] = False
    roles = (case.visual, case.text, case.prior)
    case.visual[:, 3 * chunk : 3 * chunk + 4] = True  # seen by text queries of the fourth
    grad = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(3))
    grad[:, :chunk] = 0

    def run(fill):
        leaves = [x.clone() for x in (case.q, case.k, case.v)]
        for x in leaves[1:]:
            x[:, :chunk] = fill
        leaves = [x.requires_grad_() for x in leaves]
        out, stats = sar_attn_func(
            *leaves, *roles, visibility=Visibility(chunk=chunk), backend=backend, return_stats=True
        )
        return out, stats, torch.autograd.grad(out, leaves, grad)

    (out, stats, grads), (zero_out, zero_stats, zero_grads) = run(bad), run(0.0)
    torch.testing.assert_close(out[:, chunk:], zero_out[:, chunk:])
    torch.testing.assert_close(stats.head_weights, zero_stats.head_weights)
    assert stats.head_weights.isfinite().all()
    assert stats.query_count.item() > 0
    for got, expected in zip(grads, zero_grads):
        torch.testing.assert_close(got[:, chunk:], expected[:, chunk:])
    assert not out[:, :chunk].isfinite().any()


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
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
        (lambda: Visibility(chunk_start=torch.zeros(2).long()), ValueError, "chunk must be > 0 with chunk_start"),
        (lambda: Visibility(blocks=torch.zeros(5)), TypeError, "blocks must be a tensor of integers; got torch.flo"),
        (lambda: Visibility(prefix=[3]), TypeError, "prefix must be a tensor of integers; got list"),
        (
            lambda: Visibility(prefix=torch.ones(2).long(), blocks=torch.ones(2, 5).long()),
            ValueError,
            "prefix and blocks must not be given together",
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


START = torch.tensor([0, 3])
NUMBERS = torch.tensor([-1] * 5 + [0] * 9 + [-1] * 4 + [1] * 12 + [-1] * 10)
FLEX = {  # what FlexAttention's users write, and what it is here
    "window": (lambda b, h, i, j: (i >= j) & (i - j <= 7), {"window_size": (7, -1)}),
    "both ways": (lambda b, h, i, j: (i - j).abs() <= 6, {"window_size": (6, 6), "causal": False}),
    "chunks": (
        lambda b, h, i, j: (i >= j) & ((i - START[b]) // 11 == (j - START[b]) // 11),
        {"visibility": Visibility(chunk=11, chunk_start=START)},
    ),
    "prefix": (lambda b, h, i, j: (i >= j) | (j < 13), {"visibility": Visibility(prefix=torch.tensor([13, 13]))}),
    "pictures": (
        lambda b, h, i, j: (i >= j) | ((NUMBERS[i] == NUMBERS[j]) & (NUMBERS[i] >= 0)),
        {"visibility": Visibility(blocks=NUMBERS)},
    ),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", FLEX)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_edges_are_flex_attentions(name, backend):
    """A prefix-LM's query sees all of the prefix, which causality says already where it does not lie in it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask_mod, options = FLEX[name]
    q, k, v = torch.randn(2, 40, 4, 16), torch.randn(2, 40, 2, 16), torch.randn(2, 40, 2, 16)
    nothing = torch.zeros(2, 40, dtype=torch.bool)
    got = sar_attn_func(q, k, v, nothing, nothing, torch.zeros(2, 40), **options, backend=backend)
    blocks = create_block_mask(mask_mod, 2, None, 40, 40, device="cpu")
    want = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks, enable_gqa=True)
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_the_page_on_masks_runs():
    """Its Python block, whose output is the oracle's under the matrix that the page's table describes."""
    page = (Path(__file__).parents[1] / "docs/masks.md").read_text()
    (source,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    found: dict = {}
    exec(compile(source, "docs/masks.md", "exec"), found)
    S, visual = found["S"], found["visual"][0]
    i, j = torch.arange(S)[:, None], torch.arange(S)
    seen = ((j <= i) & (j >= i - 511)) | (visual[:, None] & visual)
    call = [found[name] for name in ("q", "k", "v", "visual", "text", "prior")]
    want = sar_attention_reference(*call, causal=False, attn_mask=seen[None, None])
    torch.testing.assert_close(found["out"], want, rtol=1e-3, atol=1e-5)
