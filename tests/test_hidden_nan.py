"""What a mask hides need not be finite, and what it does not hide must show: outputs, statistics and gradients.

Hidden by padding, a dense mask, a window that no query reaches, another sequence's or sample's share, a cache's length:
nothing of it shows anywhere, on any backend. Hidden from some queries only (the causal edge, a window): it shows in the
queries that see it and in no other; in the gradients too. There the kernels of a GPU take values as zero times what
they are, as every flash kernel does (docs/method.md, section 5), so those tests are for the PyTorch backends.
"""

from __future__ import annotations

import math

import pytest
import torch

from sar_fast import (
    SARState,
    flash_attn_func,
    flash_attn_with_kvcache,
    sar_attn_func,
    sar_attn_varlen_func,
    sar_attn_with_kvcache,
)
from sar_fast.reference import sar_attention_reference
from tests.helpers import STATISTICS, make_case

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("reference", "torch", "composed", pytest.param("triton", marks=pytest.mark.slow))
S = 40
every_backend = pytest.mark.parametrize("backend", BACKENDS)
exact_backend = pytest.mark.parametrize("backend", BACKENDS[:3])
bad_values = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
through_weights = pytest.mark.parametrize("sav_grad", [False, True], ids=["constant", "sav_grad"])
NAMES = ("q", "k", "v", "visual", "text", "prior")


def case(queries=S, padding="none", **options) -> dict:
    made = make_case(queries, S, D=16, Dv=8, padding=padding, **options)
    return dict(zip(NAMES, made.tensors)), made.options


def run(tensors: dict, options: dict, backend: str, sav_grad: bool = False) -> dict[str, torch.Tensor]:
    """Output, statistics and gradients."""
    leaves = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    call = {**options, "sav_grad": sav_grad, "return_stats": True}
    if backend == "reference":
        out, stats = sar_attention_reference(*leaves.values(), **call)
    else:
        out, stats = sar_attn_func(*leaves.values(), **call, backend=backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    wanted = [n for n in ("q", "k", "v", "prior") if sav_grad or n != "prior"]
    gradients = torch.autograd.grad(out, [leaves[n] for n in wanted], grad)
    results = {"out": out, "lse": stats.lse, **{n: getattr(stats, n) for n in STATISTICS}}
    return {n: t.detach() for n, t in {**results, **{f"d{n}": g for n, g in zip(wanted, gradients)}}.items()}


def spoil(tensors: dict, bad: float, where: dict[str, tuple]) -> dict:
    """Copies with ``bad`` at the given places."""
    spoiled = {n: t.clone() for n, t in tensors.items()}
    for name, index in where.items():
        spoiled[name][index] = bad
    return spoiled


def assert_same(got: dict, expected: dict, rows: torch.Tensor | slice = slice(None)) -> None:
    """Everything, or of what belongs to queries some of them; dk and dv then mix queries and are left out."""
    for name, want in expected.items():
        have = got[name]
        if rows != slice(None):
            if name in ("dk", "dv", "dprior"):
                continue
            if name in ("out", "dq"):
                have, want = have[:, rows], want[:, rows]
            elif name == "lse":
                have, want = have[..., rows], want[..., rows]
        largest = want[want.isfinite()].abs().max() if want.isfinite().any() else 1.0
        message = lambda text, name=name: f"{name}: {text}"
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5 * max(1.0, float(largest)), msg=message)


@pytest.mark.everyday(bad=[math.nan])
@pytest.mark.everyday(padding=["left"], queries=[3])
@every_backend
@bad_values
@through_weights
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("queries", [S, 3])
def test_keys_and_values_behind_padding(padding, queries, backend, bad, sav_grad):
    tensors, options = case(queries, padding)
    hidden = (~options["key_padding_mask"],)
    for visual in (False, True):
        tensors["visual"] = tensors["visual"] | (~options["key_padding_mask"] & visual)
        expected = run(spoil(tensors, 0.0, {"k": hidden, "v": hidden}), options, backend, sav_grad)
        got = run(spoil(tensors, bad, {"k": hidden, "v": hidden}), options, backend, sav_grad)
        assert_same(got, expected)


@every_backend
@bad_values
@through_weights
def test_queries_that_see_nothing(backend, bad, sav_grad):
    """The rows of left padding, with their keys and values."""
    tensors, options = case(padding="left")
    dead = (~options["key_padding_mask"],)
    expected = run(spoil(tensors, 0.0, dict.fromkeys("qkv", dead)), options, backend, sav_grad)
    assert_same(run(spoil(tensors, bad, dict.fromkeys("qkv", dead)), options, backend, sav_grad), expected)


def test_padding_in_the_kernels():
    """The slow cases in one: keys and values of left padding, and the queries that see nothing."""
    made = make_case(16, D=16, Dv=8, H=2, Hkv=1, padding="left", layouts=("image", "two_images"))
    tensors, dead = dict(zip(NAMES, made.tensors)), (~made.options["key_padding_mask"],)
    expected = run(spoil(tensors, 0.0, dict.fromkeys("qkv", dead)), made.options, "triton", sav_grad=True)
    assert_same(
        run(spoil(tensors, math.nan, dict.fromkeys("qkv", dead)), made.options, "triton", sav_grad=True), expected
    )


@every_backend
@bad_values
def test_a_query_spoils_its_own_row_alone(backend, bad):
    tensors, options = case(padding="right")
    tensors["text"][:, -6:] = False
    expected = run(tensors, options, backend)
    got = run(spoil(tensors, bad, {"q": (slice(None), S - 5)}), options, backend)
    rest = torch.arange(S) != S - 5
    assert_same(got, expected, rest)
    assert not got["out"][:, S - 5].isfinite().any()


@every_backend
@bad_values
@pytest.mark.parametrize("what", ["k", "v"])
def test_behind_the_causal_edge(backend, bad, what):
    """One kv head's key 30: text queries come before it. Queries from 30 on see it, whose heads' output shows it."""
    tensors, options = case(layouts=("image", "image"))
    tensors["text"][:, 30:] = False
    tensors["visual"][:, 30] = True
    if backend == "triton" and what == "v":
        pytest.skip("as in other flash kernels")
    expected = run(tensors, options, backend)
    got = run(spoil(tensors, bad, {what: (slice(None), 30, 1)}), options, backend)
    if backend == "triton":
        del got["dq"], expected["dq"]
    assert_same(got, expected, slice(0, 30))
    rows = got["out"][:, 30:]
    assert_same({"out": rows[:, :, :2]}, {"out": expected["out"][:, 30:, :2]})
    seen = rows[:, :, 2:] if what == "v" or math.isnan(bad) else rows[:, :1, 2:]
    assert not seen.isfinite().all(-1).any() or (what == "k" and not math.isnan(bad))


@exact_backend
@bad_values
@through_weights
@pytest.mark.parametrize("queries", [6, 1])
def test_a_window_that_no_query_reaches(queries, backend, bad, sav_grad):
    tensors, options = case(queries, layouts=("image", "two_images"), window_size=(28, -1))
    hidden = (slice(None), slice(0, S - queries - 28))
    expected = run(spoil(tensors, 0.0, {"k": hidden, "v": hidden}), options, backend, sav_grad)
    assert_same(run(spoil(tensors, bad, {"k": hidden, "v": hidden}), options, backend, sav_grad), expected)


@exact_backend
@bad_values
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_window_that_some_queries_reach(softcap, backend, bad):
    if backend == "composed" and softcap:
        pytest.skip("has no soft-cap")
    tensors, options = case(layouts=("image", "image"), window_size=(9, -1), softcap=softcap)
    tensors["visual"][:, 3] = True
    where = {"k": (slice(None), 3), "v": (slice(None), 3)}
    expected = run(tensors, options, backend)
    got = run(spoil(tensors, bad, where), options, backend)
    assert_same(got, expected, slice(13, None))
    assert not got["out"][:, 3:13].isfinite().all(-1).any()


@exact_backend
@bad_values
@through_weights
def test_behind_a_dense_mask(backend, bad, sav_grad):
    if backend == "composed":
        pytest.skip("has no dense mask")
    tensors, options = case(layouts=("image", "two_images"))
    options["attn_mask"] = torch.ones(1, 1, S, S, dtype=torch.bool)
    options["attn_mask"][..., [6, 31]] = False
    where = dict.fromkeys(("k", "v"), (slice(None), [6, 31]))
    expected = run(spoil(tensors, 0.0, where), options, backend, sav_grad)
    assert_same(run(spoil(tensors, bad, where), options, backend, sav_grad), expected)


@every_backend
@bad_values
@through_weights
def test_another_sample(backend, bad, sav_grad):
    tensors, options = case()
    expected = run(tensors, options, backend, sav_grad)
    got = run(spoil(tensors, bad, dict.fromkeys("qkv", (1, slice(5, 9)))), options, backend, sav_grad)
    rest = [0, 2]
    assert_same(*({n: t[rest] for n, t in result.items()} for result in (got, expected)))


@every_backend
@bad_values
@pytest.mark.parametrize("padding", ["none", "left"])
def test_what_is_seen_shows(backend, bad, padding):
    """In a key, a value and a query: never silently dropped."""
    tensors, options = case(padding=padding)
    for name in "qkv":
        got = run(spoil(tensors, bad, {name: (slice(None), 20)}), options, backend)
        assert not got["out"][:, 20].isfinite().all(-1).any()
        if name != "q" and (name == "v" or math.isnan(bad)):
            assert not got["out"][:, 20:].isfinite().all(-1).any()
        if math.isnan(bad) and name != "v":
            assert got["lse"][..., 20].isnan().all()


@every_backend
def test_a_key_that_text_sees_spoils_the_statistics(backend):
    tensors, options = case(layouts=("image",))
    got = run(spoil(tensors, math.nan, {"k": (slice(None), 10)}), options, backend, sav_grad=True)
    assert all(got[n].isnan().all() for n in STATISTICS)
    other = run(spoil(tensors, math.nan, {"k": (slice(None), 0)}), options, backend, sav_grad=True)
    assert other["semantic_alignment"].isnan().all()


@every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_prior_is_checked_wherever_it_is(backend, bad):
    tensors, options = case(padding="left")
    tensors["prior"][:, 0] = bad
    function = sar_attention_reference if backend == "reference" else sar_attn_func
    options |= {} if backend == "reference" else {"backend": backend}
    with pytest.raises(ValueError, match="prior must be finite and non-negative"):
        function(*tensors.values(), **options)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@bad_values
@through_weights
def test_another_packed_sequence(backend, bad, sav_grad):
    tensors, options = case()
    ends = torch.arange(0, 4 * S, S, dtype=torch.int32)

    def packed(tensors):
        leaves = [t.detach().flatten(0, 1).requires_grad_(t.is_floating_point()) for t in tensors.values()]
        out, stats = sar_attn_varlen_func(
            *leaves[:3], ends, ends, S, S, *leaves[3:], **options, sav_grad=sav_grad, backend=backend, return_stats=True
        )
        gradients = torch.autograd.grad(out.square().sum(), leaves[:3])
        parts = {n: t.detach().unflatten(0, (3, S)) for n, t in zip(("out", "dq", "dk", "dv"), (out, *gradients))}
        return {**parts, **{n: getattr(stats, n) for n in STATISTICS}}

    expected, got = packed(tensors), packed(spoil(tensors, bad, dict.fromkeys("qkv", (1, slice(5, 9)))))
    assert_same(*({n: t[[0, 2]] for n, t in result.items()} for result in (got, expected)))


@pytest.mark.everyday(bad=[math.nan])
@pytest.mark.everyday(decode=["running"], queries=[4])
@pytest.mark.parametrize("backend", BACKENDS[1:])
@bad_values
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("decode", ["running", "step", "prompt"])
def test_slots_that_a_cache_has_not_filled(decode, queries, paged, bad, backend):
    """And pages that no sample uses; a NaN among the filled ones shows in its sample alone."""
    tensors, _ = case(queries)
    q, k, v, visual, _, prior = tensors.values()
    lengths = torch.tensor([30, 17, 40], dtype=torch.int32)
    table = torch.arange(15, dtype=torch.int32).view(3, 5) if paged else None

    def step(fill, seen=0.0):
        caches = [t.clone().masked_fill((torch.arange(S) >= lengths[:, None])[..., None, None], fill) for t in (k, v)]
        caches[0][1, 16] += seen
        if paged:
            unused = torch.full((1, 8, 1, 1), fill)
            caches = [torch.cat([t.view(15, 8, *t.shape[2:]), unused.expand(1, 8, *t.shape[2:])]) for t in caches]
        state = SARState.from_means(torch.rand(3, 4), torch.rand(3, 4), torch.ones(3, 4), torch.ones(3))
        call = {"cache_seqlens": lengths, "block_table": table, "backend": backend}
        out, stats = sar_attn_with_kvcache(
            q, *caches, **call, visual_mask=visual, prior=prior, state=state, decode=decode, return_stats=True
        )
        plain, lse = flash_attn_with_kvcache(q, *caches, **call, causal=True, return_softmax_lse=True)
        statistics = {n: getattr(stats, n) for n in STATISTICS}
        return {"out": out, "plain": plain, "lse": lse, "sar_lse": stats.lse, **statistics}

    torch.manual_seed(3)
    expected = step(0.0)
    torch.manual_seed(3)
    assert_same(step(bad), expected)
    torch.manual_seed(3)
    got = step(bad, seen=math.nan)
    assert_same(*({n: t[[0, 2]] for n, t in result.items()} for result in (got, expected)))
    for name in ("out", "plain"):
        assert got[name][1, -1].isnan().all()
    for name in ("lse", "sar_lse"):
        assert got[name][1, :, -1].isnan().all()


@bad_values
@through_weights
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padding_where_results_are_not_looked_at(padding, bad, sav_grad, monkeypatch):
    """As on a GPU, where that would wait for it."""
    monkeypatch.setattr("sar_fast.backends.host_loop._is_looked_at", lambda seq: False)
    tensors, options = case(padding=padding)
    hidden = (~options["key_padding_mask"],)
    where = dict.fromkeys("qkv" if padding == "left" else "kv", hidden)
    expected = run(spoil(tensors, 0.0, where), options, "torch", sav_grad)
    assert_same(run(spoil(tensors, bad, where), options, "torch", sav_grad), expected)


@pytest.mark.parametrize("backend", ["torch", "composed"])
def test_plain_attention_looks_at_its_result_alone(backend, monkeypatch):
    """What is finite costs no look at the inputs, and no copy of them."""
    from sar_fast.backends.sequence import Sequence

    def fail(self):
        raise AssertionError("looked")

    monkeypatch.setattr(Sequence, "marked", fail)
    tensors, options = case(padding="left")
    run(tensors, options, backend, sav_grad=True)
    flash_attn_func(*(tensors[n] for n in "qkv"), causal=True, backend=backend)
