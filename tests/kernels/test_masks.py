"""Every kind of visibility in every kernel: against the fp64 oracle with the pattern as a matrix, and tiles counted."""

import importlib
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import INTERPRETED, Case, both_gradients, check_forward, check_gradients, daily, make

from sar_fast import Visibility
from sar_kernels.attention import AttentionOptions, attention_backward, attention_forward, pack_mask, sar_forward
from sar_kernels.configs import KernelConfig
from sar_kernels.decode.call import decode_forward, sar_decode_forward
from sar_kernels.masks import Masks

BASE = Case(heads=2, kv_heads=1, head_dim=16)


def blocks_of(*samples: tuple[tuple[int, int], ...], length: int = 97) -> torch.Tensor:
    """(B, length) block numbers of runs [first, end), -1 elsewhere."""
    numbers = torch.full((len(samples), length), -1)
    for row, runs in zip(numbers, samples):
        for number, (first, end) in enumerate(runs):
            row[first:end] = number
    return numbers


def random_mask(batch: int, Sq: int, Sk: int, seed: int = 0) -> torch.Tensor:
    """(batch, 1, Sq, Sk) bool with whole tiles, rows and keys that are hidden."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, 1, Sq, Sk, generator=g) < 0.6
    mask[..., :64, Sk // 2 :] = False
    mask[..., Sq // 3, :] = False
    mask[..., Sk // 4] = False
    return mask


PICTURES = Visibility(blocks=blocks_of(((5, 45),), ((0, 33), (40, 44))))
CASES = [
    BASE.but(name="chunks", visibility=Visibility(chunk=40)),
    BASE.but(
        name="chunks-after-padding",
        visibility=Visibility(chunk=32, chunk_start=torch.tensor([11, 0])),
        padding=((11, 97), (0, 97)),
    ),
    BASE.but(name="chunks-both-ways", visibility=Visibility(chunk=50), causal=False),
    BASE.but(name="prefix", visibility=Visibility(prefix=torch.tensor([60, 33])), kv_heads=2),
    BASE.but(name="pictures", visibility=PICTURES),
    BASE.but(name="pictures-window", visibility=PICTURES, window=(20, -1)),
    BASE.but(name="pictures-padded", visibility=PICTURES, window=(30, -1), padding=((4, 97), (0, 90)), kv_heads=2),
    BASE.but(name="pictures-mqa-d80-fp16", visibility=PICTURES, heads=3, kv_heads=1, head_dim=80, dtype=torch.float16),
    BASE.but(name="pictures-bf16", visibility=PICTURES, window=(20, -1), dtype=torch.bfloat16),
    BASE.but(name="pictures-softcap", visibility=PICTURES, softcap=2.0),
    BASE.but(name="one-pattern-for-all", visibility=Visibility(blocks=blocks_of(((5, 45),))[0]), window=(20, -1)),
    BASE.but(name="short-queries", visibility=PICTURES, window=(25, -1), seqlen_q=19),
    BASE.but(name="mask", mask=random_mask(2, 97, 97), causal=False),
    BASE.but(name="mask-causal-padded", mask=random_mask(1, 97, 97), padding=((4, 97), (0, 90)), head_dim=64),
    BASE.but(
        name="mask-of-chunks", mask=random_mask(2, 70, 97), seqlen_q=70, visibility=Visibility(chunk=48), kv_heads=2
    ),
    BASE.but(
        name="mask-fp16", mask=random_mask(2, 70, 130), seqlen_q=70, seqlen_k=130, window=(60, -1), dtype=torch.float16
    ),
]


# Every day patterns with something beside them; soft-capping, d80 and 16 bits are test_backward.py's.
FORWARD = ("chunks", "pictures-window", "mask")
BACKWARD = ("chunks-after-padding", "pictures-padded", "short-queries", "mask-fp16")
DECODED = (
    "chunks-after-padding", "prefix", "pictures-padded", "pictures-mqa-d80-fp16", "short-queries",
    "mask-causal-padded", "mask-of-chunks", "padded",
)  # fmt: skip


# Gradients rest on output, log-sum-exp and statistics: where they are compared every day, these need not be.
@pytest.mark.parametrize("case", daily(CASES, *FORWARD), ids=str)
def test_forward_matches_reference(case):
    inputs = make(case)
    check_forward(inputs, *sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs()))


@pytest.mark.parametrize("case", daily(CASES, *BACKWARD), ids=str)
def test_backward_matches_autograd_of_the_reference(case):
    check_gradients(*both_gradients(case, sav_grad=True, statistics_too=True))


@pytest.mark.parametrize("case", daily([CASES[0], CASES[5], CASES[13]], "chunks"), ids=str)
def test_backward_with_constant_weights(case):
    check_gradients(*both_gradients(case, sav_grad=False))


# Every day each with one combination of queries and splits, which the cases take in turn.
STEPS = [
    pytest.param(case.but(seqlen_q=q), splits, marks=[pytest.mark.slow] * (INTERPRETED and n != i % 4) + param.marks)
    for i, param in enumerate(daily([*CASES, BASE.but(name="padded", padding=((9, 97), (0, 97)))], *DECODED))
    for case in param.values
    for n, (q, splits) in enumerate(itertools.product((1, 3), (1, 3)))
]


def step_of(case: Case) -> Case:
    """The case with its mask cut to the newest queries."""
    return case if case.mask is None else case.but(mask=case.mask[:, :, -case.seqlen_q :])


@pytest.mark.parametrize(("case", "num_splits"), STEPS, ids=str)
def test_decode_matches_reference(case, num_splits):
    case = step_of(case)
    inputs = make(case)
    B, H = inputs.q.shape[0], case.heads
    lengths = torch.full((B,), case.seqlen_k, dtype=torch.int32)
    state = [torch.zeros(B, H), torch.zeros(B, H), torch.zeros(B), torch.ones(B, H)]
    found = sar_decode_forward(
        inputs.q,
        inputs.k,
        inputs.v,
        lengths,
        *inputs.sav,
        *state,
        **inputs.kwargs(),
        mode="step",
        num_splits=num_splits,
    )
    check_forward(inputs, *found)
    plain = decode_forward(inputs.q, inputs.k, inputs.v, lengths, **inputs.kwargs(weights=False), num_splits=num_splits)
    torch.testing.assert_close(plain[1], found[1])


def test_a_paged_cache_has_masks_too():
    case = BASE.but(seqlen_q=2, visibility=PICTURES, window=(30, -1), padding=((9, 97), (0, 97)), seqlen_k=96)
    case = case.but(visibility=Visibility(blocks=PICTURES.blocks[:, :96]), padding=((9, 96), (0, 96)))
    inputs = make(case)
    order = torch.randperm(2 * 6)
    paged = [torch.empty(12, 16, *x.shape[2:], dtype=x.dtype) for x in (inputs.k, inputs.v)]
    for pages, x in zip(paged, (inputs.k, inputs.v)):
        pages[order] = x.reshape(12, 16, *x.shape[2:])
    lengths = torch.full((2,), 96, dtype=torch.int32)
    kwargs = inputs.kwargs(weights=False)
    out, lse = decode_forward(inputs.q, *paged, lengths, block_table=order.view(2, 6).int(), **kwargs)
    dense_out, dense_lse = decode_forward(inputs.q, inputs.k, inputs.v, lengths, **kwargs)
    torch.testing.assert_close(out, dense_out)
    torch.testing.assert_close(lse, dense_lse)


@pytest.mark.parametrize("page", [0, 16], ids=["contiguous", "paged"])
def test_what_padding_of_a_cache_hides_need_not_be_finite(page):
    case = BASE.but(seqlen_q=2, seqlen_k=96, padding=((9, 96), (0, 60)))
    inputs = make(case)
    lengths, kwargs = torch.full((2,), 96, dtype=torch.int32), inputs.kwargs(weights=False)
    clean = decode_forward(inputs.q, inputs.k, inputs.v, lengths, **kwargs)
    cache = [x.masked_fill(~inputs.padding[..., None, None], torch.nan) for x in (inputs.k, inputs.v)]
    table = None
    if page:
        cache, table = [x.reshape(-1, page, *x.shape[2:]) for x in cache], torch.arange(12).view(2, 6).int()
    found = decode_forward(inputs.q, *cache, lengths, block_table=table, **kwargs)
    for got, want in zip(found, clean):
        torch.testing.assert_close(got, want)


few, many = (
    settings(deadline=None, max_examples=n, suppress_health_check=[HealthCheck.too_slow]) for n in (3, 30)
)  # others every time


@few
@given(st.data())
def test_any_combination(data):
    """Forward and gradients of patterns that nobody chose."""
    check_drawn(data.draw)


@pytest.mark.slow
@many
@given(st.data())
def test_many_combinations(data):
    check_drawn(data.draw)


def check_drawn(draw):
    Sk = draw(st.integers(2, 80))
    Sq = draw(st.integers(1, Sk))
    edge = draw(st.integers(1, Sk))
    case = BASE.but(
        seqlen_q=Sq,
        seqlen_k=Sk,
        images=(((0, edge),), ((edge // 2, edge),)),
        causal=draw(st.booleans()),
        window=(draw(st.sampled_from([-1, 0, 7, 33])), draw(st.sampled_from([-1, 0, 5]))),
        padding=draw(st.sampled_from([None, ((0, Sk), (Sk // 3, Sk)), ((0, Sk - Sk // 4), (0, Sk))])),
        softcap=draw(st.sampled_from([0.0, 3.0])),
    )
    kind = draw(st.sampled_from(["chunk", "prefix", "blocks", "none"]))
    runs = ((1, max(2, edge)),), ((edge // 2, edge),)
    patterns = {
        "chunk": lambda: Visibility(chunk=draw(st.integers(1, Sk))),
        "prefix": lambda: Visibility(prefix=torch.tensor([edge, edge // 2])),
        "blocks": lambda: Visibility(blocks=blocks_of(*runs, length=Sk)),
        "none": lambda: None,
    }
    mask = random_mask(draw(st.sampled_from([1, 2])), Sq, Sk, draw(st.integers(0, 99))) if draw(st.booleans()) else None
    case = case.but(visibility=patterns[kind](), mask=mask)
    inputs = make(case)
    check_forward(inputs, *sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs()))
    check_gradients(*both_gradients(case, sav_grad=draw(st.booleans()), inputs=inputs))


@pytest.mark.parametrize(("Sq", "Sk"), [(1, 1), (64, 64), (65, 130), (200, 31)])
def test_pack_mask(Sq, Sk):
    mask = random_mask(2, Sq, Sk)
    packed = pack_mask(mask.transpose(2, 3).contiguous().transpose(2, 3))  # strided in any way
    keys = torch.arange(Sk)
    bits = packed.bits[:, :, keys // 32] >> (keys % 32) & 1
    assert torch.equal(bits.bool(), mask[:, 0])
    for b, i, j in itertools.product(range(2), range(packed.tiles.shape[1]), range(packed.tiles.shape[2])):
        tile = mask[b, 0, 64 * i : 64 * i + 64, 64 * j : 64 * j + 64]
        assert bool(packed.tiles[b, i, j]) == bool(tile.any())


@pytest.mark.parametrize(
    ("masks", "window", "message"),
    [
        ({"first": torch.zeros(2, 9)}, (-1, -1), r"masks\.first: got torch\.float32 \(2, 9\).*need torch\.int32"),
        ({"end": torch.zeros(2, 8).int()}, (-1, -1), r"masks\.end: got .*\(2, 8\).*need .*\(2, 9\) or \(1, 9\)"),
        ({"padding": torch.ones(2, 8).bool()}, (-1, -1), r"masks\.padding: got .*\(2, 8\)"),
        ({"end": torch.zeros(2, 9).int()}, (-1, 0), r"masks\.end: got one beside a window"),
        ({"packed": torch.ones(3, 1, 9, 9).bool()}, (-1, -1), r"masks\.packed: got a mask of 3 samples"),
        ({"packed": torch.ones(1, 1, 9, 8).bool()}, (-1, -1), r"masks\.packed: got 9 queries and 8 keys"),
    ],
)
def test_bad_masks(masks, window, message):
    q = torch.randn(2, 9, 2, 16)
    if "packed" in masks:
        masks = {"packed": pack_mask(masks["packed"])}
    with pytest.raises(ValueError, match=message):
        attention_forward(q, q, q, options=AttentionOptions(False, 0.25, window), masks=Masks(**masks))


# tiles that are visited

TILES = {"forward": KernelConfig(32, 16, 4, 1), "dq": KernelConfig(32, 16, 4, 1), "dkdv": KernelConfig(16, 32, 4, 1)}
PATTERNS = [
    BASE.but(name="window", window=(20, -1)),
    BASE.but(name="window-both", window=(20, 10), causal=False),
    BASE.but(name="chunks", visibility=Visibility(chunk=48)),
    BASE.but(name="chunks-of-odd-length", visibility=Visibility(chunk=33)),
    BASE.but(name="prefix", visibility=Visibility(prefix=torch.tensor([40, 7]))),
    BASE.but(name="pictures-window", visibility=PICTURES, window=(20, -1)),
]


def seen_of(case: Case) -> torch.Tensor:
    """(B, Sq, Sk) bool, the whole pattern."""
    (left, right), causal = case.scores["window_size"], case.scores["causal"]
    distance = torch.arange(case.seqlen_k) - torch.arange(case.seqlen_q)[:, None] - case.seqlen_k + case.seqlen_q
    seen = torch.ones(len(case.images), case.seqlen_q, case.seqlen_k, dtype=torch.bool)
    seen = seen & (distance <= 0) if causal else seen
    seen = seen & (distance >= -left) if left >= 0 else seen
    seen = seen & (distance <= right) if right >= 0 else seen
    return seen if case.seen is None else seen & case.seen[:, 0]


def tiles_needed(seen: torch.Tensor, rows: int, keys: int) -> int:
    """Tiles of rows x keys in which some row sees some key, over the batch."""
    Sq, Sk = seen.shape[1:]
    padded = torch.nn.functional.pad(seen, (0, -Sk % keys, 0, -Sq % rows))
    return int(padded.unflatten(1, (-1, rows)).unflatten(3, (-1, keys)).any(4).any(2).sum())


class Counted:
    """A device function that counts its calls, in the interpreter."""

    def __init__(self, monkeypatch, module: str, name: str) -> None:
        found = importlib.import_module(f"sar_kernels.{module}")
        self.calls, self.function = 0, getattr(found, name)
        monkeypatch.setattr(found, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


@pytest.mark.skipif(not INTERPRETED, reason="counts calls in the interpreter")
@pytest.mark.parametrize("case", daily(PATTERNS, "window-both", "pictures-window"), ids=str)
def test_no_tile_is_visited_that_nobody_sees(case, monkeypatch):
    """Nor one that somebody sees left out, which the results show."""
    from sar_kernels.call import Call
    from sar_kernels.dense.plan import plan_attention_forward, plan_backward
    from sar_kernels.launch import run_all

    inputs, seen = make(case), seen_of(case)
    call = Call(inputs.q, inputs.k, inputs.v, inputs.options, inputs.masks, configs=TILES)
    softmax = Counted(monkeypatch, "dense.forward", "online_softmax")
    (out, lse), launches = plan_attention_forward(call)
    run_all(launches)
    assert softmax.calls == case.heads * tiles_needed(seen, 32, 16)
    lse_loads = Counted(monkeypatch, "dense.dkdv", "load_lse2")
    run_all(plan_backward(call, torch.randn_like(out), out, lse)[1])
    assert lse_loads.calls == case.heads * tiles_needed(seen, 16, 32)


@pytest.mark.skipif(not INTERPRETED, reason="counts calls in the interpreter")
def test_a_packed_mask_leaves_out_tiles_that_are_empty(monkeypatch):
    from sar_kernels.call import Call
    from sar_kernels.dense.plan import plan_attention_forward, plan_backward
    from sar_kernels.launch import run_all

    mask = torch.zeros(1, 1, 192, 192, dtype=torch.bool)
    mask[..., :64, 64:70], mask[..., 150:, :3] = True, True
    case = BASE.but(seqlen_q=192, seqlen_k=192, causal=False, mask=mask)
    inputs = make(case)
    tiles = {name: KernelConfig(64, 64, 4, 1) for name in TILES}
    call = Call(inputs.q, inputs.k, inputs.v, inputs.options, inputs.masks, configs=tiles)
    softmax, lse_loads = (
        Counted(monkeypatch, "dense.forward", "online_softmax"),
        Counted(monkeypatch, "dense.dkdv", "load_lse2"),
    )
    (out, lse), launches = plan_attention_forward(call)
    run_all(launches)
    run_all(plan_backward(call, torch.randn_like(out), out, lse)[1])
    assert softmax.calls == lse_loads.calls == 2 * 2 * case.heads


@pytest.mark.skipif(not INTERPRETED, reason="counts calls in the interpreter")
def test_a_decode_step_over_a_window_reads_the_window(monkeypatch):
    case = BASE.but(seqlen_q=1, seqlen_k=400, images=(((5, 45),),) * 2, visibility=Visibility(chunk=100))
    inputs = make(case)
    softmax = Counted(monkeypatch, "decode.kernels", "softmax_weights")
    lengths = torch.tensor([400, 330], dtype=torch.int32)  # the second is shorter than its edges say
    out, lse = decode_forward(inputs.q, inputs.k, inputs.v, lengths, **inputs.kwargs(weights=False), num_splits=2)
    keys = [(300, 400), (300, 330)]
    assert softmax.calls == case.kv_heads * sum(-(-end // 32) - first // 32 for first, end in keys)
    assert bool(torch.isfinite(out).all())
    assert bool(torch.isfinite(lse).all())


def test_edges_take_packed_sequences():
    """As sample by sample."""
    lengths = [30, 47]
    ends = torch.tensor([0, 30, 77], dtype=torch.int32)
    q, k, v = torch.randn(77, 4, 16), torch.randn(77, 2, 16), torch.randn(77, 2, 16)
    first = torch.cat([torch.arange(n) // 16 * 16 for n in lengths]).int()
    end = torch.cat([(torch.arange(n) // 8 + 1) * 8 for n in lengths]).int()
    options, longest = AttentionOptions(False, 0.25), {"max_seqlen_q": 47, "max_seqlen_k": 47}
    masks = Masks(first=first, end=end)
    packed = {"options": options, "masks": masks, "cu_seqlens_q": ends, "cu_seqlens_k": ends, **longest}
    out, lse = attention_forward(q, k, v, **packed)
    dout = torch.randn_like(out)
    grads = attention_backward(dout, q, k, v, out, lse, **packed)
    for a, b in itertools.pairwise(ends.tolist()):
        alone = {"options": options, "masks": Masks(first=first[None, a:b], end=end[None, a:b])}
        one = [x[None, a:b] for x in (q, k, v)]
        own_out, own_lse = attention_forward(*one, **alone)
        torch.testing.assert_close(out[a:b], own_out[0])
        torch.testing.assert_close(lse[:, a:b], own_lse[0])
        for got, want in zip(grads, attention_backward(dout[None, a:b], *one, own_out, own_lse, **alone)):
            torch.testing.assert_close(got[a:b], want[0])
