"""Throughput of SAR attention beside what a user would call instead.

    pytest benchmarks --benchmark-only                               # tiny on CPU, real sizes on a GPU
    pytest benchmarks --benchmark-only --benchmark-json=out.json

Compare rows of one group only. Every provider's output is checked before it is timed.
"""

from __future__ import annotations

import pytest
import torch
from providers import PROVIDERS, make_inputs, synchronize, unavailable

from sar_fast import SARState, sar_attn_func, sar_attn_with_kvcache
from sar_fast.reference import sar_attention_reference
from sar_fast.weighting import Equal

SHAPES = {
    "tiny": {"prefill": (1, 96, 4, 2, 32), "decode": (2, 128, 4, 2, 32)},
    "real": {"prefill": (1, 8192, 32, 8, 128), "decode": (16, 8192, 32, 8, 128)},
}
PLAIN = {"sdpa-flash", "sdpa-cudnn", "flex", "flash-attn", "plain-triton", "plain-composed"}


def case(sizes, mode, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return make_inputs(*SHAPES[sizes][mode], dtype=dtype, device=device)


def check(name, inputs, out):
    """Refuse to time a wrong answer, at the tolerance of docs/method.md."""
    rule = Equal() if name in PLAIN else None
    exact = sar_attention_reference(*(x.double() if x.is_floating_point() else x for x in inputs), weighting=rule)
    rounded = sar_attention_reference(*inputs, weighting=rule)
    allowed = 2 * (rounded.double() - exact).abs().max() + 1e-5
    assert (out.double() - exact).abs().max() <= allowed


def provider(name, device):
    reason = unavailable(name, device)
    if reason:
        pytest.skip(reason)
    return PROVIDERS[name]


@pytest.mark.parametrize("name", PROVIDERS)
def test_forward(benchmark, name, sizes, device):
    run = provider(name, device)
    small = make_inputs(1, 64, 4, 2, 32, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    check(name, small, run(*small))
    inputs = case(sizes, "prefill", device)
    benchmark.group = f"forward {SHAPES[sizes]['prefill']}"

    def timed():
        run(*inputs)
        synchronize(device)

    benchmark(timed)


@pytest.mark.parametrize("name", PROVIDERS)
def test_forward_backward(benchmark, name, sizes, device):
    run = provider(name, device)
    inputs = case(sizes, "prefill", device)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    benchmark.group = f"forward+backward {SHAPES[sizes]['prefill']}"
    grad = torch.randn_like(inputs[0])

    def timed():
        gradients = torch.autograd.grad(run(*inputs), leaves, grad)
        synchronize(device)
        return gradients

    assert all(g.isfinite().all() for g in timed())
    benchmark(timed)


@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant", "through-weights"])
@pytest.mark.parametrize("backend", ["triton", "composed", "torch"])
def test_training_through_the_weights(benchmark, backend, sav_grad, sizes, device):
    provider(f"sar-{backend}", device)
    inputs = case(sizes, "prefill", device)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    benchmark.group = f"forward+backward, sav_grad {SHAPES[sizes]['prefill']}"
    grad = torch.randn_like(inputs[0])

    def timed():
        out = sar_attn_func(*inputs, sav_grad=sav_grad, backend=backend)
        torch.autograd.grad(out, leaves, grad)
        synchronize(device)

    benchmark(timed)


@pytest.mark.parametrize("mode", ["running", "step", "prompt"])
@pytest.mark.parametrize("backend", ["triton", "composed", "torch"])
def test_decode(benchmark, backend, mode, sizes, device):
    provider(f"sar-{backend}", device)
    q, k, v, visual, text, prior = case(sizes, "decode", device)
    _, stats = sar_attn_func(q, k, v, visual, text, prior, backend=backend, return_stats=True)
    state = SARState.from_stats(stats)
    benchmark.group = f"decode {SHAPES[sizes]['decode']}"
    step = q[:, -1:].contiguous()

    def timed():
        sar_attn_with_kvcache(
            step,
            k,
            v,
            cache_seqlens=k.shape[1],
            visual_mask=visual,
            prior=prior,
            state=state,
            decode=mode,
            backend=backend,
        )
        synchronize(device)

    benchmark(timed)
