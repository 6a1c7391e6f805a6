"""What the forward with statistics needs to know of a sample before it starts, in one launch."""

import triton
import triton.language as tl

from sar_kernels.dense.weights import first_and_end, store_visual_tiles
from sar_kernels.primitives import column_offset, head_matrix, sequence_bounds


@triton.jit
def _visible_visual(visual_ptr, padding_ptr, keys, num_keys):
    visual = tl.load(visual_ptr + keys, mask=keys < num_keys, other=0) != 0
    if padding_ptr is not None:
        visual = visual & (tl.load(padding_ptr + keys, mask=keys < num_keys, other=0) != 0)
    return visual


@triton.jit(do_not_specialize=["num_chunks", "max_seqlen_q", "max_seqlen_k", "stride_visual_tiles_b"])
def prepare_kernel(
    k_ptr,  # (B, Sk, Hkv, D)
    padding_ptr,  # (B, Sk) True = real token, or None
    visual_ptr,  # (B, Sk) bool
    text_ptr,  # (B, Sq) bool
    prior_ptr,  # (B, Sk)
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    ranges_ptr,  # (B, 4) int32 out
    visual_tiles_ptr,  # (B, 2, 1 + tiles) int32 out, or None
    num_visual_ptr,  # (B,) int32 out
    columns_ptr,  # (L, 2, 128) out
    sums_ptr,  # (B, Hkv, chunks, BLOCK_D) out
    stride_kb,
    stride_ks,
    stride_kh,
    stride_visual_tiles_b,
    num_chunks,
    max_seqlen_q,
    max_seqlen_k,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VARLEN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Grid (chunks, Hkv + 1, B): sums of the visual keys of one chunk and kv head, and with the last of the second
    axis the two columns of one chunk; its first program finds the sample's ranges and tiles and counts its visual keys.

    A visual key that padding hides is none.
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    start_q, num_rows = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q, VARLEN)
    start_k, num_keys = sequence_bounds(cu_seqlens_k_ptr, batch, max_seqlen_k, VARLEN)
    visual_ptr += start_k
    if padding_ptr is not None:
        padding_ptr += start_k
    first_key = chunk * CHUNK
    if head == tl.num_programs(1) - 1:
        if chunk == 0:
            visual_lo, visual_hi, num_visual = first_and_end(visual_ptr, padding_ptr, num_keys, BLOCK)
            text_lo, text_hi, _ = first_and_end(text_ptr + start_q, None, num_rows, BLOCK)
            tl.store(ranges_ptr + 4 * batch, visual_lo)
            tl.store(ranges_ptr + 4 * batch + 1, visual_hi)
            tl.store(ranges_ptr + 4 * batch + 2, text_lo)
            tl.store(ranges_ptr + 4 * batch + 3, text_hi)
            tl.store(num_visual_ptr + batch, num_visual)
            if visual_tiles_ptr is not None:
                store_visual_tiles(visual_tiles_ptr + batch * stride_visual_tiles_b, visual_ptr, num_keys, BLOCK, TILE)
        keys = first_key + tl.arange(0, CHUNK)
        visual = _visible_visual(visual_ptr, padding_ptr, keys, num_keys)  # [CHUNK]
        prior = tl.load(prior_ptr + start_k + keys, mask=visual, other=0.0)
        prior = tl.where(prior < 0.0, float("nan"), prior)  # whose values nobody may have waited for: it must show
        room = keys < tl.cdiv(num_keys, 128) * 128
        columns = columns_ptr + column_offset(start_k, batch) + keys // 128 * 256 + keys % 128
        tl.store(columns, visual.to(ACC), mask=room)
        tl.store(columns + 128, prior, mask=room)
    else:
        k_matrix = head_matrix(k_ptr, batch, head, start_k, stride_kb, stride_ks, stride_kh, VARLEN)
        keys_ptr = k_matrix.ptr + first_key * tl.cast(stride_ks, tl.int64)
        ROWS: tl.constexpr = 32
        dims = tl.arange(0, BLOCK_D)
        total = tl.zeros([ROWS, BLOCK_D], ACC)
        for first in range(0, tl.minimum(CHUNK, num_keys - first_key), ROWS):
            rows = tl.arange(0, ROWS)
            visual = _visible_visual(visual_ptr, padding_ptr, first_key + first + rows, num_keys)  # [ROWS]
            tile_ptr = keys_ptr + first * tl.cast(stride_ks, tl.int64)  # CHUNK rows do not fit 32-bit offsets
            ptrs = tile_ptr + rows[:, None] * stride_ks + dims[None, :]
            total += tl.load(ptrs, mask=visual[:, None] & (dims < HEAD_DIM)[None, :], other=0.0).to(ACC)
        index = (tl.cast(batch, tl.int64) * (tl.num_programs(1) - 1) + head) * num_chunks + chunk
        tl.store(sums_ptr + index * BLOCK_D + dims, tl.sum(total, 0))
