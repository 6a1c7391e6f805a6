"""Packed sequences against the same sequences one by one."""

from __future__ import annotations

import pytest
import torch

from sar_fast import sar_attn_func, sar_attn_varlen_func
from sar_fast.reference import sar_attention_reference
from tests.helpers import BACKENDS, assert_gradient, assert_output, dtype_id, make_case, max_error, relative_error

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("backend", BACKENDS)]

# (query, key) lengths: empty, one token, only keys, decode, more queries than keys
LENGTHS = [(0, 0), (23, 23), (1, 1), (0, 5), (40, 40), (4, 30), (30, 4), (1, 17)]
LAYOUT = ["image", "image", "text_only", "image", "two_images", "image", "image", "two_images"]
STATISTICS = ("alignment_variance", "semantic_alignment", "sav", "head_weights", "query_count")


def packed(dtype, lengths=LENGTHS):
    """The singles, and the arguments of the packed call."""
    layouts = (LAYOUT * len(lengths))[: len(lengths)]
    cases = [
        make_case(a, b, H=6, Hkv=2, D=16, Dv=24, dtype=dtype, layouts=(layout,), seed=i)
        for i, ((a, b), layout) in enumerate(zip(lengths, layouts))
    ]
    q, k, v, visual, text, prior = (torch.cat([c.tensors[n][0] for c in cases]) for n in range(6))
    ends = lambda n: torch.tensor([0, *(pair[n] for pair in lengths)]).cumsum(0).to(torch.int32)
    longest = [max(pair[n] for pair in lengths) for n in (0, 1)]
    return cases, [q, k, v], [ends(0), ends(1), *longest], [visual, text, prior]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.usefixtures("poisoned")
def test_packed_equals_singles(backend, dtype):
    cases, qkv, packing, roles = packed(dtype)
    out, stats = sar_attn_varlen_func(*qkv, *packing, *roles, beta=0.1, backend=backend, return_stats=True)
    assert stats.backend == backend
    assert out.shape == (*qkv[0].shape[:-1], 24)
    assert stats.lse.shape == (6, qkv[0].shape[0])
    at = 0
    for i, case in enumerate(cases):
        rows = slice(at, at + case.q.shape[1])
        single, expected = sar_attn_func(*case.tensors, beta=0.1, backend=backend, return_stats=True)
        assert torch.equal(out[rows], single[0])
        assert torch.equal(stats.lse[:, rows], expected.lse[0])
        for name in STATISTICS:
            assert torch.equal(getattr(stats, name)[i], getattr(expected, name)[0]), name
        at = rows.stop


@pytest.mark.parametrize("side", [2, 3], ids=["q", "k"])
def test_longest_length_that_is_too_small(backend, side):
    """Kernels launch by it; where the lengths are on the host anyway a wrong one is told, and larger ones are fine."""
    _, qkv, packing, roles = packed(torch.float32)
    expected = sar_attn_varlen_func(*qkv, *packing, *roles, backend=backend)
    packing[side] += 7
    assert torch.equal(sar_attn_varlen_func(*qkv, *packing, *roles, backend=backend), expected)
    packing[side] -= 8
    message = f"max_seqlen_{'qk'[side - 2]} must be at least the longest sequence, 40; got 39"
    with pytest.raises(ValueError, match=message):
        sar_attn_varlen_func(*qkv, *packing, *roles, backend=backend)


@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant", "sav_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_packed_against_the_reference(backend, dtype, sav_grad):
    cases, qkv, packing, roles = packed(dtype)
    leaves = [x.requires_grad_() for x in (*qkv, roles[2])]
    out, stats = sar_attn_varlen_func(
        *qkv, *packing, *roles, beta=0.1, backend=backend, sav_grad=sav_grad, return_stats=True
    )
    g = (torch.randn(out.shape, generator=torch.Generator().manual_seed(0)) / out[:, 0].numel() ** 0.5).to(dtype)
    out.backward(g)
    q_at = k_at = 0
    for i, case in enumerate(cases):
        q_rows, k_rows = slice(q_at, q_at + case.q.shape[1]), slice(k_at, k_at + case.k.shape[1])
        q_at, k_at = q_rows.stop, k_rows.stop
        if not (case.q.shape[1] and case.k.shape[1]):
            continue
        results = []
        for single in (case.to(torch.float64).leaves(), case.leaves()):
            o, s = sar_attention_reference(*single.tensors, beta=0.1, sav_grad=sav_grad, return_stats=True)
            o.backward(g[q_rows][None].to(o.dtype))
            results.append((o, s, single))
        (oracle, oracle_stats, exact), (in_dtype, _, rounded) = results
        assert_output(out[q_rows][None], oracle, in_dtype)
        assert relative_error(stats.head_weights[i], oracle_stats.head_weights[0]) <= 1e-3
        for name, leaf, rows in zip(("q", "k", "v", "prior"), leaves, (q_rows, k_rows, k_rows, k_rows)):
            if name == "prior" and not sav_grad:
                assert leaf.grad is None
                continue
            assert_gradient(name, leaf.grad[rows][None], getattr(exact, name).grad, getattr(rounded, name).grad)


def test_options_reach_the_packed_call(backend):
    cases, qkv, packing, roles = packed(torch.float64, [(12, 12), (5, 20)])
    options = {"causal": False, "softmax_scale": 0.3, "protect_first_head": False, "normalize": "standardize"}
    options |= {"window_size": (6, 5)}
    if backend == "torch":
        options |= {"softcap": 2.0}
    out = sar_attn_varlen_func(*qkv, *packing, *roles, beta=0.7, backend=backend, **options)
    at = 0
    for case in cases:
        expected = sar_attention_reference(*case.tensors, beta=0.7, **options)
        assert max_error(out[at : at + case.q.shape[1]], expected[0]) < 1e-11
        at += case.q.shape[1]


@pytest.mark.parametrize("lengths", [[(0, 0)], [(0, 0), (0, 0)], []], ids=["one", "two", "none"])
def test_only_empty_sequences(backend, lengths):
    n = len(lengths)
    leaf = lambda heads: torch.zeros(0, heads, 8, requires_grad=True)
    q, k, v, mask = leaf(4), leaf(2), leaf(2), torch.zeros(0, dtype=torch.bool)
    ends = torch.zeros(n + 1, dtype=torch.int32)
    out, stats = sar_attn_varlen_func(
        q, k, v, ends, ends, 0, 0, mask, mask, torch.zeros(0), backend=backend, sav_grad=True, return_stats=True
    )
    assert out.shape == (0, 4, 8)
    assert torch.equal(stats.head_weights, torch.ones(n, 4))
    out.sum().backward()
    assert q.grad.shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("argument", "ends"),
    [
        ("cu_seqlens_q", [0, 5, 9]),
        ("cu_seqlens_q", [1, 5, 10]),
        ("cu_seqlens_q", [0, 12, 10]),
        ("cu_seqlens_k", [0, 5, 11]),
        ("cu_seqlens_k", [0, -1, 10]),
    ],
    ids=str,
)
def test_sequence_ends_that_do_not_tile_the_input(backend, argument, ends):
    """Rows outside every sequence would come back uninitialised."""
    q, mask = torch.randn(10, 4, 8), torch.zeros(10, dtype=torch.bool)
    given = {name: torch.tensor([0, 5, 10], dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    given[argument] = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"{argument} must.*10"):
        sar_attn_varlen_func(q, q, q, *given.values(), 5, 5, mask, mask, torch.zeros(10), backend=backend)
