"""Forward kernel: flash attention, and as a compile-time variant the SAR statistics of the text queries."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sar_kernels.dense.statistics import visual_statistics
from sar_kernels.primitives import (
    LN_2,
    base2_scale,
    column_offset,
    edge_offset,
    head_matrix,
    is_tile_seen,
    key_block_range,
    load_columns,
    load_keys_mask,
    load_real_tile,
    load_tile,
    mean_visual_key,
    online_softmax,
    product_scores,
    row_edges,
    row_pointer,
    sequence_bounds,
    shifted,
    soft_cap,
    store_partials,
    store_tile,
    text_meets_visual,
    visible_mask,
    visual_key_range,
)
from sar_kernels.structs import Edges, Mask, Softmax


class _Running(NamedTuple):
    """What a row block has gathered of the keys behind it."""

    acc: Any  # [BM, DV]
    row_max: Any  # [BM], and the rest; in base 2
    row_sum: Any
    alignment: Any
    m1: Any  # sums of the visual scores' deviations from the pivot, and of their squares
    m2: Any


@triton.jit
def _attend(
    running,
    q,
    pivot,
    k_matrix,
    v_matrix,
    edges,
    mask,
    columns_ptr,
    start,
    end,
    first_row,
    softmax,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    STATISTICS: tl.constexpr,
    COLLECT: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Runs the keys [start, end) through the row block; start is a multiple of BLOCK_N.

    Without MASKED every key must be in range and visible to every row. Tiles that a packed mask hides are left out, at
    the price of the pipeline. COLLECT marks the stretch with visual keys;
    outside it the statistics only follow the running maximum. They are those of rows that see all visual keys, so that
    what selects an entry is its column alone. Without MOMENTS the alignment is collected and the variance is not.
    """
    HIDES_ANY: tl.constexpr = edges.right is not None or edges.left is not None or mask.padding_ptr is not None
    acc, row_max, row_sum, alignment, m1, m2 = running
    rows = first_row + tl.arange(0, BLOCK_M)
    if MASKED:  # here, so that the other stretches hold no edges in registers
        row_first, row_last = row_edges(edges, rows)
        row_first, row_last = row_first[:, None], row_last[:, None]  # [BM, 1]
    for first_key in range(start, end, BLOCK_N):
        if is_tile_seen(mask, edges, first_row, first_key, BLOCK_M, BLOCK_N):
            if COLLECT and not MASKED:  # before the product, which hides the way from memory
                selected, prior = load_columns(columns_ptr, first_key, BLOCK_N)  # [BN] each
            k = load_tile(k_matrix, first_key, edges.num_keys, BLOCK_N, BLOCK_D, HEAD_DIM, MASKED)  # [BN, D]
            scores = product_scores(q, k, softmax, PRECISION)  # [BM, BN]
            if COLLECT and MASKED:  # where registers are short
                selected, prior = load_columns(columns_ptr, first_key, BLOCK_N)  # [BN] each
            if COLLECT and MOMENTS:  # the moments first: their temporaries are dead before the softmax's are born
                if MASKED and HIDES_ANY:  # what no text query sees need not be finite
                    deviation = tl.where(selected[None, :] > 0.0, scores, pivot[:, None]) - pivot[:, None]  # [BM, BN]
                else:
                    deviation = (scores - pivot[:, None]) * selected[None, :]  # [BM, BN]
                if softmax.cap is not None:
                    m1 += tl.sum(deviation, 1)
                m2 += tl.sum(deviation * deviation, 1)
            real = None
            if MASKED:
                keys = first_key + tl.arange(0, BLOCK_N)
                if mask.padding_ptr is not None:
                    real = load_keys_mask(mask.padding_ptr, first_key, edges.num_keys, BLOCK_N)  # [BN]
                visible = visible_mask(edges, mask, rows, row_first, row_last, keys, real, first_key, BLOCK_N, False)
                scores = tl.where(visible, scores, -float("inf"))
            weights, rescale, row_max, row_sum = online_softmax(scores, row_max, row_sum, softmax.scale_log2, MASKED)
            if STATISTICS:
                alignment = alignment * rescale
            if COLLECT:
                alignment += tl.sum(weights * prior[None, :], 1)
            acc = acc * rescale[:, None]
            v = load_real_tile(v_matrix, first_key, edges.num_keys, real, BLOCK_N, BLOCK_DV, HEAD_DIM_V, MASKED)
            acc += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)  # [BM, DV]
    return _Running(acc, row_max, row_sum, alignment, m1, m2)


@triton.jit
def _mean_score(
    q_matrix,
    sums_ptr,
    first_row,
    num_rows,
    first_key,
    end_key,
    num_visual,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Every row's score with the mean of the visual keys, which lie in [first_key, end_key).  # [BM]

    In pieces of the head dimension, and of q read again: nothing of it lives in registers before or long.
    """
    BLOCK_P: tl.constexpr = BLOCK_D if BLOCK_D < 32 else 32
    scores = tl.zeros([BLOCK_M], ACC)
    for piece in range(0, BLOCK_D, BLOCK_P):
        mean_key = mean_visual_key(sums_ptr, first_key, end_key, num_visual, piece, BLOCK_P, BLOCK_D, CHUNK, ACC)
        rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), num_rows - 1)[:, None]
        dims = piece + tl.arange(0, BLOCK_P)[None, :]
        ptrs = q_matrix.ptr + rows * tl.cast(q_matrix.stride, tl.int64) + dims
        q = tl.load(ptrs, mask=dims < HEAD_DIM, other=0.0)  # [BM, BP]
        scores += tl.sum(q.to(ACC) * mean_key[None, :], 1)
    return scores


@triton.jit(
    do_not_specialize=[
        "stride_lse_b",
        "stride_lse_h",
        "num_blocks",
        "max_seqlen_q",
        "max_seqlen_k",
        "group",
        "window_left",
        "stride_edges_b",
        "stride_bits_b",
        "stride_bits_s",
        "stride_tiles_b",
    ]
)
def forward_kernel(
    q_ptr,  # (B, Sq, H, D) or (T, H, D)
    k_ptr,  # (B, Sk, Hkv, D)
    v_ptr,  # (B, Sk, Hkv, DV)
    out_ptr,  # (B, Sq, H, DV)
    lse_ptr,  # (B, H, Sq) natural log
    cu_seqlens_q_ptr,  # (B + 1,), VARLEN only
    cu_seqlens_k_ptr,
    padding_ptr,  # (B, Sk) True = real token, HAS_PADDING only
    first_ptr,  # (B, Sq) int32 first visible key, or None: the window's
    end_ptr,  # (B, Sq) int32 one past the last visible key, or None: the window's
    bits_ptr,  # (B, Sq, words) int32 packed mask, HAS_BITS only
    tiles_ptr,  # (B, row tiles, key tiles) int8, HAS_BITS only
    text_ptr,  # (B, Sq) bool; this and the rest STATISTICS only
    ranges_ptr,  # (B, 4) first and past-last visual key, first and past-last text query
    columns_ptr,  # (L, 2, 128) per key 1 if visual else 0, and the prior or 0; see `column_offset`
    num_visual_ptr,  # (B,) visual keys per sample
    sums_ptr,  # (B, Hkv, chunks, BLOCK_D) sums of the visual keys in CHUNK keys
    closed_ptr,  # (B, H) negative where the closed form is not trusted, CLOSED_FORM only
    partials_ptr,  # (B, H, row blocks, 3) sums of variance, of semantic alignment, and the number of queries in them
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_lse_b,
    stride_lse_h,
    stride_sums_h,
    num_blocks,  # of rows; told again, since the compiler would keep the grid's size in a register all along
    max_seqlen_q,
    max_seqlen_k,
    group,  # query heads per kv head
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
    SPLIT_COLLECT: tl.constexpr,
    CLOSED_FORM: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One row block of one head: out and lse, and with STATISTICS this block's share of AV and SA.

    With CLOSED_FORM the variance of row blocks that see all of V counts as 0 here, where `moments.py` has it; blocks of
    other heads take the second look.
    Grid (row blocks, H, B). Late row blocks go first: under a causal mask they are the long ones.
    """
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

    scale = tl.cast(softmax_scale, ACC)
    softmax = Softmax(scale, base2_scale(scale, HAS_SOFTCAP), tl.cast(softcap, ACC) if HAS_SOFTCAP else None)
    # Only the right edge of the mask leaves a run of keys that every row sees; the others can hide a key anywhere.
    ANYWHERE: tl.constexpr = HAS_LEFT or HAS_PADDING or HAS_BITS
    rows = first_row + tl.arange(0, BLOCK_M)
    lo, full, hi = key_block_range(edges, first_row, BLOCK_M, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    row_max = tl.full([BLOCK_M], -float("inf"), ACC)
    row_sum = tl.zeros([BLOCK_M], ACC)
    alignment = tl.zeros([BLOCK_M], ACC)
    m1 = tl.zeros([BLOCK_M], ACC)
    m2 = tl.zeros([BLOCK_M], ACC)
    q = load_tile(q_matrix, first_row, num_rows, BLOCK_M, BLOCK_D, HEAD_DIM, True)  # [BM, D]

    running = _Running(acc, row_max, row_sum, alignment, m1, m2)
    collects = False
    pivot = row_sum
    if STATISTICS:
        text = tl.load(text_ptr + start_q + rows, mask=rows < num_rows, other=0) != 0  # [BM]
        num_visual = tl.load(num_visual_ptr + batch)
        collects, mixed = text_meets_visual(text, rows, edges, ranges_ptr, num_visual, batch, HAS_BITS)
        if CLOSED_FORM and collects:
            mixed = tl.load(closed_ptr + batch * tl.num_programs(1) + head) < 0.0
            collects = mixed == 0
        columns_ptr += column_offset(start_k, batch)
    collect_lo, collect_hi = visual_key_range(ranges_ptr, batch, collects, lo, full, hi, BLOCK_N, ANYWHERE, STATISTICS)
    SPLIT: tl.constexpr = SPLIT_COLLECT and not ANYWHERE
    collect_edge = tl.maximum(tl.minimum(collect_hi, full), collect_lo) if SPLIT else collect_lo
    for segment in tl.static_range(0 if STATISTICS else 3, 5):
        if segment == 0:  # before the first visual key
            start, end = lo, collect_lo
        elif segment == 1:  # the stretch with visual keys, as far as every row sees every key
            start, end = collect_lo, collect_edge
        elif segment == 2:  # and on to the edge of the mask
            start, end = collect_edge, collect_hi
        elif segment == 3:  # after it, every key visible to every row
            start, end = collect_hi, full
        else:  # up to the edge of the mask
            start, end = (collect_hi if ANYWHERE else tl.maximum(collect_hi, full)), hi
        if (segment == 1 if SPLIT else segment == 2) and not CLOSED_FORM and collects:
            # Only here, so that nothing of it lives in registers before.
            sums_ptr += (tl.cast(batch, tl.int64) * (tl.num_programs(1) // group) + head // group) * stride_sums_h
            visual_lo = tl.load(ranges_ptr + 4 * batch)
            visual_hi = tl.load(ranges_ptr + 4 * batch + 1)
            num_visual = tl.load(num_visual_ptr + batch)
            pivot = _mean_score(
                q_matrix,
                sums_ptr,
                first_row,
                num_rows,
                visual_lo,
                visual_hi,
                num_visual,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_M,
                CHUNK,
                ACC,
            )
            if HAS_SOFTCAP:
                pivot = soft_cap(pivot * scale, softmax.cap)
        # The guard keeps a skipped loop's accumulator from meeting one whose product is still under way: ptxas would
        # then let every wgmma of the kernel wait for the one before it.
        if not ((segment == 1 and not SPLIT) or (segment == 3 and ANYWHERE)) and start < end:
            running = _attend(
                running,
                q,
                pivot,
                k_matrix,
                v_matrix,
                edges,
                mask,
                columns_ptr,
                start,
                end,
                first_row,
                softmax,
                HEAD_DIM,
                HEAD_DIM_V,
                BLOCK_D,
                BLOCK_DV,
                BLOCK_M,
                BLOCK_N,
                ANYWHERE or segment == 2 or segment == 4,  # MASKED
                STATISTICS,
                segment == 1 or segment == 2,  # COLLECT
                not CLOSED_FORM,  # MOMENTS
                PRECISION,
            )

    acc, row_max, row_sum, alignment, m1, m2 = running
    unseen = row_sum == 0.0  # not a comparison that NaN fails: bad inputs must show in the output
    row_sum = tl.where(unseen, 1.0, row_sum)
    out_matrix = head_matrix(out_ptr, batch, head, start_q, stride_ob, stride_os, stride_oh, VARLEN)
    lse_ptr = row_pointer(lse_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN)
    store_tile(out_matrix, acc / row_sum[:, None], first_row, num_rows, BLOCK_M, BLOCK_DV, HEAD_DIM_V)
    lse = tl.where(unseen, -float("inf"), (row_max + tl.log2(row_sum)) * LN_2)
    tl.store(lse_ptr + rows, lse, mask=rows < num_rows)
    if STATISTICS:
        # All of it again, and by another argument, so that the loops need not hold it in registers.
        text_ptr = row_pointer(text_ptr, batch, 0, start_q, stride_lse_h, 0, VARLEN)
        text = tl.load(text_ptr + rows, mask=rows < num_rows, other=0) != 0  # [BM]
        num_visual = tl.load(num_visual_ptr + batch)
        collects, mixed = text_meets_visual(text, rows, edges, ranges_ptr, num_visual, batch, HAS_BITS)
        if CLOSED_FORM and collects:
            mixed = tl.load(closed_ptr + batch * tl.num_programs(1) + head) < 0.0
            collects = mixed == 0
        counts = text & collects
        count = tl.zeros([BLOCK_M], ACC) + num_visual
        alignment = alignment / row_sum
        if mixed:
            # Rows that see different visual keys: a second look at those alone, when all registers are free again.
            lse = tl.where(unseen, float("inf"), row_max + tl.log2(row_sum))
            start, end = visual_key_range(ranges_ptr, batch, True, lo, full, hi, BLOCK_N, True, True)
            count, _mean, m2, alignment = visual_statistics(
                q,
                lse,
                k_matrix,
                edges,
                mask,
                None,
                None,
                columns_ptr,
                None,
                start,
                end,
                first_row,
                softmax,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_M,
                BLOCK_N,
                PRECISION,
            )
            counts = text & (count >= 2.0)
            m1 = tl.zeros([BLOCK_M], ACC)
        if HAS_SOFTCAP:  # the pivot is not the mean
            m2 -= m1 * m1 / tl.maximum(count, 1.0)
        unit = 1.0 if HAS_SOFTCAP else scale  # one unit of the scores that the moments were taken of
        variance = tl.where(counts, m2 / tl.maximum(count - 1.0, 1.0), 0.0) * unit * unit
        alignment = tl.where(counts, alignment, 0.0)
        store_partials(partials_ptr, batch, head, block, num_blocks, variance, alignment, counts.to(ACC))
