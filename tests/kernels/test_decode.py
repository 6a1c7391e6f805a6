"""Decode kernels against the fp64 oracle and the PyTorch backend.

Cache slots beyond a sample's length hold NaN, as does every allocation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import (
    INTERPRETED,
    assert_close,
    assert_relative,
    assert_same,
    assert_same_forward,
    daily,
    skip_unless_supported,
)

from sar_fast import SARState, sar_attn_with_kvcache
from sar_fast.reference import sar_attention_reference
from sar_kernels.call import AttentionOptions, WeightOptions
from sar_kernels.decode.cache import plan_append
from sar_kernels.decode.call import append_kv, decode_forward, decode_workspace, sar_decode_forward
from sar_kernels.decode.configs import MAX_SPLITS, num_splits_for
from sar_kernels.decode.plan import DecodeCall

NAN = float("nan")
DEVICE = "cpu" if INTERPRETED else "cuda"


@dataclass(frozen=True)
class Case:
    """One step. images holds, per sample, the (first, end) of its visual keys; lengths include the new keys."""

    name: str = "base"
    lengths: tuple[int, ...] = (150, 77)
    images: tuple[tuple[int, int], ...] = ((5, 45), (30, 70))
    capacity: int = 160
    queries: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    beta: float = 0.02
    protect: bool = True
    normalize: str = "none"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"

    def but(self, **changes) -> Case:
        return replace(self, **changes)


class Inputs:
    def __init__(self, case: Case):
        skip_unless_supported(case.dtype)
        self.case, batch = case, len(case.lengths)
        normal = lambda *shape: torch.randn(*shape).to(case.dtype)
        self.q = normal(batch, case.queries, case.heads, case.head_dim)
        self.k = normal(batch, case.capacity, case.kv_heads, case.head_dim)
        self.v = normal(batch, case.capacity, case.kv_heads, case.head_dim_v or case.head_dim)
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32)
        self.visual = torch.zeros(batch, case.capacity, dtype=torch.bool)
        for b, (first, end) in enumerate(case.images):
            self.visual[b, first:end] = True
        prior = torch.rand(batch, case.capacity) * self.visual * (torch.arange(case.capacity) % 3 != 0)
        self.prior = prior / prior.sum(-1, keepdim=True).clamp_min(1e-9)
        self.text = torch.ones(batch, case.queries, dtype=torch.bool)
        if case.queries > 1:
            self.text[0, 1] = False
        self.options = AttentionOptions(case.causal, case.head_dim**-0.5, case.window, case.softcap)
        self.weights = WeightOptions(case.beta, case.protect, case.normalize)
        self.empty_unfilled()

    def empty_unfilled(self) -> None:
        for b, length in enumerate(self.case.lengths):
            self.k[b, length:] = NAN
            self.v[b, length:] = NAN

    @property
    def cache(self):
        return self.q, self.k, self.v, self.lengths

    @property
    def roles(self):
        return self.visual, self.text, self.prior

    def state(self) -> SARState:
        return SARState.empty(len(self.case.lengths), self.case.heads, DEVICE)

    def run(self, mode="running", state=None, **kwargs):
        state = state or self.state()
        common = {"options": self.options, "weights": self.weights, "mode": mode}
        return sar_decode_forward(*self.cache, *self.roles, *state.tensors(), **common, **kwargs)

    def reference(self, b: int, dtype=torch.float64):
        """(out, stats) of sample b by the oracle on its filled prefix."""
        one, prefix = slice(b, b + 1), slice(0, self.case.lengths[b])
        k, v = self.k[one, prefix].to(dtype), self.v[one, prefix].to(dtype)
        return sar_attention_reference(
            self.q[one].to(dtype),
            k,
            v,
            self.visual[one, prefix],
            self.text[one],
            self.prior[one, prefix].to(torch.float64 if dtype == torch.float64 else torch.float32),
            **keywords(self.case),
            return_stats=True,
        )


def keywords(case: Case) -> dict:
    """The case's options as the package's functions name them."""
    return {
        "beta": case.beta,
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
        "protect_first_head": case.protect,
        "normalize": case.normalize,
    }


def check(inputs: Inputs, out, lse, av, sa, c, count) -> None:
    """SPEC's output and statistics rules, per sample."""
    assert out.dtype == inputs.q.dtype
    for b in range(len(inputs.case.lengths)):
        exact, stats = inputs.reference(b)
        eager, _ = inputs.reference(b, inputs.case.dtype)
        assert_close("out", out[b].double(), exact[0], eager[0].double(), 2, 1e-5)
        torch.testing.assert_close(lse[b].double(), stats.lse[0], rtol=1e-5, atol=1e-5)
        assert_relative("av", av[b], stats.alignment_variance[0])
        assert_relative("sa", sa[b], stats.semantic_alignment[0])
        assert_relative("c", c[b], stats.head_weights[0])
        assert count[b] == stats.query_count[0]


BASE = Case()
CASES = [
    BASE,
    BASE.but(name="fp16", dtype=torch.float16),
    BASE.but(name="bf16", dtype=torch.bfloat16),
    BASE.but(name="bf16-d128-eight-queries", dtype=torch.bfloat16, head_dim=128, queries=8),
    BASE.but(name="fp64", dtype=torch.float64, head_dim=16),
    BASE.but(name="three-queries", queries=3),
    BASE.but(name="two-row-tiles", queries=16, heads=2, kv_heads=1, head_dim=16, dtype=torch.float16),
    BASE.but(name="mha-d16", kv_heads=4, head_dim=16),
    BASE.but(name="gqa4-d80", kv_heads=1, head_dim=80, dtype=torch.float16),
    BASE.but(name="gqa7-d128", heads=7, kv_heads=1, head_dim=128, queries=2),
    BASE.but(name="d96-dv32", head_dim=96, head_dim_v=32),
    BASE.but(name="d16-dv64", head_dim=16, head_dim_v=64, queries=2),
    BASE.but(name="d256", heads=2, kv_heads=1, head_dim=256, dtype=torch.float16),
    BASE.but(name="window", window=(60, -1), queries=3, head_dim=16),
    BASE.but(name="window-past-the-image", window=(20, -1), head_dim=16),
    BASE.but(name="window-both-full", window=(40, 1), causal=False, queries=4, head_dim=16),
    BASE.but(name="full", causal=False, queries=3, head_dim=16),
    BASE.but(name="softcap", softcap=2.0, dtype=torch.float16),
    BASE.but(name="softcap-window", softcap=3.0, window=(90, -1), queries=2, head_dim=16),
    BASE.but(name="standardize", normalize="standardize", beta=0.5, head_dim=16),
    BASE.but(name="unprotected", protect=False, head_dim=16),
    BASE.but(name="one-head", heads=1, kv_heads=1, normalize="standardize", head_dim=16),
    BASE.but(name="five-heads", heads=5, kv_heads=5, head_dim=16),
    BASE.but(name="one-key", lengths=(1, 160), images=((0, 1), (0, 160)), head_dim=16),
    BASE.but(name="more-queries-than-keys", lengths=(2, 5), images=((0, 2), (1, 5)), queries=4, head_dim=16, beta=0.5),
    BASE.but(name="image-in-the-new-keys", lengths=(150, 77), images=((148, 150), (0, 77)), queries=3, head_dim=16),
]
SPLIT_EVERY_WAY = ("base", "fp16", "three-queries", "window-both-full", "softcap-window", "more-queries-than-keys")
# Every day, cut in two; those that are cut otherwise below need not be.
DAILY = (
    "fp64", "two-row-tiles", "gqa4-d80", "d96-dv32", "d16-dv64", "window-past-the-image", "softcap", "standardize",
    "unprotected", "five-heads", "one-key", "image-in-the-new-keys",
)  # fmt: skip


@pytest.mark.parametrize("case", daily(CASES, *DAILY), ids=str)
def test_matches_reference(case):
    inputs = Inputs(case)
    check(inputs, *inputs.run(num_splits=2))


@pytest.mark.everyday(num_splits=[5])
@pytest.mark.parametrize("num_splits", [1, 5])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in SPLIT_EVERY_WAY], ids=str)
def test_any_number_of_splits_matches_reference(case, num_splits):
    inputs = Inputs(case)
    check(inputs, *inputs.run(num_splits=num_splits))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (7, 1)])
@pytest.mark.parametrize("queries", [1, 2, 7])
@pytest.mark.parametrize("options", [{}, {"window": (70, -1)}, {"softcap": 2.5}], ids=str)
def test_matches_reference_grid(dtype, head_dim, heads, queries, options):
    case = BASE.but(dtype=dtype, head_dim=head_dim, heads=heads[0], kv_heads=heads[1], queries=queries, **options)
    inputs = Inputs(case)
    for num_splits in (1, 4, 64):
        check(inputs, *inputs.run(num_splits=num_splits))


def test_plain_decode_matches_reference():
    inputs = Inputs(BASE.but(queries=3, dtype=torch.float16, images=((0, 0), (0, 0))))
    out, lse = decode_forward(*inputs.cache, options=inputs.options)
    ones = torch.ones(2, BASE.heads)
    check(inputs, out, lse, 0 * ones, 0 * ones, ones, torch.zeros(2))


def test_empty_sample_gives_zeros():
    inputs = Inputs(BASE.but(lengths=(0, 20), images=((0, 0), (2, 9)), head_dim=16))
    out, lse, _, _, c, count = inputs.run(num_splits=3)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == -torch.inf).all()
    assert torch.equal(c[0], torch.ones(4))
    assert count.tolist() == [0, 1]


@pytest.mark.parametrize("num_splits", [1, 3])
def test_nan_inputs_show_in_the_output(num_splits):
    inputs = Inputs(BASE.but(head_dim=16, queries=2))
    inputs.q[0, 1, 2] = NAN
    inputs.k[1, 70] = NAN
    out, lse = decode_forward(*inputs.cache, options=inputs.options, num_splits=num_splits)
    shows = torch.zeros(2, 2, 4, dtype=torch.bool)
    shows[0, 1, 2] = shows[1] = True
    assert torch.equal(out.isnan().all(-1), shows)
    assert torch.equal(out.isnan().any(-1), shows)
    assert torch.equal(lse.isnan(), shows.transpose(1, 2))


def test_large_batches_lie_on_the_first_axis_of_the_grid():
    """CUDA takes no more than 65,535 programs on the others."""
    batch = 70_000
    empty = lambda *shape, dtype=torch.float16: torch.empty(shape, dtype=dtype, device="meta")
    k, lengths = empty(batch, 64, 2, 16), empty(batch, dtype=torch.int32)
    call = DecodeCall(empty(batch, 1, 4, 16), k, k, lengths, AttentionOptions(True, 0.25), arch="sm_90", sm_count=132)
    few = empty(1, 70_000, 2, 16)  # a long prompt that is written at once
    new = empty(batch, 1, 2, 16)
    launches = plan_append(k, k, new, new, lengths)
    for mode in ("plain", "running", "step", "prompt"):
        launches += call.plan(mode, WeightOptions(0.5))
    for launch in launches + plan_append(few, few, few, few, lengths[:1]):
        assert max(launch.grid[1:], default=1) <= 65_535, launch.kernel


def test_length_beyond_the_cache_is_taken_for_its_capacity():
    inputs = Inputs(BASE.but(lengths=(160, 77), head_dim=16))
    expected = [t.clone() for t in inputs.run()]
    inputs.lengths = torch.tensor([1000, 77], dtype=torch.int32)
    assert all(torch.equal(a, b) for a, b in zip(inputs.run(), expected))


def test_sample_without_counting_query_is_plain_attention_bit_for_bit():
    # an image, text only, one visual key, an image but no text query
    case = BASE.but(lengths=(150, 77, 90, 60), images=((5, 45), (0, 0), (7, 8), (3, 30)), queries=2)
    inputs = Inputs(case.but(dtype=torch.float16, head_dim=16))
    inputs.text[3] = False
    plain, plain_lse = decode_forward(*inputs.cache, options=inputs.options, num_splits=3)
    out, lse, _, _, c, count = inputs.run(num_splits=3)
    assert count.tolist() == [1, 0, 0, 0]
    assert torch.equal(c[1:], torch.ones(3, 4))
    assert torch.equal(out[1:], plain[1:])
    assert torch.equal(lse, plain_lse)
    assert not torch.equal(out[0], plain[0])


def test_huge_unprotected_beta_is_plain_attention():
    inputs = Inputs(BASE.but(beta=1e30, protect=False, head_dim=16))
    plain, _ = decode_forward(*inputs.cache, options=inputs.options)
    torch.testing.assert_close(inputs.run()[0], plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_variance_survives_a_common_shift_of_all_keys(num_splits):
    inputs = Inputs(BASE)
    shift = torch.randn(BASE.head_dim)
    inputs.k = inputs.k + shift * (100 / shift.std())
    av = inputs.run(num_splits=num_splits)[2]
    for b in range(2):
        assert_relative("av", av[b], inputs.reference(b)[1].alignment_variance[0])


def paged(cache: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache in shuffled pages between others that hold NaN, and its block table."""
    batch, capacity = cache.shape[:2]
    pages = capacity // page
    order = torch.arange(batch * pages + 3).roll(2).flip(0)[: batch * pages]
    blocks = torch.full((batch * pages + 3, page, *cache.shape[2:]), NAN, dtype=cache.dtype)
    blocks[order] = cache.reshape(batch * pages, page, *cache.shape[2:])
    return blocks, order.view(batch, pages).to(torch.int32)


@pytest.mark.everyday(page=[20, 32])
@pytest.mark.parametrize("page", [8, 20, 32, 160])  # parts of a tile of 32 keys, straddling tiles, whole tiles
def test_paged_equals_contiguous(page):
    inputs = Inputs(BASE.but(queries=3, head_dim=80, head_dim_v=16))
    expected = [t.clone() for t in inputs.run(num_splits=2)]
    (inputs.k, table), (inputs.v, _) = paged(inputs.k, page), paged(inputs.v, page)
    assert_same_forward(inputs.run(num_splits=2, block_table=table), expected)
    plain = decode_forward(*inputs.cache, options=inputs.options, num_splits=2, block_table=table)
    assert_same(plain[1], expected[1])


def test_strided_inputs_are_read_in_place():
    inputs = Inputs(BASE.but(queries=2, head_dim=16))
    expected = [t.clone() for t in inputs.run()]
    heads_first = lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)
    inputs.q, inputs.k, inputs.v = heads_first(inputs.q), heads_first(inputs.k), heads_first(inputs.v)
    longer = torch.nn.functional.pad(inputs.prior, (0, 40), value=NAN)
    inputs.prior, inputs.visual = longer[:, :160], torch.nn.functional.pad(inputs.visual, (0, 40))[:, :160]
    assert_same_forward(inputs.run(), expected)


def test_prior_is_read_at_visual_keys_only():
    inputs = Inputs(BASE.but(head_dim=16))
    expected = [t.clone() for t in inputs.run()]
    inputs.prior[~inputs.visual] = NAN
    assert all(torch.equal(a, b) for a, b in zip(inputs.run(), expected))


@pytest.mark.everyday(mode=["running"])
@pytest.mark.parametrize("mode", ["running", "step", "prompt"])
def test_chain_of_steps(mode):
    """Six generated tokens after a prompt: against the oracle on the whole prefix and against PyTorch's decode."""
    batch, heads, kv_heads, dim, capacity, steps = 2, 4, 2, 16, 64, 6
    prompts = torch.tensor([28, 41])  # the first goes over the edge of a tile
    images = ((3, 20), (0, 37))
    tokens = torch.arange(capacity)
    q, k, v = (torch.randn(batch, capacity, h, dim) for h in (heads, kv_heads, kv_heads))
    visual = torch.stack([(tokens >= first) & (tokens < end) for first, end in images])
    text = torch.stack([tokens >= end for _, end in images])
    prior = torch.rand(batch, capacity) * visual * (tokens % 3 != 0)
    prior = prior / prior.sum(-1, keepdim=True)
    options, weights = AttentionOptions(True, dim**-0.5), WeightOptions(0.02)

    def reference(b, end, text, first=0):
        one, prefix = slice(b, b + 1), slice(0, end)
        queries = slice(first, end)
        return sar_attention_reference(
            q[one, queries].double(),
            k[one, prefix].double(),
            v[one, prefix].double(),
            visual[one, prefix],
            text[one, queries],
            prior[one, prefix].double(),
            beta=0.02,
            return_stats=True,
        )

    stats = [reference(b, int(n), text)[1] for b, n in enumerate(prompts)]
    states = [SARState.from_stats(s) for s in stats]
    state = SARState(*(torch.cat(t) for t in zip(*(s.tensors() for s in states))))
    before, torch_state = ([t.clone() for t in state.tensors()] for _ in range(2))
    torch_state = SARState(*torch_state)
    caches = [torch.full((batch, capacity, kv_heads, dim), NAN) for _ in range(4)]
    for cache, filled in zip(caches, (k, v, k, v)):
        for b, n in enumerate(prompts):
            cache[b, :n] = filled[b, :n]
    workspace = decode_workspace(
        batch, 1, heads, kv_heads, dim, capacity, dtype=torch.float32, device=DEVICE, num_splits=2
    )
    ones = torch.ones(batch, 1, dtype=torch.bool)
    for step in range(steps):
        at = prompts + step
        new = [t[torch.arange(batch), at][:, None] for t in (q, k, v)]
        lengths = (at + 1).to(torch.int32)
        append_kv(caches[0], caches[1], new[1], new[2], lengths)
        got = sar_decode_forward(
            new[0],
            *caches[:2],
            lengths,
            *((None, None, None) if mode == "prompt" else (visual, ones, prior)),
            *state.tensors(),
            options=options,
            weights=weights,
            mode=mode,
            workspace=workspace,
        )
        out, expected = sar_attn_with_kvcache(
            new[0],
            caches[2],
            caches[3],
            new[1],
            new[2],
            cache_seqlens=lengths - 1,
            visual_mask=visual,
            prior=prior,
            state=torch_state,
            decode=mode,
            beta=0.02,
            backend="torch",
            return_stats=True,
        )
        torch.testing.assert_close(got[0], out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1], expected.lse, rtol=1e-5, atol=1e-5)
        assert_relative("av", got[2], expected.alignment_variance)
        assert_relative("sa", got[3], expected.semantic_alignment)
        assert_relative("c", got[4], expected.head_weights)
        assert torch.equal(got[5], expected.query_count)
        for b in range(batch):
            end = int(lengths[b])
            exact, exact_stats = reference(b, end, text, first=end - 1 if mode == "step" else 0)
            c = stats[b].head_weights if mode == "prompt" else exact_stats.head_weights
            assert_relative("c", got[4][b], c[0])
            plain = exact[0, -1] / exact_stats.head_weights[0, :, None]
            torch.testing.assert_close(got[0][b, 0].double(), plain * c[0, :, None], rtol=1e-5, atol=1e-5)
    for name, now, torch_now, then in zip(
        ("av_sum", "sa_sum", "count", "head_weights"), state.tensors(), torch_state.tensors(), before
    ):
        if mode == "running" and name != "head_weights":
            assert_relative(name, now, torch_now)
            assert not torch.equal(now, then)
        else:
            assert torch.equal(now, then), name


def test_several_new_tokens_equal_one_after_another():
    """ "running": five queries in one call leave the state that five calls leave."""
    inputs = Inputs(BASE.but(queries=5, head_dim=16, images=((5, 45), (3, 40))))
    inputs.text[:] = True
    together, apart = inputs.state(), inputs.state()
    out = inputs.run(state=together)[0].clone()
    single = Inputs(BASE.but(head_dim=16))
    single.visual, single.prior, single.k, single.v = inputs.visual, inputs.prior, inputs.k, inputs.v
    for i in range(5):
        single.q, single.lengths = inputs.q[:, i : i + 1], inputs.lengths - 4 + i
        last = single.run(state=apart)
    for name, a, b in zip(("av_sum", "sa_sum", "count"), together.tensors(), apart.tensors()):
        assert_relative(name, a, b)
    torch.testing.assert_close(out[:, -1:], last[0], rtol=1e-5, atol=1e-5)


def test_workspace_is_all_the_memory(monkeypatch):
    inputs = Inputs(BASE.but(queries=2, head_dim=16))
    expected = [t.clone() for t in inputs.run(num_splits=4)]
    workspace = decode_workspace(2, 2, 4, 2, 16, 160, dtype=torch.float32, device=DEVICE, num_splits=4)

    def refuse(*args, **kwargs):
        raise AssertionError("allocated")

    for name in ("empty", "zeros", "full", "empty_like", "zeros_like"):
        monkeypatch.setattr(torch, name, refuse)
    monkeypatch.setattr(torch.Tensor, "item", refuse)
    monkeypatch.setattr(torch.Tensor, "tolist", refuse)
    state = SARState(*(t.clone() for t in (expected[2] * 0, expected[2] * 0, expected[5] * 0, expected[2] * 0 + 1)))
    start = [t.clone() for t in state.tensors()]
    for _ in range(2):  # nothing of the first call is left in the second
        for tensor, value in zip(state.tensors(), start):
            tensor.copy_(value)
        got = inputs.run(state=state, workspace=workspace)
        assert got[0] is workspace.out
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("page", [0, 16])
def test_append_writes_the_new_tokens_and_nothing_else(page):
    batch, capacity, new = 3, 48, 3
    k, v = torch.randn(batch, capacity, 2, 24), torch.randn(batch, capacity, 2, 16)
    k_new, v_new = torch.randn(batch, 2, new, 24).transpose(1, 2), torch.randn(batch, new, 2, 16)
    lengths = torch.tensor([17, 48, 2], dtype=torch.int32)  # across pages, at the end, and one token before the start
    expected = k.clone(), v.clone()
    for cache, tokens in zip(expected, (k_new, v_new)):
        cache[0, 14:17], cache[1, 45:48], cache[2, 0:2] = tokens[0], tokens[1], tokens[2, 1:]
    if not page:
        append_kv(k, v, k_new, v_new, lengths)
        assert torch.equal(k, expected[0])
        assert torch.equal(v, expected[1])
        return
    (k, table), (v, _) = paged(k, page), paged(v, page)
    append_kv(k, v, k_new, v_new, lengths, table)
    assert torch.equal(k[table.long()].flatten(1, 2), expected[0])
    assert torch.equal(v[table.long()].flatten(1, 2), expected[1])
    assert int(k.isnan().any(-1).sum()) == 3 * page * 2


def test_append_beyond_the_cache_writes_nothing():
    k, v = torch.zeros(1, 8, 1, 16), torch.zeros(1, 8, 1, 16)
    append_kv(k[:, :4], v[:, :4], *torch.ones(2, 1, 1, 1, 16), torch.tensor([5], dtype=torch.int32))
    assert k.sum() == v.sum() == 0


def test_number_of_splits():
    assert num_splits_for(132, batch=1, kv_heads=8, max_length=8192) == 33
    assert num_splits_for(132, batch=64, kv_heads=8, max_length=8192) == 1
    assert num_splits_for(132, batch=1, kv_heads=2, max_length=300) == 3
    assert num_splits_for(132, batch=1, kv_heads=1, max_length=10**6) == MAX_SPLITS
    assert num_splits_for(132, batch=0, kv_heads=8, max_length=0) == 1


def test_is_deterministic():
    inputs = Inputs(BASE.but(head_dim=16))
    first = [t.clone() for t in inputs.run()]
    assert all(torch.equal(a, b) for a, b in zip(inputs.run(), first))


BAD = [
    ("q", lambda i: setattr(i, "q", i.q[0])),
    ("k_cache", lambda i: setattr(i, "k", i.k[:1])),
    ("k_cache", lambda i: setattr(i, "k", i.k.double())),
    ("v_cache", lambda i: setattr(i, "v", i.v[..., ::2])),
    ("cache_seqlens", lambda i: setattr(i, "lengths", i.lengths.long())),
    ("visual_mask", lambda i: setattr(i, "visual", i.visual.float())),
    ("visual_mask", lambda i: setattr(i, "visual", i.visual[:, :100])),
    ("text_mask", lambda i: setattr(i, "text", None)),
    ("prior", lambda i: setattr(i, "prior", i.prior.long())),
    ("heads", lambda i: setattr(i, "q", i.q[:, :, :3])),
    ("head dim", lambda i: setattr(i, "q", i.q[..., :8])),
]


@pytest.mark.parametrize(("name", "spoil"), BAD, ids=[f"{n}-{i}" for i, (n, _) in enumerate(BAD)])
def test_errors_name_the_argument(name, spoil):
    inputs = Inputs(BASE.but(head_dim=16))
    spoil(inputs)
    with pytest.raises(ValueError, match=name):
        inputs.run(state=SARState.empty(2, 4, DEVICE))


def test_frozen_weights_need_no_sums():
    inputs, c = Inputs(BASE), torch.rand(len(BASE.lengths), BASE.heads)
    nothing, common = (None, None, None), {"options": inputs.options, "weights": inputs.weights, "mode": "prompt"}
    sums = [torch.rand(x.shape) for x in inputs.state().tensors()[:3]]
    out, lse, av, sa, used, count = sar_decode_forward(*inputs.cache, *nothing, *nothing, c, **common)
    want = sar_decode_forward(*inputs.cache, *nothing, *sums, c, **common)
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])
    assert torch.equal(used, c)
    assert not any(x.any() for x in (av, sa, count))
    with pytest.raises(ValueError, match=r'head_weights: got None, need a tensor if mode is "prompt"'):
        sar_decode_forward(*inputs.cache, *nothing, *nothing, None, **common)


def test_new_sums_may_go_elsewhere():
    inputs = Inputs(BASE)
    old = SARState(*(torch.rand(x.shape) for x in inputs.state().tensors()))
    kept, there = [x.clone() for x in old.tensors()], tuple(torch.empty_like(x) for x in old.tensors()[:3])
    got = inputs.run(state=old, sums_out=there)
    assert all(torch.equal(a, b) for a, b in zip(old.tensors(), kept))
    want = inputs.run(state=old)  # over the old ones
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert all(torch.equal(a, b) for a, b in zip(there, old.tensors()))
    with pytest.raises(ValueError, match=r"sa_sum: got torch\.float32"):
        inputs.run(sums_out=(there[0], there[0][:, :1], there[2]))


def test_a_full_cache_needs_no_lengths():
    inputs = Inputs(BASE.but(lengths=(BASE.capacity,) * len(BASE.lengths)))
    given = {"options": inputs.options, "weights": inputs.weights, "mode": "step"}
    q, k, v, lengths = inputs.cache
    with_lengths = sar_decode_forward(q, k, v, lengths, *inputs.roles, *inputs.state().tensors(), **given)
    without = sar_decode_forward(q, k, v, None, *inputs.roles, None, None, None, None, **given)
    assert all(torch.equal(a, b) for a, b in zip(with_lengths, without))


def test_errors_of_mode_state_and_workspace():
    inputs = Inputs(BASE.but(head_dim=16))
    with pytest.raises(ValueError, match="mode"):
        inputs.run("frozen")
    with pytest.raises(ValueError, match="av_sum"):
        inputs.run(state=SARState.empty(2, 5, DEVICE))
    workspace = decode_workspace(2, 1, 4, 2, 32, 160, dtype=torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match=r"workspace\.out"):
        inputs.run(workspace=workspace)
    with pytest.raises(ValueError, match="num_splits"):
        inputs.run(num_splits=0)
    with pytest.raises(ValueError, match="block_table"):
        inputs.run(block_table=torch.zeros(3, 4, dtype=torch.int32))
