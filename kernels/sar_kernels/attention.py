"""The functions that the rest of the world calls: torch tensors in, torch tensors out.

Tensors are in FlashAttention's layout. Dense: q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, DV), masks (B, S).
Packed: q (T, H, D), k (Tk, Hkv, D), v (Tk, Hkv, DV), masks (T,) or (Tk,), with cu_seqlens int32 (num_seqs + 1,) and the
longest sequence's length. q, k, v and dout may be strided in any way if the last dimension is dense.

Nothing here waits for the GPU.
"""

from __future__ import annotations

import torch

from sar_kernels.call import AttentionOptions, Call, WeightOptions
from sar_kernels.dense.beside import attention_statistics, scale_heads, statistics_backward, unscale_heads
from sar_kernels.dense.plan import (
    Through,
    plan_attention_forward,
    plan_backward,
    plan_sar_forward,
)
from sar_kernels.launch import run_all
from sar_kernels.masks import NO_MASKS, Masks, pack_mask

__all__ = [
    "AttentionOptions",
    "Masks",
    "WeightOptions",
    "attention_backward",
    "attention_forward",
    "attention_statistics",
    "pack_mask",
    "sar_backward",
    "sar_forward",
    "scale_heads",
    "statistics_backward",
    "unscale_heads",
]


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    options: AttentionOptions,
    masks: Masks = NO_MASKS,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flash attention.

    Args:
        q, k, v: the module's layouts; H must be a multiple of Hkv (grouped queries), DV may differ from D.
        options: mask, scale and soft cap. Causal masks and windows are aligned bottom-right when Sq != Sk.
        masks: padding, runs of keys and masks of bits: what the options' window does not say.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: packed sequences; all or none.

    Returns:
        out with q's layout and v's head dim, in q's dtype, and lse, fp32 (B, H, Sq) or (H, T), natural logarithm.
        A query that sees no key gets out = 0 and lse = -inf.

    Raises:
        ValueError: naming the argument, what came and what is needed.
    """
    call = Call(q, k, v, options, masks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    outputs, launches = plan_attention_forward(call)
    run_all(launches)
    return outputs


def sar_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visual_mask: torch.Tensor,
    text_mask: torch.Tensor,
    prior: torch.Tensor,
    *,
    options: AttentionOptions,
    weights: WeightOptions,
    masks: Masks = NO_MASKS,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Attention whose heads are re-weighted by how sharply and how meaningfully they look at the visual keys.

    Args:
        visual_mask: bool, per key. text_mask: bool, per query.
        prior: floating point, per key; read at visual keys only.
        weights: temperature, protected head and normalisation.
        The others as in `attention_forward`.

    Returns:
        (out_scaled, lse, av, sa, c, count): as in `attention_forward`, then fp32 (B, H) alignment variance, semantic
        alignment and head weights, and fp32 (B,) number of text queries that counted. A sample with count 0 has c = 1
        and plain attention's output, bit for bit.

    Raises:
        ValueError: naming the argument, what came and what is needed.
    """
    call = Call(q, k, v, options, masks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    outputs, launches = plan_sar_forward(call, visual_mask, text_mask, prior, weights)
    run_all(launches)
    return outputs


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    options: AttentionOptions,
    masks: Masks = NO_MASKS,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attention_forward`; deterministic.

    Args:
        dout: the gradient of out, with its shape and dtype, any strides.
        out, lse: what the forward returned.
        The others as given to the forward.

    Returns:
        (dq, dk, dv), contiguous, in the inputs' shapes and dtype.
    """
    call = Call(q, k, v, options, masks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    (dq, dk, dv, _), launches = plan_backward(call, dout, out, lse)
    run_all(launches)
    return dq, dk, dv


def sar_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out_scaled: torch.Tensor,
    lse: torch.Tensor,
    visual_mask: torch.Tensor,
    text_mask: torch.Tensor,
    prior: torch.Tensor,
    av: torch.Tensor,
    sa: torch.Tensor,
    c: torch.Tensor,
    count: torch.Tensor,
    *,
    options: AttentionOptions,
    weights: WeightOptions,
    sav_grad: bool,
    dav: torch.Tensor | None = None,
    dsa: torch.Tensor | None = None,
    dc: torch.Tensor | None = None,
    masks: Masks = NO_MASKS,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `sar_forward`; deterministic.

    Args:
        dout: the gradient of out_scaled, with its shape and dtype, any strides.
        out_scaled, lse, av, sa, c, count: what the forward returned.
        sav_grad: False takes c for a constant and costs what plain attention's backward costs. True is exact.
        dav, dsa, dc: gradients of av, sa and c themselves, (B, H) each; need sav_grad.
        The others as given to the forward.

    Returns:
        (dq, dk, dv, dprior), contiguous; dprior has prior's shape in fp32, None without sav_grad.
    """
    if not sav_grad and any(g is not None for g in (dav, dsa, dc)):
        raise ValueError("dav, dsa, dc: got a gradient, need sav_grad=True for it to be used")
    call = Call(q, k, v, options, masks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    through = None
    if sav_grad:
        through = Through(visual_mask, text_mask, prior, weights, av, sa, count, dav, dsa, dc)
    (dq, dk, dv, dprior), launches = plan_backward(call, dout, out_scaled, lse, c, through)
    run_all(launches)
    return dq, dk, dv, None if dprior is None else dprior.sum(0)
