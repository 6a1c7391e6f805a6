"""FlashAttention-2's packed functions, paged sequences and KV-cache arguments against SDPA in fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sar_fast import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from sar_fast.attention import flash, flash_cache
from sar_fast.method.kvcache import Step
from sar_fast.method.values import Result
from tests.helpers import max_error, sdpa, visible

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("torch", "composed", "triton")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
Q_ENDS, K_ENDS = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 5, 5, 12, 13], [0, 9, 12, 19, 30]))
LONGEST = {"max_seqlen_q": 7, "max_seqlen_k": 11}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(function, *inputs: Tensor) -> list[Tensor]:
    """Output and gradients of a function of tensors, under one fixed gradient."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, randn(*out.shape, seed=1))]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert max_error(a, b) < 1e-12


@every_backend
def test_qkvpacked(backend):
    """Values and the one packed gradient."""
    packed = lambda qkv: flash_attn_qkvpacked_func(qkv, 0.0, 0.375, True, (9, -1), backend=backend)
    eager = lambda qkv: sdpa(*qkv.unbind(2), visible(13, 13, True, (9, -1)), scale=0.375)
    assert_same(gradients(packed, randn(2, 13, 3, 2, 16)), gradients(eager, randn(2, 13, 3, 2, 16)))


@every_backend
def test_kvpacked(backend):
    packed = lambda q, kv: flash_attn_kvpacked_func(q, kv, causal=True, backend=backend)
    eager = lambda q, kv: sdpa(q, *kv.unbind(2), visible(7, 13, True))
    inputs = randn(2, 7, 4, 16), randn(2, 13, 2, 2, 16)
    assert_same(gradients(packed, *inputs), gradients(eager, *inputs))


def in_sequences(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, causal: bool) -> Tensor:
    """SDPA of each packed sequence, (total_q, H, D)."""
    out = []
    for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:]):
        out.append(sdpa(q[None, a:b], k[None, c:d], v[None, c:d], visible(int(b - a), int(d - c), causal))[0])
    return torch.cat(out)


@every_backend
def test_varlen_qkvpacked(backend):
    packed = lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, Q_ENDS, torch.tensor(7), causal=True, backend=backend)
    eager = lambda qkv: in_sequences(*qkv.unbind(1), Q_ENDS, Q_ENDS, True)
    assert_same(gradients(packed, randn(13, 3, 2, 16)), gradients(eager, randn(13, 3, 2, 16)))


@every_backend
def test_varlen_kvpacked(backend):
    lengths = torch.tensor(7), torch.tensor(11)
    packed = lambda q, kv: flash_attn_varlen_kvpacked_func(q, kv, Q_ENDS, K_ENDS, *lengths, backend=backend)
    eager = lambda q, kv: in_sequences(q, *kv.unbind(1), Q_ENDS, K_ENDS, False)
    inputs = randn(13, 4, 16), randn(30, 2, 2, 16)
    assert_same(gradients(packed, *inputs), gradients(eager, *inputs))


def test_packed_functions_return_what_the_others_do():
    qkv = randn(2, 13, 3, 2, 16)
    out, lse, probabilities = flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
    expected = flash_attn_func(*qkv.unbind(2), causal=True, return_attn_probs=True)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert probabilities is None


@pytest.mark.everyday(backend=["torch"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_packed_functions_compile(backend):
    def block(qkv: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        out = flash_attn_qkvpacked_func(qkv * 2, causal=True, backend=backend)
        out = out + flash_attn_kvpacked_func(q, kv, backend=backend)
        flat = qkv.flatten(0, 1)
        out = out.flatten(0, 1) + flash_attn_varlen_qkvpacked_func(flat, ENDS, 9, causal=True, backend=backend)
        kv = kv.flatten(0, 1)
        return out + flash_attn_varlen_kvpacked_func(q.flatten(0, 1), kv, ENDS, ENDS, 9, 9, backend=backend)

    ENDS = torch.tensor([0, 9, 18], dtype=torch.int32)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    inputs = randn(2, 9, 3, 2, 16), randn(2, 9, 2, 16), randn(2, 9, 2, 2, 16)
    assert_same(gradients(compiled, *inputs), gradients(block, *inputs))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("function", "shapes", "message"),
    [
        (
            flash_attn_qkvpacked_func,
            [(2, 9, 3, 8)],
            r"qkv must be \(batch, seqlen, 3, heads, head_dim\); got .*9, 3, 8\)",
        ),
        (flash_attn_qkvpacked_func, [(2, 9, 2, 2, 8)], r"qkv must be \(batch, seqlen, 3, heads.* got shape \(2, 9, 2,"),
        (
            flash_attn_kvpacked_func,
            [(2, 9, 2, 8), (2, 9, 3, 2, 8)],
            r"kv must be \(batch, seqlen, 2, heads, head_dim\)",
        ),
        (
            flash_attn_kvpacked_func,
            [(2, 9, 2, 8), (2, 9, 2, 2, 4)],
            r"k must have q's head dim 8; got shape \(2, 9, 2, 4",
        ),
    ],
)
def test_shapes_of_packed_tensors(function, shapes, message):
    with pytest.raises(ValueError, match=message):
        function(*(randn(*shape) for shape in shapes))


def test_shapes_of_packed_sequences():
    with pytest.raises(ValueError, match=r"qkv must be \(total, 3, heads, head_dim\); got shape \(13, 2, 2, 8\)"):
        flash_attn_varlen_qkvpacked_func(randn(13, 2, 2, 8), Q_ENDS, 7)
    with pytest.raises(ValueError, match=r"kv must be \(total, 2, heads, head_dim\); got shape \(30, 2, 8\)"):
        flash_attn_varlen_kvpacked_func(randn(13, 2, 8), randn(30, 2, 8), Q_ENDS, K_ENDS, 7, 11)
    with pytest.raises(TypeError, match=r"qkv must be a torch.Tensor; got list"):
        flash_attn_varlen_qkvpacked_func([1], Q_ENDS, 7)


PAGE = 4
TABLE = torch.tensor([[5, 1, 8], [3, -1, -1], [0, 7, 77], [2, 4, 6]], dtype=torch.int32)  # beyond a length: anything


def pages(x: Tensor, k_ends: Tensor = K_ENDS) -> Tensor:
    """(9 blocks, PAGE, ...) of packed keys; NaN where there are none."""
    out = x.new_full((9, PAGE, *x.shape[1:]), torch.nan)
    for row, a, b in zip(TABLE.tolist(), k_ends.tolist(), k_ends[1:].tolist()):
        for n, key in enumerate(range(a, b)):
            out[row[n // PAGE], n % PAGE] = x[key]
    return out


@every_backend
@pytest.mark.parametrize("q_ends", [Q_ENDS, torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)], ids=["ragged", "step"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_varlen_pages(backend, q_ends, causal):
    q, k, v = randn(int(q_ends[-1]), 4, 16), randn(30, 2, 16, seed=1), randn(30, 2, 16, seed=2)
    packing = {"cu_seqlens_q": q_ends, "cu_seqlens_k": K_ENDS, "max_seqlen_q": int(q_ends.diff().max())}
    how = {**packing, "max_seqlen_k": 11, "causal": causal, "return_attn_probs": True, "backend": backend}
    out, lse, _ = flash_attn_varlen_func(q, pages(k), pages(v), block_table=TABLE, **how)
    assert max_error(out, in_sequences(q, k, v, q_ends, K_ENDS, causal)) < 1e-12
    assert max_error(lse, flash_attn_varlen_func(q, k, v, **how)[1]) < 1e-6


def test_a_step_over_pages_gathers_none(monkeypatch):
    q, k = randn(4, 4, 16), pages(randn(30, 2, 16))
    run = lambda: flash_attn_varlen_func(q, k, k, torch.arange(5).int(), K_ENDS, 1, 11, block_table=TABLE)
    expected = run()
    monkeypatch.setattr(flash_cache, "is_step", lambda *_: False)
    assert max_error(expected, run()) < 1e-12
    monkeypatch.undo()
    monkeypatch.delattr(flash_cache, "gathered")
    assert torch.equal(run(), expected)


@every_backend
@pytest.mark.parametrize("q_ends", [Q_ENDS, torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)], ids=["ragged", "step"])
def test_gradients_reach_pages(backend, q_ends):
    inputs = randn(int(q_ends[-1]), 4, 16), randn(30, 2, 16, seed=1), randn(30, 2, 16, seed=2)
    longest = int(q_ends.diff().max())
    paged = lambda q, k, v: flash_attn_varlen_func(
        q, pages(k), pages(v), q_ends, K_ENDS, longest, 11, causal=True, block_table=TABLE, backend=backend
    )
    assert_same(gradients(paged, *inputs), gradients(lambda *qkv: in_sequences(*qkv, q_ends, K_ENDS, True), *inputs))


@pytest.mark.parametrize("q_ends", [Q_ENDS, torch.arange(5, dtype=torch.int32)], ids=["ragged", "step"])
def test_autocast_reaches_pages(q_ends):
    """As without pages."""
    q, k = randn(int(q_ends[-1]), 4, 16).float(), randn(30, 2, 16).float()
    packing = q_ends, K_ENDS, int(q_ends.diff().max()), 11
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attn_varlen_func(q, pages(k), pages(k), *packing, block_table=TABLE)
        expected = flash_attn_varlen_func(q, k, k, *packing)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block_table": TABLE.long()}, TypeError, r"block_table must be int32; got torch.int64"),
        ({"block_table": TABLE[:2]}, ValueError, r"block_table must have shape \(4, pages\); got \(2, 3\)"),
        ({"block_table": TABLE.to("meta")}, ValueError, r"block_table must be on q's device cpu; got meta"),
        (
            {"block_table": TABLE[:, :2]},
            ValueError,
            r"block_table must hold pages for the longest sequence, 11 keys; got 8",
        ),
        ({"block_table": TABLE.flip(1)}, ValueError, r"block_table\[1\] must hold pages between 0 and 8; got \[-1\]"),
        ({"k": randn(30, 2, 8)}, ValueError, r"k must be \(blocks, page, heads, head_dim\); got shape \(30, 2, 8\)"),
        (
            {"k": randn(9, 0, 2, 8), "v": randn(9, 0, 2, 8)},
            ValueError,
            r"k must have pages of one key or more; got shape \(9, 0, 2, 8\)",
        ),
        ({"q": randn(1, 13, 4, 8)}, ValueError, r"q must be \(total, heads, head_dim\); got shape \(1, 13, 4, 8\)"),
        ({"max_seqlen_q": 6}, ValueError, r"max_seqlen_q must be at least the longest sequence, 7; got 6"),
        ({"max_seqlen_k": 6}, ValueError, r"max_seqlen_k must be at least the longest sequence, 11; got 6"),
    ],
)
def test_errors_of_pages(changes, error, message):
    k = pages(randn(30, 2, 8))
    good = {"q": randn(13, 4, 8), "k": k, "v": k, "cu_seqlens_q": Q_ENDS, "cu_seqlens_k": K_ENDS, "block_table": TABLE}
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**{**good, **LONGEST, **changes})


def turned(x: Tensor, cos: Tensor, sin: Tensor, at: Tensor, interleaved: bool) -> Tensor:
    """The rotary embedding as a product of complex numbers: x (S, heads, D) at positions (S or 1,)."""
    half = cos.shape[1]
    angle = torch.complex(cos, sin)[at][:, None]
    pairs = (
        x[..., : 2 * half].unflatten(-1, (half, 2)) if interleaved else x[..., : 2 * half].unflatten(-1, (2, half)).mT
    )
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angle)
    return torch.cat([(pairs if interleaved else pairs.mT).flatten(-2), x[..., 2 * half :]], -1)


@dataclasses.dataclass
class CacheCall:
    """Three samples over a cache of 21 keys; ``rows``, ``leftpad`` and ``rotary`` say which arguments are given.

    The cache is NaN wherever a call has no business: beyond lengths, in the padding, in rows of others.
    """

    new: int = 2
    queries: int = 2
    rows: bool = False
    leftpad: bool = False
    rotary: int = 0  # of 16 channels
    interleaved: bool = True
    options: dict = dataclasses.field(default_factory=dict)
    lengths = (11, 0, 6)
    pads = (3, 0, 6)

    def __post_init__(self) -> None:
        self.q = randn(3, self.queries, 4, 16)
        self.k, self.v = (randn(3, self.new, 2, width, seed=width) for width in (16, 24))
        self.row = [4, 0, 3] if self.rows else [0, 1, 2]
        shape = (5 if self.rows else 3, 21, 2)
        self.k_cache, self.v_cache = (torch.full((*shape, w), torch.nan, dtype=torch.float64) for w in (16, 24))
        self.first = self.pads if self.leftpad else (0, 0, 0)
        for row, first, length in zip(self.row, self.first, self.lengths):
            for cache in (self.k_cache, self.v_cache):
                cache[row, first:length] = randn(length - first, *cache.shape[2:], seed=row)
        angle = 6 * randn(24, self.rotary // 2, seed=9)
        self.cos, self.sin = angle.cos(), angle.sin()

    def arguments(self) -> dict:
        int32 = lambda numbers: torch.tensor(numbers, dtype=torch.int32)
        found = {"q": self.q, "k_cache": self.k_cache, "v_cache": self.v_cache, "cache_seqlens": int32(self.lengths)}
        found |= {"k": self.k, "v": self.v} if self.new else {}
        found |= {"cache_batch_idx": int32(self.row)} if self.rows else {}
        found |= {"cache_leftpad": int32(self.pads)} if self.leftpad else {}
        if self.rotary:
            found |= {"rotary_cos": self.cos, "rotary_sin": self.sin, "rotary_interleaved": self.interleaved}
        return {**found, **self.options}

    def expected(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(out, lse, k_cache, v_cache) after the call."""
        k_cache, v_cache, outs, lses = self.k_cache.clone(), self.v_cache.clone(), [], []
        causal, window = self.options.get("causal", False), self.options.get("window_size", (-1, -1))
        for b, (row, first, length) in enumerate(zip(self.row, self.first, self.lengths)):
            q, k, end = self.q[b], self.k[b], length + self.new
            if self.rotary:
                count = self.queries if causal or window != (-1, -1) else 1
                q = turned(q, self.cos, self.sin, length + torch.arange(count), self.interleaved)
                k = turned(k, self.cos, self.sin, length + torch.arange(self.new), self.interleaved)
            k_cache[row, length:end], v_cache[row, length:end] = k, self.v[b]
            keys, values = k_cache[row, first:end], v_cache[row, first:end]
            sees = visible(self.queries, end - first, causal, window)
            outs.append(sdpa(q[None], keys[None], values[None], sees)[0])
            scores = torch.einsum("ihd,jhd->hij", q, keys.repeat_interleave(2, 1)) / 4
            lses.append(scores.masked_fill(~sees, -torch.inf).logsumexp(-1))
        return torch.stack(outs), torch.stack(lses), k_cache, v_cache


CACHE_CALLS = {
    "rotary": {"rotary": 16},
    "rotary, causal": {"rotary": 16, "options": {"causal": True}},
    "rotary in part, halves, window": {"rotary": 6, "interleaved": False, "options": {"window_size": (3, 1)}},
    "rotary, fewer new keys than queries": {"rotary": 8, "queries": 4, "new": 1, "options": {"causal": True}},
    "rows": {"rows": True},
    "rows, only read": {"rows": True, "new": 0, "queries": 1},
    "padding": {"leftpad": True},
    "padding, causal": {"leftpad": True, "queries": 4, "options": {"causal": True}},
    "padding, window": {"leftpad": True, "queries": 3, "options": {"causal": True, "window_size": (4, -1)}},
    "all": {"rotary": 16, "rows": True, "leftpad": True, "interleaved": False, "options": {"causal": True}},
}


@every_backend
@pytest.mark.parametrize("name", CACHE_CALLS)
def test_cache(name, backend):
    call = CacheCall(**CACHE_CALLS[name])
    arguments, (out, lse, k_cache, v_cache) = call.arguments(), call.expected()
    got, got_lse = flash_attn_with_kvcache(**arguments, return_softmax_lse=True, backend=backend)
    assert max_error(got, out) < 1e-12
    assert max_error(got_lse, lse) < 1e-5
    assert max_error(call.k_cache.nan_to_num(99.0), k_cache.nan_to_num(99.0)) < 1e-12
    assert torch.equal(call.v_cache.nan_to_num(99.0), v_cache.nan_to_num(99.0))
    assert torch.equal(call.k, arguments.get("k", call.k))  # only the cache is written


@every_backend
def test_rotary_over_pages(backend):
    """The same as over one row per sample."""
    call = CacheCall(rotary=16, options={"causal": True})
    out, _, k_cache, _ = call.expected()
    blocks = lambda x: x.view(9, 7, *x.shape[2:]).flip(0).contiguous()
    table = torch.arange(9, dtype=torch.int32).flip(0).view(3, 3)
    k_pages, v_pages = blocks(call.k_cache), blocks(call.v_cache)
    paged = {**call.arguments(), "k_cache": k_pages, "v_cache": v_pages, "block_table": table}
    assert max_error(flash_attn_with_kvcache(**paged, backend=backend), out) < 1e-12
    assert max_error(k_pages.nan_to_num(99.0), blocks(k_cache).nan_to_num(99.0)) < 1e-12


def test_rotary_of_half_precision_is_rounded_once():
    x, cos, sin = (y.half() for y in (randn(1, 5, 2, 16), *(randn(5, 8, seed=s) for s in (1, 2))))
    cache = torch.zeros(1, 5, 2, 16, dtype=torch.half)
    flash_attn_with_kvcache(x, cache, cache.clone(), x, x, cos, sin, cache_seqlens=0)
    expected = turned(x[0].double(), cos.double(), sin.double(), torch.arange(5), True)
    assert torch.equal(cache[0], expected.half())


def test_a_cache_with_more_rows_than_samples():
    call = CacheCall()
    out, _, k_cache, _ = call.expected()
    more = torch.cat([call.k_cache, call.k_cache.new_zeros(2, 21, 2, 16)])
    values = torch.cat([call.v_cache, call.v_cache.new_zeros(2, 21, 2, 24)])
    assert max_error(flash_attn_with_kvcache(**{**call.arguments(), "k_cache": more, "v_cache": values}), out) < 1e-12
    assert torch.equal(more[:3].nan_to_num(99.0), k_cache.nan_to_num(99.0))
    assert not more[3:].any()


def test_lengths_may_be_numbers():
    """One length for all, and none for a full cache."""
    call = CacheCall(rotary=16, leftpad=True, options={"causal": True})
    call.k_cache.nan_to_num_(1.0)
    call.v_cache.nan_to_num_(1.0)
    arguments = call.arguments()
    of_tensors = flash_attn_with_kvcache(**{**arguments, "cache_seqlens": torch.full((3,), 6, dtype=torch.int32)})
    assert torch.equal(flash_attn_with_kvcache(**{**arguments, "cache_seqlens": 6}), of_tensors)
    read = {name: arguments[name] for name in ("q", "k_cache", "v_cache", "cache_leftpad")}
    full = flash_attn_with_kvcache(**read)
    assert torch.equal(full, flash_attn_with_kvcache(**read, cache_seqlens=21))


@pytest.mark.everyday(backend=["torch"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_cache_call_compiles(backend):
    call = CacheCall(**CACHE_CALLS["all"])
    out, _, k_cache, _ = call.expected()
    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    assert max_error(compiled(**call.arguments(), backend=backend), out) < 1e-12
    assert max_error(call.k_cache.nan_to_num(99.0), k_cache.nan_to_num(99.0)) < 1e-12
    torch._dynamo.reset()


def test_no_value_is_read_on_the_host(monkeypatch):
    """Meta tensors have none: to read one would raise."""
    steps = []

    def decode(backend: object, step: Step, *, need_lse: bool) -> Result:
        steps.append(step)
        return Result(step.q, step.q, None, None)

    for module in (flash, flash_cache):
        monkeypatch.setattr(module, "decode", decode)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it knows no meta device
    on_meta = lambda x: x.to("meta") if isinstance(x, Tensor) else x
    arguments = CacheCall(**CACHE_CALLS["all"]).arguments()
    flash_attn_with_kvcache(**{name: on_meta(x) for name, x in arguments.items()})
    q, k, ends, k_ends, table = map(on_meta, (randn(4, 4, 16), pages(randn(30, 2, 16)), Q_ENDS, K_ENDS, TABLE))
    flash_attn_varlen_func(q, k, k, ends, k_ends, 1, 11, block_table=table)
    assert [step.q.shape for step in steps] == [(3, 2, 4, 16), (4, 1, 4, 16)]
    assert steps[0].key_padding_mask.shape == (3, 21)


INT = torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rotary_sin": None}, ValueError, r"rotary_cos and rotary_sin must be given together; got only rotary_cos"),
        ({"rotary_cos": None}, ValueError, r"rotary_cos and rotary_sin must be given together; got only rotary_sin"),
        ({"k": None, "v": None}, ValueError, r"k and v must be given with rotary_cos: .*; got None"),
        ({"rotary_cos": randn(24, 9)}, ValueError, r"rotary_cos must be \(positions, R / 2\), .*dim 16; got \(24, 9\)"),
        ({"rotary_sin": randn(24, 0)}, ValueError, r"rotary_sin must be \(positions, R / 2\), .*dim 16; got \(24, 0\)"),
        ({"rotary_sin": randn(23, 8)}, ValueError, r"rotary_sin must have rotary_cos's shape \(24, 8\); got \(23, 8\)"),
        ({"rotary_cos": randn(24, 8).float()}, TypeError, r"rotary_cos must have q's dtype .*64; got .*float32"),
        ({"rotary_sin": randn(24, 8).to("meta")}, ValueError, r"rotary_sin must be on q's device cpu; got meta"),
        (
            {"rotary_cos": randn(20, 8), "rotary_sin": randn(20, 8)},
            ValueError,
            r"rotary_cos must have 21 positions .*got 20",
        ),
        (
            {"q": randn(3, 14, 4, 16), "causal": True},
            ValueError,
            r"rotary_cos must have 25 positions or more .*; got 24",
        ),
        ({"rotary_interleaved": 1}, TypeError, r"rotary_interleaved must be a bool; got int"),
        ({"cache_batch_idx": INT.long()}, TypeError, r"cache_batch_idx must be int32; got torch.int64"),
        ({"cache_batch_idx": INT[:2]}, ValueError, r"cache_batch_idx must have shape \(3,\); got \(2,\)"),
        (
            {"cache_batch_idx": INT + 3},
            ValueError,
            r"cache_batch_idx must hold numbers between 0 and 2; got \[3, 3, 3\]",
        ),
        ({"cache_batch_idx": INT.to("meta")}, ValueError, r"cache_batch_idx must be on q's device cpu; got meta"),
        ({"cache_batch_idx": [0, 1, 2]}, TypeError, r"cache_batch_idx must be a torch.Tensor; got list"),
        (
            {"cache_leftpad": INT - 1},
            ValueError,
            r"cache_leftpad must hold numbers between 0 and 21; got \[-1, -1, -1\]",
        ),
        ({"cache_leftpad": INT.long()}, TypeError, r"cache_leftpad must be int32; got torch.int64"),
        (
            {"block_table": INT[:, None], "cache_batch_idx": INT},
            ValueError,
            r"cache_batch_idx must be None where block_table",
        ),
        (
            {"block_table": INT[:, None], "cache_leftpad": INT},
            ValueError,
            r"cache_leftpad must be None where block_table",
        ),
        ({"q": randn(4, 2, 4, 16)}, ValueError, r"k_cache must have q's batch size 4; got shape \(3, 21, 2, 16\)"),
        ({"q": randn(16)}, ValueError, r"q must be \(batch, seqlen, heads, head_dim\); got shape \(16,\)"),
    ],
)
def test_errors_of_a_cache(changes, error, message):
    """By name, before anything is written."""
    call = CacheCall(rotary=16)
    before = call.k_cache.clone()
    with pytest.raises(error, match=message):
        flash_attn_with_kvcache(**{**call.arguments(), **changes})
    assert torch.equal(call.k_cache.nan_to_num(), before.nan_to_num())
