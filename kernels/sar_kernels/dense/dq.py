"""Backward kernels by rows: delta = rowsum(dout * out), and dQ.

The head weight c is folded into two numbers per row, so that dK/dV and dQ are plain attention's, to the byte: with
lse' = lse - log c their P is c P, and with delta' = delta / c their P (dP - delta') is c P (dP - delta / c), what the
gradient of c P V asks for. From out_scaled = c * out comes delta = rowsum(dout * out_scaled), so that the unscaled
output is not needed.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sar_kernels.primitives import (
    LEAST_WEIGHT,
    base2_scale,
    edge_offset,
    head_matrix,
    is_tile_seen,
    key_block_range,
    load_keys_mask,
    load_lse,
    load_lse2,
    load_real_tile,
    load_tile,
    product_scores,
    row_edges,
    row_pointer,
    sequence_bounds,
    shifted,
    soft_cap_slope,
    store_tile,
    visible_mask,
    visual_key_range,
)
from sar_kernels.structs import Edges, Mask, Softmax


@triton.jit(do_not_specialize=["stride_lse_b", "stride_lse_h", "max_seqlen_q"])
def delta_kernel(
    dout_ptr,  # (B, Sq, H, DV)
    out_ptr,  # (B, Sq, H, DV), scaled by c if there are head weights
    delta_ptr,  # (B, H, Sq) out: divided by c if there are head weights
    sums_ptr,  # (B, H, row blocks) out, WITH_SUMS only: sums of delta itself, which the gradient of c is made of
    c_ptr,  # (B, H), or None
    lse_ptr,  # (B, H, Sq)
    lse2_ptr,  # (B, H, Sq) out: lse - log c in base 2, inf for rows that saw nothing, so that their weights are 0
    cu_seqlens_q_ptr,
    stride_dob,
    stride_dos,
    stride_doh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_lse_b,
    stride_lse_h,
    max_seqlen_q,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VARLEN: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    ACC: tl.constexpr,
):
    """delta = rowsum(dout * out), and lse as loops read it, the head weight in both. Grid (row blocks, H, B)."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    start, num_rows = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q, VARLEN)
    first_row = block * BLOCK_M
    if first_row >= num_rows:
        return
    dout_matrix = head_matrix(dout_ptr, batch, head, start, stride_dob, stride_dos, stride_doh, VARLEN)
    out_matrix = head_matrix(out_ptr, batch, head, start, stride_ob, stride_os, stride_oh, VARLEN)
    delta_ptr = row_pointer(delta_ptr, batch, head, start, stride_lse_b, stride_lse_h, VARLEN)
    rows = first_row + tl.arange(0, BLOCK_M)
    dout = load_tile(dout_matrix, first_row, num_rows, BLOCK_M, BLOCK_DV, HEAD_DIM_V, True)  # [BM, DV]
    out = load_tile(out_matrix, first_row, num_rows, BLOCK_M, BLOCK_DV, HEAD_DIM_V, True)  # [BM, DV]
    delta = tl.sum(dout.to(ACC) * out.to(ACC), 1)  # [BM], 0 beyond the last row
    in_range = rows < num_rows
    index = tl.cast(batch, tl.int64) * tl.num_programs(1) + head
    if WITH_SUMS:
        tl.store(sums_ptr + index * tl.num_programs(0) + block, tl.sum(delta, 0))
    lse_ptr = row_pointer(lse_ptr, batch, head, start, stride_lse_b, stride_lse_h, VARLEN)
    lse2_ptr = row_pointer(lse2_ptr, batch, head, start, stride_lse_b, stride_lse_h, VARLEN)
    lse2 = load_lse(lse_ptr, rows, num_rows)
    if c_ptr is not None:
        c = tl.maximum(tl.load(c_ptr + index), LEAST_WEIGHT)
        lse2 -= tl.log2(c)
        delta = delta / c
    tl.store(lse2_ptr + rows, lse2, mask=in_range)
    tl.store(delta_ptr + rows, delta, mask=in_range)


class _Rows(NamedTuple):
    """What a program holds of its row block."""

    first: Any
    q: Any  # [BM, D]
    dout: Any  # [BM, DV]
    lse: Any  # [BM], and the rest
    delta: Any
    mean: Any  # this and the next two None without statistics
    slope: Any
    gain: Any


@triton.jit
def _dq_segment(
    dq,
    rows,
    k_matrix,
    v_matrix,
    edges,
    mask,
    visual_ptr,
    prior_ptr,
    start,
    end,
    softmax,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    COLLECT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the keys [start, end) to dq; COLLECT (which needs MASKED) adds the gradient through the statistics."""
    index = rows.first + tl.arange(0, BLOCK_M)
    if MASKED:
        row_first, row_last = row_edges(edges, index)
        row_first, row_last = row_first[:, None], row_last[:, None]  # [BM, 1]
    for first_key in range(start, end, BLOCK_N):
        if is_tile_seen(mask, edges, rows.first, first_key, BLOCK_M, BLOCK_N):
            real = None
            if mask.padding_ptr is not None:
                real = load_keys_mask(mask.padding_ptr, first_key, edges.num_keys, BLOCK_N)  # [BN]
            k = load_real_tile(k_matrix, first_key, edges.num_keys, real, BLOCK_N, BLOCK_D, HEAD_DIM, MASKED)
            v = load_real_tile(v_matrix, first_key, edges.num_keys, real, BLOCK_N, BLOCK_DV, HEAD_DIM_V, MASKED)
            scores = product_scores(rows.q, k, softmax, PRECISION)  # [BM, BN]
            if MASKED:
                keys = first_key + tl.arange(0, BLOCK_N)
                visible = visible_mask(edges, mask, index, row_first, row_last, keys, real, first_key, BLOCK_N, False)
                scores = tl.where(visible, scores, -float("inf"))
            weights = tl.exp2(scores * softmax.scale_log2 - rows.lse[:, None])  # [BM, BN]
            dweights = tl.dot(rows.dout, tl.trans(v), input_precision=PRECISION)  # [BM, BN]
            if COLLECT:
                visual = load_keys_mask(visual_ptr, first_key, edges.num_keys, BLOCK_N)  # [BN]
                prior = tl.load(prior_ptr + keys, mask=visual, other=0.0)  # [BN]
                dweights += rows.gain[:, None] * prior[None, :]
            dscores = weights * (dweights - rows.delta[:, None])
            if COLLECT:
                dscores += tl.where(
                    visual[None, :] & (scores > -float("inf")), rows.slope[:, None] * (scores - rows.mean[:, None]), 0.0
                )
            if softmax.cap is not None:
                dscores = dscores * soft_cap_slope(scores, softmax.cap)
            dq += tl.dot(dscores.to(k.dtype), k, input_precision=PRECISION)  # [BM, D]
    return dq


@triton.jit(
    do_not_specialize=[
        *("stride_lse_b", "stride_lse_h", "max_seqlen_q", "max_seqlen_k", "group", "window_left", "stride_edges_b"),
        *("stride_bits_b", "stride_bits_s", "stride_tiles_b"),
    ]
)
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    padding_ptr,
    first_ptr,  # (B, Sq) int32, this and the next or None: the window's edges
    end_ptr,
    bits_ptr,  # (B, Sq, words) int32, this and the next HAS_BITS only
    tiles_ptr,  # (B, row tiles, key tiles) int8
    visual_ptr,  # this and the rest STATISTICS only
    text_ptr,
    prior_ptr,
    ranges_ptr,
    row_mean_ptr,  # (B, H, Sq) mean score over the visual keys
    row_slope_ptr,  # (B, H, Sq) factor of (score - mean) in the gradient of AV, 0 for rows that do not count
    row_gain_ptr,  # (B, H, Sq) factor of the prior in the gradient of SA, over c; 0 for rows that do not count
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_dob,
    stride_dos,
    stride_doh,
    stride_dqb,
    stride_dqs,
    stride_dqh,
    stride_lse_b,
    stride_lse_h,
    max_seqlen_q,
    max_seqlen_k,
    group,
    window_left,
    window_right,
    stride_edges_b,
    stride_bits_b,
    stride_bits_s,
    stride_tiles_b,
    softmax_scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """dq of one row block of one head, a loop over its keys. Grid (row blocks, H, B), long rows first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    start_q, num_rows = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q, VARLEN)
    start_k, num_keys = sequence_bounds(cu_seqlens_k_ptr, batch, max_seqlen_k, VARLEN)
    first_row = block * BLOCK_M
    if first_row >= num_rows:
        return

    q_matrix = head_matrix(q_ptr, batch, head, start_q, stride_qb, stride_qs, stride_qh, VARLEN)
    k_matrix = head_matrix(k_ptr, batch, head // group, start_k, stride_kb, stride_ks, stride_kh, VARLEN)
    v_matrix = head_matrix(v_ptr, batch, head // group, start_k, stride_vb, stride_vs, stride_vh, VARLEN)
    dout_matrix = head_matrix(dout_ptr, batch, head, start_q, stride_dob, stride_dos, stride_doh, VARLEN)
    dq_matrix = head_matrix(dq_ptr, batch, head, start_q, stride_dqb, stride_dqs, stride_dqh, VARLEN)
    lse_ptr = row_pointer(lse_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN)
    delta_ptr = row_pointer(delta_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN)
    offset = edge_offset(batch, start_q, stride_edges_b, VARLEN)
    edges = Edges(
        num_rows,
        num_keys,
        window_left if HAS_LEFT else None,
        window_right if HAS_RIGHT else None,
        shifted(first_ptr, offset),
        shifted(end_ptr, offset),
    )
    mask = Mask(
        shifted(padding_ptr, start_k),
        shifted(bits_ptr, tl.cast(batch, tl.int64) * stride_bits_b),
        stride_bits_s,
        shifted(tiles_ptr, tl.cast(batch, tl.int64) * stride_tiles_b),
    )
    ANYWHERE: tl.constexpr = HAS_LEFT or HAS_PADDING or HAS_BITS
    scale = tl.cast(softmax_scale, ACC)
    softmax = Softmax(scale, base2_scale(scale, HAS_SOFTCAP), tl.cast(softcap, ACC) if HAS_SOFTCAP else None)
    rows = first_row + tl.arange(0, BLOCK_M)
    in_range = rows < num_rows
    lo, full, hi = key_block_range(edges, first_row, BLOCK_M, BLOCK_N)

    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    q = load_tile(q_matrix, first_row, num_rows, BLOCK_M, BLOCK_D, HEAD_DIM, True)  # [BM, D]
    dout = load_tile(dout_matrix, first_row, num_rows, BLOCK_M, BLOCK_DV, HEAD_DIM_V, True)  # [BM, DV]
    lse = load_lse2(lse_ptr, rows, num_rows)  # [BM]
    delta = tl.load(delta_ptr + rows, mask=in_range, other=0.0)  # [BM]
    row_mean = None
    row_slope = None
    row_gain = None
    has_text = False
    if STATISTICS:
        visual_ptr += start_k
        prior_ptr += start_k
        text = tl.load(text_ptr + start_q + rows, mask=in_range, other=0) != 0  # [BM]
        has_text = tl.max(text.to(tl.int32), 0) != 0
        row_mean_ptr = row_pointer(row_mean_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN)
        row_slope_ptr = row_pointer(row_slope_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN)
        row_gain_ptr = row_pointer(row_gain_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN)
        row_mean = tl.load(row_mean_ptr + rows, mask=in_range, other=0.0)
        row_slope = tl.load(row_slope_ptr + rows, mask=in_range, other=0.0)
        row_gain = tl.load(row_gain_ptr + rows, mask=in_range, other=0.0)

    held = _Rows(first_row, q, dout, lse, delta, row_mean, row_slope, row_gain)
    collect_lo, collect_hi = visual_key_range(ranges_ptr, batch, has_text, lo, full, hi, BLOCK_N, ANYWHERE, STATISTICS)
    for segment in tl.static_range(0 if STATISTICS else 2, 4):
        if segment == 0:
            start, end = lo, collect_lo
        elif segment == 1:
            start, end = collect_lo, collect_hi
        elif segment == 2:
            start, end = collect_hi, full
        else:
            start, end = (collect_hi if ANYWHERE else tl.maximum(collect_hi, full)), hi
        # The guard keeps a skipped loop from letting every wgmma wait for the one before it; see forward.py.
        if not (ANYWHERE and segment == 2) and start < end:
            dq = _dq_segment(
                dq,
                held,
                k_matrix,
                v_matrix,
                edges,
                mask,
                visual_ptr,
                prior_ptr,
                start,
                end,
                softmax,
                HEAD_DIM,
                HEAD_DIM_V,
                BLOCK_D,
                BLOCK_DV,
                BLOCK_M,
                BLOCK_N,
                ANYWHERE or segment == 1 or segment == 3,  # MASKED
                segment == 1,  # COLLECT
                PRECISION,
            )
    store_tile(dq_matrix, dq * scale, first_row, num_rows, BLOCK_M, BLOCK_D, HEAD_DIM)
