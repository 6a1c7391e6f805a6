"""Stand-ins for the libraries whose attention backend "composed" takes: the real operators' and functions' signatures,
plain PyTorch on a CPU inside, and what the real ones ask of their inputs as assertions.

What a library leaves unwritten is NaN here, and a query without keys has lse = +inf, as FlashAttention-2 leaves it.
"""

from __future__ import annotations

import dataclasses
import inspect
import types

import torch
from torch import Tensor

from sar_fast.backends.providers import packages
from sar_fast.backends.providers.aten import CuDNN, TorchFlash
from sar_fast.backends.providers.packages import FlashAttention2, FlashAttention3, FlashAttention4
from sar_fast.backends.providers.protocol import Limits

OPERATORS = (
    "_flash_attention_forward",
    "_flash_attention_backward",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_cudnn_attention_backward",
)


@dataclasses.dataclass(frozen=True)
class OnCPU(Limits):
    """Limits without those of a GPU's generation and dtypes, so that stand-ins can be exact."""

    def refuse(self, request):
        gpu = types.SimpleNamespace(**{f.name: getattr(request, f.name) for f in dataclasses.fields(request)})
        gpu.arch, gpu.dtype = self.archs[0], torch.bfloat16
        return super().refuse(gpu)


LIMITS = OnCPU(("sm_9",), window=True)


def on_cpu(kind: type, *args):
    """A provider of a kind that says to be there."""
    return type(kind.__name__, (kind,), {"missing": lambda self: None})(*args)


def install(monkeypatch) -> None:
    """The packages as modules, for as long as the fixture lasts."""
    modules = {"two": two, "three": three, "four": four}
    monkeypatch.setattr(packages, "_imported", modules.__getitem__)


class CuDNNOnCPU(CuDNN):
    limits = OnCPU(("sm_9",), head_dim=128, equal_head_dims=False, causal="square", packed=False)

    def missing(self):
        return None


PROVIDERS = {
    "torch": on_cpu(TorchFlash, "test-torch", "FA2", LIMITS),
    "cudnn": type("CuDNN", (CuDNNOnCPU,), {"name": "test-cudnn"})(),
    "fa2": on_cpu(FlashAttention2, "test-fa2", "two", LIMITS),
    "fa3": on_cpu(FlashAttention3, "test-fa3", "three", LIMITS),
    "fa4": on_cpu(FlashAttention4, "test-fa4", "four", dataclasses.replace(LIMITS, equal_head_dims=False)),
}


# --- the mathematics -------------------------------------------------------------------------------------------------


def weights_of(q: Tensor, k: Tensor, scale: float, causal: bool, window: tuple[int, int]) -> Tensor:
    """Scores (H, Sq, Sk) of one sequence, -inf where a query does not see a key; aligned bottom-right."""
    assert all(x.stride(-1) == 1 for x in (q, k)), "the last dimension must be dense"
    assert q.shape[-1] % 8 == 0, "head dims must be multiples of 8"
    Sq, Sk, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    scores = scale * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1))
    distance = torch.arange(Sk) - (torch.arange(Sq)[:, None] + Sk - Sq)
    left, right = window[0], 0 if causal else window[1]
    hidden = (distance > right) if right >= 0 else torch.zeros_like(distance, dtype=torch.bool)
    hidden = hidden | (distance < -left) if left >= 0 else hidden
    return scores.masked_fill(hidden, -torch.inf)


def attend(q, k, v, scale, causal, window) -> tuple[Tensor, Tensor]:
    """out (Sq, H, Dv) and lse (H, Sq) of one sequence."""
    scores = weights_of(q, k, scale, causal, window)
    lse = scores.logsumexp(-1) if k.shape[0] else q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    dead = lse == -torch.inf
    p = torch.exp(scores - lse.masked_fill(dead, 0)[..., None])
    out = torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(q.shape[1] // v.shape[1], 1))
    return out, lse.masked_fill(dead, torch.inf)


def attend_backward(grad, q, k, v, out, lse, scale, causal, window) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from what the library is given, which need not be what it returned."""
    assert not (lse == -torch.inf).any(), "exp(s - lse) of a dead row"
    group = q.shape[1] // k.shape[1]
    p = torch.exp(weights_of(q, k, scale, causal, window) - lse[..., None])
    summed = lambda x: x.unflatten(1, (-1, group)).sum(2)
    dv = summed(torch.einsum("hqk,qhd->khd", p, grad))
    dp = torch.einsum("qhd,khd->hqk", grad, v.repeat_interleave(group, 1))
    ds = scale * p * (dp - (grad * out).sum(-1).T[..., None])
    dq = torch.einsum("hqk,khd->qhd", ds, k.repeat_interleave(group, 1))
    return dq, summed(torch.einsum("hqk,qhd->khd", ds, q)), dv


def _sequences(cu_q, cu_k, q, k):
    for x in (cu_q, cu_k):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    return [(slice(a, b), slice(c, d)) for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:])]


def batch(q, k, v, cu_q, cu_k, scale, causal, window) -> tuple[Tensor, Tensor]:
    """`attend` of a dense batch, or of packed sequences; what belongs to no sequence stays NaN."""
    if cu_q is None:
        outs, lses = zip(*(attend(*x, scale, causal, window) for x in zip(q, k, v)))
        return torch.stack(outs), torch.stack(lses)
    out, lse = torch.full((*q.shape[:-1], v.shape[-1]), torch.nan), torch.full((q.shape[1], q.shape[0]), torch.nan)
    out, lse = out.to(q.dtype), lse.to(q.dtype)
    for rows, keys in _sequences(cu_q, cu_k, q, k):
        out[rows], lse[:, rows] = attend(q[rows], k[keys], v[keys], scale, causal, window)
    return out, lse


def batch_backward(grad, q, k, v, out, lse, cu_q, cu_k, scale, causal, window) -> tuple[Tensor, Tensor, Tensor]:
    assert lse.is_contiguous()
    if cu_q is None:
        found = [attend_backward(*x, scale, causal, window) for x in zip(grad, q, k, v, out, lse)]
        return tuple(torch.stack(x) for x in zip(*found))
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    for rows, keys in _sequences(cu_q, cu_k, q, k):
        of = (grad[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows])
        dq[rows], dk[keys], dv[keys] = attend_backward(*of, scale, causal, window)
    return dq, dk, dv


# --- PyTorch's operators; parameters are named as their schemas name them ---------------------------------------------


def _flash_attention_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    check_longest(query, key, cum_seq_q, cum_seq_k, max_q, max_k)
    window = tuple(-1 if x is None else x for x in (window_size_left, window_size_right))
    out, lse = batch(query, key, value, cum_seq_q, cum_seq_k, scale, is_causal, window)
    unused = query.new_empty(0)
    return out, lse, torch.zeros(2, dtype=torch.uint64), unused.clone(), unused


def _flash_attention_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    check_longest(query, key, cum_seq_q, cum_seq_k, max_q, max_k)
    window = tuple(-1 if x is None else x for x in (window_size_left, window_size_right))
    given = (grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, scale, is_causal, window)
    return batch_backward(*given)


def check_longest(q, k, cu_q, cu_k, max_q, max_k) -> None:
    if cu_q is None:
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
    else:
        assert max_q >= cu_q.diff().max()
        assert max_k >= cu_k.diff().max()


def _scaled_dot_product_cudnn_attention(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
    scale=None,
):  # fmt: skip
    assert attn_bias is None
    assert compute_log_sumexp
    assert not is_causal or query.shape[2] == key.shape[2], "aligned top-left"
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = batch(q, k, v, None, None, scale, is_causal, (-1, -1))
    out = out.transpose(1, 2).contiguous()  # heads outside: as queries that are laid out so
    nothing = lambda: torch.zeros((), dtype=torch.int64)
    lengths = query.new_empty(0), query.new_empty(0), query.shape[2], key.shape[2]
    return out, lse[..., None], *lengths, nothing(), nothing(), query.new_empty(0)


def _scaled_dot_product_cudnn_attention_backward(
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q,
    max_k, dropout_p, is_causal, *, scale=None,
):  # fmt: skip
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    assert logsumexp.shape == (*query.shape[:3], 1)
    grad, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    grads = batch_backward(grad, q, k, v, o, logsumexp.squeeze(-1).contiguous(), None, None, scale, is_causal, (-1, -1))
    return tuple(g.transpose(1, 2).contiguous() for g in grads)


def operator_library() -> torch.library.Library:
    """The stand-ins as those operators' CPU kernels, which PyTorch has none of."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    for name in OPERATORS:
        library.impl(name, globals()[name])
    return library


def parameters_of(name: str) -> tuple[list[str], list[str]]:
    """(a stand-in's parameters, the real operator's)."""
    schema = getattr(torch.ops.aten, name).default._schema
    return list(inspect.signature(globals()[name]).parameters), [a.name for a in schema.arguments]


# --- packages; signatures as they are published ----------------------------------------------------------------------


def _fa2_forward(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert return_attn_probs
    return *batch(q, k, v, None, None, softmax_scale, causal, window_size), None


def _fa2_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert return_attn_probs
    check_longest(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return *batch(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size), None


def _fa2_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
    softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    window = (window_size_left, window_size_right)
    given = (dout, q, k, v, out, softmax_lse, None, None, softmax_scale, causal, window)
    _write((dq, dk, dv), batch_backward(*given))


def _fa2_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    zero_tensors=False,
):  # fmt: skip
    window = (window_size_left, window_size_right)
    given = (dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window)
    _write((dq, dk, dv), batch_backward(*given))


def _write(into, grads) -> None:
    for x, g in zip(into, grads):
        assert x.is_contiguous()
        x.copy_(g)


two = types.SimpleNamespace(
    flash_attn_func=_fa2_forward,
    flash_attn_varlen_func=_fa2_varlen_forward,
    _flash_attn_backward=_fa2_backward,
    _flash_attn_varlen_backward=_fa2_varlen_backward,
)


def _fa3_forward(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    assert return_attn_probs
    return batch(q, k, v, None, None, softmax_scale, causal, window_size)


def _fa3_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    assert return_attn_probs
    return batch(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size)


def _fa3_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
    max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
    window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    window = (window_size_left, window_size_right)
    given = (dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, is_causal, window)
    _write((dq, dk, dv), batch_backward(*given))


three = types.SimpleNamespace(
    flash_attn_func=_fa3_forward, flash_attn_varlen_func=_fa3_varlen_forward, _flash_attn_backward=_fa3_backward
)


def _fa4_forward(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, return_lse=False,
):  # fmt: skip
    assert return_lse
    return batch(q, k, v, None, None, softmax_scale, causal, _closed(window_size))


def _fa4_varlen_forward(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    return_lse=False,
):  # fmt: skip
    assert return_lse
    return batch(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, _closed(window_size))


def _fa4_backward(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None,
    seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
):  # fmt: skip
    window = _closed((window_size_left, window_size_right))
    return batch_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window)


def _closed(window) -> tuple[int, int]:
    assert all(x is None or x >= 0 for x in window), "None is open there"
    return tuple(-1 if x is None else x for x in window)


four = types.SimpleNamespace(
    flash_attn_func=_fa4_forward, flash_attn_varlen_func=_fa4_varlen_forward, _flash_attn_bwd=_fa4_backward
)
