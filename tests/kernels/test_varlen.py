"""Packed sequences equal the same sequences one by one, empty and one-token ones among them."""

import pytest
import torch
from kernel_cases import INTERPRETED, assert_same, assert_same_gradients

from sar_kernels.attention import (
    AttentionOptions,
    WeightOptions,
    attention_backward,
    attention_forward,
    attention_statistics,
    sar_backward,
    sar_forward,
)

LENGTHS_Q = (37, 0, 1, 70, 5)
LENGTHS_K = (37, 0, 1, 97, 33)
OPTIONS = [
    AttentionOptions(True, 0.25),
    AttentionOptions(False, 0.25, (30, 8), 2.0),
]
WEIGHTS = WeightOptions(0.02)


@pytest.fixture
def packed():
    q, dout = torch.randn(sum(LENGTHS_Q), 2, 16), torch.randn(sum(LENGTHS_Q), 2, 16)
    k, v = torch.randn(sum(LENGTHS_K), 1, 16), torch.randn(sum(LENGTHS_K), 1, 16)
    visual, text = torch.rand(sum(LENGTHS_K)) < 0.5, torch.rand(sum(LENGTHS_Q)) < 0.5
    prior = torch.rand(sum(LENGTHS_K)) * visual
    lengths = {
        "cu_seqlens_q": torch.tensor((0, *LENGTHS_Q)).cumsum(0).int(),
        "cu_seqlens_k": torch.tensor((0, *LENGTHS_K)).cumsum(0).int(),
        "max_seqlen_q": max(LENGTHS_Q),
        "max_seqlen_k": max(LENGTHS_K),
    }
    return q, k, v, dout, visual, text, prior, lengths


def one_by_one(q, k, v, dout, visual, text, prior, options):
    """Forward results and gradients of each sequence as a dense call."""
    split = lambda t, lengths: [x[None] for x in t.split(lengths)]
    queries = [split(t, LENGTHS_Q) for t in (q, dout, text)]
    keys = [split(t, LENGTHS_K) for t in (k, v, visual, prior)]
    for q1, dout1, text1, k1, v1, visual1, prior1 in zip(*queries, *keys):
        sav = visual1, text1, prior1
        forward = sar_forward(q1, k1, v1, *sav, options=options, weights=WEIGHTS)
        gradients = sar_backward(
            dout1, q1, k1, v1, *forward[:2], *sav, *forward[2:], options=options, weights=WEIGHTS, sav_grad=True
        )
        yield forward, gradients


@pytest.mark.everyday(options=OPTIONS[1:])
@pytest.mark.parametrize("options", OPTIONS, ids=["causal", "window-softcap"])
def test_packed_equals_one_by_one(packed, options):
    q, k, v, dout, visual, text, prior, lengths = packed
    forward = sar_forward(q, k, v, visual, text, prior, options=options, weights=WEIGHTS, **lengths)
    gradients = sar_backward(
        dout, q, k, v, *forward[:2], visual, text, prior, *forward[2:],
        options=options, weights=WEIGHTS, sav_grad=True, **lengths,
    )  # fmt: skip
    singles = list(one_by_one(q, k, v, dout, visual, text, prior, options))
    for i, dim in enumerate((0, 1, 0, 0, 0, 0)):  # out, lse (H, T), then per-sequence statistics
        pieces = [f[i][0] if i < 2 else f[i] for f, _ in singles]
        assert_same(forward[i], torch.cat(pieces, dim), kind="output" if i < 2 else "statistic")
    for i in range(4):
        pieces = torch.cat([g[i][0] for _, g in singles])
        if INTERPRETED:  # NumPy adds other numbers of rows in other orders
            torch.testing.assert_close(gradients[i], pieces, rtol=1e-6, atol=1e-6)
        else:
            assert_same(gradients[i], pieces, kind="gradient")
    statistics = attention_statistics(
        q, k, forward[1], visual, text, prior, options=options, weights=WEIGHTS, **lengths
    )
    for got, expected in zip(statistics, forward[2:]):
        torch.testing.assert_close(got, expected, rtol=1e-5 if INTERPRETED else 2e-3, atol=1e-7)


def test_plain_packed_attention(packed):
    q, k, v, dout, *_, lengths = packed
    options = OPTIONS[0]
    out, lse = attention_forward(q, k, v, options=options, **lengths)
    gradients = attention_backward(dout, q, k, v, out, lse, options=options, **lengths)
    start_q = start_k = 0
    for n, m in zip(LENGTHS_Q, LENGTHS_K):
        queries, keys = slice(start_q, start_q + n), slice(start_k, start_k + m)
        one = q[queries][None], k[keys][None], v[keys][None]
        out1, lse1 = attention_forward(*one, options=options)
        assert_same(out[queries], out1[0])
        assert_same(lse[:, queries], lse1[0])
        grads1 = attention_backward(dout[queries][None], *one, out1, lse1, options=options)
        pieces = [gradient[rows] for gradient, rows in zip(gradients, (queries, keys, keys))]
        assert_same_gradients(pieces, [gradient[0] for gradient in grads1])
        start_q, start_k = start_q + n, start_k + m


def test_packed_arguments_come_together(packed):
    q, k, v, *_, lengths = packed
    with pytest.raises(ValueError, match="max_seqlen_k: got None, need all of them with cu_seqlens_q"):
        attention_forward(q, k, v, options=OPTIONS[0], cu_seqlens_q=lengths["cu_seqlens_q"])
    lengths["cu_seqlens_k"] = lengths["cu_seqlens_k"].long()
    with pytest.raises(ValueError, match=r"cu_seqlens_k: got torch\.int64"):
        attention_forward(q, k, v, options=OPTIONS[0], **lengths)
