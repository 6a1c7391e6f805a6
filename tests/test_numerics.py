"""Numbers at the edges of their format: near-ties, cancellation, overflow, NaN (docs/method.md, section 5)."""

from __future__ import annotations

import pytest
import torch

from sar_fast import SARState, flash_attn_with_kvcache, sar_attn_func, sar_attn_with_kvcache
from sar_fast.reference import sar_attention_reference
from sar_fast.weighting import SoftmaxOverHeads, Statistics
from tests.helpers import max_error, relative_error

BACKENDS = ("torch", "composed")
pytestmark = pytest.mark.usefixtures("one_thread")


def picture_and_text(S=60, V=40, H=4, Hkv=2, D=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, S, h, D, generator=g).to(dtype) for h in (H, Hkv, Hkv))
    visual = torch.arange(S)[None] < V
    return q, k, v, visual, ~visual, visual / V


def in_double(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("protect", [True, False])
def test_gradient_of_standardised_heads_that_nearly_agree(protect):
    """Two standardised numbers are 1 and -1 whatever they were: the gradient is 0, 1 / std must not magnify noise."""
    sav = 0.1 + 1e-4 * torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
    grad_c = torch.tensor([[300.0, -200.0]]).expand(1000, 2)
    rule = SoftmaxOverHeads(0.5, protect, "standardize")
    grad, _ = rule.vjp(grad_c, Statistics(sav, torch.ones(1000, 2), torch.ones(1000)))
    allowed = 300 * torch.finfo(torch.float32).eps / (sav - sav.mean(-1, keepdim=True)).abs().amax(-1)
    assert (grad.abs().amax(-1) <= 8 * allowed).all()


@pytest.mark.parametrize("beta", [1e-3, 0.02, 1.0])
@pytest.mark.parametrize("normalize", ["none", "standardize"])
def test_gradient_of_weights_that_saturate(normalize, beta):
    """The largest weight may be all but 1: its gradient is what the others' leave."""
    sav = torch.rand(200, 6, generator=torch.Generator().manual_seed(0))
    grad_c = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    rule = SoftmaxOverHeads(beta, True, normalize)
    leaf = sav.double().requires_grad_()
    c = rule(Statistics(leaf, torch.ones(200, 6, dtype=torch.float64), torch.ones(200)))
    (exact,) = torch.autograd.grad(c, leaf, grad_c.double())
    got, _ = rule.vjp(grad_c, Statistics(sav, torch.ones(200, 6), torch.ones(200)))
    std = sav.std(-1, correction=0) if normalize == "standardize" else 1.0
    rounding = (
        8 * torch.finfo(torch.float32).eps * (1 + 1 / (beta * std))
    )  # of SAV / (std beta), which is exponentiated
    ok = (got.double() - exact).abs().amax(-1) <= rounding * exact.abs().amax(-1) + 1e-12
    assert ok.all(), f"{(~ok).sum()} of 200 rows"


@pytest.mark.parametrize("normalize", ["none", "standardize"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_temperatures_that_overflow_leave_one_head(backend, normalize):
    call = picture_and_text()
    for beta in (1e-45, 1e-40, 1e-30):
        out, stats = sar_attn_func(*call, beta=beta, normalize=normalize, backend=backend, return_stats=True)
        _, expected = sar_attention_reference(*in_double(call), beta=beta, normalize=normalize, return_stats=True)
        assert out.isfinite().all()
        assert torch.equal(stats.head_weights, expected.head_weights.float())
        assert sorted(stats.head_weights[0].unique().tolist()) == [0.0, 4.0]


@pytest.mark.parametrize("spread", [10, 300, 3000, 10_000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_variance_where_products_of_the_closed_form_cancel(backend, spread):
    """Keys vary most in a direction that the queries do not look in; more keys than dimensions."""
    q, k, v, *roles = picture_and_text(S=400, V=300, D=32)
    g = torch.Generator().manual_seed(1)
    direction = torch.nn.functional.normalize(torch.randn(32, generator=g), dim=0)
    k = k + spread * torch.randn(1, 400, 2, 1, generator=g) * direction
    q = q - (q @ direction)[..., None] * direction
    _, stats = sar_attn_func(q, k, v, *roles, backend=backend, return_stats=True)
    _, exact = sar_attention_reference(*in_double((q, k, v, *roles)), return_stats=True)
    assert (stats.alignment_variance > 0).all()
    error = relative_error(stats.alignment_variance, exact.alignment_variance)
    _, eager = sar_attention_reference(q, k, v, *roles, return_stats=True)
    allowed = max(1e-3, 3 * relative_error(eager.alignment_variance, exact.alignment_variance))
    assert error <= allowed, f"relative error {error:.1e}, eager {allowed:.1e}"


def test_reference_keeps_nan_to_the_rows_that_see_it():
    """In a query outside T, in a key that padding hides and in one that no text query sees."""
    q, k, v, visual, text, prior = picture_and_text(dtype=torch.float64)
    _, expected = sar_attention_reference(q, k, v, visual, text, prior, return_stats=True)
    q[0, 3] = torch.nan
    out, stats = sar_attention_reference(q, k, v, visual, text, prior, return_stats=True)
    assert torch.equal(stats.head_weights, expected.head_weights)
    assert out[0, 3].isnan().all()
    assert not out[0, 4:].isnan().any()
    q[0, 3] = 0
    k[0, 50] = torch.nan
    padding = torch.arange(60)[None] != 50
    _, stats = sar_attention_reference(q, k, v, visual, text, prior, key_padding_mask=padding, return_stats=True)
    assert not stats.head_weights.isnan().any()


def test_reference_of_half_precision_has_gradients():
    """The division by std must not overflow where AV and SA are halves."""
    for seed in range(5):
        call = picture_and_text(dtype=torch.float16, seed=seed)
        leaves = [t.requires_grad_() for t in call[:3]]
        options = {"beta": 0.5, "normalize": "standardize", "sav_grad": True}
        out = sar_attention_reference(*leaves, *call[3:], **options)
        out.backward(torch.randn_like(out))
        assert all(t.grad.isfinite().all() for t in leaves)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_keeps_no_graph(backend, paged):
    """New keys come from a layer with weights; a cache that remembered them would grow a graph with every step."""
    q, k, v, visual, _, prior = picture_and_text(S=8, V=4)
    caches = [torch.zeros(1, 8, 2, 16), torch.zeros(1, 8, 2, 16)]
    table = torch.zeros(1, 1, dtype=torch.int32) if paged else None
    new = [t[:, :1].clone().requires_grad_() for t in (k, v)]
    out = flash_attn_with_kvcache(q[:, :1], *caches, *new, cache_seqlens=5, block_table=table, backend=backend)
    assert not out.requires_grad
    roles = {"visual_mask": visual, "prior": prior, "state": SARState.empty(1, 4), "block_table": table}
    out = sar_attn_with_kvcache(q[:, :1], *caches, *new, cache_seqlens=6, **roles, backend=backend)
    assert not out.requires_grad
    assert not any(cache.requires_grad for cache in caches)
    assert max_error(caches[0][0, 6], new[0][0, 0]) == 0


def test_decode_compiles_in_one_graph():
    q, k, v, visual, _, prior = picture_and_text(S=8, V=4)
    state = SARState.from_means(*torch.rand(3, 1, 4), torch.ones(1))

    def step(q, k_cache, v_cache, k, v):
        return sar_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=5, visual_mask=visual, prior=prior, state=state, decode="step"
        )

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    caches = [t.clone() for t in (k, v, k, v)]
    with torch.no_grad():
        got = compiled(q[:, :1], *caches[:2], k[:, :1], v[:, :1])
        assert torch.equal(got, step(q[:, :1], *caches[2:], k[:, :1], v[:, :1]))
    assert torch.equal(caches[0], caches[2])
