"""The statistics of the text queries over the visual keys alone, from the log-sum-exp of any attention forward."""

import triton
import triton.language as tl

from sar_kernels.primitives import (
    base2_scale,
    column_offset,
    edge_offset,
    head_matrix,
    is_in_run,
    key_block_range,
    load_bits,
    load_columns,
    load_keys_mask,
    load_lse,
    load_tile,
    product_scores,
    row_edges,
    row_pointer,
    sequence_bounds,
    shifted,
    store_partials,
    text_meets_visual,
    update_moments,
)
from sar_kernels.structs import Edges, Mask, Softmax


@triton.jit
def visual_statistics(
    q,
    lse,
    k_matrix,
    edges,
    mask,
    visual_ptr,
    prior_ptr,
    columns_ptr,
    tiles_ptr,
    start,
    end,
    first_row,
    softmax,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(count, mean, M2, alignment) per row over the visual keys that it sees in [start, end).  # [BM] each

    With tiles_ptr, in the key tiles tiles_ptr[start:end] instead. What is visual, not padding, and its prior come from
    the columns if there are some, else from the three masks. lse is in base-2 units, +inf for rows whose weights are to
    be 0. mean and M2 are in units of `scores`.
    """
    STEP: tl.constexpr = BLOCK_N if tiles_ptr is None else 1
    rows = first_row + tl.arange(0, BLOCK_M)
    row_first, row_last = row_edges(edges, rows)
    row_first, row_last = row_first[:, None], row_last[:, None]  # [BM, 1]
    alignment = tl.zeros_like(lse)
    count = tl.zeros_like(lse)
    mean = tl.zeros_like(lse)
    m2 = tl.zeros_like(lse)
    for step in range(start, end, STEP):
        first_key = step
        if tiles_ptr is not None:
            first_key = tl.load(tiles_ptr + step) * BLOCK_N
        k = load_tile(k_matrix, first_key, edges.num_keys, BLOCK_N, BLOCK_D, HEAD_DIM, True)  # [BN, D]
        scores = product_scores(q, k, softmax, PRECISION)  # [BM, BN]
        keys = first_key + tl.arange(0, BLOCK_N)
        if columns_ptr is not None:
            visual, prior = load_columns(columns_ptr, first_key, BLOCK_N)  # [BN] each
            visual = visual > 0.0
        else:
            visual = load_keys_mask(visual_ptr, first_key, edges.num_keys, BLOCK_N)  # [BN]
            prior = tl.load(prior_ptr + keys, mask=visual, other=0.0)  # [BN]
        selected = visual[None, :] & is_in_run(edges, row_first, row_last, keys[None, :])
        if mask.padding_ptr is not None and columns_ptr is None:
            selected = selected & load_keys_mask(mask.padding_ptr, first_key, edges.num_keys, BLOCK_N)[None, :]
        if mask.bits_ptr is not None:
            selected = selected & load_bits(mask, rows, first_key, edges.num_rows, BLOCK_N, False)
        scores = tl.where(selected, scores, -float("inf"))
        # The mask is read back off the scores: a tile of predicates would have to stay in registers.
        count, mean, m2 = update_moments(scores, scores > -float("inf"), count, mean, m2)
        weights = tl.exp2(scores * softmax.scale_log2 - lse[:, None])  # [BM, BN], 0 where not selected
        alignment += tl.sum(weights * prior[None, :], 1)
    return count, mean, m2, alignment


@triton.jit
def visual_alignment(
    q,
    lse,
    k_matrix,
    columns_ptr,
    tiles_ptr,
    start,
    end,
    num_keys,
    softmax,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The alignment of rows that see all visual keys, in the key tiles tiles_ptr[start:end]; no soft cap.  # [BM]"""
    alignment = tl.zeros_like(lse)
    for index in range(start, end):
        first_key = tl.load(tiles_ptr + index) * BLOCK_N
        k = load_tile(k_matrix, first_key, num_keys, BLOCK_N, BLOCK_D, HEAD_DIM, True)  # [BN, D]
        scores = product_scores(q, k, softmax, PRECISION)  # [BM, BN]
        visual, prior = load_columns(columns_ptr, first_key, BLOCK_N)  # [BN] each
        weights = tl.exp2(scores * softmax.scale_log2 - lse[:, None])
        # others' weights, of keys that a row does not see among them, may be infinite
        alignment += tl.sum(tl.where((visual > 0.0)[None, :], weights, 0.0) * prior[None, :], 1)
    return alignment


@triton.jit(
    do_not_specialize=[
        *("stride_lse_b", "stride_lse_h", "max_seqlen_q", "max_seqlen_k", "group", "window_left", "stride_edges_b"),
        *("stride_bits_b", "stride_bits_s", "stride_visual_tiles_b"),
    ]
)
def statistics_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    padding_ptr,
    first_ptr,  # (B, Sq) int32, this and the next or None: the window's edges
    end_ptr,
    bits_ptr,  # (B, Sq, words) int32, HAS_BITS only
    visual_ptr,
    text_ptr,
    prior_ptr,
    ranges_ptr,
    visual_tiles_ptr,  # (B, 2, 1 + key tiles) int32 of `store_visual_tiles`
    columns_ptr,  # visual keys and prior as the forward has them; this and the next two CLOSED_FORM only
    num_visual_ptr,  # (B,)
    closed_ptr,  # (B, H) negative where the closed form is not trusted
    partials_ptr,  # (B, H, row blocks, 3), not GRADIENT
    variance_gain_ptr,  # (B, H) gradient of each counting query's variance; this and the rest GRADIENT only
    alignment_gain_ptr,  # (B, H) gradient of each counting query's semantic alignment, over c
    delta_ptr,  # (B, H, Sq) in place, over c too: += alignment gain * semantic alignment
    row_mean_ptr,  # (B, H, Sq) out
    row_slope_ptr,  # (B, H, Sq) out
    row_gain_ptr,  # (B, H, Sq) out
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
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
    stride_visual_tiles_b,
    softmax_scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    CLOSED_FORM: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Recomputes the text-by-visual scores of one row block of one head. Grid (row blocks, H, B).

    Its loop runs over a list of the key tiles that hold visual keys: a branch in it would end the pipeline.
    Without GRADIENT it writes the partial sums of AV and SA that the forward kernel would have written; CLOSED_FORM as
    there. With it, it writes per row what dK/dV and dQ need to carry the gradient through the statistics.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    start_q, num_rows = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q, VARLEN)
    start_k, num_keys = sequence_bounds(cu_seqlens_k_ptr, batch, max_seqlen_k, VARLEN)
    first_row = block * BLOCK_M
    if first_row >= num_rows:
        return
    if not GRADIENT:  # the weights read no sums from beyond the text queries
        text_lo, text_hi = tl.load(ranges_ptr + 4 * batch + 2), tl.load(ranges_ptr + 4 * batch + 3)
        if (first_row >= text_hi) | (first_row + BLOCK_M <= text_lo):
            return

    q_matrix = head_matrix(q_ptr, batch, head, start_q, stride_qb, stride_qs, stride_qh, VARLEN)
    k_matrix = head_matrix(k_ptr, batch, head // group, start_k, stride_kb, stride_ks, stride_kh, VARLEN)
    lse_ptr = row_pointer(lse_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN)
    visual_ptr += start_k
    prior_ptr += start_k
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
        None,
    )

    scale = tl.cast(softmax_scale, ACC)
    softmax = Softmax(scale, base2_scale(scale, HAS_SOFTCAP), tl.cast(softcap, ACC) if HAS_SOFTCAP else None)
    unit = tl.cast(1.0, ACC) if HAS_SOFTCAP else scale
    rows = first_row + tl.arange(0, BLOCK_M)
    in_range = rows < num_rows
    text = tl.load(text_ptr + start_q + rows, mask=in_range, other=0) != 0  # [BM]
    has_text = tl.max(text.to(tl.int32), 0) != 0
    lo, _, hi = key_block_range(edges, first_row, BLOCK_M, BLOCK_N)
    visual_tiles_ptr += batch * stride_visual_tiles_b
    start = tl.load(visual_tiles_ptr + tl.minimum(lo, num_keys) // BLOCK_N)
    end = tl.where(has_text, tl.load(visual_tiles_ptr + tl.cdiv(hi, BLOCK_N)), start)
    tiles_ptr = visual_tiles_ptr + 1 + tl.cdiv(num_keys, BLOCK_N)

    q = load_tile(q_matrix, first_row, num_rows, BLOCK_M, BLOCK_D, HEAD_DIM, True)  # [BM, D]
    lse = load_lse(lse_ptr, rows, num_rows)  # [BM]
    sees_all = False
    if CLOSED_FORM:
        num_visual = tl.load(num_visual_ptr + batch)
        sees_all, _ = text_meets_visual(text, rows, edges, ranges_ptr, num_visual, batch, HAS_BITS)
        sees_all = sees_all & (tl.load(closed_ptr + batch * tl.num_programs(1) + head) >= 0.0)
    count = tl.zeros([BLOCK_M], ACC)
    mean = tl.zeros([BLOCK_M], ACC)
    m2 = tl.zeros([BLOCK_M], ACC)
    alignment = tl.zeros([BLOCK_M], ACC)
    if CLOSED_FORM and sees_all:  # `moments.py` has their variance
        columns_ptr += column_offset(start_k, batch)
        count += num_visual
        alignment = visual_alignment(
            q,
            lse,
            k_matrix,
            columns_ptr,
            tiles_ptr,
            start,
            end,
            num_keys,
            softmax,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            PRECISION,
        )
    else:
        count, mean, m2, alignment = visual_statistics(
            q,
            lse,
            k_matrix,
            edges,
            mask,
            visual_ptr,
            prior_ptr,
            None,
            tiles_ptr,
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
    alignment = tl.where(counts, alignment, 0.0)
    freedom = tl.maximum(count - 1.0, 1.0)
    if GRADIENT:
        delta_ptr = row_pointer(delta_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN)
        row_mean_ptr = row_pointer(row_mean_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN)
        row_slope_ptr = row_pointer(row_slope_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN)
        row_gain_ptr = row_pointer(row_gain_ptr, batch, head, start_q, stride_lse_b, stride_lse_h, VARLEN)
        offset = tl.cast(batch, tl.int64) * tl.num_programs(1) + head
        gain = tl.where(counts, tl.load(alignment_gain_ptr + offset), 0.0)
        slope = tl.where(counts, tl.load(variance_gain_ptr + offset) * 2.0 * unit / freedom, 0.0)
        delta = tl.load(delta_ptr + rows, mask=in_range, other=0.0)
        tl.store(delta_ptr + rows, delta + gain * alignment, mask=in_range)
        tl.store(row_mean_ptr + rows, mean, mask=in_range)
        tl.store(row_slope_ptr + rows, slope, mask=in_range)
        tl.store(row_gain_ptr + rows, gain, mask=in_range)
    else:
        variance = tl.where(counts, m2 / freedom, 0.0) * unit * unit
        store_partials(partials_ptr, batch, head, block, tl.num_programs(0), variance, alignment, counts.to(ACC))
