"""FlashAttention-2's functions on this project's kernels, SAR off, under the same signatures.

What the kernels do not have (dropout, ALiBi) raises by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sar_fast.attention import flash_cache
from sar_fast.attention.decode_op import decode
from sar_fast.attention.functional import check_packing, plain_attention
from sar_fast.backends.protocol import Request
from sar_fast.backends.select import choose_backend
from sar_fast.base.errors import ArgumentError
from sar_fast.method import validation
from sar_fast.method.kvcache import Step, check_cache
from sar_fast.method.values import Call


def _check_options(dropout_p: float, alibi_slopes: Tensor | None, return_attn_probs: bool) -> bool:
    """``return_attn_probs`` as a bool; raise on what FlashAttention has and these kernels do not."""
    validation.check_dropout(dropout_p)
    _refuse_alibi(alibi_slopes)
    return validation.check_flag("return_attn_probs", return_attn_probs)


def _refuse_alibi(alibi_slopes: Tensor | None) -> None:
    if alibi_slopes is not None:
        kind = type(alibi_slopes).__name__
        raise ArgumentError("alibi_slopes", kind, "be None: these kernels do not support it")


def _parts(name: str, packed: Tensor, layout: str, parts: int) -> tuple[Tensor, ...]:
    """Views of q, k and v (or k and v) in one tensor, which lie side by side in its last dimension but two."""
    validation.check_rank(name, packed, layout)
    if packed.shape[-3] != parts:
        raise ArgumentError(name, f"shape {tuple(packed.shape)}", f"be {layout}")
    return packed.unbind(-3)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of q (B, Sq, H, D) over k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv); causal is aligned bottom-right.

    ``deterministic`` leaves the backwards of other libraries out; these kernels always are. ``return_attn_probs``
    returns (out, lse, None) with lse (B, H, Sq) fp32; the probabilities themselves never exist.
    """
    return_attn_probs = _check_options(dropout_p, alibi_slopes, return_attn_probs)
    validation.check_qkv(q, k, v)
    scores = validation.make_scores(
        q, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap
    )
    how = {"backend": backend, "need_lse": return_attn_probs, "deterministic": bool(deterministic)}
    out, lse = plain_attention(Call(q, k, v, scores), **how)
    return (out, lse.to(torch.float32), None) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """:func:`flash_attn_func` of q (B, Sq, H, D) over kv (B, Sk, 2, Hkv, D), of which no part is copied."""
    return flash_attn_func(
        q,
        *_parts("kv", kv, "(batch, seqlen, 2, heads, head_dim)", 2),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        backend=backend,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """:func:`flash_attn_func` of qkv (B, S, 3, H, D), of which no part is copied."""
    return flash_attn_func(
        *_parts("qkv", qkv, "(batch, seqlen, 3, heads, head_dim)", 3),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        backend=backend,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """:func:`flash_attn_func` on packed sequences, q (total_q, H, D); lse is (H, total_q) fp32.

    With ``block_table`` (sequences, pages) int32, k and v are pages (blocks, page, Hkv, D), any number of keys each.
    Where all sequences have ``max_seqlen_q`` queries and no gradient is wanted, pages are read where they are; else
    their keys are gathered first, for which a GPU is waited for.
    """
    return_attn_probs = _check_options(dropout_p, alibi_slopes, return_attn_probs)
    validation.check_qkv(q, k, v, packed=True, paged=block_table is not None)
    cu_seqlens = cu_seqlens_q, cu_seqlens_k
    max_seqlens = check_packing(*cu_seqlens, max_seqlen_q, max_seqlen_k, q.shape[0], k.shape[0], q.device)
    scores = validation.make_scores(
        q, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap
    )
    how = {"backend": backend, "need_lse": return_attn_probs}
    cache = None if block_table is None else flash_cache.paged(q, k, v, *cu_seqlens, max_seqlens, block_table)
    if cache is not None and flash_cache.is_step(q, cache, max_seqlens[0]):
        out, lse = flash_cache.packed_step(q, cache, scores, **how)
    else:
        k, v = (k, v) if cache is None else flash_cache.gathered(cache, cu_seqlens_k)
        call = Call(q, k, v, scores, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlens=max_seqlens)
        out, lse = plain_attention(call, **how, deterministic=bool(deterministic))
    return (out, lse.to(torch.float32), None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """:func:`flash_attn_varlen_func` of q (total_q, H, D) over kv (total_k, 2, Hkv, D)."""
    return flash_attn_varlen_func(
        q,
        *_parts("kv", kv, "(total, 2, heads, head_dim)", 2),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        backend=backend,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """:func:`flash_attn_varlen_func` of qkv (total, 3, H, D)."""
    return flash_attn_varlen_func(
        *_parts("qkv", qkv, "(total, 3, heads, head_dim)", 3),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        backend=backend,
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over a cache, which k and v, if given, extend in place.

    Args:
        q: (B, Sq, H, D). k, v: (B, Snew, Hkv, D) or None.
        k_cache, v_cache: (B or more, Smax, Hkv, D), or (blocks, page, Hkv, D) with ``block_table`` (B, pages) int32.
        rotary_cos, rotary_sin: (positions, R / 2) in q's dtype, R <= D: rotate k at the positions where it is written,
            and q at ``cache_seqlens`` and on; at ``cache_seqlens`` alone if it is neither causal nor has a window.
        cache_seqlens: int or (B,) int32, keys in the cache before this call; None = the cache is full.
        cache_batch_idx: (B,) int32, each sample's row of the cache; not with ``block_table``. None = its first rows.
        cache_leftpad: (B,) int32, keys before which a sample sees nothing; not with ``block_table``.
        rotary_interleaved: channels 0 and 1, 2 and 3, ... make a pair; else 0 and R / 2, 1 and R / 2 + 1, ...
        num_splits: accepted; the kernels choose.

    Returns:
        out (B, Sq, H, Dv), or (out, lse (B, H, Sq) fp32). As FlashAttention's, it has no backward. On a GPU the kernels
        read no value on the host: there lengths, rows, pages and positions that do not exist are the caller's to avoid.
    """
    return_softmax_lse = validation.check_flag("return_softmax_lse", return_softmax_lse)
    rotary_interleaved = validation.check_flag("rotary_interleaved", rotary_interleaved)
    _refuse_alibi(alibi_slopes)
    if block_table is None:
        k_cache, v_cache, block_table = flash_cache.sample_rows(q, k_cache, v_cache, cache_batch_idx)
    else:
        flash_cache.refuse_with_pages(cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad)
    cache = check_cache(q, k_cache, v_cache, k, v, cache_seqlens, block_table)
    scores = validation.make_scores(
        q, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap
    )
    step = Step(q, cache, scores)
    with torch.no_grad():
        if rotary_cos is not None or rotary_sin is not None:
            step = flash_cache.rotated(step, rotary_cos, rotary_sin, rotary_interleaved)
        if cache_leftpad is not None:
            step = flash_cache.left_padded(step, cache_leftpad)
        chosen = choose_backend(
            backend, Request(q.device, q.dtype, scores, padded=cache_leftpad is not None, decode=True)
        )
        result = decode(chosen, step, need_lse=return_softmax_lse)
    return (result.out, result.lse.to(torch.float32)) if return_softmax_lse else result.out
