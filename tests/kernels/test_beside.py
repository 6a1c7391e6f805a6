"""What stands beside another library's attention: parts that together are re-weighted attention, both ways."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FP64, INTERPRETED, STATISTICS, Case, make

from sar_fast import Visibility
from sar_kernels import call
from sar_kernels.attention import (
    attention_backward,
    attention_forward,
    attention_statistics,
    sar_backward,
    sar_forward,
    scale_heads,
    statistics_backward,
    unscale_heads,
)
from sar_kernels.dense import plan, statistics
from sar_kernels.launch import Launch
from sar_kernels.tools.aot import plan_attention

DTYPE = torch.float64 if FP64 else torch.float32
CLOSE = {"rtol": 1e-9, "atol": 1e-11} if FP64 else {"rtol": 2e-4, "atol": 2e-5}
IMAGES = (((5, 30),), ((3, 20), (33, 41)))
BASE = Case(seqlen_q=75, seqlen_k=75, heads=2, kv_heads=1, head_dim=16, images=IMAGES, dtype=DTYPE)
CASES = {
    "base": BASE,
    "text after the first picture": BASE.but(text_only_rows=False),
    "more keys": BASE.but(seqlen_q=40),
    "more queries": BASE.but(seqlen_q=90),
    "full": BASE.but(causal=False),
    "window": BASE.but(window=(30, 5), causal=False),
    "window, causal": BASE.but(window=(30, -1)),
    "soft cap": BASE.but(softcap=3.0),
    "padding": BASE.but(padding=((0, 75), (7, 75))),
    "runs": BASE.but(visibility=Visibility(chunk=40)),
    "pictures far apart": BASE.but(seqlen_q=70, seqlen_k=200, images=(((3, 20), (170, 180)), ((150, 199),))),
    "no picture": BASE.but(images=(((5, 30),), ())),
    "odd head dims": BASE.but(heads=4, kv_heads=2, head_dim=24, head_dim_v=40),
}
# Every day what takes a path of its own; other cases have the rest.
FORWARD = ("text after the first picture", "soft cap", "padding", "runs", "odd head dims")
BACKWARD = ("padding", "no picture", "odd head dims")
CLOSED = ("text after the first picture", "padding", "no picture", "odd head dims")


def in_one_pass(inputs):
    """(out, lse, av, sa, c, count)."""
    return sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())


def from_parts(inputs):
    """(out, lse, av, sa, c, count)."""
    out, lse = attention_forward(inputs.q, inputs.k, inputs.v, **inputs.kwargs(weights=False))
    statistics = attention_statistics(inputs.q, inputs.k, lse, *inputs.sav, **inputs.kwargs())
    return scale_heads(out, *statistics[2:]), lse, *statistics


@pytest.mark.everyday(name=FORWARD)
@pytest.mark.parametrize("name", CASES)
def test_forward_from_parts(name):
    inputs = make(CASES[name])
    for what, got, want in zip(("out", "lse", *STATISTICS, "count"), from_parts(inputs), in_one_pass(inputs)):
        torch.testing.assert_close(got, want, **CLOSE, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.everyday(name=CLOSED)
@pytest.mark.parametrize("name", [name for name in CASES if name != "soft cap"])
def test_statistics_in_closed_form(name, monkeypatch):
    inputs = make(CASES[name])
    monkeypatch.setattr(plan, "MOMENT_ROWS", 64)
    _, lse, *expected = in_one_pass(inputs)
    launched = []
    monkeypatch.setattr(call, "has_closed_form", lambda *given: True)
    monkeypatch.setattr(Launch, "run", lambda x, run=Launch.run: (launched.append(x.kernel.__name__), run(x)))
    found = attention_statistics(inputs.q, inputs.k, lse, *inputs.sav, **inputs.kwargs())
    assert launched[1:3] == ["second_moments_kernel", "closed_variance_kernel"]
    for what, got, want in zip((*STATISTICS, "count"), found, expected):
        torch.testing.assert_close(got, want, **CLOSE, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.skipif(not INTERPRETED, reason="counts tiles as the interpreter loads them")
@pytest.mark.parametrize("closed_form", [False, True])
def test_key_tiles_without_visual_keys_are_not_read(closed_form, monkeypatch):
    images = (((5, 30), (250, 270)), ((33, 65), (298, 300)), ())
    case = BASE.but(seqlen_q=40, seqlen_k=300, heads=2, kv_heads=1, head_dim=16, images=images, text_only_rows=False)
    inputs = make(case)
    ones = lambda *shape: torch.ones(shape, dtype=DTYPE)
    read, load, run = [], statistics.load_tile, Launch.run

    def recorded(matrix, first, rows, ROWS, *args):
        read.append((ROWS, int(first.handle.data[0])))
        return load(matrix, first, rows, ROWS, *args)

    monkeypatch.setattr(call, "has_closed_form", lambda *given: closed_form)
    monkeypatch.setattr(statistics, "load_tile", recorded)
    monkeypatch.setattr(Launch, "run", lambda x: None if x.kernel.__name__ in ("dq_kernel", "dkdv_kernel") else run(x))
    attention_statistics(inputs.q, inputs.k, ones(3, 2, 40), *inputs.sav, **inputs.kwargs())
    kept = (ones(3, 2), ones(3, 2), ones(3, 2), ones(3), ones(3, 2, 1))
    statistics_backward(inputs.q, inputs.k, inputs.v, ones(3, 2, 40), *inputs.sav, *kept, **inputs.kwargs())
    tiles = [0, 224, 256, 32, 64, 288]
    assert sorted(first for rows, first in read if rows == 32) == sorted(4 * tiles)  # two heads, there and back


def test_as_many_keys_as_a_block_of_the_list_of_tiles():
    case = BASE.but(seqlen_q=4, seqlen_k=4096, heads=1, kv_heads=1, head_dim=16, images=(((4000, 4090),),))
    inputs = make(case)
    for got, want in zip(from_parts(inputs), in_one_pass(inputs)):
        torch.testing.assert_close(got, want, **CLOSE)


def test_a_closed_form_that_is_not_trusted_is_not_taken(monkeypatch):
    inputs = make(BASE)
    inputs.k[..., 0] += 1e5 * torch.randn(inputs.k.shape[:-1], dtype=DTYPE)  # a direction in which queries do not look
    inputs.q[..., 0] = 0
    _, lse, *expected = in_one_pass(inputs)
    monkeypatch.setattr(call, "has_closed_form", lambda *given: True)
    found = attention_statistics(inputs.q, inputs.k, lse, *inputs.sav, **inputs.kwargs())
    for got, want in zip(found, expected):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=0)


@pytest.mark.everyday(name=BACKWARD)
@pytest.mark.parametrize("name", CASES)
def test_backward_from_parts(name):
    inputs = make(CASES[name])
    qkv, (out, lse, av, sa, c, count) = (inputs.q, inputs.k, inputs.v), in_one_pass(inputs)
    incoming = {"dav": torch.randn_like(av), "dsa": torch.randn_like(sa), "dc": torch.randn_like(c)}
    dout = torch.randn_like(out).transpose(1, 2).contiguous().transpose(1, 2)  # any strides
    kept = (*inputs.sav, av, sa, c, count)
    want = sar_backward(dout, *qkv, out, lse, *kept, sav_grad=True, **incoming, **inputs.kwargs())

    dplain, plain, sums = unscale_heads(dout, out, c, with_sums=True)
    constant = attention_backward(dplain, *qkv, plain, lse, **inputs.kwargs(weights=False))
    dq, dk, dprior = statistics_backward(*qkv, lse, *kept, sums, **incoming, **inputs.kwargs())
    got = (constant[0] + dq, constant[1] + dk, constant[2], dprior)
    for what, ours, theirs in zip(("dq", "dk", "dv", "dprior"), got, want):
        torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda m, what=what: f"{what}: {m}")
    assert dprior.abs().max() > 0
    assert dq.abs().max() > 0


def test_what_the_statistics_do_not_depend_on_gets_no_gradient():
    launches = plan_attention("sm_90", "beside", 64, torch.bfloat16, True, 600)
    [dkdv] = [launch for launch in launches if launch.kernel.__name__ == "dkdv_kernel"]
    assert dkdv.arguments["dv_ptr"] is None


def test_packed_sequences_from_parts():
    lengths = (0, 41, 1, 70)
    tokens = sum(lengths)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    q, dout = (torch.randn(tokens, 4, 32, dtype=DTYPE) for _ in range(2))
    k, v = (torch.randn(tokens, 2, 32, dtype=DTYPE) for _ in range(2))
    visual, text = torch.zeros(tokens, dtype=torch.bool), torch.zeros(tokens, dtype=torch.bool)
    visual[3:20], visual[45:80] = True, True
    text[20:41], text[80:tokens] = True, True
    prior = visual / 20.0
    inputs = make(BASE)
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 70, "max_seqlen_k": 70}
    both = {"options": inputs.options, **packed}
    weights = {"weights": inputs.weights}
    out, lse, av, sa, c, count = sar_forward(q, k, v, visual, text, prior.to(DTYPE), **both, **weights)
    plain_out, _ = attention_forward(q, k, v, **both)
    scaled = scale_heads(plain_out, c, count, cu_seqlens=cu, max_seqlen=70)
    torch.testing.assert_close(scaled, out, **CLOSE)
    kept = (visual, text, prior.to(DTYPE), av, sa, c, count)
    want = sar_backward(dout, q, k, v, out, lse, *kept, sav_grad=True, **both, **weights)
    dplain, plain, sums = unscale_heads(dout, out, c, with_sums=True, cu_seqlens=cu, max_seqlen=70)
    dq, dk, dv = attention_backward(dplain, q, k, v, plain, lse, **both)
    more_dq, more_dk, dprior = statistics_backward(q, k, v, lse, *kept, sums, **both, **weights)
    for ours, theirs in zip((dq + more_dq, dk + more_dk, dv, dprior), want):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("head_dim", [16, 32])
def test_sums_are_of_the_rows_of_a_block(head_dim):
    """A narrow head's rows are taken more at a time, and never the next block's."""
    dout, out = torch.randn(2, 1, 75, 2, head_dim, dtype=DTYPE)
    sums = unscale_heads(dout, out, torch.ones(1, 2, dtype=DTYPE), with_sums=True)[2]
    want = [(dout * out)[:, rows].sum((1, 3)) for rows in (slice(64), slice(64, 75))]
    torch.testing.assert_close(sums, torch.stack(want, -1), **CLOSE)


def test_a_head_whose_weight_underflowed_gives_no_gradient():
    out, dout = torch.zeros(1, 5, 2, 16), torch.randn(1, 5, 2, 16)
    dplain, plain, _ = unscale_heads(dout, out, torch.tensor([[0.0, 2.0]]))
    assert not dplain[:, :, 0].any()
    assert plain.isfinite().all()
    torch.testing.assert_close(dplain[:, :, 1], 2 * dout[:, :, 1])


def test_what_parts_refuse():
    out = torch.zeros(1, 2, 5, 16).transpose(1, 2)  # (B, S, H, D) with heads outside
    ones = torch.ones(1, 2)
    with pytest.raises(ValueError, match="out: got strides"):
        scale_heads(out, ones, ones[0, :1])
    with pytest.raises(ValueError, match="c: got"):
        scale_heads(out.contiguous(), ones[:, :1], ones[0, :1])
    with pytest.raises(ValueError, match="dout: got"):
        unscale_heads(out[:, :4], out, ones)
    inputs = make(BASE.but(mask=torch.ones(1, 1, 75, 75, dtype=torch.bool), causal=False))
    lse, heads = torch.zeros(2, 2, 75, dtype=DTYPE), torch.ones(2, 2, dtype=DTYPE)
    kept = (*inputs.sav, heads, heads, heads, heads[:, 0])
    sums = torch.zeros(2, 2, 2, dtype=DTYPE)
    with pytest.raises(ValueError, match=r"masks\.packed"):
        statistics_backward(inputs.q, inputs.k, inputs.v, lse, *kept, sums, **inputs.kwargs())
