"""The KV cache: its layouts, the checks on it, and the kernel that writes new keys and values into it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sar_kernels.call import MAX_TOKEN_STRIDE
from sar_kernels.configs import SMALL, padded_head_dim
from sar_kernels.launch import Launch, run_all


@triton.jit(do_not_specialize=["capacity", "num_new", "stride_table_b"])
def append_kernel(
    cache_ptr,  # (B, Smax, Hkv, D) or (blocks, PAGE, Hkv, D)
    new_ptr,  # (B, Snew, Hkv, D)
    lengths_ptr,  # (B,) int32, after the new keys
    table_ptr,  # (B, pages) int32, paged only
    stride_cb,
    stride_cs,
    stride_ch,
    stride_nb,
    stride_ns,
    stride_nh,
    stride_table_b,
    capacity,
    num_new,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Writes one token's entries of all kv heads into the cache. Grid (B * Snew,); nothing outside the cache."""
    token = tl.program_id(0) % num_new
    batch = (tl.program_id(0) // num_new).to(tl.int64)
    position = tl.load(lengths_ptr + batch) - num_new + token
    if (position < 0) | (position >= capacity):
        return
    if PAGE == 0:
        cache_ptr += batch * stride_cb + position.to(tl.int64) * stride_cs
    else:
        page = tl.load(table_ptr + batch * stride_table_b + position // PAGE).to(tl.int64)
        cache_ptr += page * stride_cb + tl.cast(position % PAGE, tl.int64) * stride_cs
    new_ptr += batch * stride_nb + token.to(tl.int64) * stride_ns
    heads = tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < HEADS) & (columns < HEAD_DIM)
    values = tl.load(new_ptr + heads * stride_nh + columns, mask=mask)
    tl.store(cache_ptr + heads * stride_ch + columns, values, mask=mask)


def append_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = None,
) -> None:
    """Writes new keys and values into the cache, in place and without waiting for the GPU.

    Args:
        k, v: (B, Snew, Hkv, D) and (B, Snew, Hkv, DV), in the caches' dtype.
        cache_seqlens: (B,) int32, each sample's length with the new keys: key i goes to position
            cache_seqlens - Snew + i, nowhere if that is outside the cache.
        k_cache, v_cache, block_table: the module's layouts.

    Raises:
        ValueError: naming the argument, what came and what is needed.
    """
    run_all(plan_append(k_cache, v_cache, k, v, cache_seqlens, block_table))


def plan_append(k_cache, v_cache, k, v, cache_seqlens, block_table=None) -> list[Launch]:
    """The two launches of `append_kv`."""
    capacity = check_cache("k", k, k_cache, v_cache, cache_seqlens, block_table)
    launches = []
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new.shape != (*k.shape[:2], *cache.shape[2:]) or new.dtype != cache.dtype or new.stride(-1) != 1:
            raise ValueError(
                f"{name}: got {new.dtype} {tuple(new.shape)}, need {cache.dtype} (B, Snew, {cache.shape[2]}, "
                f"{cache.shape[3]}) with a dense last dimension"
            )
        arguments = {
            "cache_ptr": cache,
            "new_ptr": new,
            "lengths_ptr": cache_seqlens,
            "table_ptr": block_table,
            **strides("c", cache),
            **strides("n", new),
            "stride_table_b": 0 if block_table is None else block_table.stride(0),
            "capacity": capacity,
            "num_new": k.shape[1],
            "HEADS": cache.shape[2],
            "HEAD_DIM": cache.shape[3],
            "BLOCK_H": triton.next_power_of_2(cache.shape[2]),
            "BLOCK_D": padded_head_dim(cache.shape[3]),
            "PAGE": 0 if block_table is None else cache.shape[1],
        }
        launches.append(Launch(append_kernel, (k.shape[0] * k.shape[1],), arguments, SMALL))
    return launches


def strides(name: str, tensor: torch.Tensor) -> dict[str, int]:
    """Strides over batch (or block), token and head as the kernels name them."""
    return {f"stride_{name}{axis}": stride for axis, stride in zip("bsh", tensor.stride())}


def check_cache(name_q, q, k_cache, v_cache, cache_seqlens, block_table) -> int:
    """Checks what q (or new keys), the caches and the lengths, if any, have in common; returns Smax."""
    for name, tensor in ((name_q, q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.ndim != 4:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, need 4 dimensions")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name}: got {tensor.dtype} on {tensor.device}, need {q.dtype} on {q.device}")
        if tensor.stride(-1) != 1 or tensor.stride(1) >= MAX_TOKEN_STRIDE:
            raise ValueError(
                f"{name}: got strides {tensor.stride()}, need a dense last dimension and less than "
                f"{MAX_TOKEN_STRIDE} from token to token"
            )
    if k_cache.shape[:-1] != v_cache.shape[:-1]:
        raise ValueError(f"v_cache: got shape {tuple(v_cache.shape)}, need k_cache's {tuple(k_cache.shape)} but for DV")
    batch = q.shape[0]
    if cache_seqlens is not None:
        _check_int32("cache_seqlens", cache_seqlens, (batch,), q.device)
    if block_table is None:
        if k_cache.shape[0] != batch:
            raise ValueError(f"k_cache: got shape {tuple(k_cache.shape)}, need {name_q}'s batch size {batch} first")
        return k_cache.shape[1]
    pages = block_table.shape[-1]
    _check_int32("block_table", block_table, (batch, pages), q.device)
    return pages * k_cache.shape[1]


def _check_int32(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != torch.int32 or tensor.shape != shape or tensor.device != device or tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}: got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
            f"need torch.int32 {shape} on {device} with a dense last dimension"
        )
