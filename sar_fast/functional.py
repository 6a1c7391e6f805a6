"""SAR attention as functions, in FlashAttention's layout and with FlashAttention-2's conventions."""

from __future__ import annotations

import torch
from torch import Tensor

from sar_fast import ops, validation
from sar_fast.backends.select import choose_backend
from sar_fast.distributed import Shards
from sar_fast.types import AttentionOptions, SARStats


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, cast as scaled_dot_product_attention does: everything but fp64 to the autocast dtype."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _stats(lse: Tensor, av: Tensor, sa: Tensor, c: Tensor, count: Tensor, backend: str) -> SARStats:
    narrow = lambda t: t.to(torch.float32)
    return SARStats(narrow(lse), narrow(av), narrow(sa), narrow(av * sa), narrow(c), narrow(count), backend)


def sar_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visual_mask: Tensor,
    text_mask: Tensor,
    prior: Tensor,
    *,
    beta: float = 0.5,
    causal: bool = True,
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    protect_first_head: bool = True,
    normalize: str = "none",
    sav_grad: bool = False,
    backend: str = "auto",
    return_stats: bool = False,
    attn_mask: Tensor | None = None,
    shards: Shards | None = None,
) -> Tensor | tuple[Tensor, SARStats]:
    """Attention whose heads are re-weighted by Semantic Alignment Variance (docs/method.md).

    Args:
        q: (B, Sq, H, D) fp16, bf16, fp32 or fp64; D <= 256. Only the last dimension need be dense.
        k, v: (B, Sk, Hkv, D) and (B, Sk, Hkv, Dv), same dtype; H a multiple of Hkv, head h reads h // (H // Hkv).
        visual_mask: (B, Sk) bool, the visual keys V.
        text_mask: (B, Sq) bool, the text queries T.
        prior: (B, Sk) floating point, non-negative and finite; sums to 1 over V, ignored elsewhere.
        beta: temperature of the softmax over heads, > 0.
        causal: mask aligned bottom-right when Sq != Sk, as in FlashAttention.
        softmax_scale: default 1 / sqrt(D).
        key_padding_mask: (B, Sk) bool, True = real token.
        window_size: (left, right) keys that a query sees around its position; -1 = unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0 = off.
        protect_first_head: head 0 gets the largest weight.
        normalize: ``"none"`` or ``"standardize"`` (SAV standardised over heads before the softmax).
        sav_grad: gradients also flow through the weights, exactly; otherwise they are constants in backward.
        backend: ``"auto"``, ``"triton"``, ``"composed"`` or ``"torch"``; ``SAR_BACKEND`` replaces ``"auto"``.
        return_stats: also return the statistics.
        attn_mask: (B or 1, 1, Sq, Sk) bool, True = may be seen, for patterns that the options above cannot say.
        shards: q, k and v hold this rank's heads or queries only (:class:`~sar_fast.distributed.Shards`).

    Returns:
        out (B, Sq, H, Dv), or (out, :class:`SARStats`). A sample without counted text queries is plain attention,
        bit for bit. Queries that see no key give 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is needed. The Triton backend does not wait for a
            GPU to look at a prior's values: a bad one raises in a later call, and a negative one makes its sample's
            output NaN.
    """
    validation.check_qkv(q, k, v)
    validation.check_roles(visual_mask, text_mask, prior, q, k, key_padding_mask=key_padding_mask, attn_mask=attn_mask)
    sav_grad = validation.check_flag("sav_grad", sav_grad)
    return_stats = validation.check_flag("return_stats", return_stats)
    options = validation.make_options(
        q,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        beta=beta,
        protect_first_head=protect_first_head,
        normalize=normalize,
    )
    q, k, v = autocast_inputs(q, k, v)
    backend = choose_backend(
        backend, q.device, q.dtype, options, padded=key_padding_mask is not None, masked=attn_mask is not None
    )
    out, *stats = ops.attention(
        q,
        k,
        v,
        visual_mask,
        text_mask,
        prior,
        key_padding_mask=key_padding_mask,
        attn_mask=attn_mask,
        options=options,
        backend=backend,
        sav_grad=sav_grad,
        need_lse=return_stats,
        shards=shards,
    )
    return (out, _stats(*stats, backend)) if return_stats else out


def sar_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    visual_mask: Tensor,
    text_mask: Tensor,
    prior: Tensor,
    *,
    beta: float = 0.5,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    protect_first_head: bool = True,
    normalize: str = "none",
    sav_grad: bool = False,
    backend: str = "auto",
    return_stats: bool = False,
    shards: Shards | None = None,
) -> Tensor | tuple[Tensor, SARStats]:
    """:func:`sar_attn_func` on sequences packed without padding; statistics are per sequence.

    Args:
        q: (total_q, H, D). k, v: (total_k, Hkv, D) and (total_k, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (num_sequences + 1,) int32, where each sequence starts; the last is the total.
        max_seqlen_q, max_seqlen_k: longest sequence. A tensor on a GPU is waited for, as FlashAttention does.
        visual_mask, prior: (total_k,). text_mask: (total_q,).

    Returns:
        out (total_q, H, Dv), or (out, stats) with ``stats.lse`` (H, total_q) and the others (num_sequences, H).
    """
    validation.check_qkv(q, k, v, packed=True)
    total_q, total_k, device = q.shape[0], k.shape[0], q.device
    validation.check_mask("visual_mask", visual_mask, (total_k,), device)
    validation.check_mask("text_mask", text_mask, (total_q,), device)
    validation.check_prior(prior, (total_k,), device)
    sav_grad = validation.check_flag("sav_grad", sav_grad)
    return_stats = validation.check_flag("return_stats", return_stats)
    options = validation.make_options(
        q,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        beta=beta,
        protect_first_head=protect_first_head,
        normalize=normalize,
    )
    max_seqlens = check_packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, total_q, total_k, device)
    q, k, v = autocast_inputs(q, k, v)
    backend = choose_backend(backend, device, q.dtype, options, padded=False, masked=False)
    out, *stats = ops.attention(
        q,
        k,
        v,
        visual_mask,
        text_mask,
        prior,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlens=max_seqlens,
        options=options,
        backend=backend,
        sav_grad=sav_grad,
        need_lse=return_stats,
        shards=shards,
    )
    return (out, _stats(*stats, backend)) if return_stats else out


def check_packing(
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, total_q: int, total_k: int, device: torch.device
) -> tuple[int, int]:
    """Check a packed call's sequences; returns the two longest lengths as ints."""
    validation.check_cu_seqlens("cu_seqlens_q", cu_q, total_q, device)
    validation.check_cu_seqlens("cu_seqlens_k", cu_k, total_k, device)
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"cu_seqlens_k must describe as many sequences as cu_seqlens_q; got {cu_k.shape[0] - 1} and "
            f"{cu_q.shape[0] - 1}"
        )
    return validation.check_longest("max_seqlen_q", max_q), validation.check_longest("max_seqlen_k", max_k)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: AttentionOptions,
    backend: str = "auto",
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlens: tuple[int, int] = (0, 0),
    need_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same kernels with SAR off, on validated arguments: (out, lse)."""
    q, k, v = autocast_inputs(q, k, v)
    backend = choose_backend(
        backend,
        q.device,
        q.dtype,
        options,
        padded=key_padding_mask is not None,
        masked=attn_mask is not None,
        head_dim=max(q.shape[-1], v.shape[-1]),
    )
    out, lse, *_ = ops.attention(
        q,
        k,
        v,
        None,
        None,
        None,
        key_padding_mask=key_padding_mask,
        attn_mask=attn_mask,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlens=max_seqlens,
        options=options,
        backend=backend,
        need_lse=need_lse,
    )
    return out, lse
