"""Decode steps over a KV cache against the reference on the whole prefix, in every mode and cache layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sar_fast import SARState, flash_attn_with_kvcache, sar_attn_func, sar_attn_with_kvcache
from sar_fast.reference import sar_attention_reference
from tests.helpers import BACKENDS, dtype_id, make_case, max_error, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = (24, 17, 9)  # tokens before decoding: an image, two images, text only
STEPS, PAGE, CAPACITY = 20, 8, 96
H, HKV, D, DV = 4, 2, 16, 24
BETA = 0.05


class Generation:
    """Three samples, each a prompt and what follows it, with a cache that holds the prompts."""

    def __init__(self, *, paged: bool, new: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.new, self.paged, self.dtype = new, paged, dtype
        g = torch.Generator().manual_seed(seed)
        total = [n + STEPS * new for n in PROMPTS]
        randn = lambda n, heads, width: torch.randn(n, heads, width, generator=g).to(dtype)
        self.q, self.k, self.v = (
            [randn(n, heads, width) for n in total] for heads, width in ((H, D), (HKV, D), (HKV, DV))
        )
        self.visual = torch.zeros(3, CAPACITY, dtype=torch.bool)
        self.visual[0, 2:15], self.visual[1, 1:6], self.visual[1, 8:13] = True, True, True
        prior = torch.rand(3, CAPACITY, generator=g) * self.visual
        self.prior = prior / prior.sum(-1, keepdim=True).clamp_min(1e-9)
        self.first_text = (15, 13, PROMPTS[2])  # the text-only sample has no text queries in its prompt
        self.lengths = torch.tensor(PROMPTS, dtype=torch.int32)
        shape = (3 * CAPACITY // PAGE, PAGE) if paged else (3, CAPACITY)
        self.k_cache = torch.full((*shape, HKV, D), torch.nan, dtype=dtype)
        self.v_cache = torch.full((*shape, HKV, DV), torch.nan, dtype=dtype)
        pages = torch.randperm(shape[0], generator=g).view(3, -1) if paged else None
        self.block_table = pages.to(torch.int32) if paged else None
        for b, n in enumerate(PROMPTS):
            self.put(b, range(n))

    def slot(self, b: int, position: int) -> tuple[int, int]:
        if not self.paged:
            return b, position
        return int(self.block_table[b, position // PAGE]), position % PAGE

    def put(self, b: int, positions) -> None:
        for n in positions:
            self.k_cache[self.slot(b, n)], self.v_cache[self.slot(b, n)] = self.k[b][n], self.v[b][n]

    def text(self, b: int, start: int, stop: int) -> torch.Tensor:
        return torch.arange(start, stop) >= self.first_text[b]

    def reference(self, b: int, stop: int, *, first_query: int = 0, prompt_only: bool = False, **options):
        """(out, stats) in fp64 of queries first_query.. over the first ``stop`` positions of sample b."""
        one = lambda x, a=0: x[b][a:stop].double()[None]
        text = self.text(b, first_query, stop)
        if prompt_only:
            text = text & (torch.arange(first_query, stop) < PROMPTS[b])
        return sar_attention_reference(
            one(self.q, first_query), one(self.k), one(self.v), self.visual[b : b + 1, :stop], text[None],
            self.prior[b : b + 1, :stop].double(), return_stats=True, **{"beta": BETA, **options},
        )  # fmt: skip

    def prompt_state(self, backend: str) -> SARState:
        """State after the prompts, from one right-padded call."""
        n = max(PROMPTS)
        pad = lambda xs: torch.stack([F.pad(x[:p], (0, 0, 0, 0, 0, n - p)) for x, p in zip(xs, PROMPTS)])
        real = torch.arange(n) < self.lengths[:, None]
        text = torch.stack([self.text(b, 0, n) for b in range(3)]) & real
        _, stats = sar_attn_func(
            pad(self.q), pad(self.k), pad(self.v), self.visual[:, :n], text, self.prior[:, :n],
            key_padding_mask=real, beta=BETA, backend=backend, return_stats=True,
        )  # fmt: skip
        return SARState.from_stats(stats)

    def step(self, t: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of step t, (3, new, heads, width)."""
        rows = [slice(p + t * self.new, p + (t + 1) * self.new) for p in PROMPTS]
        return tuple(torch.stack([x[b][rows[b]] for b in range(3)]) for x in (self.q, self.k, self.v))

    def expected(self, b: int, t: int, decode: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(out (new, H, DV), c (H,)) of sample b at step t."""
        start, stop = PROMPTS[b] + t * self.new, PROMPTS[b] + (t + 1) * self.new
        if decode == "step":
            out, stats = self.reference(b, stop, first_query=start)
            return out[0], stats.head_weights[0]
        out, stats = self.reference(b, stop, prompt_only=decode == "prompt")
        return out[0, start:], stats.head_weights[0]


@pytest.mark.everyday(new=[3])
@pytest.mark.everyday(decode=["running"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("new", [1, 3], ids=["one token", "three tokens"])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("decode", ["running", "step", "prompt"])
@pytest.mark.usefixtures("poisoned")
def test_a_chain_of_steps(decode, paged, new, backend):
    gen = Generation(paged=paged, new=new)
    state = gen.prompt_state(backend)
    held = state.tensors()
    prompt = [t.clone() for t in held]
    for t in range(STEPS):
        q, k, v = gen.step(t)
        lengths = gen.lengths + t * new
        before = lengths.clone()
        out, stats = sar_attn_with_kvcache(
            q, gen.k_cache, gen.v_cache, k, v, cache_seqlens=lengths, visual_mask=gen.visual, prior=gen.prior,
            state=state, decode=decode, block_table=gen.block_table, beta=BETA, backend=backend, return_stats=True,
        )  # fmt: skip
        assert torch.equal(lengths, before)
        for b in range(3):
            expected, c = gen.expected(b, t, decode)
            assert max_error(out[b], expected) < 2e-5
            assert relative_error(stats.head_weights[b], c) <= 1e-3
    assert torch.equal(stats.head_weights[2], torch.ones(H))
    for b, n in enumerate(PROMPTS):  # the cache holds every token in its place
        for position in (0, n - 1, n, n + STEPS * new - 1):
            assert torch.equal(gen.k_cache[gen.slot(b, position)], gen.k[b][position])
            assert torch.equal(gen.v_cache[gen.slot(b, position)], gen.v[b][position])
        assert gen.k_cache[gen.slot(b, n + STEPS * new)].isnan().all()
    assert all(a is b for a, b in zip(state.tensors(), held))
    unchanged = all(torch.equal(a, b) for a, b in zip(held, prompt))
    assert unchanged == (decode != "running")
    if decode == "running":
        assert state.count.tolist() == [9.0 + STEPS * new, 4.0 + STEPS * new, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=dtype_id)
def test_other_dtypes(backend, dtype):
    gen = Generation(paged=False, dtype=dtype)
    state = gen.prompt_state(backend)
    for t in range(4):
        q, k, v = gen.step(t)
        out, stats = sar_attn_with_kvcache(
            q, gen.k_cache, gen.v_cache, k, v, cache_seqlens=gen.lengths + t, visual_mask=gen.visual,
            prior=gen.prior, state=state, beta=BETA, backend=backend, return_stats=True,
        )  # fmt: skip
        assert out.dtype == dtype
        for b in range(3):
            expected, c = gen.expected(b, t, "running")
            assert relative_error(stats.head_weights[b], c) <= 1e-3
            assert max_error(out[b], expected) < (0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{"softcap": 1.5}, {"window_size": (12, -1)}, {"normalize": "standardize"}], ids=str
)
def test_options_reach_the_step(options, backend):
    if backend == "composed" and "softcap" in options:
        pytest.skip("has no soft-cap")
    gen = Generation(paged=True)
    state = SARState.empty(3, H)
    q, k, v = gen.step(0)
    out, stats = sar_attn_with_kvcache(
        q, gen.k_cache, gen.v_cache, k, v, cache_seqlens=gen.lengths, visual_mask=gen.visual, prior=gen.prior,
        state=state, block_table=gen.block_table, beta=BETA, backend=backend, return_stats=True,
        softmax_scale=0.4, protect_first_head=False, **options,
    )  # fmt: skip
    for b, n in enumerate(PROMPTS):
        expected, ref = gen.reference(b, n + 1, first_query=n, softmax_scale=0.4, protect_first_head=False, **options)
        assert max_error(out[b], expected[0]) < 2e-5
        assert relative_error(stats.head_weights[b], ref.head_weights[0]) <= 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_in_chunks_equals_the_prompt(backend):
    """From an empty state and an empty cache: 24 tokens of one sample, 5 at a time."""
    gen = Generation(paged=False)
    state, n = SARState.empty(1, H), PROMPTS[0]
    k_cache, v_cache = torch.full((1, n, HKV, D), torch.nan), torch.full((1, n, HKV, DV), torch.nan)
    for start in range(0, n, 5):
        stop = min(start + 5, n)
        q, k, v = (x[0][start:stop][None] for x in (gen.q, gen.k, gen.v))
        _, stats = sar_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=start, visual_mask=gen.visual[:1, :n], prior=gen.prior[:1, :n],
            state=state, text_mask=gen.text(0, start, stop)[None], beta=BETA, backend=backend, return_stats=True,
        )  # fmt: skip
    _, expected = gen.reference(0, n)
    for name in ("alignment_variance", "semantic_alignment", "head_weights"):
        assert relative_error(getattr(stats, name), getattr(expected, name)) <= 1e-3
    assert state.count.item() == expected.query_count.item() == 9


def test_without_new_keys_the_cache_is_only_read():
    gen = Generation(paged=False)
    q = gen.step(0)[0]
    for b, n in enumerate(PROMPTS):
        gen.put(b, [n])
    before = gen.k_cache.clone()
    out = sar_attn_with_kvcache(
        q, gen.k_cache, gen.v_cache, cache_seqlens=gen.lengths + 1, visual_mask=gen.visual, prior=gen.prior,
        state=SARState.empty(3, H), decode="step", beta=BETA,
    )  # fmt: skip
    assert torch.equal(gen.k_cache.nan_to_num(), before.nan_to_num())
    for b in range(3):
        assert max_error(out[b], gen.expected(b, 0, "step")[0]) < 2e-5


def test_reordered_state_continues_the_chosen_rows():
    """Beam search: rows 1 and 1 go on from row 1's sums."""
    gen = Generation(paged=False)
    state = gen.prompt_state("torch")
    rows = torch.tensor([1, 1])
    picked = state.index_select(rows)
    q, k, v = (x[rows] for x in gen.step(0))
    call = {"cache_seqlens": PROMPTS[1], "visual_mask": gen.visual[rows], "prior": gen.prior[rows], "beta": BETA}
    out = sar_attn_with_kvcache(q, gen.k_cache[rows], gen.v_cache[rows], k, v, state=picked, **call)
    for row in out:
        assert max_error(row, gen.expected(1, 0, "running")[0]) < 2e-5
    assert torch.equal(state.count, torch.tensor([9.0, 4.0, 0.0]))


def test_an_empty_batch():
    case = make_case(4, layouts=("image",))
    q, k, v = (x[:0] for x in (case.q, case.k, case.v))
    out, stats = sar_attn_with_kvcache(
        q, k, v, cache_seqlens=4, visual_mask=case.visual[:0], prior=case.prior[:0], state=SARState.empty(0, 4),
        return_stats=True,
    )  # fmt: skip
    assert out.shape == (0, 4, 4, 32)
    assert stats.head_weights.shape == (0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_flash_attn_with_kvcache(backend, paged, new, causal):
    gen = Generation(paged=paged, new=new)
    q, k, v = gen.step(0)
    out, lse = flash_attn_with_kvcache(
        q, gen.k_cache, gen.v_cache, k, v, cache_seqlens=gen.lengths, block_table=gen.block_table, causal=causal,
        return_softmax_lse=True, backend=backend,
    )  # fmt: skip
    for b, n in enumerate(PROMPTS):
        keys, values = (x[b][: n + new].transpose(0, 1).repeat_interleave(H // HKV, 0) for x in (gen.k, gen.v))
        sees = torch.ones(new, n + new, dtype=torch.bool).tril(n if causal else n + new)
        expected = F.scaled_dot_product_attention(q[b].transpose(0, 1), keys, values, attn_mask=sees)
        assert max_error(out[b], expected.transpose(0, 1)) < 2e-5
        scores = (q[b].transpose(0, 1) @ keys.mT / D**0.5).masked_fill(~sees, -torch.inf)
        assert max_error(lse[b], scores.logsumexp(-1)) < 1e-5
        assert torch.equal(gen.v_cache[gen.slot(b, n + new - 1)], gen.v[b][n + new - 1])


def test_flash_attn_with_kvcache_of_a_full_cache():
    """Without ``cache_seqlens`` every key counts; an int is every sample's length."""
    q, k = torch.randn(2, 1, 4, 8), torch.randn(2, 10, 4, 8)
    plain = lambda n: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k[:, :n], k[:, :n])))
    assert max_error(flash_attn_with_kvcache(q, k, k).transpose(1, 2), plain(10)) < 1e-5
    assert max_error(flash_attn_with_kvcache(q, k, k, cache_seqlens=6).transpose(1, 2), plain(6)) < 1e-5
