"""Any rule in place of the paper's: outputs and gradients of the public functions against the fp64 reference."""

from __future__ import annotations

import copy
import dataclasses
import os

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sar_fast import (
    SARAttention,
    SARConfig,
    SARState,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    sar_attn_func,
    sar_attn_varlen_func,
    sar_attn_with_kvcache,
)
from sar_fast.weighting import Equal, Fixed, SoftmaxOverHeads, Statistics
from tests.helpers import BACKENDS, LAYOUTS, combinations, make_case, max_error, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = (*BACKENDS, "triton") if os.environ.get("TRITON_INTERPRET") == "1" else BACKENDS
H = 4


class Mixture(nn.Module):
    """A smooth rule with parameters that uses all statistics, and couples the heads."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.mix = nn.Parameter(torch.randn(H, H, generator=g, dtype=dtype) / H)
        self.bias = nn.Parameter(torch.randn(H, generator=g, dtype=dtype))

    def forward(self, statistics: Statistics, layer: int | None) -> Tensor:
        av, sa, count = statistics
        mean = torch.tanh(av) + 5 * sa + torch.log1p(count)[:, None] / 10
        return (mean @ self.mix.to(av.dtype)).tanh() + self.bias.to(av.dtype) + statistics.sav


def without_beta(case):
    return dataclasses.replace(case, options={n: x for n, x in case.options.items() if n != "beta"})


def gradients(function, case, rule) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of q, k, v, the prior and the rule's parameters, for a loss on output and weights."""
    leaves = case.leaves()
    rule.zero_grad()
    out, stats = function(leaves)
    g = torch.Generator().manual_seed(9)
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    ((out * weight).sum() + stats.head_weights.square().sum() / 7).backward()
    return out, stats, [getattr(leaves, n).grad for n in ("q", "k", "v", "prior")], [p.grad for p in rule.parameters()]


OPTIONS = {"causal": {}, "padded": {"padding": "left"}, "window": {"window_size": (9, 0)}, "softcap": {"softcap": 2.0}}
THROUGH_WEIGHTS = ("causal", "softcap")  # of the interpreter's every day; the others with constant weights
RULES = combinations(
    OPTIONS,
    (False, True),
    ALL,
    daily=lambda name, grad, backend: backend != "triton" or grad == (name in THROUGH_WEIGHTS),
)


@pytest.mark.everyday(backend=["torch", "composed"])
@pytest.mark.everyday(name=["causal", "padded"])
@pytest.mark.parametrize(("name", "sav_grad", "backend"), RULES)
def test_a_rule_equals_autograd_of_the_reference(name, sav_grad, backend):
    if backend == "composed" and name == "softcap":
        pytest.skip("PyTorch's fused kernels have no soft-capping")
    case = without_beta(make_case(21, H=H, D=16, Dv=24, **OPTIONS[name]))
    run = lambda c, **more: sar_attn_func(
        *c.tensors, **c.options, weighting=rule, backend=backend, sav_grad=sav_grad, return_stats=True
    )
    rule = Mixture(torch.float32)
    out, stats, inputs, parameters = gradients(run, case, rule)
    exact = Mixture(torch.float64)
    exact.load_state_dict(rule.state_dict())
    with_reference = lambda c: c.reference(weighting=exact, sav_grad=sav_grad)
    want, want_stats, want_inputs, want_parameters = gradients(with_reference, case.to(torch.float64), exact)
    assert max_error(out, want) <= 2e-5
    assert relative_error(stats.head_weights, want_stats.head_weights) <= 1e-3
    for name, got, expected in zip(("q", "k", "v", "prior"), inputs, want_inputs):
        if expected is None or got is None:
            assert (sav_grad, name, got) == (False, "prior", None)
            continue
        assert max_error(got, expected) <= 3e-5 * max(1, expected.abs().max()), name
    for got, expected in zip(parameters, want_parameters):
        assert expected.abs().max() > 0
        assert max_error(got, expected) <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("backend", ["torch", pytest.param("composed", marks=pytest.mark.slow)])
def test_gradcheck_of_a_rule(backend):
    case = without_beta(make_case(6, H=H, D=4, dtype=torch.float64, layouts=("image", "text_only"), seed=1))
    case.prior.masked_fill_(~case.visual, 0.5)  # not read there; finite differences step below zero
    rule = Mixture()

    def f(q, k, v, prior, mix, bias):
        given = torch.func.functional_call
        weighting = lambda statistics, layer: given(rule, {"mix": mix, "bias": bias}, (statistics, layer))
        return sar_attn_func(
            q, k, v, case.visual, case.text, prior, weighting=weighting, sav_grad=True, backend=backend
        )

    leaves = case.leaves()
    inputs = (leaves.q, leaves.k, leaves.v, leaves.prior, rule.mix, rule.bias)
    by_direction = backend != "torch"  # entry by entry on one backend is enough
    assert torch.autograd.gradcheck(f, inputs, eps=1e-6, atol=1e-6, nondet_tol=0.0, fast_mode=by_direction)


SHAPES = combinations(
    ("heads", "one row", "batch"), ALL, daily=lambda shape, backend: backend != "triton" or shape != "one row"
)


@pytest.mark.parametrize(("shape", "backend"), SHAPES)
def test_fixed_is_plain_attention_times_c_bit_for_bit(backend, shape):
    case = without_beta(make_case(19, H=H, D=16))
    B = len(LAYOUTS)
    c = {"heads": torch.randn(H), "one row": torch.randn(1, H), "batch": torch.randn(B, H)}[shape]
    plain = flash_attn_func(case.q, case.k, case.v, causal=True, backend=backend)
    out, stats = case.run(backend, weighting=Fixed(c))
    assert torch.equal(out, plain * c.expand(B, H)[:, None, :, None])
    assert torch.equal(stats.head_weights, c.expand(B, H))
    quiet = sar_attn_func(*case.tensors, **case.options, weighting=Fixed(c), backend=backend)
    assert torch.equal(quiet, out)
    reference, _ = case.to(torch.float64).reference(weighting=Fixed(c))
    assert max_error(out, reference) <= 2e-5


def test_fixed_weights_of_text_only_rows_and_statistics_on_request():
    case = without_beta(make_case(19, H=H, D=16))
    c = torch.tensor([0.0, 2.0, 1.0, -1.0])
    _, stats = case.run("torch", weighting=Fixed(c))
    _, paper = case.run("torch")
    assert torch.equal(stats.head_weights, c.expand(3, H))  # the last row has no picture
    assert torch.equal(stats.alignment_variance, paper.alignment_variance)
    assert torch.equal(stats.query_count, paper.query_count)


@pytest.mark.parametrize("backend", ALL)
def test_equal_is_plain_attention_with_statistics(backend):
    case = without_beta(make_case(26, H=7, Hkv=1, D=16))
    out, stats = case.run(backend, weighting=Equal())
    assert torch.equal(out, flash_attn_func(case.q, case.k, case.v, causal=True, backend=backend))
    assert torch.equal(stats.head_weights, torch.ones(3, 7))
    _, paper = case.run(backend)
    assert relative_error(stats.sav, paper.sav) < 1e-5


@pytest.mark.everyday(backend=["torch", "composed"])
@pytest.mark.everyday(dtype=[torch.float32])
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_papers_rule_given_as_a_weighting_is_the_same_call(backend, dtype):
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 is wrong")
    case = make_case(24, H=H, D=16, dtype=dtype, normalize="standardize", protect_first_head=False)
    options = {n: case.options[n] for n in ("beta", "protect_first_head", "normalize")}
    rest = dataclasses.replace(case, options={})
    out, _ = case.run(backend)
    same, _ = rest.run(backend, weighting=SoftmaxOverHeads(**options))
    assert torch.equal(out, same)
    python, _ = rest.run(backend, weighting=lambda statistics, layer: SoftmaxOverHeads(**options)(statistics))
    assert max_error(python, out) <= 4 * torch.finfo(dtype).eps * out.abs().max()


PACKED = combinations((False, True), ALL, daily=lambda sav_grad, backend: backend != "triton" or sav_grad)


@pytest.mark.parametrize(("sav_grad", "backend"), PACKED)
def test_packed_sequences_have_weights_of_their_own(backend, sav_grad):
    case = without_beta(make_case(17, H=H, D=16))
    rule = Mixture(torch.float32)
    ends = torch.tensor([0, 17, 34, 51], dtype=torch.int32)

    def packed(c):
        q, k, v, visual, text, prior = (x.flatten(0, 1) for x in c.tensors)
        out, stats = sar_attn_varlen_func(
            *(q, k, v, ends, ends, 17, 17, visual, text, prior),
            weighting=rule,
            backend=backend,
            sav_grad=sav_grad,
            return_stats=True,
        )
        return out.unflatten(0, (3, 17)), stats

    dense = lambda c: sar_attn_func(*c.tensors, weighting=rule, backend=backend, sav_grad=sav_grad, return_stats=True)
    got, expected = gradients(packed, case, rule), gradients(dense, case, rule)
    assert max_error(got[0], expected[0]) <= 1e-5
    for a, b in zip((*got[2][: 4 if sav_grad else 3], *got[3]), (*expected[2][: 4 if sav_grad else 3], *expected[3])):
        assert max_error(a, b) <= 1e-4 * b.abs().max()


class Asked:
    """Records what a rule is asked with."""

    def __init__(self) -> None:
        self.calls = []

    def __call__(self, statistics: Statistics, layer: int | None) -> Tensor:
        self.calls.append((statistics, layer))
        return 1 + torch.tanh(statistics.sav)


@pytest.mark.everyday(backend=["torch", "composed"])
@pytest.mark.everyday(mode=["running"])
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("mode", ["running", "step", "prompt"])
def test_decode_asks_the_rule_with_the_means_of_its_mode(backend, mode):
    """Against the function on the whole prefix, whose T is that of the mode."""
    case = without_beta(make_case(30, H=H, D=16))
    rule, start = lambda s, layer: 1 + torch.tanh(s.sav) + s.sa, 27
    causal = {"weighting": rule, "backend": "torch", "return_stats": True}
    part = lambda n: tuple(x[:, :n] for x in case.tensors)
    _, stats = sar_attn_func(*part(start), **causal)
    state = SARState.from_stats(stats)
    k_cache, v_cache = (torch.zeros(3, 32, *x.shape[2:]) for x in (case.k, case.v))
    k_cache[:, :start], v_cache[:, :start] = case.k[:, :start], case.v[:, :start]
    visual, prior = (torch.nn.functional.pad(x, (0, 2)) for x in (case.visual, case.prior))
    for n in range(start, 30):
        out, got = sar_attn_with_kvcache(
            *(case.q[:, n : n + 1], k_cache, v_cache, case.k[:, n : n + 1], case.v[:, n : n + 1]),
            cache_seqlens=n,
            visual_mask=visual,
            prior=prior,
            state=state,
            decode=mode,
            weighting=rule,
            backend=backend,
            return_stats=True,
        )
        text = case.text[:, : n + 1].clone()
        if mode == "step":
            text[:, :n] = False
        text[:, start : n + 1] = True
        if mode == "step":
            text[:, :n] = False
        tensors = (*part(n + 1)[:4], text, case.prior[:, : n + 1])
        whole, want = sar_attn_func(*tensors, **causal)
        c = stats.head_weights if mode == "prompt" else want.head_weights
        plain = flash_attn_func(*part(n + 1)[:3], causal=True, backend="torch")[:, -1:]
        assert max_error(got.head_weights, c) <= 1e-5
        assert max_error(out, plain * c[:, None, :, None]) <= 1e-5
        if mode != "prompt":
            assert max_error(out, whole[:, -1:]) <= 1e-5


MODES = combinations(
    ("running", "step", "prompt"), ALL, daily=lambda mode, backend: backend != "triton" or mode == "running"
)


@pytest.mark.parametrize(("mode", "backend"), MODES)
def test_fixed_weights_in_decode_neither_read_nor_write_the_state(backend, mode):
    case = make_case(12, H=H, D=16)
    c = torch.randn(3, H)
    state = SARState.empty(3, H)
    state.av_sum.fill_(float("nan"))
    caches = case.k.clone(), case.v.clone()
    roles = {"visual_mask": case.visual, "prior": case.prior, "state": state, "decode": mode, "backend": backend}
    for return_stats in (False, True):
        found = sar_attn_with_kvcache(
            case.q[:, -1:], *caches, cache_seqlens=12, weighting=Fixed(c), return_stats=return_stats, **roles
        )
        out = found[0] if return_stats else found
        plain = flash_attn_with_kvcache(case.q[:, -1:], *caches, cache_seqlens=12, causal=True, backend=backend)
        torch.testing.assert_close(out, plain * c[:, None, :, None], rtol=1e-6, atol=1e-7)
    assert torch.equal(found[1].head_weights, c)
    assert state.av_sum.isnan().all()
    assert (state.count == 0).all()
    without = {**roles, "state": None}
    out = sar_attn_with_kvcache(case.q[:, -1:], *caches, cache_seqlens=12, weighting=Fixed(c), **without)
    torch.testing.assert_close(out, plain * c[:, None, :, None], rtol=1e-6, atol=1e-7)


BAD = {
    "class": (Fixed, TypeError, r"weighting must be a rule, not a class; got Fixed"),
    "name": ("equal", TypeError, r"weighting must be a callable .*; got str"),
    "no tensor": (lambda s, layer: [1.0] * H, TypeError, r"weighting must return a tensor; got list from <lambda>"),
    "integers": (
        lambda s, layer: torch.ones(H, dtype=torch.int64),
        TypeError,
        r"floating point weights; got torch.int64",
    ),
    "shape": (lambda s, layer: torch.ones(5), ValueError, r"of shape \(3, 4\), \(4,\) or \(1, 4\); got \(5,\)"),
    "batch": (lambda s, layer: torch.ones(2, H), ValueError, r"of shape \(3, 4\), .*; got \(2, 4\)"),
    "scalar": (lambda s, layer: torch.ones(()), ValueError, r"of shape .*; got \(\)"),
    "device": (lambda s, layer: torch.ones(H, device="meta"), ValueError, r"must return weights on cpu; got meta"),
    "nan": (
        lambda s, layer: s.sav * torch.nan,
        ValueError,
        r"weighting must return finite weights; got .*nan of <lambda>",
    ),
    "inf": (lambda s, layer: torch.full((H,), torch.inf), ValueError, r"must return finite weights; got .*inf"),
    "heads": (Fixed(torch.ones(5)), ValueError, r"weighting must have weights of 4 heads; got Fixed with \(5,\)"),
    "per layer": (Fixed(torch.ones(7, H)), ValueError, r"a call without a layer index; got Fixed with \(7, 4\)"),
    "told per layer": (
        Fixed(torch.ones(3, H), per_layer=True),
        ValueError,
        r"must be without tables per layer for a call without a layer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rules(name):
    rule, error, message = BAD[name]
    case = without_beta(make_case(12, H=H, D=16))
    with pytest.raises(error, match=message):
        case.run("torch", weighting=rule)


@pytest.mark.parametrize("given", [{"beta": 0.5}, {"protect_first_head": True}, {"normalize": "none"}], ids=str)
def test_a_rule_and_the_papers_options_exclude_each_other(given):
    case = without_beta(make_case(12, H=H, D=16))
    (name,) = given
    with pytest.raises(
        ValueError, match=rf"weighting must come without {name}, of the paper's rule; got Equal and {name}="
    ):
        case.run("torch", weighting=Equal(), **given)
    with pytest.raises(ValueError, match=rf"weighting must come without {name}"):
        case.reference(weighting=Equal(), **given)
    with pytest.raises(ValueError, match=rf"weighting must come without {name}"):
        SARConfig(weighting=Equal(), **given)
    state = {"visual_mask": case.visual, "prior": case.prior, "state": None}
    with pytest.raises(ValueError, match=rf"weighting must come without {name}"):
        sar_attn_with_kvcache(case.q[:, -1:], case.k, case.v, cache_seqlens=12, weighting=Equal(), **state, **given)


@pytest.mark.parametrize(
    ("c", "error", "message"),
    [
        ([1.0, float("nan")], ValueError, "c must be finite; got 1 of 2 that are not"),
        (torch.ones(2, 3, 4), ValueError, r"c must have shape .*; got \(2, 3, 4\)"),
        (torch.ones(2, dtype=torch.bool), TypeError, "c must be floating point; got torch.bool"),
        ([], ValueError, "c must have shape"),
    ],
)
def test_bad_fixed_weights(c, error, message):
    with pytest.raises(error, match=message):
        Fixed(c)


def test_a_rule_that_uses_statistics_it_said_it_needs_none_of_is_an_error():
    class Careless:
        needs_statistics = False

        def __call__(self, statistics, layer):
            return statistics.sav

    case = without_beta(make_case(12, H=H, D=16))
    with pytest.raises(
        ValueError, match="weighting must return finite weights; got values from nan to nan of Careless"
    ):
        sar_attn_func(*case.tensors, weighting=Careless())


def test_rows_without_counted_queries_weigh_1_whatever_the_rule_returns():
    case = without_beta(make_case(20, H=H, D=16))
    plain = flash_attn_func(case.q, case.k, case.v, causal=True, backend="torch")
    out, stats = case.run("torch", weighting=lambda s, layer: 3 / s.sav)  # infinite where nothing counted
    assert torch.equal(out[2], plain[2])
    assert torch.equal(stats.head_weights[2], torch.ones(H))
    assert torch.equal(stats.head_weights[:2], 3 / stats.sav[:2])


def test_the_rule_is_told_its_layer_only_inside_a_model():
    case = without_beta(make_case(12, H=H, D=16))
    rule = Asked()
    case.run("torch", weighting=rule)
    module = SARAttention(64, H, layer_idx=5, config=SARConfig(weighting=rule))
    hidden = torch.randn(3, 12, 64)
    module(hidden, visual_mask=case.visual, text_mask=case.text, prior=case.prior)
    assert [layer for _, layer in rule.calls] == [None, 5]
    statistics = rule.calls[0][0]
    assert statistics.av.dtype == torch.float32
    assert statistics.av.shape == statistics.sav.shape == (3, H)
    assert statistics.count.shape == (3,)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# every day each kind of rule on each backend and with each gradient
GRAPHS = combinations(
    *(("module", "fixed", "closure"), (False, True), BACKENDS),
    daily=lambda kind, grad, backend: (kind == "fixed") ^ grad ^ (backend == "torch"),
)


@pytest.mark.everyday(backend=["torch"])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("kind", "sav_grad", "backend"), GRAPHS)
def test_compiles_in_one_graph(kind, sav_grad, backend):
    module = Mixture(torch.float32)
    scale = torch.ones(H, requires_grad=True)
    rule = {"module": module, "fixed": Fixed(scale), "closure": lambda s, layer: 1 + s.sav * scale}[kind]
    parameters = list(module.parameters()) if kind == "module" else [scale]

    def block(q, k, v, visual, text, prior):
        out, stats = sar_attn_func(
            q * 1.5, k, v, visual, text, prior, weighting=rule, sav_grad=sav_grad, backend=backend, return_stats=True
        )
        return out.tanh(), stats.head_weights

    case = without_beta(make_case(18, H=H, D=16))
    results = []
    for f in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        leaves = case.leaves()
        for p in parameters:
            p.grad = None
        out, c = f(*leaves.tensors)
        (out.sum() + c.square().sum()).backward()
        results.append([out, leaves.q.grad, leaves.k.grad, leaves.v.grad, *(p.grad for p in parameters)])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
def test_bad_values_show_inside_a_graph_too():
    case = without_beta(make_case(12, H=H, D=16))
    f = lambda *t: sar_attn_func(*t, weighting=lambda s, layer: s.sav / 0, backend="torch")
    with pytest.raises(ValueError, match="must return finite weights"):
        torch.compile(f, fullgraph=True, backend="aot_eager")(*case.tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing(backend):
    case = without_beta(make_case(16, H=H, D=16))
    rule = Mixture(torch.float32)
    plain = lambda c: sar_attn_func(*c.tensors, weighting=rule, sav_grad=True, backend=backend, return_stats=True)
    again = lambda c: checkpoint(lambda *t: plain(dataclasses.replace(c, q=t[0])), c.q, use_reentrant=False)
    for got, want in zip(gradients(again, case, rule)[2:], gradients(plain, case, rule)[2:]):
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_a_rule_is_asked_in_fp32(compiled):
    case = without_beta(make_case(16, H=H, D=16))
    mix, dtypes = torch.randn(H, H), []

    def rule(statistics, layer):
        c = statistics.sav @ mix
        dtypes.append(c.dtype)
        return c

    f = lambda *t: sar_attn_func(*t, weighting=rule, backend="torch")
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        out = (torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f)(*case.tensors)
    torch._dynamo.reset()
    assert out.dtype == torch.bfloat16
    assert dtypes == [torch.float32]


def test_only_the_rule_learns():
    """A frozen model's tensors want no gradient; the rule's parameters get theirs all the same."""
    case = without_beta(make_case(16, H=H, D=16))
    scale = torch.ones(H, requires_grad=True)
    out = sar_attn_func(*case.tensors, weighting=Fixed(scale), backend="composed")
    out.square().sum().backward()
    plain = flash_attn_func(case.q, case.k, case.v, causal=True, backend="composed")
    torch.testing.assert_close(scale.grad, 2 * plain.square().sum((0, 1, 3)))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_of_the_scaling(packed):
    shape, ends = ((9, H, 8), torch.tensor([0, 4, 9], dtype=torch.int32)) if packed else ((2, 5, H, 8), None)
    for dtype in (torch.float32, torch.bfloat16):
        out, c = torch.randn(shape).to(dtype), torch.randn(2, H)
        torch.library.opcheck(torch.ops.sar_fast.scale_heads, (out, c, ends, "rule"))
        for need in (False, True):
            torch.library.opcheck(torch.ops.sar_fast.scale_heads_backward, (torch.randn_like(out), out, c, ends, need))


def test_packed_varlen_plain_times_fixed():
    case = without_beta(make_case(15, H=H, D=16))
    q, k, v, visual, text, prior = (x.flatten(0, 1) for x in case.tensors)
    ends, c = torch.tensor([0, 10, 31, 45], dtype=torch.int32), torch.randn(3, H)
    out = sar_attn_varlen_func(q, k, v, ends, ends, 21, 21, visual, text, prior, weighting=Fixed(c), backend="torch")
    plain = flash_attn_varlen_func(q, k, v, ends, ends, 21, 21, causal=True, backend="torch")
    assert torch.equal(out, plain * c.repeat_interleave(ends.diff(), 0)[..., None])


def test_a_module_under_given_weights_needs_neither_pictures_nor_a_cache_of_its_own():
    from transformers import DynamicCache

    torch.manual_seed(0)
    c = torch.tensor([0.0, 2.0, 0.5, -1.0])
    hidden = torch.randn(3, 12, 64)
    module = SARAttention(64, H, config=SARConfig(weighting=Fixed(c)))
    plain = SARAttention(64, H, config=SARConfig(activation_layer_k=0))
    plain.load_state_dict(module.state_dict())
    scale = lambda _, args: ((args[0].unflatten(-1, (H, -1)) * c[:, None]).flatten(-2),)
    plain.o_proj.register_forward_pre_hook(scale)
    with torch.no_grad():
        want, _ = plain(hidden)
        got, _ = module(hidden)
        assert module.last_stats is None
        torch.testing.assert_close(got, want)
        cache = DynamicCache()
        parts = [module(hidden[:, a:b], past_key_values=cache)[0] for a, b in ((0, 10), (10, 11), (11, 12))]
        torch.testing.assert_close(torch.cat(parts, 1), want)
        visual = torch.arange(12)[None].expand(3, -1) < 6
        roles = {"visual_mask": visual, "text_mask": ~visual, "prior": visual / 6}
        torch.testing.assert_close(module(hidden, **roles)[0], want)
        assert torch.equal(module.last_stats.head_weights, c.expand(3, H))
        assert (module.last_stats.sav > 0).all()


def test_a_table_is_brought_to_a_calls_dtype_once_and_again_when_it_changes():
    rule, statistics = Fixed([1.0, 0.5]), Statistics(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3))
    with torch.inference_mode():
        first = rule(statistics)
    assert first.dtype == torch.float32  # the list is kept in fp64
    assert not first.is_inference()
    assert rule(statistics) is first
    rule.c.mul_(2)
    assert torch.equal(rule(statistics), torch.tensor([2.0, 1.0]))
    rule.c = torch.zeros(2, dtype=torch.float64)
    assert not rule(statistics).any()
    copied = copy.deepcopy(rule)
    copied.c.add_(3)
    assert torch.equal(copied(statistics), torch.full((2,), 3.0))
    assert not rule(statistics).any()
