"""Calls of any shape that the public functions take, on the backends of PyTorch, against the oracle in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sar_fast import sar_attn_func, sar_attn_varlen_func
from sar_fast.base.errors import ArgumentError
from sar_fast.reference import sar_attention_reference
from tests.helpers import max_error

pytestmark = pytest.mark.usefixtures("one_thread")
OUTPUT, WEIGHTS = 1e-5, 1e-3  # of docs/method.md, section 5: statistics and weights are fp32
few = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def calls(draw, packed: bool = False):
    """(tensors, options, lengths of the sequences): heads in groups, any masks, windows, a soft-cap; sides may be 0."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0 if packed else 1, 9), min_size=batch, max_size=batch))
    length, dim, value_dim = max(lengths), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    rand = lambda heads, d: torch.randn(batch, length, heads, d, generator=generator, dtype=torch.float64)
    mask = lambda: torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    visual = mask()
    text, prior = mask() & ~visual, torch.rand(batch, length, generator=generator, dtype=torch.float64)
    options = {
        "causal": draw(st.booleans()),
        "window_size": draw(st.sampled_from([(-1, -1), (2, -1), (3, 1), (0, 0)])),
        "softcap": draw(st.sampled_from([0.0, 5.0])),
        "beta": draw(st.sampled_from([0.1, 0.5, 3.0])),
        "protect_first_head": draw(st.booleans()),
        "normalize": draw(st.sampled_from(["none", "standardize"])),
    }
    tensors = (rand(kv_heads * group, dim), rand(kv_heads, dim), rand(kv_heads, value_dim), visual, text, prior)
    return tensors, options, lengths


def supported(options, backend):
    """PyTorch's fused attention, which composed is on a CPU, has no soft-cap."""
    return options | {"softcap": 0.0} if backend == "composed" else options


@pytest.mark.parametrize("backend", ["torch", "composed"])
@given(call=calls())
@few
def test_dense_calls(backend, call):
    tensors, options, _ = call
    options = supported(options, backend)
    out, stats = sar_attn_func(*tensors, **options, backend=backend, return_stats=True)
    expected, wanted = sar_attention_reference(*tensors, **options, return_stats=True)
    assert max_error(out, expected) < OUTPUT
    torch.testing.assert_close(stats.head_weights.double(), wanted.head_weights.double(), rtol=WEIGHTS, atol=1e-6)
    torch.testing.assert_close(stats.sav.double(), wanted.sav.double(), rtol=WEIGHTS, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "composed"])
@given(call=calls(packed=True))
@few
def test_packed_calls(backend, call):
    """The sequences of a batch, one after the other without padding; some may be empty."""
    tensors, options, lengths = call
    options = supported(options, backend)
    packed = [torch.cat([x[b, :n] for b, n in enumerate(lengths)]) for x in tensors]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    qkv, roles = packed[:3], packed[3:]
    out, stats = sar_attn_varlen_func(
        *qkv, ends, ends, longest, longest, *roles, **options, backend=backend, return_stats=True
    )
    for b, length in enumerate(lengths):
        if length:
            expected, wanted = sar_attention_reference(
                *(x[b : b + 1, :length] for x in tensors), **options, return_stats=True
            )
            assert max_error(out[ends[b] : ends[b + 1]], expected[0]) < OUTPUT
            weights, right = stats.head_weights[b].double(), wanted.head_weights[0].double()
            torch.testing.assert_close(weights, right, rtol=WEIGHTS, atol=1e-6)


@given(call=calls(), wrong=st.sampled_from(["rank", "heads", "length", "dim", "mask"]))
@few
def test_wrong_shapes_are_errors_that_name_the_argument(call, wrong):
    (q, k, v, visual, text, prior), options, _ = call
    spoilt = {
        "rank": (q[0], k, v, visual, text, prior),
        "heads": (torch.cat([q, q[:, :, :1]], 2) if k.shape[2] > 1 else q[..., :0, :], k, v, visual, text, prior),
        "length": (q, k, v[:, 1:], visual, text, prior),
        "dim": (q, torch.cat([k, k], -1), v, visual, text, prior),
        "mask": (q, k, v, visual[:, 1:], text, prior),
    }
    with pytest.raises((ArgumentError, ValueError), match=r"^(q|k|v|visual_mask)\b.* must .*; got "):
        sar_attn_func(*spoilt[wrong], **options)
