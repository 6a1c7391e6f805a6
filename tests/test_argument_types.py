"""Numbers and flags as FlashAttention takes them: Python's, NumPy's, and tensors of one entry."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from sar_fast import (
    SARConfig,
    SARState,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    sar_attn_func,
    sar_attn_varlen_func,
    sar_attn_with_kvcache,
)
from sar_fast.reference import sar_attention_reference
from tests.helpers import make_case

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("torch", "composed", "triton")
ENDS = torch.tensor([0, 5, 12], dtype=torch.int32)
INTEGERS = [np.int64, np.int32, np.uint8, torch.tensor, lambda n: torch.tensor([n], dtype=torch.int32), np.array]
FLOATS = [np.float64, np.float32, np.float16, np.longdouble, torch.tensor, lambda x: torch.tensor([x]), np.array]
BOOLS = [np.bool_, torch.tensor, np.array]


def dense() -> tuple[torch.Tensor, ...]:
    return tuple(x[:1] for x in make_case(12, H=4, Hkv=2, D=16).tensors)


def packed() -> tuple[torch.Tensor, ...]:
    return tuple(x[0] for x in dense())


def run(function, *, length=8, cache_seqlens=12, **changes) -> torch.Tensor:
    """One call of any of the functions; ``length`` is the longest sequence of the packed ones."""
    if function in (sar_attn_func, sar_attention_reference):
        return function(*dense(), **changes)
    if function is flash_attn_func:
        return function(*dense()[:3], **changes)
    if function is sar_attn_varlen_func:
        return function(*packed()[:3], ENDS, ENDS, length, length, *packed()[3:], **changes)
    if function is flash_attn_varlen_func:
        return function(*packed()[:3], ENDS, ENDS, length, length, **changes)
    q, k, v, visual, _, prior = dense()
    if function is sar_attn_with_kvcache:
        changes |= {"visual_mask": visual, "prior": prior, "state": SARState.empty(1, 4)}
    return function(q[:, -1:], k, v, cache_seqlens=cache_seqlens, **changes)


FLASH = (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)
SAR = (sar_attn_func, sar_attn_varlen_func, sar_attn_with_kvcache, sar_attention_reference)
every_function = pytest.mark.parametrize("function", [*FLASH, *SAR], ids=lambda f: f.__name__)


@every_function
@pytest.mark.parametrize("kind", FLOATS)
def test_floats(function, kind):
    options = {"softmax_scale": 0.25, "softcap": 2.0, **({"beta": 0.5} if function in SAR else {})}
    assert torch.equal(run(function, **{n: kind(x) for n, x in options.items()}), run(function, **options))


@every_function
@pytest.mark.parametrize("kind", BOOLS)
def test_flags(function, kind):
    options = {"causal": False, **({"protect_first_head": False} if function in SAR else {})}
    assert torch.equal(run(function, **{n: kind(x) for n, x in options.items()}), run(function, **options))


@every_function
@pytest.mark.parametrize("kind", INTEGERS[:4])
def test_windows(function, kind):
    options = {"softmax_scale": kind(1), "window_size": (kind(3), kind(2))}
    expected = run(function, softmax_scale=1, window_size=(3, 2))
    assert torch.equal(run(function, **options), expected)
    for both in (torch.tensor([3, 2]), np.array([3, 2]), [3, 2]):
        assert torch.equal(run(function, **{**options, "window_size": both}), expected)


@pytest.mark.everyday(backend=["torch"])
@pytest.mark.everyday(kind=[torch.tensor])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [flash_attn_varlen_func, sar_attn_varlen_func], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", INTEGERS)
def test_longest_sequence(function, kind, backend):
    assert torch.equal(run(function, length=kind(8), backend=backend), run(function, backend=backend))
    with pytest.raises(ValueError, match=r"max_seqlen_q must be at least the longest sequence, 7; got 6"):
        run(function, length=kind(6), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [flash_attn_with_kvcache, sar_attn_with_kvcache], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [*INTEGERS[:2], *INTEGERS[3:]])
def test_length_of_the_cache(function, kind, backend):
    got = run(function, cache_seqlens=kind(9), backend=backend)
    assert torch.equal(got, run(function, cache_seqlens=9, backend=backend))


@pytest.mark.parametrize("kind", FLOATS)
def test_no_dropout(kind):
    for function in FLASH[:2]:
        assert torch.equal(run(function, dropout_p=kind(0.0)), run(function))
        with pytest.raises(ValueError, match=r"dropout_p must be 0\.0"):
            run(function, dropout_p=kind(0.5))


def test_what_a_result_is_asked_for():
    assert len(run(flash_attn_func, return_attn_probs=np.True_)) == 3
    assert len(run(flash_attn_with_kvcache, return_softmax_lse=torch.tensor(True))) == 2
    assert run(sar_attn_func, return_stats=np.True_, sav_grad=np.False_)[1].head_weights.shape == (1, 4)


_, FLASH_PACKED, FLASH_CACHE = FLASH
_, SAR_PACKED, SAR_CACHE, _ = SAR
WRONG = {
    "max_seqlen: bool": (FLASH_PACKED, {"length": True}, "max_seqlen_q must be an int >= 0; got True"),
    "max_seqlen: numpy bool": (SAR_PACKED, {"length": np.True_}, "max_seqlen_q must be an int >= 0"),
    "max_seqlen: bool tensor": (FLASH_PACKED, {"length": torch.tensor(True)}, "max_seqlen_q must be an int"),
    "max_seqlen: float": (SAR_PACKED, {"length": np.float64(8.5)}, r"max_seqlen_q must be an int .*8\.5"),
    "max_seqlen: float tensor": (FLASH_PACKED, {"length": torch.tensor(8.5)}, "max_seqlen_q must be an int"),
    "max_seqlen: two": (FLASH_PACKED, {"length": torch.tensor([7, 8])}, "max_seqlen_q must be an int"),
    "max_seqlen: negative": (SAR_PACKED, {"length": np.int64(-1)}, "max_seqlen_q must be an int >= 0; got -1"),
    "scale: bool": (flash_attn_func, {"softmax_scale": np.True_}, "softmax_scale must be a number or None"),
    "scale: complex": (sar_attn_func, {"softmax_scale": np.complex64(1)}, "softmax_scale must be a number or None"),
    "scale: nan": (sar_attn_func, {"softmax_scale": np.float32("nan")}, "softmax_scale must be a finite number > 0"),
    "scale: huge": (sar_attn_func, {"softmax_scale": 10**400}, "softmax_scale must be a finite number > 0"),
    "softcap: bool": (flash_attn_func, {"softcap": True}, "softcap must be a number; got bool"),
    "softcap: two": (flash_attn_func, {"softcap": torch.ones(2)}, "softcap must be a number; got Tensor"),
    "softcap: inf": (FLASH_CACHE, {"softcap": torch.tensor(math.inf)}, "softcap must be a finite number"),
    "beta: zero": (sar_attn_func, {"beta": torch.tensor(0.0)}, "beta must be > 0"),
    "beta: bool": (SAR_CACHE, {"beta": np.True_}, "beta must be a number; got bool"),
    "window: float": (flash_attn_func, {"window_size": (np.float32(2), 3)}, "window_size must hold two ints"),
    "window: bool": (flash_attn_func, {"window_size": (np.True_, 3)}, "window_size must hold two ints"),
    "window: three": (flash_attn_func, {"window_size": torch.tensor([1, 2, 3])}, "window_size must be .left, right."),
    "causal: int": (flash_attn_func, {"causal": np.int64(1)}, "causal must be a bool; got int"),
    "dropout: text": (flash_attn_func, {"dropout_p": "no"}, "dropout_p must be 0.0"),
    "lengths: bool": (FLASH_CACHE, {"cache_seqlens": np.True_}, "cache_seqlens must be an int or int32"),
    "lengths: bool tensor": (SAR_CACHE, {"cache_seqlens": torch.tensor(True)}, "cache_seqlens must be an int"),
    "lengths: float": (SAR_CACHE, {"cache_seqlens": np.float32(3)}, "cache_seqlens must be an int or int32"),
    "lengths: too long": (FLASH_CACHE, {"cache_seqlens": np.int64(13)}, r"cache_seqlens\[0\] must leave room"),
}  # fmt: skip


@pytest.mark.parametrize(("function", "changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_types_are_named(function, changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run(function, **changes)


@pytest.mark.parametrize("name", ["softmax_scale", "softcap", "beta"])
def test_a_number_that_wants_a_gradient_is_refused(name):
    """None would reach it."""
    with pytest.raises(TypeError, match=rf"{name} must be a number.*requires_grad"):
        run(sar_attn_func, **{name: torch.tensor(0.5, requires_grad=True)})


@pytest.mark.everyday(backend=["torch"])
@pytest.mark.parametrize("backend", ["torch", "composed", "triton"])
@pytest.mark.parametrize("kind", [torch.tensor, np.int64])
def test_longest_sequence_in_a_compiled_graph(kind, backend):
    """Its value cannot be read there."""

    inputs, roles = packed()[:3], packed()[3:]

    def step(q, k, v, ends, longest):
        out = sar_attn_varlen_func(q * 1, k, v, ends, ends, longest, longest, *roles, backend=backend)
        return out + flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for f, longest in ((step, 8), (compiled, kind(8))):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = f(*leaves, ENDS, longest)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    torch._dynamo.reset()


def test_a_length_that_is_not_known_costs_no_memory(monkeypatch):
    """The longest sequence sizes what is allocated per sequence; the packed length in its place would be far larger."""
    from sar_fast.backends import triton

    seen = []
    layout = triton.described
    monkeypatch.setattr(triton, "described", lambda call: seen.append(call.max_seqlens) or layout(call))
    torch._dynamo.reset()
    f = lambda q, k, v, n: flash_attn_varlen_func(q, k, v, ENDS, ENDS, n, n, causal=True, backend="triton")
    torch.compile(f, fullgraph=True, backend="eager")(*packed()[:3], torch.tensor(8))
    assert seen == [(7, 7)]
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", FLOATS)
def test_configuration_takes_numpy_numbers(kind):
    config = SARConfig(beta=kind(0.5), activation_layer_k=np.int64(3))
    assert config == SARConfig(beta=0.5, activation_layer_k=3)
    assert type(config.beta) is float
    assert type(config.activation_layer_k) is int
    assert SARConfig.from_json(config.to_json()) == config


def test_configuration_refuses_what_is_no_number():
    with pytest.raises(TypeError, match="beta must be a number; got bool"):
        SARConfig(beta=np.True_)
    with pytest.raises(TypeError, match="activation_layer_k must be an int; got float"):
        SARConfig(activation_layer_k=np.float64(3))
    with pytest.raises(TypeError, match="activation_layer_k must be an int; got bool"):
        SARConfig(activation_layer_k=torch.tensor(True))


def test_an_infinite_beta_is_valid_json():
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    config = SARConfig(beta=math.inf)
    text = config.to_json()
    assert json.loads(text, parse_constant=refuse)["beta"] == math.inf
    assert SARConfig.from_json(text) == config
    assert SARConfig.from_json('{"beta": Infinity}') == config  # as earlier files have it


def test_one_tensor_for_two_arguments_in_a_compiled_graph():
    """Gradients too: a packed sequence's own ends, and q for keys and values."""
    mask = torch.arange(12) < 5
    f = lambda x, ends: sar_attn_varlen_func(x, x, x, ends, ends, 8, 8, mask, mask, mask / 5)
    torch._dynamo.reset()
    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-1, 1, 12 * 4 * 16).view(12, 4, 16).requires_grad_()
        out = g(x, ENDS)
        results.append([out, *torch.autograd.grad(out.square().sum(), x)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()
