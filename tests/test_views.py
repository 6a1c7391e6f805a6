"""Arguments that are views: expanded, transposed, every other entry of something wider. Same results as contiguous."""

from __future__ import annotations

import pytest
import torch

from sar_fast import (
    SARState,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    sar_attn_func,
    sar_attn_varlen_func,
    sar_attn_with_kvcache,
)
from tests.helpers import combinations, make_case

BACKENDS = ("torch", "composed", "triton")
pytestmark = pytest.mark.usefixtures("one_thread")
CAPACITY, PAGE = 24, 4


def every_other(t: torch.Tensor) -> torch.Tensor:
    """Every other entry of the last dimension of something wider, which holds other values in between."""
    return torch.stack([t, torch.zeros_like(t)], -1).flatten(-2)[..., ::2]


VIEWS = {
    "transposed": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "every other": every_other,
    "a slice": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}
# of the views, the interpreter takes one every day: a last dimension that is not dense
VIEWED = combinations(VIEWS, BACKENDS, daily=lambda view, backend: backend != "triton" or view == "every other")
views = pytest.mark.parametrize(("view", "backend"), VIEWED)


def close(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # another layout sums in another order


def dense_results(case, backend, sav_grad=True) -> list[torch.Tensor]:
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in case]
    out, stats = sar_attn_func(*leaves, beta=0.1, sav_grad=sav_grad, backend=backend, return_stats=True)
    grads = torch.autograd.grad(out.square().sum(), [leaves[i] for i in (0, 1, 2, 5)])
    return [out, stats.lse, stats.alignment_variance, stats.semantic_alignment, stats.head_weights, *grads]


@pytest.mark.everyday(queries=[3])
@pytest.mark.everyday(backend=["torch", "composed"])
@views
@pytest.mark.parametrize("queries", [20, 3])
def test_dense(view, queries, backend):
    case = make_case(queries, 20, D=16, Dv=8).tensors
    got = dense_results([VIEWS[view](t.detach()) for t in case], backend)
    close(got, dense_results([t.detach() for t in case], backend))


@pytest.mark.everyday(queries=[3])
@views
@pytest.mark.parametrize("queries", [20, 3])
@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
def test_masks_of_keys(name, view, queries, backend):
    case = make_case(queries, 20, D=16, padding="holes")
    mask = case.options["key_padding_mask"]
    if name == "attn_mask":
        if backend != "torch":
            pytest.skip("a dense mask is for the torch backend")
        mask = mask[:, None, None, :] & torch.rand(1, 1, queries, 20).gt(0.2)
    run = lambda mask: sar_attn_func(*case.tensors, beta=0.1, backend=backend, **{name: mask})
    close([run(VIEWS[view](mask))], [run(mask)])


PADDED = combinations(
    (False, True), (20, 3), BACKENDS, daily=lambda padded, n, name: name != "triton" or padded == (n == 3)
)


@pytest.mark.everyday(backend=["torch", "composed"])
@pytest.mark.everyday(queries=[3])
@pytest.mark.parametrize(("padded", "queries", "backend"), PADDED)
def test_one_row_for_all_samples(padded, queries, backend):
    """And one entry for all tokens."""
    q, k, v, visual, _, prior = make_case(queries, 20, D=16, layouts=("image",) * 3).tensors
    roles = visual[:1].expand(3, -1), torch.ones(1, 1, dtype=torch.bool).expand(3, queries), prior[:1].expand(3, -1)
    padding = torch.ones(1, 1, dtype=torch.bool).expand(3, 20) if padded else None
    expected_padding = padding.contiguous() if padded else None
    run = lambda roles, padding: sar_attn_func(q, k, v, *roles, key_padding_mask=padding, backend=backend)
    close([run(roles, padding)], [run([t.contiguous() for t in roles], expected_padding)])
    constant = torch.ones(3, 1).div(20).expand(3, 20)
    uniform = visual[:1].expand(3, -1), roles[1], constant
    close([run(uniform, padding)], [run([t.contiguous() for t in uniform], expected_padding)])


@views
def test_packed(view, backend):
    tensors = [t.flatten(0, 1).detach() for t in make_case(12, D=16).tensors]
    ends = torch.tensor([0, 12, 20, 36], dtype=torch.int32)

    def run(q, k, v, visual, text, prior, ends_q, ends_k):
        leaves = [t.requires_grad_() for t in (q, k, v)]
        packing = ends_q, ends_k, 16, 16
        out = sar_attn_varlen_func(*leaves, *packing, visual, text, prior, beta=0.1, backend=backend)
        plain = flash_attn_varlen_func(*leaves, *packing, causal=True, backend=backend)
        return [out, plain, *torch.autograd.grad((out + plain).square().sum(), leaves)]

    close(run(*(VIEWS[view](t) for t in (*tensors, ends, ends))), run(*tensors, ends, ends))
    with pytest.raises(TypeError, match=r"cu_seqlens_k must be int32; got torch\.int64"):
        run(*tensors, ends, ends.long())


WHAT = {"roles": "contiguous", "new": "paged", "lengths": "paged", "state": "contiguous"}  # every day on the kernels
IN_CACHE = combinations(
    WHAT, ("contiguous", "paged"), VIEWS, BACKENDS,
    daily=lambda what, layout, view, name: name != "triton" or (view == "every other" and layout == WHAT[what]),
)  # fmt: skip


@pytest.mark.everyday(what=["new", "state"])
@pytest.mark.everyday(backend=["torch", "composed"])
@pytest.mark.parametrize(("what", "layout", "view", "backend"), IN_CACHE)
def test_cache(what, layout, view, backend):
    paged = layout == "paged"

    def run(view):
        part = lambda name: view if what == name else (lambda t: t)
        q, k, v, visual, _, prior = (t.clone() for t in make_case(2, CAPACITY, D=16, layouts=("image",) * 3).tensors)
        new_k, new_v = k[:, :2].clone(), v[:, :2].clone()
        lengths, table = torch.tensor([15, 9, 20], dtype=torch.int32), None
        if paged:
            k, v = (t.view(-1, PAGE, *t.shape[2:]) for t in (k, v))
            table = part("lengths")(torch.arange(len(k), dtype=torch.int32).view(3, -1))
        g = torch.Generator().manual_seed(1)
        state = [torch.rand(3, 4, generator=g), torch.rand(3, 4, generator=g), torch.tensor([3.0, 0.0, 1.0])]
        state = SARState(*(part("state")(t) for t in (*state, torch.ones(3, 4))))
        cache = {"cache_seqlens": part("lengths")(lengths), "block_table": table, "backend": backend}
        q, new_k, new_v = (part("new")(t) for t in (q, new_k, new_v))
        roles = {"visual_mask": part("roles")(visual), "prior": part("roles")(prior)}
        roles["text_mask"] = part("roles")(torch.tensor([[True, True], [False, True], [True, False]]))
        out, stats = sar_attn_with_kvcache(
            q, k, v, new_k, new_v, **cache, **roles, state=state, beta=0.1, return_stats=True
        )
        plain = flash_attn_with_kvcache(q, k, v, new_k, new_v, **cache, causal=True)
        return [out, plain, stats.head_weights, *state.tensors(), k, v]

    close(run(VIEWS[view]), run(lambda t: t))


MODES = combinations(
    ("running", "step", "prompt"), BACKENDS, daily=lambda decode, backend: backend != "triton" or decode == "running"
)


@pytest.mark.parametrize(("decode", "backend"), MODES)
def test_one_row_for_all_samples_of_a_cache(decode, backend):
    q, k, v, visual, _, prior = make_case(2, CAPACITY, D=16, layouts=("image",) * 3).tensors
    text = torch.ones(1, 1, dtype=torch.bool).expand(3, 2)
    roles = {"visual_mask": visual[:1].expand(3, -1), "prior": prior[:1].expand(3, -1), "text_mask": text}

    def run(**roles):
        lengths = torch.tensor(20, dtype=torch.int32).expand(3)
        state = SARState.empty(3, 4)
        out = sar_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, state=state, decode=decode, backend=backend, **roles
        )
        return [out, *state.tensors()]

    close(run(**roles), run(**{name: t.contiguous() for name, t in roles.items()}))


@pytest.mark.parametrize(
    ("queries", "backend"), combinations((20, 3), BACKENDS, daily=lambda n, backend: backend != "triton" or n == 3)
)
def test_plain(queries, backend):
    q, k, v = (t.detach() for t in make_case(queries, 20, D=16).tensors[:3])
    run = lambda *qkv: flash_attn_func(*qkv, causal=True, backend=backend)
    for view in VIEWS.values():
        close([run(*map(view, (q, k, v)))], [run(q, k, v)])
    one = q[:, :, :1], k[:, :, :1], v[:, :, :1]
    heads = [t.expand(-1, -1, 2, -1) for t in one]
    close([run(*heads)], [run(*(t.contiguous() for t in heads))])
