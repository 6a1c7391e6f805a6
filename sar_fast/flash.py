"""FlashAttention-2's functions on this project's kernels, SAR off, under the same signatures.

What the kernels do not have (dropout, ALiBi, rotary inside the kernel) raises by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sar_fast import validation
from sar_fast.backends.protocol import Request
from sar_fast.backends.select import choose_backend
from sar_fast.decode_op import decode
from sar_fast.functional import check_packing, plain_attention
from sar_fast.kvcache import Step, check_cache
from sar_fast.values import Call


def _reject(**arguments: object) -> None:
    """Raise on the first argument that is set: FlashAttention has it, these kernels do not."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} is not supported by these kernels: leave it None; got {type(value).__name__}")


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

    ``deterministic`` is accepted: these kernels always are. ``return_attn_probs`` returns (out, lse, None) with lse
    (B, H, Sq) fp32; the probabilities themselves never exist.
    """
    validation.check_dropout(dropout_p)
    return_attn_probs = validation.check_flag("return_attn_probs", return_attn_probs)
    _reject(alibi_slopes=alibi_slopes)
    validation.check_qkv(q, k, v)
    scores = validation.make_scores(
        q, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap
    )
    out, lse = plain_attention(Call(q, k, v, scores), backend=backend, need_lse=return_attn_probs)
    return (out, lse.to(torch.float32), None) if return_attn_probs else out


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
    """:func:`flash_attn_func` on packed sequences, q (total_q, H, D); lse is (H, total_q) fp32."""
    validation.check_dropout(dropout_p)
    return_attn_probs = validation.check_flag("return_attn_probs", return_attn_probs)
    _reject(alibi_slopes=alibi_slopes, block_table=block_table)
    validation.check_qkv(q, k, v, packed=True)
    max_seqlens = check_packing(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q.shape[0], k.shape[0], q.device
    )
    scores = validation.make_scores(
        q, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap
    )
    call = Call(q, k, v, scores, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlens=max_seqlens)
    out, lse = plain_attention(call, backend=backend, need_lse=return_attn_probs)
    return (out, lse.to(torch.float32), None) if return_attn_probs else out


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
        k_cache, v_cache: (B, Smax, Hkv, D), or (blocks, page, Hkv, D) with ``block_table`` (B, pages) int32.
        cache_seqlens: int or (B,) int32, keys in the cache before this call; None = the cache is full.
        num_splits: accepted; the kernels choose.

    Returns:
        out (B, Sq, H, Dv), or (out, lse (B, H, Sq) fp32). As FlashAttention's, it has no backward.
    """
    return_softmax_lse = validation.check_flag("return_softmax_lse", return_softmax_lse)
    _reject(
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        alibi_slopes=alibi_slopes,
    )
    cache = check_cache(q, k_cache, v_cache, k, v, cache_seqlens, block_table)
    scores = validation.make_scores(
        q, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap
    )
    chosen = choose_backend(backend, Request(q.device, q.dtype, scores))
    with torch.no_grad():
        result = decode(chosen, Step(q, cache, scores), need_lse=return_softmax_lse)
    return (result.out, result.lse.to(torch.float32)) if return_softmax_lse else result.out
