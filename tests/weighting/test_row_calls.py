"""Row statistics as operators: compiled, in the kernels, and what users may get wrong."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from sar_fast.attention.row_statistics import row_statistics
from sar_fast.method.values import Call, Roles, Scores
from sar_fast.method.weighting.rows import Entropy, Mass, RowStatistic, check_row_statistics
from tests.weighting.row_cases import (
    PATTERNS,
    SCALE,
    Peak,
    asked,
    box_of,
    call_of,
    differentiated,
    lse_of,
    packed,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# compiled


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operator_arguments(pattern: str) -> list:
    call = call_of("image two_images", dtype=torch.float32, padding=pattern == "padded", dense_mask=pattern == "masked")
    lse, statistics = lse_of(call), asked(box_of(call))
    operator_arguments.held = statistics
    if pattern == "packed":
        call, lse = packed(call, lse)
        operator_arguments.held = statistics = asked(box_of(call).flatten())
    masks = (call.key_padding_mask, call.attn_mask, call.cu_seqlens_q, call.cu_seqlens_k, *call.bounds)
    tensors = [[t for s in statistics for t in s.tensors], [len(s.tensors) for s in statistics]]
    scores = (SCALE, True, -1, -1, 0.0, *call.max_seqlens)
    return [call.q, call.k, lse, *call.roles[:2], *masks, *tensors, [s._id for s in statistics], *scores]


@pytest.mark.parametrize("pattern", ["dense", "padded", "masked", "packed"])
def test_opcheck(pattern):
    arguments = operator_arguments(pattern)
    torch.library.opcheck(torch.ops.sar_fast.row_statistics, (*arguments, "torch", True))
    sums = torch.ops.sar_fast.row_statistics(*arguments, "torch", True)
    torch.library.opcheck(torch.ops.sar_fast.row_statistics_backward, (torch.randn_like(sums), *arguments))


@pytest.mark.everyday(dynamic=[True])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_in_one_graph(dynamic):
    """Forward and backward; the same mask twice, and a statistic that holds none."""
    call = call_of("image two_images", dtype=torch.float32)
    box = box_of(call)
    statistics = (Mass(box, name="a"), Mass(box, name="b", queries="last"), Entropy(), Peak())

    def f(q, k, lse, visual, text):
        moved = Call(q * 1.0, k, k, Scores(SCALE), Roles(visual, text, visual))
        return row_statistics(moved, lse, statistics, "torch", differentiable=True).sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for run in (f, compiled):
        leaves = [x.clone().requires_grad_() for x in (call.q, call.k)]
        out = run(*leaves, lse_of(call), *call.roles[:2])
        out.sum().backward()
        results.append((out.detach(), *(x.grad for x in leaves)))
    for eager_result, got in zip(*results):
        torch.testing.assert_close(got, eager_result)


@pytest.mark.usefixtures("fresh_compiler")
def test_new_keys_are_no_new_graph():
    call = call_of("image two_images", dtype=torch.float32)
    mass, lse = Mass(box_of(call)), lse_of(call)
    counter = CompileCounterWithBackend("eager")

    def f(q, k, lse):
        return row_statistics(dataclasses.replace(call, q=q, k=k), lse, (mass,), "torch", differentiable=False)

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    first = compiled(call.q, call.k, lse)
    mass.keys = ~mass.keys
    second = compiled(call.q, call.k, lse)
    assert torch.equal(second, f(call.q, call.k, lse))
    assert not torch.equal(first, second)
    assert counter.frame_count == 1


class Quiet(TorchDispatchMode):
    """Sees every operator, as modes that count or checkpoint do, and runs it below autograd."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("below", [Quiet, torch._C._AutoDispatchBelowAutograd])
def test_gradients_where_operators_run_below_autograd(below):
    arguments = operator_arguments("dense")
    grad = torch.ones(2, 6, 4)
    expected = torch.ops.sar_fast.row_statistics_backward(grad, *arguments)
    with below():
        got = torch.ops.sar_fast.row_statistics_backward(grad, *arguments)
    assert expected[0].any()
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def test_inference_mode():
    call = call_of("image")
    lse, box = lse_of(call), box_of(call)
    expected = row_statistics(call, lse, asked(box), "torch", differentiable=False)
    with torch.inference_mode():
        assert torch.equal(row_statistics(call, lse, asked(box), "torch", differentiable=True), expected)
        with pytest.raises(RuntimeError, match="where autograd does not record"):
            torch.ops.sar_fast.row_statistics_backward(torch.ones(2, 6, 4), *operator_arguments("dense"))


# in the kernels


@pytest.fixture
def kernel_calls(monkeypatch):
    """The priors that the kernels were given, a call each."""
    from sar_kernels import attention

    given, statistics = [], attention.attention_statistics

    def counted(q, k, lse, visual, text, prior, **options):
        given.append(prior)
        return statistics(q, k, lse, visual, text, prior, **options)

    monkeypatch.setattr(attention, "attention_statistics", counted)
    return given


def small(**options) -> Call:
    """For the interpreter: D must be padded, T and V cross a tile's edge."""
    return call_of("image two_images text_only one_token", **{"dtype": torch.float32, **options})


@pytest.mark.everyday(pattern=["padded", "fewer queries", "packed"])
@pytest.mark.parametrize("pattern", ["causal", "padded", "window", "softcap", "fewer queries", "packed"])
def test_mass_in_the_kernels(pattern, kernel_calls):
    call = small(**PATTERNS.get(pattern, {}))
    lse, box = lse_of(call), box_of(call)
    if pattern == "packed":
        (call, lse), box = packed(call, lse), box.flatten()
    statistics = (Mass(), Mass(box, name="box"), Mass(box, name="last", queries="last"), Entropy())
    expected = row_statistics(call, lse, statistics, "torch", differentiable=False)
    assert not kernel_calls
    got = row_statistics(call, lse, statistics, "triton", differentiable=False)
    assert len(kernel_calls) == 2
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(got[2:], torch.zeros_like(got[2:]))


def test_mass_in_the_kernels_has_its_gradients(kernel_calls):
    call = small()
    statistics = (Mass(box_of(call)), Entropy())
    for a, b in zip(differentiated(call, statistics, backend="triton"), differentiated(call, statistics)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(kernel_calls) == 1


def test_only_the_library_s_own_mass_runs_in_the_kernels(kernel_calls):
    class Squared(Mass):
        def __call__(self, rows, *tensors):
            return super().__call__(rows, *tensors) ** 2

    class Named(Mass):
        pass

    call = small()
    row_statistics(call, lse_of(call), (Squared(),), "triton", differentiable=False)
    assert not kernel_calls
    row_statistics(call, lse_of(call), (Named(),), "triton", differentiable=False)
    assert len(kernel_calls) == 1
    masked = small(dense_mask=True)
    got = row_statistics(masked, lse_of(masked), (Mass(),), "triton", differentiable=False)
    want = row_statistics(masked, lse_of(masked), (Mass(),), "torch", differentiable=False)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert len(kernel_calls) == 2


def test_keys_of_the_prompt_in_the_kernels(kernel_calls):
    call = small(Sq=2)
    box = box_of(call)[:, :7]
    run = lambda backend: row_statistics(call, lse_of(call), (Mass(box),), backend, differentiable=False)
    torch.testing.assert_close(run("triton"), run("torch"), rtol=1e-5, atol=1e-6)
    assert kernel_calls[0].shape == (4, 13)


# errors


@pytest.mark.parametrize(
    ("statistics", "error", "message"),
    [
        (Mass(), TypeError, "row_statistics must be a tuple of RowStatistic; got Mass"),
        ((Mass,), TypeError, "row_statistics must be instances of RowStatistic; got Mass"),
        ((len,), TypeError, "got builtin_function_or_method"),
        ((Mass(), Mass()), ValueError, "names that differ; got 'mass' twice"),
        ((Mass(name=""),), TypeError, "row_statistics must have a name that is a text; got '' from Mass"),
        (
            (type("Nameless", (Mass,), {"__init__": lambda self: None})(),),
            TypeError,
            "row_statistics must have a name that is a text; got None from Nameless",
        ),
        (
            (Mass(queries="first"),),
            ValueError,
            "row_statistics must have queries 'text' or 'last'; got 'first' from 'mass'",
        ),
    ],
)
def test_statistics_that_are_none(statistics, error, message):
    with pytest.raises(error, match=message):
        check_row_statistics(statistics)
    call = call_of("image")
    with pytest.raises(error, match=message):
        row_statistics(call, lse_of(call), statistics, "torch", differentiable=False)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ([True], TypeError, "keys must be a bool tensor or None; got list"),
        (torch.ones(1, 13), TypeError, "keys must be bool; got torch.float32"),
        (torch.ones(1, 1, 13, dtype=torch.bool), ValueError, r"keys must have shape .*; got \(1, 1, 13\)"),
    ],
)
def test_keys_that_are_no_mask(keys, error, message):
    with pytest.raises(error, match=message):
        Mass(keys)
    mass = Mass()
    with pytest.raises(error, match=message):
        mass.keys = keys


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(1, 13), (2, 14), (13,), (26,)], ids=str)
def test_keys_that_do_not_fit(shape, backend):
    call = call_of("image two_images", dtype=torch.float32)
    lse, mass = lse_of(call), Mass(torch.ones(shape, dtype=torch.bool), name="box")
    with pytest.raises(ValueError, match=r"keys of 'box' must have shape \(2, at most 13\); got"):
        row_statistics(call, lse, (mass,), backend, differentiable=False)
    if shape != (26,):
        with pytest.raises(ValueError, match=r"keys of 'box' must have shape \(26,\); got"):
            row_statistics(*packed(call, lse), (mass,), backend, differentiable=False)


def returning(value) -> RowStatistic:
    class Given(RowStatistic):
        name = "given"

        def __call__(self, rows):
            return value(rows)

    return Given()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda rows: 1.0, TypeError, "row statistic 'given' must return a floating point tensor; got float"),
        (lambda rows: rows.keys, TypeError, "must return a floating point tensor; got torch.int64"),
        (lambda rows: rows.p, ValueError, r"must return shape \(2, 5\), \(heads, queries\); got \(2, 5, 7\)"),
        (lambda rows: rows.p.sum((-1, -2)), ValueError, r"must return shape \(2, 5\)"),
    ],
)
def test_results_that_are_none(value, error, message):
    call, statistic = call_of("image"), returning(value)
    with pytest.raises(error, match=message):
        row_statistics(call, lse_of(call), (statistic,), "torch", differentiable=False)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_parameters_of_a_statistic_would_get_no_gradient(differentiable):
    gain = torch.nn.Parameter(torch.ones(()).double())
    call, statistic = call_of("image"), returning(lambda rows: rows.p.sum(-1) * gain)
    call.q.requires_grad_()
    with pytest.raises(TypeError, match="'given' must have no parameters of its own"):
        row_statistics(call, lse_of(call), (statistic,), "torch", differentiable=differentiable)
    lse = lse_of(call)
    f = lambda q: row_statistics(
        dataclasses.replace(call, q=q), lse, (statistic,), "torch", differentiable=differentiable
    )
    with pytest.raises(TypeError, match="'given' must have no parameters of its own"):
        torch.compile(f, backend="aot_eager")(call.q)
    with torch.no_grad():
        sums = row_statistics(call, lse, (statistic,), "torch", differentiable=differentiable)
    assert torch.equal(sums, row_statistics(call, lse_of(call), (Mass(),), "torch", differentiable=False))


def test_calls_that_have_no_rows():
    call = call_of("image")
    lse = lse_of(call)
    with pytest.raises(ValueError, match="row_statistics must be asked of a call with roles"):
        row_statistics(dataclasses.replace(call, roles=None), lse, (Mass(),), "torch", differentiable=False)
    for wrong in (lse[..., :-1], lse.transpose(1, 2), lse.float()):
        with pytest.raises(ValueError, match=r"lse must be torch.float64 of shape \(1, 4, 13\); got"):
            row_statistics(call, wrong, (Mass(),), "torch", differentiable=False)
    with pytest.raises(TypeError, match=r"abstract class Nothing .*__call__"):
        row_statistics(call, lse, (type("Nothing", (RowStatistic,), {"name": "x"})(),), "torch", differentiable=False)


def test_a_statistic_that_is_gone_is_named():
    arguments = operator_arguments("dense")
    operator_arguments.held = None
    gc.collect()
    with pytest.raises(RuntimeError, match=r"row statistic 'Mass \d+' is gone"):
        torch.ops.sar_fast.row_statistics(*arguments, "torch", False)
