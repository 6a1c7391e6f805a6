"""The public functions with backend="triton": the operators, autograd and compile paths around the kernels."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FP64, INTERPRETED, assert_same
from torch.utils._python_dispatch import TorchDispatchMode

import sar_fast
from sar_fast import (
    SARState,
    Visibility,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    sar_attn_func,
    sar_attn_varlen_func,
    sar_attn_with_kvcache,
)
from sar_fast.method.visibility import as_mask, query_positions
from sar_fast.reference import sar_attention_reference

TRITON = {"backend": "triton"}
EXACT = torch.float64 if FP64 else torch.float32
CLOSE = {} if FP64 else {"rtol": 1e-4, "atol": 1e-5}


def inputs(B=2, S=19, H=4, Hkv=2, D=16, dtype=EXACT):
    tensors = [torch.randn(B, S, h, D, dtype=dtype) for h in (H, Hkv, Hkv)]
    visual = torch.zeros(B, S, dtype=torch.bool)
    visual[0, 2:9] = True  # row 1 is text only
    text = torch.zeros(B, S, dtype=torch.bool)
    text[0, 9:] = True
    prior = torch.rand(B, S, dtype=dtype) * visual
    return *tensors, visual, text, prior / prior.sum(-1, keepdim=True).clamp_min(1e-9)


def leaves(case):
    return [t.clone().requires_grad_() if t.is_floating_point() else t for t in case]


@pytest.mark.parametrize("sav_grad", [False, True])
def test_output_statistics_and_gradients_equal_the_reference(sav_grad):
    case = inputs()
    ours, reference = leaves(case), leaves(case)
    options = {"beta": 0.05, "sav_grad": sav_grad, "return_stats": True}
    out, stats = sar_attn_func(*ours, **options, **TRITON)
    want, expected = sar_attention_reference(*reference, **options)
    grad = torch.randn_like(want)
    out.backward(grad)
    want.backward(grad)
    assert stats.backend == "triton"
    torch.testing.assert_close(out, want, **CLOSE)
    for name in ("lse", "alignment_variance", "semantic_alignment", "sav", "head_weights", "query_count"):
        torch.testing.assert_close(
            getattr(stats, name), getattr(expected, name).float(), rtol=1e-5 if FP64 else 1e-3, atol=1e-6
        )
    for a, b in zip(ours[:3], reference[:3]):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)
    if sav_grad:
        torch.testing.assert_close(ours[5].grad, reference[5].grad, **CLOSE)


def test_packed_equals_dense():
    q, k, v, visual, text, prior = case = inputs(dtype=torch.float32)
    want = sar_attn_func(*case, **TRITON)
    cu = torch.tensor([0, 19, 38], dtype=torch.int32)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    roles = [t.flatten() for t in (visual, text, prior)]
    got = sar_attn_varlen_func(*flat, cu, cu, 19, 19, *roles, **TRITON)
    torch.testing.assert_close(got.view_as(want), want, **CLOSE)
    plain = flash_attn_varlen_func(*flat, cu, cu, 19, 19, causal=True, **TRITON)
    assert_same(plain.view_as(want)[1], want[1])


def test_plain_attention_and_its_log_sum_exp():
    q, k, v, *_ = inputs()
    out, lse, probabilities = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, **TRITON)
    want, expected, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, backend="torch")
    assert probabilities is None
    torch.testing.assert_close(out, want, **CLOSE)
    torch.testing.assert_close(lse, expected, **CLOSE)


@pytest.mark.parametrize("carried", [False, True])
def test_few_queries_run_the_decode_kernels(carried, monkeypatch):
    from sar_fast.attention import ops
    from sar_fast.backends import triton
    from sar_fast.backends.select import BACKENDS
    from sar_fast.method.values import Call, Roles, Scores, Sums
    from sar_fast.weighting import SoftmaxOverHeads

    q, k, v, visual, text, prior = inputs(S=40, dtype=torch.float32)
    call = Call(q[:, -2:], k, v, Scores(0.25), Roles(visual, text[:, -2:], prior))
    before = Sums(torch.rand(2, 4), torch.rand(2, 4), torch.tensor([3.0, 0.0])) if carried else None
    call.carried = before
    kept = [t.clone() for t in before[:3]] if carried else []
    called = []
    decode = triton._decode
    monkeypatch.setattr(triton, "_decode", lambda *a: called.append(1) or decode(*a))
    results = {
        backend: ops.attention(call, SoftmaxOverHeads(beta=0.05), BACKENDS[backend], need_lse=True)
        for backend in ("torch", "triton")
    }
    assert called
    assert (results["triton"].sums is not None) == carried
    for got, want in zip(results["triton"], results["torch"]):
        if want is not None:
            torch.testing.assert_close(got[:3], want[:3], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(kept, before or []))


@pytest.mark.parametrize("rule", ["softmax", "equal", "python"])
def test_many_queries_go_on_from_carried_sums(rule):
    from sar_fast.attention import ops
    from sar_fast.backends.select import BACKENDS
    from sar_fast.method.values import Call, Roles, Scores, Sums
    from sar_fast.weighting import Equal, SoftmaxOverHeads

    q, k, v, visual, text, prior = inputs(S=40, dtype=torch.float32)
    sums = Sums(torch.rand(2, 4), torch.rand(2, 4), torch.tensor([3.0, 0.0]))
    call = Call(q[:, -20:], k, v, Scores(0.25), Roles(visual, text[:, -20:], prior), carried=sums)
    weighting = {"softmax": SoftmaxOverHeads(0.05), "equal": Equal(), "python": lambda s, layer: 1 + s.sav}[rule]
    got, want = (ops.attention(call, weighting, BACKENDS[name], need_lse=True) for name in ("triton", "torch"))
    parts = lambda x: (x.out, x.lse, x.c, *x.statistics, *x.sums[:3])
    for a, b in zip(parts(got), parts(want)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="values on a GPU are not waited for")
def test_values_that_the_host_can_read_are_checked():
    q, k, v, visual, _, prior = inputs(dtype=torch.float32)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    for ends in ([0, 19, 37], [1, 19, 38], [0, 25, 20, 38], [0, 19, 39]):
        cu = torch.tensor(ends, dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0 to the packed length 38"):
            flash_attn_varlen_func(*flat, cu, cu, 38, 38, **TRITON)
    cu = torch.tensor([0, 19, 38], dtype=torch.int32)
    with pytest.raises(ValueError, match="max_seqlen_q must be at least the longest sequence, 19; got 18"):
        flash_attn_varlen_func(*flat, cu, cu, 18, 19, **TRITON)
    caches, state = (k.clone(), v.clone()), SARState.empty(2, 4)
    new = k[:, :1] + 1, v[:, :1] + 1
    roles = {"visual_mask": visual, "prior": prior, "state": state, **TRITON}
    with pytest.raises(ValueError, match="prior must be finite and non-negative"):
        sar_attn_with_kvcache(q[:, :1], *caches, *new, cache_seqlens=9, **{**roles, "prior": -prior})
    table = torch.tensor([[0], [2]], dtype=torch.int32)
    for function, arguments in ((sar_attn_with_kvcache, roles), (flash_attn_with_kvcache, TRITON)):
        with pytest.raises(ValueError, match=r"block_table\[1\] must hold pages between 0 and 1; got \[2\]"):
            function(q[:, :1], *caches, *new, cache_seqlens=9, block_table=table, **arguments)
    assert torch.equal(caches[0], k)
    assert not state.count.any()


def test_text_only_row_is_plain_bit_for_bit():
    case = inputs(dtype=torch.float32)
    plain = flash_attn_func(*case[:3], causal=True, **TRITON)
    assert torch.equal(sar_attn_func(*case, beta=0.01, **TRITON)[1], plain[1])


def test_cached_decode_continues_the_sums():
    q, k, v, visual, text, prior = inputs(dtype=torch.float32)
    want = {}
    for backend in ("torch", "triton"):
        _, stats = sar_attn_func(
            q[:, :16],
            k[:, :16],
            v[:, :16],
            visual[:, :16],
            text[:, :16],
            prior[:, :16],
            return_stats=True,
            backend=backend,
        )
        state = SARState.from_stats(stats)
        steps = [
            sar_fast.sar_attn_with_kvcache(
                q[:, i : i + 1],
                k,
                v,
                cache_seqlens=i + 1,
                visual_mask=visual,
                prior=prior,
                state=state,
                backend=backend,
            )
            for i in range(16, 19)
        ]
        want[backend] = torch.cat(steps, 1), state.count
    torch.testing.assert_close(want["triton"][0], want["torch"][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(want["triton"][1], want["torch"][1])


@pytest.mark.everyday(dynamic=[True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic):
    torch._dynamo.reset()
    case = inputs(dtype=torch.float32)
    compiled = torch.compile(
        lambda *a: sar_attn_func(*a, beta=0.05, **TRITON), backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    torch.testing.assert_close(compiled(*case), sar_attn_func(*case, beta=0.05, **TRITON))


def test_operator_checks():
    q, k, v, visual, text, prior = inputs(B=1, S=7, H=2, Hkv=1)
    flat = (0.25, True, -1, -1, 0.0, 0.5, True, "none", "triton")
    forward = torch.ops.sar_fast.attention_forward
    arguments = (q, k, v, visual, text, prior, *[None] * 6)
    torch.library.opcheck(forward.default, (*arguments, *flat, True))
    continued, sums = torch.ops.sar_fast.attention_continued, (torch.rand(1, 2), torch.rand(1, 2), torch.rand(1))
    torch.library.opcheck(continued.default, (*arguments, *sums, *flat, True))
    one = (q[:, -1:], k, v, visual, text[:, -1:], prior, *[None] * 6)  # on the decode kernels
    torch.library.opcheck(continued.default, (*one, *sums, *flat, True))


def test_what_the_kernels_lack_names_the_backend_to_use():
    q = torch.randn(1, 5, 2, 16).to(torch.bfloat16 if INTERPRETED else torch.float64)
    marks = torch.zeros(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"backend must be .*'torch' here; got 'triton', .*: the kernels take .*float"):
        sar_attn_func(q, q, q, marks, marks, torch.zeros(1, 5), **TRITON)


MASK = torch.rand(1, 1, 19, 19, generator=torch.Generator().manual_seed(0)) < 0.7
REAL = torch.arange(19).expand(2, -1) >= torch.tensor([[0], [3]])
PATTERNS = {
    "chunks": {"visibility": Visibility(chunk=7)},
    "prefix": {"visibility": Visibility(prefix=torch.tensor([9, 4]))},
    "blocks in a window": {
        "visibility": Visibility(blocks=torch.tensor([-1] * 2 + [0] * 7 + [-1] * 10)),
        "window_size": (5, -1),
        "key_padding_mask": REAL,
    },
    "mask": {"attn_mask": MASK},
    "mask and padding": {"attn_mask": MASK, "causal": False, "key_padding_mask": REAL},
    "padding": {"key_padding_mask": REAL},
}


def as_matrix(pattern: dict, Sq: int) -> dict:
    """A pattern's options with its visibility as an ``attn_mask`` of the last ``Sq`` queries, for the oracle."""
    options = dict(pattern)
    visibility, mask = options.pop("visibility", None), options.pop("attn_mask", None)
    if visibility is not None:
        how = {"causal": options.pop("causal", True), "window": options.pop("window_size", (-1, -1))}
        bounds = visibility.bounds(
            query_positions(Sq, 19, REAL.device), 19, **how, real=options.get("key_padding_mask")
        )
        options |= {"causal": False, "attn_mask": as_mask(bounds, 19, (2, Sq))}
    if mask is not None:
        options["attn_mask"] = mask[:, :, -Sq:]
    return options


@pytest.mark.everyday(Sq=[19], name=["chunks", "blocks in a window", "mask and padding"])
@pytest.mark.everyday(Sq=[2], name=["prefix", "blocks in a window", "mask"])
@pytest.mark.parametrize("Sq", [19, 2], ids=["prompt", "step"])
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_equals_the_reference(name, Sq):
    q, k, v, visual, text, prior = inputs(H=2, Hkv=1)
    case = (q[:, -Sq:], k, v, visual, text[:, -Sq:], prior)
    ours, reference = leaves(case), leaves(case)
    options, pattern = {"beta": 0.05, "sav_grad": True, "return_stats": True}, dict(PATTERNS[name])
    if "attn_mask" in pattern:
        pattern["attn_mask"] = MASK[:, :, -Sq:]
    out, stats = sar_attn_func(*ours, **options, **pattern, **TRITON)
    want, expected = sar_attention_reference(*reference, **options, **as_matrix(PATTERNS[name], Sq))
    grad = torch.randn_like(want)
    out.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(out, want, **CLOSE)
    for field in ("lse", "alignment_variance", "semantic_alignment", "head_weights", "query_count"):
        theirs = getattr(expected, field).float()
        torch.testing.assert_close(getattr(stats, field).float(), theirs, rtol=1e-3, atol=1e-6)
    for a, b in zip((ours[0], ours[1], ours[2], ours[5]), (reference[0], reference[1], reference[2], reference[5])):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("lengths", [12, torch.tensor([12, 9], dtype=torch.int32)], ids=["int", "tensor"])
def test_a_cache_with_chunks(backend, lengths):
    """As the whole sequence at once, in the modes that count the new queries alone."""
    q, k, v, visual, _, prior = inputs(dtype=torch.float32)
    cache = [torch.zeros(2, 24, 2, 16) for _ in range(2)]
    for kept, x in zip(cache, (k, v)):
        kept[:, :19] = x
    pad = lambda x: torch.nn.functional.pad(x, (0, 5))
    pattern, starts = Visibility(chunk=5), [12, 12] if isinstance(lengths, int) else lengths.tolist()
    roles = {"visual_mask": pad(visual), "prior": pad(prior)}
    out = sar_attn_with_kvcache(
        q[:, :2], *cache, q.new_ones(2, 2, 2, 16), q.new_ones(2, 2, 2, 16), cache_seqlens=lengths, **roles, state=None,
        decode="step", beta=0.05, visibility=pattern, backend=backend,
    )  # fmt: skip
    for b, start in enumerate(starts):
        one = [x[b : b + 1, : start + 2] for x in (*cache, visual, prior)]
        text = torch.ones(1, 2, dtype=torch.bool)
        want = sar_attn_func(
            q[b : b + 1, :2], *one[:2], one[2], text, one[3], beta=0.05, visibility=pattern, backend="torch"
        )
        torch.testing.assert_close(out[b : b + 1], want, rtol=1e-4, atol=1e-5)


# The others compile no other code.
@pytest.mark.everyday(name=["mask and padding"])
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_compile_without_a_break(name):
    torch._dynamo.reset()
    case = inputs(H=2, Hkv=1, dtype=torch.float32)
    options = {"beta": 0.05, **PATTERNS[name], **TRITON}
    compiled = torch.compile(lambda *a: sar_attn_func(*a, **options), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*case), sar_attn_func(*case, **options))
    torch._dynamo.reset()


def test_a_dense_mask_is_packed_once_for_all_layers(monkeypatch):
    from sar_kernels import masks

    packed, pack = [], masks.pack_mask
    monkeypatch.setattr(masks, "pack_mask", lambda mask: packed.append(mask) or pack(mask))
    case, mask = inputs(dtype=torch.float32), MASK.clone()
    first = sar_attn_func(*case, attn_mask=mask, **TRITON)
    assert torch.equal(sar_attn_func(*case, attn_mask=mask, **TRITON), first)
    assert len(packed) == 1
    mask[:] = True  # what was known of it is not true any more
    assert not torch.equal(sar_attn_func(*case, attn_mask=mask, **TRITON), first)
    assert len(packed) == 2


def test_a_captured_graph_reads_its_mask_itself(monkeypatch):
    """A replay reads what the mask then holds, so that nothing packed before may stand for it."""
    from sar_kernels import masks

    case, mask = inputs(dtype=torch.float32), MASK.clone()
    sar_attn_func(*case, attn_mask=mask, **TRITON)
    packed, pack = [], masks.pack_mask
    monkeypatch.setattr(masks, "pack_mask", lambda mask: packed.append(mask) or pack(mask))
    monkeypatch.setattr("sar_fast.backends.kernel_calls.capturing", lambda: True)
    for calls in (1, 2):
        sar_attn_func(*case, attn_mask=mask, **TRITON)
        assert len(packed) == calls


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"backend must be 'composed' or 'torch' here; got 'triton', .*cpu tensors"):
        sar_attn_func(*(t.cpu() for t in inputs(dtype=torch.float32)), **TRITON)


class KernelsOfOperators(TorchDispatchMode):
    """Names of the operators that launch a kernel on a GPU: not views, nor memory alone."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "empty_strided", "new_empty", "empty_like"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["plain", "running", "step"])
def test_a_decode_step_is_two_launches(kind, monkeypatch, poisoned_allocations):
    """Re-weighted or plain, and no operator beside them: the kernels find lengths, old sums and new ones themselves."""
    from sar_fast.backends.select import BACKENDS
    from sar_fast.method.values import Call, Roles, Scores, Sums
    from sar_fast.weighting import Equal, SoftmaxOverHeads
    from sar_kernels.decode import call as decode_call

    q, k, v, visual, text, prior = inputs(S=40, dtype=torch.float32)
    roles = None if kind == "plain" else Roles(visual, text[:, -1:], prior)
    carried = Sums(torch.rand(2, 4), torch.rand(2, 4), torch.tensor([3.0, 0.0])) if kind == "running" else None
    call = Call(q[:, -1:], k, v, Scores(0.25), roles, carried=carried)
    launched = []
    monkeypatch.setattr(decode_call, "run_all", launched.extend)
    monkeypatch.setattr(torch, "empty", poisoned_allocations)  # filling would count
    with KernelsOfOperators() as operators:
        BACKENDS["triton"].forward(call, Equal() if kind == "plain" else SoftmaxOverHeads(0.05), need_lse=False)
    assert [launch.kernel.__name__ for launch in launched] == ["decode_split_kernel", "decode_combine_kernel"]
    assert operators.names == []
