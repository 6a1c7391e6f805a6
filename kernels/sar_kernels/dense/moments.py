"""The variance in closed form: second moments of the visual keys and of the text queries, and their inner product.

Where every text query sees all visual keys, the variances of a head's text queries add up to

    sum_i scale^2 q_i^T C q_i = scale^2 <C, M>,   C = cov(visual keys), M = sum_i q_i q_i^T,

two D x D matrices that need no score. The forward pass then collects the semantic alignment alone. Where products of
either sign nearly cancel in <C, M>, it is not trusted, and those heads look at the scores after all.
"""

import triton
import triton.language as tl

from sar_kernels.primitives import (
    column_offset,
    edge_offset,
    head_matrix,
    load_columns,
    mean_visual_key,
    sequence_bounds,
    shifted,
    text_meets_visual,
)
from sar_kernels.structs import Edges


@triton.jit
def _load_rows(ptr, rows, stride, selected, first_dim, COLS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Dims [first_dim, first_dim + COLS) of rows, zeros where not selected and beyond HEAD_DIM.  # [R, COLS]"""
    dims = first_dim + tl.arange(0, COLS)
    ptrs = ptr + rows[:, None] * stride + dims[None, :]
    return tl.load(ptrs, mask=selected[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _add_outer(total, panel, tile, SPLIT: tl.constexpr, ACC: tl.constexpr):
    """total [P, D] += panel^T tile of fp32 rows [R, P] and [R, D].

    SPLIT multiplies high and low halves in bfloat16, whatever the inputs' dtype: a difference of fp16 keys need not be
    an fp16 number. The product of the low halves is neglected, 2^-16 of the whole.
    """
    if SPLIT:
        panel_high, tile_high = panel.to(tl.bfloat16), tile.to(tl.bfloat16)
        panel_low = (panel - panel_high.to(ACC)).to(tl.bfloat16)
        tile_low = (tile - tile_high.to(ACC)).to(tl.bfloat16)
        total = tl.dot(tl.trans(panel_low), tile_high, total)
        total = tl.dot(tl.trans(panel_high), tile_low, total)
        total = tl.dot(tl.trans(panel_high), tile_high, total)
    else:
        total += tl.dot(tl.trans(panel), tile, input_precision="ieee")
    return total


@triton.jit(
    do_not_specialize=[
        *("stride_sums_h", "num_chunks", "num_kv_heads", "max_seqlen_q", "max_seqlen_k", "window_left"),
        "stride_edges_b",
    ]
)
def second_moments_kernel(
    q_ptr,  # (B, Sq, H, D) or (T, H, D)
    k_ptr,  # (B, Sk, Hkv, D)
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    first_ptr,  # (B, Sq) int32, this and the next or None: the window's edges
    end_ptr,
    text_ptr,  # (B, Sq) bool
    ranges_ptr,  # (B, 4) first and past-last visual key, first and past-last text query
    columns_ptr,  # (L, 2, 128) per key 1 if visual else 0, and the prior or 0; see `column_offset`
    num_visual_ptr,  # (B,)
    sums_ptr,  # (B, Hkv, key chunks, BLOCK_D) sums of the visual keys in CHUNK keys
    moments_ptr,  # (B, Hkv + H, num_chunks, BLOCK_D, BLOCK_D) out
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_sums_h,
    num_chunks,
    num_kv_heads,
    max_seqlen_q,
    max_seqlen_k,
    window_left,
    window_right,
    stride_edges_b,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """PANEL rows of the second moment of ROWS tokens: a kv head's visual keys about their mean, or a head's queries.

    Grid (num_chunks * panels, Hkv + H, B). Queries are taken or left by the forward's row blocks, BLOCK_M, as it takes
    or leaves them. Chunks outside the ranges are not written.
    """
    PANELS: tl.constexpr = BLOCK_D // PANEL
    chunk = tl.program_id(0) // PANELS
    first_dim = tl.program_id(0) % PANELS * PANEL
    head = tl.program_id(1)
    batch = tl.program_id(2)
    start_q, num_rows = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q, VARLEN)
    start_k, num_keys = sequence_bounds(cu_seqlens_k_ptr, batch, max_seqlen_k, VARLEN)
    num_visual = tl.load(num_visual_ptr + batch)
    total = tl.zeros([PANEL, BLOCK_D], ACC)
    is_keys = head < num_kv_heads
    lo = tl.load(ranges_ptr + 4 * batch + (0 if is_keys else 2))
    hi = tl.load(ranges_ptr + 4 * batch + (1 if is_keys else 3))
    first = chunk * ROWS
    end = tl.minimum(first + ROWS, hi)
    if (end <= lo) | (first >= hi) | (num_visual < 2):
        return
    if is_keys:
        k_matrix = head_matrix(k_ptr, batch, head, start_k, stride_kb, stride_ks, stride_kh, VARLEN)
        sums_ptr += (tl.cast(batch, tl.int64) * num_kv_heads + head) * stride_sums_h
        columns_ptr += column_offset(start_k, batch)
        mean = mean_visual_key(sums_ptr, lo, hi, num_visual, 0, BLOCK_D, BLOCK_D, CHUNK, ACC)  # [D]
        mean_panel = mean_visual_key(sums_ptr, lo, hi, num_visual, first_dim, PANEL, BLOCK_D, CHUNK, ACC)  # [P]
        for first_key in range(first, end, BLOCK_N):
            keys = tl.arange(0, BLOCK_N)
            selected, _prior = load_columns(columns_ptr, first_key, BLOCK_N)  # [BN]
            tile_ptr = k_matrix.ptr + first_key * tl.cast(k_matrix.stride, tl.int64)
            visual = selected > 0.0
            tile = _load_rows(tile_ptr, keys, k_matrix.stride, visual, 0, BLOCK_D, HEAD_DIM)  # [BN, D]
            panel = _load_rows(tile_ptr, keys, k_matrix.stride, visual, first_dim, PANEL, HEAD_DIM)  # [BN, P]
            tile = (tile.to(ACC) - mean[None, :]) * selected[:, None]
            panel = (panel.to(ACC) - mean_panel[None, :]) * selected[:, None]
            total = _add_outer(total, panel, tile, SPLIT, ACC)
    else:
        q_matrix = head_matrix(q_ptr, batch, head - num_kv_heads, start_q, stride_qb, stride_qs, stride_qh, VARLEN)
        offset = edge_offset(batch, start_q, stride_edges_b, VARLEN)
        edges = Edges(
            num_rows,
            num_keys,
            window_left if HAS_LEFT else None,
            window_right if HAS_RIGHT else None,
            shifted(first_ptr, offset),
            shifted(end_ptr, offset),
        )
        for first_row in range(first, end, BLOCK_M):
            rows = first_row + tl.arange(0, BLOCK_M)
            text = tl.load(text_ptr + start_q + rows, mask=rows < num_rows, other=0) != 0  # [BM]
            collects, _mixed = text_meets_visual(text, rows, edges, ranges_ptr, num_visual, batch, HAS_BITS)
            taken = (text & collects) != 0  # Triton 3.9 in its interpreter takes no other mask
            tile_ptr = q_matrix.ptr + first_row * tl.cast(q_matrix.stride, tl.int64)
            members = tl.arange(0, BLOCK_M)
            tile = _load_rows(tile_ptr, members, q_matrix.stride, taken, 0, BLOCK_D, HEAD_DIM)  # [BM, D]
            panel = _load_rows(tile_ptr, members, q_matrix.stride, taken, first_dim, PANEL, HEAD_DIM)  # [BM, P]
            total += tl.dot(tl.trans(panel), tile, input_precision=PRECISION)
    index = (tl.cast(batch, tl.int64) * tl.num_programs(1) + head) * num_chunks + chunk
    moments_ptr += index * BLOCK_D * BLOCK_D
    dims = first_dim + tl.arange(0, PANEL)
    tl.store(moments_ptr + dims[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], total)


@triton.jit
def _load_moment(ptr, lo, hi, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PANEL: tl.constexpr, ACC: tl.constexpr):
    """A panel of a second moment, summed over the chunks of ROWS tokens that [lo, hi) touches.  # [P, D]"""
    total = tl.zeros([PANEL, BLOCK_D], ACC)
    offsets = tl.arange(0, PANEL)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    for chunk in range(lo // ROWS, tl.cdiv(hi, ROWS)):
        total += tl.load(ptr + chunk * tl.cast(BLOCK_D * BLOCK_D, tl.int64) + offsets)
    return total


@triton.jit(do_not_specialize=["num_chunks", "num_kv_heads", "group"])
def closed_variance_kernel(
    moments_ptr,  # (B, Hkv + H, num_chunks, BLOCK_D, BLOCK_D)
    ranges_ptr,  # (B, 4)
    num_visual_ptr,  # (B,)
    closed_ptr,  # (B, H) out; -1 = not trusted
    num_chunks,
    num_kv_heads,
    group,
    softmax_scale,
    LIMIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PANEL: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """scale^2 <C, M>: the variances of one head's text queries in row blocks that see all of V, summed. Grid (H, B).

    No C_ab M_ab is larger than sqrt(C_aa M_aa C_bb M_bb), so that (sum_a sqrt(C_aa M_aa))^2 bounds what the sum is made
    of. A sum that is LIMIT times smaller than its bound is not trusted, nor one that is not finite: of a visual key
    that is not, no text query need see anything.
    """
    head = tl.program_id(0)
    batch = tl.program_id(1)
    num_visual = tl.load(num_visual_ptr + batch)
    variance = tl.zeros([PANEL], ACC)
    deviation = tl.zeros([PANEL], ACC)
    if num_visual >= 2:
        visual_lo, visual_hi = tl.load(ranges_ptr + 4 * batch), tl.load(ranges_ptr + 4 * batch + 1)
        text_lo, text_hi = tl.load(ranges_ptr + 4 * batch + 2), tl.load(ranges_ptr + 4 * batch + 3)
        stride = num_chunks * tl.cast(BLOCK_D * BLOCK_D, tl.int64)
        keys_ptr = moments_ptr + (batch * (num_kv_heads + tl.num_programs(0)) + head // group) * stride
        text_ptr = moments_ptr + (batch * (num_kv_heads + tl.num_programs(0)) + num_kv_heads + head) * stride
        for first_dim in range(0, BLOCK_D, PANEL):
            keys = _load_moment(keys_ptr + first_dim * BLOCK_D, visual_lo, visual_hi, ROWS, BLOCK_D, PANEL, ACC)
            text = _load_moment(text_ptr + first_dim * BLOCK_D, text_lo, text_hi, ROWS, BLOCK_D, PANEL, ACC)
            products = keys * text  # [P, D]
            variance += tl.sum(products, 1)
            on_diagonal = tl.arange(0, BLOCK_D)[None, :] == first_dim + tl.arange(0, PANEL)[:, None]
            deviation += tl.sqrt(tl.sum(tl.where(on_diagonal, products, 0.0), 1))
    scale = tl.cast(softmax_scale, ACC)
    total, bound = tl.sum(variance, 0), tl.sum(deviation, 0)
    trusted = (bound * bound <= LIMIT * total) & (total < float("inf"))
    total = tl.where(trusted, total * scale * scale / tl.maximum(num_visual - 1, 1), -1.0)
    tl.store(closed_ptr + batch * tl.num_programs(0) + head, total)
