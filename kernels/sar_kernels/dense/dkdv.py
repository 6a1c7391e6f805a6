"""Backward kernel by keys: dK and dV, and the prior's gradient, summed over a group's query heads in registers."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sar_kernels.primitives import (
    base2_scale,
    edge_offset,
    head_matrix,
    is_tile_seen,
    load_keys_mask,
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
)
from sar_kernels.structs import Edges, Mask, Matrix, Softmax


class _Keys(NamedTuple):
    """What a program holds of its key block."""

    first: Any
    index: Any  # [BN]
    k: Any  # [BN, D]
    v: Any  # [BN, DV]
    real: Any  # [BN], or None: no padding
    visual: Any  # [BN], this and the next None without statistics
    prior: Any  # [BN]


class _Queries(NamedTuple):
    """The rows of the first head of a group, and the strides to the next head's."""

    group: Any  # heads
    q: Any  # Matrix
    dout: Any  # Matrix
    stride_qh: Any
    stride_doh: Any
    stride_rows_h: Any  # of the rest
    lse_ptr: Any
    delta_ptr: Any
    mean_ptr: Any  # this and the next two None without statistics
    slope_ptr: Any
    gain_ptr: Any


@triton.jit
def _dkdv_segment(
    dk,
    dv,
    dprior,
    keys,
    queries,
    edges,
    mask,
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
    SELECT: tl.constexpr,
    WITH_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the queries [start, end) of all the group's heads to dk, dv and dprior; start is a multiple of BLOCK_M.

    Tiles are keys by rows, so that P^T needs no shuffle. Heads and row blocks are one loop: two nested ones would cost
    registers, and drain the pipeline at every head. The next head is told by a comparison, as a division of the step
    costs 30 to 90 instructions a tile; SELECT, without a branch: more instructions, fewer registers.
    """
    member = 0
    first_row = start
    for _ in range(0, queries.group * tl.cdiv(tl.maximum(end - start, 0), BLOCK_M)):
        if is_tile_seen(mask, edges, first_row, keys.first, BLOCK_M, BLOCK_N):
            rows = first_row + tl.arange(0, BLOCK_M)
            in_range = rows < edges.num_rows
            q_matrix = Matrix(queries.q.ptr + member * tl.cast(queries.stride_qh, tl.int64), queries.q.stride)
            dout_matrix = Matrix(queries.dout.ptr + member * tl.cast(queries.stride_doh, tl.int64), queries.dout.stride)
            member_row = member * tl.cast(queries.stride_rows_h, tl.int64)  # offset in the per-row arrays
            q = load_tile(q_matrix, first_row, edges.num_rows, BLOCK_M, BLOCK_D, HEAD_DIM, True)  # [BM, D]
            dout = load_tile(dout_matrix, first_row, edges.num_rows, BLOCK_M, BLOCK_DV, HEAD_DIM_V, True)  # [BM, DV]
            lse = load_lse2(queries.lse_ptr + member_row, rows, edges.num_rows)  # [BM]
            delta = tl.load(queries.delta_ptr + member_row + rows, mask=in_range, other=0.0)  # [BM]
            scores = product_scores(keys.k, q, softmax, PRECISION)  # [BN, BM]
            if MASKED:
                row_first, row_last = row_edges(edges, rows)
                row_first, row_last = row_first[None, :], row_last[None, :]  # [1, BM]
                visible = visible_mask(
                    edges, mask, rows, row_first, row_last, keys.index, keys.real, keys.first, BLOCK_N, True
                )
                scores = tl.where(visible, scores, -float("inf"))
            weights = tl.exp2(scores * softmax.scale_log2 - lse[None, :])  # [BN, BM]
            if WITH_DV:
                dv += tl.dot(weights.to(dout.dtype), dout, input_precision=PRECISION)  # [BN, DV]
            dweights = tl.dot(keys.v, tl.trans(dout), input_precision=PRECISION)  # [BN, BM]
            if COLLECT:
                gain = tl.load(queries.gain_ptr + member_row + rows, mask=in_range, other=0.0)  # [BM]
                dprior += tl.sum(tl.where(keys.visual[:, None], weights * gain[None, :], 0.0), 1)  # [BN]
                dweights += keys.prior[:, None] * gain[None, :]
            dscores = weights * (dweights - delta[None, :])
            if COLLECT:
                mean = tl.load(queries.mean_ptr + member_row + rows, mask=in_range, other=0.0)  # [BM]
                slope = tl.load(queries.slope_ptr + member_row + rows, mask=in_range, other=0.0)  # [BM]
                dscores += tl.where(
                    keys.visual[:, None] & (scores > -float("inf")), slope[None, :] * (scores - mean[None, :]), 0.0
                )
            if softmax.cap is not None:
                dscores = dscores * soft_cap_slope(scores, softmax.cap)
            dk += tl.dot(dscores.to(q.dtype), q, input_precision=PRECISION)  # [BN, D]
        first_row += BLOCK_M
        if SELECT:
            wraps = first_row >= end
            first_row = tl.where(wraps, start, first_row)
            member += wraps.to(tl.int32)
        elif first_row >= end:
            first_row = start
            member += 1
    return dk, dv, dprior


@triton.jit(
    do_not_specialize=[
        *("stride_dprior_h", "stride_lse_b", "stride_lse_h", "max_seqlen_q", "max_seqlen_k", "group", "window_left"),
        *("stride_edges_b", "stride_bits_b", "stride_bits_s", "stride_tiles_b"),
    ]
)
def dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,  # or None: not wanted
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    padding_ptr,
    first_ptr,  # (B, Sq) int32, this and the next or None: the window's edges
    end_ptr,
    row_ranges_ptr,  # (B, key blocks, 3) int32 of `row_ranges_kernel`, or None: the window says them
    bits_ptr,  # (B, Sq, words) int32, this and the next HAS_BITS only
    tiles_ptr,  # (B, row tiles, key tiles) int8
    visual_ptr,  # this and the rest STATISTICS only
    prior_ptr,
    ranges_ptr,
    row_mean_ptr,
    row_slope_ptr,
    row_gain_ptr,
    dprior_ptr,  # (Hkv, B * Sk or Tk): summed over kv heads afterwards
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
    stride_dkb,
    stride_dks,
    stride_dkh,
    stride_dvb,
    stride_dvs,
    stride_dvh,
    stride_dprior_h,
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
    """dk and dv of one key block of one kv head: a loop over the group's query heads and their rows.

    Grid (key blocks, Hkv, B); early key blocks, the long ones under a causal mask, go first.
    """
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    batch = tl.program_id(2)
    start_q, num_rows = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q, VARLEN)
    start_k, num_keys = sequence_bounds(cu_seqlens_k_ptr, batch, max_seqlen_k, VARLEN)
    first_key = block * BLOCK_N
    if first_key >= num_keys:
        return
    k_matrix = head_matrix(k_ptr, batch, kv_head, start_k, stride_kb, stride_ks, stride_kh, VARLEN)
    v_matrix = head_matrix(v_ptr, batch, kv_head, start_k, stride_vb, stride_vs, stride_vh, VARLEN)
    dk_matrix = head_matrix(dk_ptr, batch, kv_head, start_k, stride_dkb, stride_dks, stride_dkh, VARLEN)
    if dv_ptr is not None:
        dv_matrix = head_matrix(dv_ptr, batch, kv_head, start_k, stride_dvb, stride_dvs, stride_dvh, VARLEN)
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

    # Where every loop masks: padding, left edges and bits hide rows anywhere, and beside two tiles of D = 256 a loop of
    # its own for the edge of the mask spills more than masking costs.
    ANYWHERE: tl.constexpr = HAS_LEFT or HAS_PADDING or HAS_BITS or BLOCK_D + BLOCK_DV > 256
    ONE_LOOP: tl.constexpr = ANYWHERE and not STATISTICS
    # A branch spilled 56 bytes in the statistics at D = 64 on sm_80, and up to 104 at D = 256.
    SELECT: tl.constexpr = BLOCK_D > 128 or (STATISTICS and BLOCK_D <= 64)
    scale = tl.cast(softmax_scale, ACC)
    softmax = Softmax(scale, base2_scale(scale, HAS_SOFTCAP), tl.cast(softcap, ACC) if HAS_SOFTCAP else None)
    diagonal = num_keys - num_rows
    keys = first_key + tl.arange(0, BLOCK_N)

    # Rows that see the block: [lo, hi); from `full` on, every row sees all of it if only the right edge masks.
    lo = 0
    full = 0
    hi = num_rows
    last_key = tl.minimum(first_key + BLOCK_N, num_keys) - 1
    if row_ranges_ptr is not None:
        row_ranges_ptr += 3 * (batch * tl.num_programs(0) + block)
        lo = tl.load(row_ranges_ptr) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.load(row_ranges_ptr + 1), BLOCK_M) * BLOCK_M
        hi = tl.load(row_ranges_ptr + 2)
    else:
        if HAS_RIGHT:
            lo = tl.maximum(first_key - diagonal - window_right, 0) // BLOCK_M * BLOCK_M
            full = tl.cdiv(tl.maximum(last_key - diagonal - window_right, 0), BLOCK_M) * BLOCK_M
        if HAS_LEFT:
            hi = tl.maximum(tl.minimum(hi, last_key - diagonal + window_left + 1), 0)
    full = lo if ONE_LOOP else tl.minimum(tl.maximum(full, lo), hi)

    real = None
    if HAS_PADDING:
        real = load_keys_mask(mask.padding_ptr, first_key, num_keys, BLOCK_N)  # [BN]
    k = load_real_tile(k_matrix, first_key, num_keys, real, BLOCK_N, BLOCK_D, HEAD_DIM, True)  # [BN, D]
    v = load_real_tile(v_matrix, first_key, num_keys, real, BLOCK_N, BLOCK_DV, HEAD_DIM_V, True)  # [BN, DV]
    visual = None
    prior = None
    # The stretch of rows that carries gradients through the statistics, [collect_lo, collect_hi).
    collect_lo = full
    collect_hi = full
    if STATISTICS:
        visual = load_keys_mask(visual_ptr + start_k, first_key, num_keys, BLOCK_N)  # [BN]
        prior = tl.load(prior_ptr + start_k + keys, mask=visual, other=0.0).to(ACC)  # [BN]
        begin = tl.maximum(tl.load(ranges_ptr + 4 * batch + 2) // BLOCK_M * BLOCK_M, lo)
        end = tl.minimum(tl.cdiv(tl.load(ranges_ptr + 4 * batch + 3), BLOCK_M) * BLOCK_M, hi)
        if not ANYWHERE:  # its loop masks, so it may run on to `full` and spare a second stretch on the diagonal
            end = tl.maximum(end, full)
        is_empty = (begin >= end) | (tl.max(visual.to(tl.int32), 0) == 0)
        collect_lo = tl.where(is_empty, full, begin)
        collect_hi = tl.where(is_empty, full, end)

    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], ACC)
    dprior = tl.zeros([BLOCK_N], ACC)
    head = kv_head * group  # the group's first
    queries = _Queries(
        group,
        head_matrix(q_ptr, batch, head, start_q, stride_qb, stride_qs, stride_qh, VARLEN),
        head_matrix(dout_ptr, batch, head, start_q, stride_dob, stride_dos, stride_doh, VARLEN),
        stride_qh,
        stride_doh,
        stride_lse_h,
        row_pointer(lse_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN),
        row_pointer(delta_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN),
        row_pointer(row_mean_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN) if STATISTICS else None,
        row_pointer(row_slope_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN) if STATISTICS else None,
        row_pointer(row_gain_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN) if STATISTICS else None,
    )
    held = _Keys(first_key, keys, k, v, real, visual, prior)
    for segment in tl.static_range(4):
        if segment == 0:  # the edge of the mask
            start, end = lo, (collect_lo if ANYWHERE else tl.minimum(full, collect_lo))
        elif segment == 1:  # rows before the text queries that see every key
            start, end = tl.minimum(full, collect_lo), collect_lo
        elif segment == 2:  # the stretch with text queries
            start, end = collect_lo, collect_hi
        else:
            start, end = collect_hi, hi
        # The guard keeps a skipped loop from letting every wgmma wait for the one before it; see forward.py.
        if (
            (segment == 0 and (HAS_RIGHT or ANYWHERE) and not ONE_LOOP)
            or (segment == 1 and (STATISTICS and not ANYWHERE))
            or (segment == 2 and STATISTICS)
            or segment == 3
        ) and start < end:
            dk, dv, dprior = _dkdv_segment(
                dk,
                dv,
                dprior,
                held,
                queries,
                edges,
                mask,
                start,
                end,
                softmax,
                HEAD_DIM,
                HEAD_DIM_V,
                BLOCK_D,
                BLOCK_DV,
                BLOCK_M,
                BLOCK_N,
                ANYWHERE or segment == 0 or segment == 2,  # MASKED
                segment == 2,  # COLLECT
                SELECT,
                dv_ptr is not None,  # WITH_DV
                PRECISION,
            )

    store_tile(dk_matrix, dk * scale, first_key, num_keys, BLOCK_N, BLOCK_D, HEAD_DIM)
    if dv_ptr is not None:
        store_tile(dv_matrix, dv, first_key, num_keys, BLOCK_N, BLOCK_DV, HEAD_DIM_V)
    if STATISTICS:
        dprior_ptr += tl.cast(kv_head, tl.int64) * stride_dprior_h + start_k
        tl.store(dprior_ptr + keys, dprior, mask=keys < num_keys)
