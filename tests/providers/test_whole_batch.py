"""Backend "composed" as it runs on a GPU, whole, on a CPU: stand-ins for the libraries, interpreted kernels."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sar_fast import flash_attn_func, sar_attn_func, sar_attn_varlen_func
from sar_fast.backends import batched, kernel_calls, select, triton
from sar_fast.backends.select import BACKENDS, BY_NAME
from sar_fast.method.values import Call, Roles, Scores, Sums
from sar_fast.reference import sar_attention_reference
from sar_fast.weighting import Equal, Fixed, SoftmaxOverHeads
from sar_kernels.launch import Launch
from tests.helpers import assert_forward, assert_gradients, make_case, max_error
from tests.providers import libraries

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = tuple(libraries.PROVIDERS)


@pytest.fixture(autouse=True, scope="module")
def _operators():
    library = libraries.operator_library()
    yield
    library._destroy()


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    libraries.install(monkeypatch)
    monkeypatch.setattr(select, "PROVIDERS", dict(select.PROVIDERS))
    before = dict(BY_NAME)
    for provider in libraries.PROVIDERS.values():
        select.register_provider(provider)
    yield
    BY_NAME.clear()
    BY_NAME.update(before)


def name_of(kind: str) -> str:
    return f"composed:test-{kind}"


def small(Sq: int = 21, Sk: int | None = None, **given):
    return make_case(Sq, Sk, **{"D": 16, "dtype": torch.float64, **given})


SHAPES = {
    "base": {},
    "odd head dim": {"D": 12},
    "values narrower": {"D": 16, "Dv": 8},
    "not causal": {"causal": False, "Sq": 9},
    "one query, more keys": {"Sq": 1, "causal": False, "Sk": 20},
}
OTHER_LENGTHS = {
    "more keys": {"Sq": 20, "Sk": 33},
    "more queries": {"Sq": 33, "Sk": 21},
    "window": {"window_size": (6, 2)},
}
CASES = [(kind, name) for kind in ALL for name in SHAPES] + [
    (kind, name) for kind in ALL if kind != "cudnn" for name in OTHER_LENGTHS
]


def made(name: str):
    given = {**SHAPES, **OTHER_LENGTHS}[name]
    if "window_size" in given:
        given = {"causal": False, **given}
    return small(given.get("Sq", 21), **{n: x for n, x in given.items() if n != "Sq"})


# What is done with shapes is the same code whatever the library: one of them has more than one every day.
@pytest.mark.everyday(kind=["torch"])
@pytest.mark.everyday(name=["base"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_forward(kind, name):
    assert_forward(made(name), name_of(kind))


@pytest.mark.everyday(kind=["torch"], name=["odd head dim", "more queries", "window"])
@pytest.mark.everyday(name=["base"])
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n in CASES if n != "one query, more keys"])
def test_backward(kind, name):
    for sav_grad in (True, False) if name == "base" else (True,):  # which contains the other
        assert_gradients(made(name), name_of(kind), sav_grad=sav_grad)


slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
OTHER_PADDING = (("left", True), ("right", True), ("right", False), ("holes", False))


@pytest.mark.parametrize(
    ("padding", "causal"),
    [("left", False), ("holes", True), *(slow(*values) for values in OTHER_PADDING)],
)
def test_padding(padding, causal, poisoned):
    case = small(padding=padding, causal=causal)
    assert_forward(case, name_of("torch"))
    assert_gradients(case, name_of("torch"), sav_grad=True)


@pytest.mark.everyday(Sq=[13])
@pytest.mark.parametrize(("Sq", "Sk"), [(13, 21), (21, 13)])
def test_padding_with_other_keys_than_queries(Sq, Sk):
    case = small(Sq, Sk, padding="left")
    assert_forward(case, name_of("fa2"))
    assert_gradients(case, name_of("fa2"), sav_grad=True)


def test_what_padding_hides_need_not_be_finite():
    case = small(padding="right")
    clean, _ = case.run(name_of("torch"))
    hidden = ~case.options["key_padding_mask"][..., None, None]
    dirty = dataclasses.replace(case, k=case.k.masked_fill(hidden, torch.nan), v=case.v.masked_fill(hidden, torch.nan))
    assert max_error(dirty.run(name_of("torch"))[0], clean) == 0


@pytest.mark.everyday(kind=["fa3"])
@pytest.mark.parametrize("kind", [k for k in ALL if k != "cudnn"])
def test_packed(kind, poisoned):
    lengths, rows = (21, 0, 1, 17), []
    for i, n in enumerate(lengths):
        rows.append(make_case(n, D=16, dtype=torch.float64, layouts=("image",), seed=i))
    joined = [torch.cat([getattr(r, n)[0] for r in rows]) for n in ("q", "k", "v", "visual", "text", "prior")]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in joined]
    out, stats = sar_attn_varlen_func(
        *leaves[:3], cu, cu, 21, 21, *leaves[3:], beta=0.1, sav_grad=True, backend=name_of(kind), return_stats=True
    )
    grad = torch.randn_like(out)
    out.backward(grad)
    assert stats.backend == name_of(kind)
    start = 0
    for n, row in zip(lengths, rows):
        alone = row.leaves()
        if n:
            want = sar_attention_reference(*alone.tensors, beta=0.1, sav_grad=True)
            want.backward(grad[start : start + n][None])
            assert max_error(out[start : start + n], want[0]) < 1e-6
            for got, name in zip((leaves[0], leaves[1], leaves[2], leaves[5]), ("q", "k", "v", "prior")):
                assert max_error(got.grad[start : start + n], getattr(alone, name).grad[0]) < 1e-5, name
        start += n


def test_plain_attention_and_other_rules():
    case = small()
    plain, lse, _ = flash_attn_func(
        case.q, case.k, case.v, causal=True, return_attn_probs=True, backend=name_of("cudnn")
    )
    want, want_lse, _ = flash_attn_func(case.q, case.k, case.v, causal=True, return_attn_probs=True, backend="torch")
    assert max_error(plain, want) < 1e-9
    assert max_error(lse, want_lse) < 1e-5
    for rule in (
        Equal(),
        Fixed(torch.linspace(-1, 2, 4, dtype=torch.float64)),
        SoftmaxOverHeads(0.1, normalize="standardize"),
    ):
        got = sar_attn_func(*case.tensors, weighting=rule, backend=name_of("cudnn"))
        assert max_error(got, sar_attn_func(*case.tensors, weighting=rule, backend="torch")) < 1e-6


def test_means_go_on_from_earlier_queries():
    case, rule = small(), SoftmaxOverHeads(0.1)
    sums = Sums(torch.rand(3, 4), torch.rand(3, 4), torch.tensor([3.0, 0.0, 5.0]))
    call = Call(case.q, case.k, case.v, Scores(0.25), Roles(case.visual, case.text, case.prior), carried=sums)
    got, want = (BY_NAME[n].forward(call, rule, need_lse=False) for n in (name_of("fa3"), "torch"))
    assert max_error(got.out, want.out) < 1e-6
    for ours, theirs in zip(got.sums[:3], want.sums[:3]):
        assert max_error(ours, theirs) < 1e-6


@pytest.mark.everyday(kind=["fa2"])
@pytest.mark.parametrize("kind", [k for k in ALL if k != "cudnn"])
def test_packed_queries_that_see_no_key(kind):
    randn = lambda n, heads: torch.randn(n, heads, 16, dtype=torch.float64)
    q, k, v, grad = (randn(n, 4) for n in (16, 10, 10, 16))
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 9, 12, 16], [0, 5, 5, 10]))
    visual, text = torch.arange(10) < 8, torch.ones(16, dtype=torch.bool)
    prior = torch.rand(10, dtype=torch.float64) * visual
    found = []
    for backend in (name_of(kind), "torch"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        given = (*leaves, cu_q, cu_k, 9, 5, visual, text, prior)
        out, stats = sar_attn_varlen_func(*given, beta=0.1, sav_grad=True, backend=backend, return_stats=True)
        out.backward(grad)
        found.append((out, stats.lse, *(x.grad for x in leaves)))
    for ours, theirs in zip(*found):
        assert max_error(ours, theirs) < 1e-5


@pytest.mark.everyday(name=["base", "more keys"])
@pytest.mark.parametrize("name", ["base", "values narrower", "more keys", "more queries", "window"])
def test_statistics_from_pytorch_where_triton_is_missing(name, monkeypatch):
    for module in (kernel_calls, triton):
        monkeypatch.setattr(module, "missing", lambda: "the Triton kernels")
    monkeypatch.setattr(batched, "_BLOCK_BYTES", 4 * 3 * 4 * 33 * 16)  # several blocks of rows
    monkeypatch.setattr(Launch, "run", None)  # no kernel runs
    assert_forward(made(name), name_of("fa2"))
    for sav_grad in (False, True):
        assert_gradients(made(name), name_of("fa2"), sav_grad=sav_grad)
    test_means_go_on_from_earlier_queries()
    assert_forward(small(44), name_of("fa2"))  # 17 text queries: one is alone in the last block
    with pytest.raises(ValueError, match="does not support the Triton kernels"):
        small(padding="left").run(name_of("fa2"))


def test_compiled_whole():
    case = small(layouts=("image",)).leaves()
    run = lambda q: sar_attn_func(q * 1.5, *case.tensors[1:], beta=0.1, backend=name_of("torch"))
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(case.q)
    assert max_error(got, run(case.q)) < 1e-12


class Waits(TorchDispatchMode):
    """Raises where a GPU would be waited for."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in self.NAMES or by_mask or repeats:
            raise AssertionError(f"{name} waits")
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits(monkeypatch):
    """Beside kernels and libraries, which run on the device."""

    def elsewhere(run):
        def quiet(*args, **kwargs):
            with _disable_current_modes():
                return run(*args, **kwargs)

        return quiet

    monkeypatch.setattr(Launch, "run", elsewhere(Launch.run))
    for name in ("batch", "batch_backward", "check_longest"):
        monkeypatch.setattr(libraries, name, elsewhere(getattr(libraries, name)))
    with Waits():
        yield


@pytest.mark.parametrize(
    ("kind", "padding"),
    [
        *(("torch", "left"), ("cudnn", "none")),
        *(slow(kind, "none") for kind in ("torch", "fa2", "fa3", "fa4")),
        *(slow(kind, "left") for kind in ("fa2", "fa3", "fa4")),
    ],
)
def test_nothing_waits_for_the_gpu(kind, padding, monkeypatch):
    case, backend, rule = small(padding=padding), BY_NAME[name_of(kind)], SoftmaxOverHeads(0.1)
    roles = Roles(case.visual, case.text, case.prior)
    call = Call(case.q, case.k, case.v, Scores(0.25), roles, case.options.get("key_padding_mask"))
    grad = torch.randn(3, 21, 4, 16, dtype=torch.float64)
    with nothing_waits(monkeypatch):
        result = backend.forward(call, rule, need_lse=True)
        through = (torch.ones_like(result.c),) * 3
        backend.backward(call, rule, grad, result, None)
        backend.backward(call, rule, grad, result, through)
    with pytest.raises(AssertionError, match="waits"), nothing_waits(monkeypatch):
        BACKENDS["torch"].forward(call, rule, need_lse=True)  # which loops on the host


@pytest.mark.parametrize("name", libraries.OPERATORS)
def test_stand_ins_have_the_operators_schemas(name):
    ours, theirs = libraries.parameters_of(name)
    assert ours == theirs[: len(ours)]  # a newer PyTorch may have more


def test_a_layout_of_lse_that_is_not_known_is_an_error(monkeypatch):
    monkeypatch.setattr(libraries.two, "flash_attn_func", lambda q, *a, **k: (q, torch.zeros(3, 21, 4), None))
    with pytest.raises(RuntimeError, match="test-fa2: got a log-sum-exp"):
        small().run(name_of("fa2"))
