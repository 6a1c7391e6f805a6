"""The operators: schemas and fakes (opcheck), gradients (gradcheck), and torch.compile of functions that use them."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sar_fast import flash_attn_func, sar_attn_func, sar_attn_varlen_func
from tests.helpers import BACKENDS, make_case, max_error

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = (0.25, True, -1, -1, 0.0, 0.05, True, "none")  # scale .. normalize, in the schemas' order


def forward_arguments(pattern: str, backend: str) -> list:
    """Arguments of ``operator`` without the packed lengths."""
    dtype = torch.bfloat16 if pattern == "bf16" else torch.float32
    padding = "left" if pattern == "padded" else "none"
    case = make_case(10, 12, D=16, Dv=24, dtype=dtype, padding=padding)
    q, k, v, options = case.q, case.k, case.v, OPTIONS
    roles, masks, carried = list(case.tensors[3:]), [None] * 6, []
    if pattern == "plain":
        roles = [None, None, None]
    elif pattern == "padded":
        masks[0] = case.options["key_padding_mask"]
    elif pattern == "dense mask":
        masks[1] = torch.rand(1, 1, 10, 12) < 0.7
    elif pattern == "bounds":
        options = (0.25, False, *OPTIONS[2:])
        masks[4:] = [torch.arange(-3, 7)[None].int(), torch.randint(1, 13, (3, 10)).int()]
    elif pattern == "decode":
        carried = [torch.rand(3, 4), torch.rand(3, 4), torch.tensor([5.0, 2.0, 0.0])]
    elif pattern == "packed":
        q, k, v, *roles = (x.flatten(0, 1) for x in case.tensors)
        masks[2:4] = [torch.tensor([0, 10, 15, 30]).int(), torch.tensor([0, 12, 20, 36]).int()]
    return [q, k, v, *roles, *masks, *carried, *options, backend]


PATTERNS = ("sar", "plain", "padded", "dense mask", "bounds", "decode", "packed", "bf16")
LACKING = [("dense mask", "composed")]
CASES = [(p, b) for p in PATTERNS for b in BACKENDS if (p, b) not in LACKING]


def operator(pattern: str):
    """The forward's, or the one that goes on from earlier sums."""
    return getattr(torch.ops.sar_fast, "attention_continued" if pattern == "decode" else "attention_forward")


def longest(pattern: str) -> tuple[int, ...]:
    """The packed lengths of ``forward_arguments``, which a continued call has none of."""
    return () if pattern == "decode" else (15, 16) if pattern == "packed" else (0, 0)


@pytest.mark.everyday(need_lse=[True], backend=["torch"])
@pytest.mark.everyday(need_lse=[False], pattern=["sar", "packed"], backend=["composed"])
@pytest.mark.parametrize(("pattern", "backend"), CASES)
@pytest.mark.parametrize("need_lse", [True, False], ids=["lse", "no lse"])
def test_opcheck_forward(pattern, backend, need_lse):
    arguments = (*forward_arguments(pattern, backend), need_lse, *longest(pattern))
    torch.library.opcheck(operator(pattern), arguments)


@pytest.mark.everyday(through_weights=[True], backend=["torch"])
@pytest.mark.everyday(through_weights=[True], pattern=["sar", "packed"], backend=["composed"])
@pytest.mark.parametrize(("pattern", "backend"), [c for c in CASES if c[0] != "decode"])
@pytest.mark.parametrize("through_weights", [False, True], ids=["constant", "sav_grad"])
def test_opcheck_backward(pattern, backend, through_weights):
    arguments = forward_arguments(pattern, backend)
    results = torch.ops.sar_fast.attention_forward(*arguments, True, *longest(pattern))
    grads = [torch.randn_like(x) for x in results[2:5]] if through_weights else [None] * 3
    call = (torch.randn_like(results[0]), *arguments[:12], *results, *grads, *arguments[12:], *longest(pattern))
    torch.library.opcheck(torch.ops.sar_fast.attention_backward, call)


@pytest.mark.everyday(backend=["torch"])
@pytest.mark.everyday(pattern=["packed"], backend=["triton"])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("pattern", ["sar", "packed", "plain"])
def test_the_backward_checks_what_the_forward_returned(pattern, backend):
    """A batch too few, a row too few, another dtype; a view with other numbers between its rows is right."""
    arguments = forward_arguments(pattern, backend)
    results = torch.ops.sar_fast.attention_forward(*arguments, True, *longest(pattern))
    names = ("grad_out", "out", "lse", "av", "sa", "c", "count")
    given = dict(zip(names, (torch.randn_like(results[0]), *results)))

    def run(**changes):
        grad_out, *saved = {**given, **changes}.values()
        return torch.ops.sar_fast.attention_backward(
            grad_out, *arguments[:12], *saved, None, None, None, *arguments[12:], *longest(pattern)
        )

    expected = run()
    for name, x in given.items():
        if pattern == "plain" and name in ("av", "sa", "c", "count"):
            continue
        for wrong in (x[:1], x[..., :-1], torch.cat([x, x])):
            with pytest.raises(ValueError, match=rf"{name} must have shape .*; got"):
                run(**{name: wrong})
        with pytest.raises(TypeError, match=rf"{name} must be torch.float32; got torch.float16"):
            run(**{name: x.half()})
        padded = torch.nn.functional.pad(x, (0, 3), value=torch.nan)[..., : x.shape[-1]]
        for a, b in zip(run(**{name: padded}), expected):
            torch.testing.assert_close(a, b)


ABOVE_ZERO = 0.01  # gradcheck steps to both sides of the prior's zeros, and a negative prior is an error


def small_case():
    return make_case(6, 7, H=4, Hkv=2, D=3, Dv=2, dtype=torch.float64, layouts=("image", "two_images"), beta=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes", [{}, {"normalize": "standardize", "beta": 1.0}, {"causal": False}], ids=str)
def test_gradcheck_through_the_weights(backend, changes):
    case = small_case().leaves()
    f = lambda q, k, v, prior: sar_attn_func(
        q, k, v, case.visual, case.text, prior + ABOVE_ZERO, backend=backend, sav_grad=True, **{"beta": 0.1, **changes}
    )
    assert torch.autograd.gradcheck(f, (case.q, case.k, case.v, case.prior), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_with_constant_weights(backend):
    """Dividing by c and multiplying by a frozen c gives a function whose numeric derivative holds c constant."""
    case = small_case().leaves()
    frozen = torch.linspace(0.4, 1.6, 4, dtype=torch.float64)[:, None]

    def f(q, k, v):
        out = sar_attn_func(q, k, v, case.visual, case.text, case.prior, beta=0.1, backend=backend)
        plain = flash_attn_func(q.detach(), k.detach(), v.detach(), causal=True, backend=backend)
        c = (out.detach() / plain).mean((1, 3), keepdim=True)
        return out / c * frozen

    assert torch.autograd.gradcheck(f, (case.q, case.k, case.v), fast_mode=True)


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"window_size": (4, -1)}], ids=str)
def test_gradcheck_of_the_torch_backends_options(options):
    case = small_case().leaves()
    f = lambda q, k, v, prior: sar_attn_func(
        q, k, v, case.visual, case.text, prior + ABOVE_ZERO, backend="torch", sav_grad=True, beta=0.1, **options
    )
    assert torch.autograd.gradcheck(f, (case.q, case.k, case.v, case.prior), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_packed(backend):
    g = torch.Generator().manual_seed(0)
    leaf = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
    ends = torch.tensor([0, 5, 5, 9], dtype=torch.int32)
    visual, text = torch.zeros(9, dtype=torch.bool), torch.zeros(9, dtype=torch.bool)
    visual[[0, 1, 2, 5, 6]], text[[3, 4, 7, 8]] = True, True
    prior = (torch.rand(9, generator=g, dtype=torch.float64) * visual).requires_grad_()
    f = lambda q, k, v, prior: sar_attn_varlen_func(
        q, k, v, ends, ends, 5, 5, visual, text, prior + ABOVE_ZERO, beta=0.1, sav_grad=True, backend=backend
    )
    assert torch.autograd.gradcheck(f, (leaf(9, 4, 3), leaf(9, 2, 3), leaf(9, 2, 2), prior), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_an_error(backend):
    case = small_case().leaves()
    out, _ = case.run(backend, sav_grad=True)
    (grad,) = torch.autograd.grad(out.square().sum(), case.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def block(q, k, v, visual, text, prior, backend):
    """Attention between operations that a compiler fuses, with statistics in use."""
    out, stats = sar_attn_func(
        q * 1.5, k, v.sin(), visual, text, prior, beta=0.05, sav_grad=True, backend=backend, return_stats=True
    )
    return out.tanh() + stats.head_weights[:, None, :, None].to(out.dtype)


def assert_compiled_equals_eager(compiled, case, backend):
    """Value and gradients of ``block``."""
    results = []
    for f in (block, compiled):
        leaves = case.leaves()
        out = f(*leaves.tensors, backend)
        out.square().sum().backward()
        results.append([out, *(getattr(leaves, name).grad for name in ("q", "k", "v", "prior"))])
    for eager, got in zip(*results):
        assert max_error(got, eager) <= 1e-5 * max(1.0, eager.abs().max().item())


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.everyday(dynamic=[True], backend=["torch"])
@pytest.mark.everyday(dynamic=[False], backend=["auto"])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_forward_and_backward(backend, dynamic):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for S in (20, 33):
        assert_compiled_equals_eager(compiled, make_case(S), backend)


@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_for_every_length():
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    for S in (20, 33, 64, 51):
        assert_compiled_equals_eager(compiled, make_case(S), "torch")
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_no_recompilation_of_forward_and_backward():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    assert_compiled_equals_eager(compiled, make_case(20), "torch")
    graphs = counter.frame_count
    for S in (33, 64, 51):
        assert_compiled_equals_eager(compiled, make_case(S), "torch")
    assert counter.frame_count == graphs


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_packed_without_gradients():
    def f(q, k, v, ends, visual, text, prior):
        return sar_attn_varlen_func(q.cos(), k, v, ends, ends, 16, 16, visual, text, prior, backend="torch") * 2

    q, k, v, visual, text, prior = (x.flatten(0, 1) for x in make_case(12).tensors)
    ends = torch.tensor([0, 12, 20, 36], dtype=torch.int32)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    arguments = (q, k, v, ends, visual, text, prior)
    assert torch.equal(compiled(*arguments), f(*arguments))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_calls_check_their_arguments():
    case = make_case(8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    bad = case.prior.clone()
    bad[0, 0] = -1
    with pytest.raises(ValueError, match="prior must be finite and non-negative"):
        compiled(*case.tensors[:5], bad, "torch")


NEEDS_CXX = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor's CPU code needs a C++ compiler")


@NEEDS_CXX
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor():
    compiled = torch.compile(lambda q, k, v: flash_attn_func(q * 2, k, v, backend="composed").tanh(), fullgraph=True)
    q, k, v = make_case(20).tensors[:3]
    assert max_error(compiled(q, k, v), flash_attn_func(q * 2, k, v, backend="composed").tanh()) < 1e-5


@NEEDS_CXX
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_forward_and_backward():
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for S in (20, 33):
        assert_compiled_equals_eager(compiled, make_case(S), "composed")
