"""FlashAttention-2's functions: the same signatures, SDPA's values, and what is not supported raises by name."""

from __future__ import annotations

import inspect

import pytest
import torch

from sar_fast import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from tests.helpers import BACKENDS, dtype_id, max_error, sdpa, visible

pytestmark = pytest.mark.usefixtures("one_thread")

REQUIRED = inspect.Parameter.empty
COMMON = [
    ("dropout_p", 0.0),
    ("softmax_scale", None),
    ("causal", False),
    ("window_size", (-1, -1)),
    ("softcap", 0.0),
    ("alibi_slopes", None),
    ("deterministic", False),
    ("return_attn_probs", False),
]
SIGNATURES = {
    flash_attn_func: [("q", REQUIRED), ("k", REQUIRED), ("v", REQUIRED), *COMMON],
    flash_attn_varlen_func: [
        ("q", REQUIRED),
        ("k", REQUIRED),
        ("v", REQUIRED),
        ("cu_seqlens_q", REQUIRED),
        ("cu_seqlens_k", REQUIRED),
        ("max_seqlen_q", REQUIRED),
        ("max_seqlen_k", REQUIRED),
        *COMMON,
        ("block_table", None),
    ],
    flash_attn_qkvpacked_func: [("qkv", REQUIRED), *COMMON],
    flash_attn_kvpacked_func: [("q", REQUIRED), ("kv", REQUIRED), *COMMON],
    flash_attn_varlen_qkvpacked_func: [
        ("qkv", REQUIRED),
        ("cu_seqlens", REQUIRED),
        ("max_seqlen", REQUIRED),
        *COMMON,
    ],
    flash_attn_varlen_kvpacked_func: [
        ("q", REQUIRED),
        ("kv", REQUIRED),
        ("cu_seqlens_q", REQUIRED),
        ("cu_seqlens_k", REQUIRED),
        ("max_seqlen_q", REQUIRED),
        ("max_seqlen_k", REQUIRED),
        *COMMON,
    ],
    flash_attn_with_kvcache: [
        ("q", REQUIRED),
        ("k_cache", REQUIRED),
        ("v_cache", REQUIRED),
        ("k", None),
        ("v", None),
        ("rotary_cos", None),
        ("rotary_sin", None),
        ("cache_seqlens", None),
        ("cache_batch_idx", None),
        ("cache_leftpad", None),
        ("block_table", None),
        ("softmax_scale", None),
        ("causal", False),
        ("window_size", (-1, -1)),
        ("softcap", 0.0),
        ("rotary_interleaved", True),
        ("alibi_slopes", None),
        ("num_splits", 0),
        ("return_softmax_lse", False),
    ],
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signature(function):
    """Name, order and default of every positional parameter; what is added is keyword-only."""
    parameters = inspect.signature(function).parameters.values()
    positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == SIGNATURES[function]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters if p.name not in dict(positional))


def random_qkv(Sq=19, Sk=27, H=6, Hkv=2, D=32, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    randn = lambda S, heads: torch.randn(2, S, heads, D, generator=g, dtype=torch.float64).to(dtype)
    return randn(Sq, H), randn(Sk, Hkv), randn(Sk, Hkv)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("Sq", "Sk"), [(19, 19), (5, 19), (19, 5), (1, 19)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
def test_values(backend, causal, Sq, Sk, dtype):
    q, k, v = random_qkv(Sq, Sk, dtype=dtype)
    out, lse, probabilities = flash_attn_func(q, k, v, 0.0, 0.3, causal, return_attn_probs=True, backend=backend)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert max_error(out, sdpa(q, k, v, visible(Sq, Sk, causal), scale=0.3)) < bound
    assert out.dtype == dtype
    assert probabilities is None
    scores = 0.3 * torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(3, 2))
    expected = scores.masked_fill(~visible(Sq, Sk, causal), -torch.inf).logsumexp(-1)
    assert lse.dtype == torch.float32
    assert max_error(lse, expected) < (2e-4 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(out, flash_attn_func(q, k, v, 0.0, 0.3, causal, backend=backend))


@pytest.mark.parametrize("window", [(4, 0), (3, 2), (-1, 1), (6, -1)])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_window(window, causal):
    q, k, v = random_qkv(19, 19)
    out = flash_attn_func(q, k, v, causal=causal, window_size=window)
    assert max_error(out, sdpa(q, k, v, visible(19, 19, causal, window))) < 1e-12


def test_softcap():
    q, k, v = random_qkv()
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(3, 2)) / 32**0.5
    p = (2.0 * torch.tanh(scores / 2.0)).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(3, 2))
    assert max_error(flash_attn_func(q, k, v, softcap=2.0), expected) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_sdpa(backend):
    leaves = [x.requires_grad_() for x in random_qkv(9, 13)]
    g = torch.randn(2, 9, 6, 32, dtype=torch.float64)
    got = torch.autograd.grad(flash_attn_func(*leaves, causal=True, backend=backend), leaves, g)
    expected = torch.autograd.grad(sdpa(*leaves, visible(9, 13, True)), leaves, g)
    for a, b in zip(got, expected):
        assert max_error(a, b) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_varlen_values(backend):
    q, k, v = random_qkv(16, 21)
    q_ends, k_ends = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 1, 10, 10, 16], [0, 7, 16, 16, 21]))
    out, lse, _ = flash_attn_varlen_func(
        q[0], k[0], v[0], q_ends, k_ends, 9, 9, causal=True, return_attn_probs=True, backend=backend
    )
    assert lse.shape == (6, 16)
    for a, b, c, d in zip(q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:]):
        part = (q[:1, a:b], k[:1, c:d], v[:1, c:d])
        single, single_lse, _ = flash_attn_func(*part, causal=True, return_attn_probs=True, backend=backend)
        assert torch.equal(out[a:b], single[0])
        assert torch.equal(lse[:, a:b], single_lse[0])
        assert max_error(single, sdpa(*part, visible(int(b - a), int(d - c), True))) < 1e-12


def test_deterministic_and_num_splits_are_accepted():
    q, k, v = random_qkv()
    assert torch.equal(flash_attn_func(q, k, v, deterministic=True), flash_attn_func(q, k, v))
    assert torch.equal(flash_attn_with_kvcache(q, k, v, num_splits=4), flash_attn_with_kvcache(q, k, v))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("alibi_slopes", torch.zeros(6), "alibi_slopes must be None: these kernels do not support it; got Tensor"),
        ("dropout_p", 0.5, "dropout_p must be 0.0: these kernels have no dropout; got 0.5"),
    ],
)
def test_arguments_that_are_not_supported(name, value, message):
    q, k, v = random_qkv(19, 19, H=2)
    ends = torch.tensor([0, 19], dtype=torch.int32)
    qkv, kv = torch.stack([q, k, v], dim=2), torch.stack([k, v], dim=2)
    calls = {
        flash_attn_func: (q, k, v),
        flash_attn_qkvpacked_func: (qkv,),
        flash_attn_kvpacked_func: (q, kv),
        flash_attn_varlen_func: (q[0], k[0], v[0], ends, ends, 19, 19),
        flash_attn_varlen_qkvpacked_func: (qkv[0], ends, 19),
        flash_attn_varlen_kvpacked_func: (q[0], kv[0], ends, ends, 19, 19),
    }
    for function, arguments in calls.items():
        with pytest.raises(ValueError, match=message):
            function(*arguments, **{name: value})


def test_a_cache_knows_no_alibi():
    with pytest.raises(ValueError, match="alibi_slopes must be None: these kernels do not support it; got Tensor"):
        flash_attn_with_kvcache(*random_qkv(), alibi_slopes=torch.zeros(6))
