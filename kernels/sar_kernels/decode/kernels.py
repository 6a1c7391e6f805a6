"""Decode kernels: attention over a KV cache in splits, and the merge that also re-weights the heads.

A step is two launches. The split kernel is flash attention of a few queries over one stretch of the cache; the combine
kernel merges the stretches of one head. A head's scale depends on all heads of its sample, so every combine program
reads the sample's statistics (a few floats per head and split, from L2) and computes all the weights itself. That costs
less than a third launch or a grid-wide barrier, and keeps B * H programs busy on the output.

The statistics are taken of every key tile, visual keys or not: decode waits for memory, so they are free, whereas a
branch around them in the loop was seen to take all 255 registers and to spill (sm_90, D = 128; 192 without it).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sar_kernels.primitives import (
    LN_2,
    base2_scale,
    edge_offset,
    load_keys_mask,
    load_tile,
    product_scores,
    row_edges,
    shifted,
    softmax_over_heads,
    softmax_weights,
    visible_mask,
)
from sar_kernels.structs import Edges, Mask, Matrix, Softmax


class _Cache(NamedTuple):
    """Keys or values of one head of one sample."""

    ptr: Any  # to the sample's first entry, or the first page's
    table_ptr: Any  # (pages,) int32 pages of the sample, or None: a contiguous cache
    stride_b: Any  # elements from a page to the next
    stride_s: Any  # elements from an entry to the next


@triton.jit
def _length(lengths_ptr, batch, capacity):
    """Keys of one sample."""
    length = capacity
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + batch), capacity)
    return length


@triton.jit
def _split_layout(edges, num_splits, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr):
    """First key block that any query sees, one past the last key, key blocks per split, and how many splits hold any.

    The keys in view, not the cache's capacity, are shared out, so that a short sample or a window uses every split.
    """
    length = edges.num_keys
    lo = 0
    hi = length
    if edges.first_ptr is not None or edges.end_ptr is not None:
        queries = tl.arange(0, BLOCK_Q)
        first, last = row_edges(edges, queries)
        sees = queries < edges.num_rows
        if edges.left is not None and edges.right is not None:
            sees = sees & (first <= last)
        if edges.left is not None:
            lo = tl.maximum(tl.min(tl.where(sees, first, length), 0), 0)
        if edges.right is not None:
            hi = tl.minimum(tl.max(tl.where(sees, last + 1, 0), 0), length)
    elif edges.left is not None:
        lo = tl.maximum(length - edges.num_rows - edges.left, 0)
    block = lo // BLOCK_N
    blocks = tl.maximum(tl.cdiv(hi, BLOCK_N) - block, 0)
    per_split = tl.maximum(tl.cdiv(blocks, num_splits), 1)
    return block, hi, per_split, tl.cdiv(blocks, per_split)


@triton.jit
def _load_cache(
    cache,
    first_key,
    num_keys,
    real,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLS: tl.constexpr,
    NUM_COLS: tl.constexpr,
):
    """Cache entries first_key .. first_key + BLOCK_N of one sample and head, zeros beyond num_keys.  # [BN, COLS]

    PAGE = 0 is a contiguous cache. real: [BN], or None: zeros where it says False, since what padding hides need not be
    finite, and 0 * NaN is NaN.
    """
    if real is not None:
        keys = first_key + tl.arange(0, BLOCK_N)
        cols = tl.arange(0, COLS)[None, :]
        offsets = keys.to(tl.int64) * cache.stride_s
        if PAGE != 0:
            pages = tl.load(cache.table_ptr + keys // PAGE, mask=real, other=0).to(tl.int64)  # [BN]
            offsets = pages * cache.stride_b + (keys % PAGE).to(tl.int64) * cache.stride_s
        return tl.load(cache.ptr + offsets[:, None] + cols, mask=real[:, None] & (cols < NUM_COLS), other=0.0)
    if PAGE == 0:
        return load_tile(Matrix(cache.ptr, cache.stride_s), first_key, num_keys, BLOCK_N, COLS, NUM_COLS, True)
    elif PAGE % BLOCK_N == 0:  # a tile lies in one page: one look-up
        page = tl.load(cache.table_ptr + first_key // PAGE).to(tl.int64)
        ptr = cache.ptr + (page * cache.stride_b + tl.cast(first_key % PAGE, tl.int64) * cache.stride_s)
        return load_tile(Matrix(ptr, cache.stride_s), 0, num_keys - first_key, BLOCK_N, COLS, NUM_COLS, True)
    else:
        keys = first_key + tl.arange(0, BLOCK_N)
        cols = tl.arange(0, COLS)[None, :]
        pages = tl.load(cache.table_ptr + keys // PAGE, mask=keys < num_keys, other=0).to(tl.int64)  # [BN]
        ptrs = cache.ptr + (pages * cache.stride_b + (keys % PAGE).to(tl.int64) * cache.stride_s)[:, None] + cols
        return tl.load(ptrs, mask=(keys < num_keys)[:, None] & (cols < NUM_COLS), other=0.0)


@triton.jit(
    do_not_specialize=[
        *("stride_table_b", "stride_visual_b", "stride_prior_b", "plane", "capacity", "seqlen_q", "num_heads", "group"),
        *("window_left", "window_right", "stride_padding_b", "stride_edges_b", "stride_bits_b", "stride_bits_s"),
    ]
)
def decode_split_kernel(
    q_ptr,  # (B, Sq, H, D)
    k_ptr,  # (B, Smax, Hkv, D) or (blocks, PAGE, Hkv, D)
    v_ptr,  # (B, Smax, Hkv, DV) or (blocks, PAGE, Hkv, DV)
    lengths_ptr,  # (B,) int32, or None: the cache is full
    table_ptr,  # (B, pages) int32, paged only
    padding_ptr,  # (B, Smax) True = real token, HAS_PADDING only
    first_ptr,  # (B, Sq) int32 first visible key, or None: the window's
    end_ptr,  # (B, Sq) int32 one past the last visible key, or None: the window's
    bits_ptr,  # (B, Sq, words) int32 packed mask, HAS_BITS only
    visual_ptr,  # (B, Smax) bool; this and the next STATISTICS only
    prior_ptr,  # (B, Smax)
    av_sum_ptr,  # (B, H); this and the next three RUNNING only
    sa_sum_ptr,  # (B, H)
    count_ptr,  # (B,)
    carried_ptr,  # (B, 2 H + 1) out: the sums and the count as they were before this step
    partial_out_ptr,  # (B, H, Sq, splits, DV) out
    partials_ptr,  # (5, B, H, Sq, splits) out: base-2 lse; count, mean and M2 of the visual scores; SA
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_table_b,
    stride_padding_b,
    stride_edges_b,
    stride_bits_b,
    stride_bits_s,
    stride_visual_b,
    stride_prior_b,
    plane,  # elements of one of the partials' five planes
    capacity,
    seqlen_q,
    num_heads,
    group,  # query heads per kv head
    window_left,
    window_right,
    softmax_scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    RUNNING: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One split of the keys for a tile of rows; a row is one query of one of the heads that share a kv head.

    Grid (B * Hkv, splits, row tiles): only the first axis has room for any batch. A split without keys writes nothing:
    the combine kernel knows which those are.
    """
    split = tl.program_id(1)
    kv_heads = num_heads // group
    batch = tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    batch64 = batch.to(tl.int64)
    if RUNNING:
        # The combine programs all read the old sums while one of them writes the new: they read this copy.
        is_first = (split == 0) & (kv_head == 0) & (tl.program_id(2) == 0)
        if is_first:
            heads = tl.arange(0, BLOCK_H)
            is_head = heads < num_heads
            copy_ptr = carried_ptr + batch64 * (2 * num_heads + 1)
            tl.store(copy_ptr + heads, tl.load(av_sum_ptr + batch64 * num_heads + heads, mask=is_head), mask=is_head)
            copy_ptr += num_heads
            tl.store(copy_ptr + heads, tl.load(sa_sum_ptr + batch64 * num_heads + heads, mask=is_head), mask=is_head)
            tl.store(copy_ptr + num_heads, tl.load(count_ptr + batch))

    num_keys = _length(lengths_ptr, batch, capacity)
    offset = edge_offset(batch, 0, stride_edges_b, False)
    edges = Edges(
        seqlen_q,
        num_keys,
        window_left if HAS_LEFT else None,
        window_right if HAS_RIGHT else None,
        shifted(first_ptr, offset),
        shifted(end_ptr, offset),
    )
    first_block, end_key, per_split, used = _split_layout(edges, tl.num_programs(1), BLOCK_N, BLOCK_Q)
    if split >= used:
        return
    start = (first_block + split * per_split) * BLOCK_N
    end = tl.minimum(start + per_split * BLOCK_N, end_key)

    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = rows < group * seqlen_q
    queries = rows // group
    heads_in_group = rows % group
    head_dims = tl.arange(0, BLOCK_D)[None, :]
    q_ptr += batch64 * stride_qb + tl.cast(kv_head * group, tl.int64) * stride_qh
    # 64-bit: queries are not counted within a tile, and the stride from head to head has no limit
    q_ptrs = q_ptr + (queries.to(tl.int64) * stride_qs + heads_in_group.to(tl.int64) * stride_qh)[:, None] + head_dims
    q = tl.load(q_ptrs, mask=in_range[:, None] & (head_dims < HEAD_DIM), other=0.0)  # [BM, D]
    k_ptr += tl.cast(kv_head, tl.int64) * stride_kh
    v_ptr += tl.cast(kv_head, tl.int64) * stride_vh
    if PAGE == 0:
        k_ptr += batch64 * stride_kb
        v_ptr += batch64 * stride_vb
    else:
        table_ptr += batch64 * stride_table_b
    k_cache = _Cache(k_ptr, table_ptr, stride_kb, stride_ks)
    v_cache = _Cache(v_ptr, table_ptr, stride_vb, stride_vs)
    mask = Mask(
        shifted(padding_ptr, batch64 * stride_padding_b),
        shifted(bits_ptr, batch64 * stride_bits_b),
        stride_bits_s,
        None,
    )
    if STATISTICS:
        visual_ptr += batch64 * stride_visual_b
        prior_ptr += batch64 * stride_prior_b

    scale = tl.cast(softmax_scale, ACC)
    softmax = Softmax(scale, base2_scale(scale, HAS_SOFTCAP), tl.cast(softcap, ACC) if HAS_SOFTCAP else None)
    unit = tl.cast(1.0, ACC) if HAS_SOFTCAP else scale
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    row_max = tl.full([BLOCK_M], -float("inf"), ACC)
    # Of every place in a tile by itself, and merged after the loop: a sum over keys is a barrier in every tile.
    sums = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    alignments = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    counts = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    means = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    m2s = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for first_key in range(start, end, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        if STATISTICS:  # asked for before anything waits: no pipeline carries these two
            visual = load_keys_mask(visual_ptr, first_key, num_keys, BLOCK_N)  # [BN]
            prior = tl.load(prior_ptr + keys, mask=keys < num_keys, other=0.0).to(ACC)  # [BN]
        real = None
        if HAS_PADDING:
            real = load_keys_mask(mask.padding_ptr, first_key, num_keys, BLOCK_N)  # [BN]
        k = _load_cache(k_cache, first_key, num_keys, None, PAGE, BLOCK_N, BLOCK_D, HEAD_DIM)  # [BN, D]
        scores = product_scores(q, k, softmax, PRECISION)  # [BM, BN]
        row_first, row_last = row_edges(edges, queries)  # here, where registers are short: they outlive no tile
        row_first, row_last = row_first[:, None], row_last[:, None]  # [BM, 1]
        visible = visible_mask(edges, mask, queries, row_first, row_last, keys, real, first_key, BLOCK_N, False)
        scores = tl.where(visible, scores, -float("inf"))
        if STATISTICS:  # the moments first: their temporaries are dead before the softmax's are born
            # Reading the mask back off the scores spares a tile of predicates.
            selected = visual[None, :] & (scores > -float("inf"))
            counts, means, m2s = _add_moments(scores, selected, counts, means, m2s)
        weights, rescale, row_max = softmax_weights(scores, row_max, softmax.scale_log2, True)
        sums = sums * rescale[:, None] + weights
        if STATISTICS:
            alignments = alignments * rescale[:, None] + weights * tl.where(visual, prior, 0.0)[None, :]
        v = _load_cache(v_cache, first_key, num_keys, real, PAGE, BLOCK_N, BLOCK_DV, HEAD_DIM_V)  # [BN, DV]
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)  # [BM, DV]

    row_sum = tl.sum(sums, 1)
    unseen = row_sum == 0.0  # not a comparison that NaN fails: bad inputs must show in the output
    row_sum = tl.where(unseen, 1.0, row_sum)
    head_rows = (batch64 * num_heads + kv_head * group + heads_in_group) * seqlen_q + queries
    index = head_rows * tl.num_programs(1) + split  # [BM]
    columns = tl.arange(0, BLOCK_DV)[None, :]
    out_ptrs = partial_out_ptr + index[:, None] * HEAD_DIM_V + columns
    tl.store(out_ptrs, acc / row_sum[:, None], mask=in_range[:, None] & (columns < HEAD_DIM_V))
    ptrs = partials_ptr + index
    tl.store(ptrs, tl.where(unseen, -float("inf"), row_max + tl.log2(row_sum)), mask=in_range)
    if STATISTICS:
        count, mean, m2 = _merged_moments(counts, means, m2s)
        plane = tl.cast(plane, tl.int64)
        tl.store(ptrs + plane, count, mask=in_range)
        tl.store(ptrs + 2 * plane, mean * unit, mask=in_range)
        tl.store(ptrs + 3 * plane, m2 * unit * unit, mask=in_range)
        tl.store(ptrs + 4 * plane, tl.sum(alignments, 1) / row_sum, mask=in_range)


@triton.jit
def _add_moments(scores, selected, counts, means, m2s):
    """Adds a tile's selected entries to the (count, mean, M2) of their places, [BM, BN] all."""
    counts += selected.to(counts.dtype)
    deviation = tl.where(selected, scores - means, 0.0)
    means += deviation / tl.maximum(counts, 1.0)
    m2s += tl.where(selected, deviation * (scores - means), 0.0)
    return counts, means, m2s


@triton.jit
def _merged_moments(counts, means, m2s):
    """Those of all places of a row, about their common mean.  # [BM] each"""
    count = tl.sum(counts, 1)
    mean = tl.sum(counts * means, 1) / tl.maximum(count, 1.0)
    spread = means - mean[:, None]
    return count, mean, tl.sum(m2s + counts * spread * spread, 1)


@triton.jit
def _softmax_step(lse, top, total, AXIS: tl.constexpr):
    """Adds splits (along AXIS) to a running softmax in base 2: their weights, the factor for older sums, max, total."""
    new_top = tl.maximum(top, tl.max(lse, AXIS))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.exp2(lse - (tl.expand_dims(shift, AXIS) if AXIS == 1 else shift))
    rescale = tl.exp2(top - shift)
    return weights, rescale, new_top, total * rescale + tl.sum(weights, AXIS)


@triton.jit
def _query_statistics(
    partials_ptr, rows, is_head, used, plane, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr
):
    """One query's variance, semantic alignment and whether it counts, for every head.  # [BH] each

    rows: index of each head's first split. Groups of splits are merged about their common mean.
    """
    top = tl.full([BLOCK_H], -float("inf"), ACC)
    total = tl.zeros([BLOCK_H], ACC)
    alignment = tl.zeros([BLOCK_H], ACC)
    count = tl.zeros([BLOCK_H], ACC)
    mean = tl.zeros([BLOCK_H], ACC)
    m2 = tl.zeros([BLOCK_H], ACC)
    for first in range(0, used, BLOCK_S):
        splits = first + tl.arange(0, BLOCK_S)
        mask = is_head[:, None] & (splits < used)[None, :]
        ptrs = partials_ptr + rows[:, None] + splits[None, :]  # [BH, BS]
        lse = tl.load(ptrs, mask=mask, other=-float("inf"))
        weights, rescale, top, total = _softmax_step(lse, top, total, 1)
        alignment = alignment * rescale + tl.sum(weights * tl.load(ptrs + 4 * plane, mask=mask, other=0.0), 1)
        counts = tl.load(ptrs + plane, mask=mask, other=0.0)
        means = tl.load(ptrs + 2 * plane, mask=mask, other=0.0)
        new_count = count + tl.sum(counts, 1)
        new_mean = (count * mean + tl.sum(counts * means, 1)) / tl.maximum(new_count, 1.0)
        spread = means - new_mean[:, None]
        m2 += tl.sum(tl.load(ptrs + 3 * plane, mask=mask, other=0.0) + counts * spread * spread, 1)
        m2 += count * (mean - new_mean) * (mean - new_mean)
        count = new_count
        mean = new_mean
    counts = count >= 2.0  # a variance needs two keys
    variance = tl.where(counts, m2 / tl.maximum(count - 1.0, 1.0), 0.0)
    alignment = tl.where(counts, alignment / tl.where(total == 0.0, 1.0, total), 0.0)
    return variance, alignment, counts.to(ACC)


@triton.jit(
    do_not_specialize=[
        *("stride_text_b", "plane", "capacity", "seqlen_q", "num_heads", "num_splits", "window_left", "window_right"),
        "stride_edges_b",
    ]
)
def decode_combine_kernel(
    partial_out_ptr,  # (B, H, Sq, splits, DV)
    partials_ptr,  # (5, B, H, Sq, splits)
    lengths_ptr,  # (B,) int32 or None
    first_ptr,  # (B, Sq) int32 or None, and the next, as in the split kernel
    end_ptr,
    text_ptr,  # (B, Sq) bool, "step" and "running" only
    carried_ptr,  # (B, 2 H + 1), "running" only
    av_sum_ptr,  # (B, H) the sums: "running" writes them, perhaps elsewhere; "prompt" reads them, or None
    sa_sum_ptr,  # (B, H)
    count_ptr,  # (B,)
    head_weights_ptr,  # (B, H), "prompt" only
    out_ptr,  # (B, Sq, H, DV) out, contiguous; the rest are outputs too
    lse_ptr,  # (B, H, Sq)
    av_ptr,  # (B, H); this and the next three unless "plain"
    sa_ptr,  # (B, H)
    c_ptr,  # (B, H)
    count_out_ptr,  # (B,)
    stride_text_b,
    plane,
    capacity,
    seqlen_q,
    num_heads,
    num_splits,
    window_left,
    window_right,
    stride_edges_b,
    beta,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,  # splits at a time in the statistics
    BLOCK_O: tl.constexpr,  # splits at a time in the output
    BLOCK_Q: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    PROTECT_FIRST: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    MODE: tl.constexpr,  # "plain", "step", "running" or "prompt"
    ACC: tl.constexpr,
):
    """Merges the splits of one head: out and lse, scaled by the head's weight. Grid (B, H).

    Every program computes the weights of all its sample's heads; head 0's writes them and the state.
    """
    batch = tl.program_id(0)
    head = tl.program_id(1)
    batch64 = batch.to(tl.int64)
    num_keys = _length(lengths_ptr, batch, capacity)
    offset = edge_offset(batch, 0, stride_edges_b, False)
    edges = Edges(
        seqlen_q,
        num_keys,
        window_left if HAS_LEFT else None,
        window_right if HAS_RIGHT else None,
        shifted(first_ptr, offset),
        shifted(end_ptr, offset),
    )
    _, _, _, used = _split_layout(edges, num_splits, BLOCK_N, BLOCK_Q)
    scale = tl.cast(1.0, ACC)
    if MODE != "plain":
        heads = tl.arange(0, BLOCK_H)
        is_head = heads < num_heads
        per_head = batch64 * num_heads + heads  # [BH]
        if MODE == "prompt":
            variance = tl.zeros([BLOCK_H], ACC)
            alignment = tl.zeros([BLOCK_H], ACC)
            count = tl.cast(0.0, ACC)
            if av_sum_ptr is not None:
                variance = tl.load(av_sum_ptr + per_head, mask=is_head, other=0.0).to(ACC)
                alignment = tl.load(sa_sum_ptr + per_head, mask=is_head, other=0.0).to(ACC)
                count = tl.load(count_ptr + batch).to(ACC)
        else:
            variance = tl.zeros([BLOCK_H], ACC)
            alignment = tl.zeros([BLOCK_H], ACC)
            counts = tl.zeros([BLOCK_H], ACC)
            for query in range(0, seqlen_q):
                if tl.load(text_ptr + batch64 * stride_text_b + query) != 0:
                    rows = (per_head * seqlen_q + query) * num_splits
                    query_variance, query_alignment, query_counts = _query_statistics(
                        partials_ptr, rows, is_head, used, tl.cast(plane, tl.int64), BLOCK_H, BLOCK_S, ACC
                    )
                    variance += query_variance
                    alignment += query_alignment
                    counts += query_counts
            count = tl.max(counts, 0)  # the same for every head
            if MODE == "running":
                carried_ptr += batch64 * (2 * num_heads + 1)
                variance += tl.load(carried_ptr + heads, mask=is_head, other=0.0)
                alignment += tl.load(carried_ptr + num_heads + heads, mask=is_head, other=0.0)
                count += tl.load(carried_ptr + 2 * num_heads)
                if head == 0:
                    tl.store(av_sum_ptr + per_head, variance, mask=is_head)
                    tl.store(sa_sum_ptr + per_head, alignment, mask=is_head)
                    tl.store(count_ptr + batch, count)
        variance = variance / tl.maximum(count, 1.0)
        alignment = alignment / tl.maximum(count, 1.0)
        if MODE == "prompt":
            c = tl.load(head_weights_ptr + per_head, mask=is_head, other=0.0).to(ACC)
        else:
            c, _, _, _ = softmax_over_heads(
                variance * alignment, heads, num_heads, tl.cast(beta, ACC), PROTECT_FIRST, STANDARDIZE
            )
            c = tl.where(count > 0.0, c, 1.0)
        if head == 0:
            tl.store(av_ptr + per_head, variance, mask=is_head)
            tl.store(sa_ptr + per_head, alignment, mask=is_head)
            tl.store(c_ptr + per_head, c, mask=is_head)
            tl.store(count_out_ptr + batch, count)
        scale = tl.sum(tl.where(heads == head, c, 0.0), 0)

    columns = tl.arange(0, BLOCK_DV)
    for query in range(0, seqlen_q):
        row = (batch64 * num_heads + head) * seqlen_q + query
        top = tl.cast(-float("inf"), ACC)
        total = tl.cast(0.0, ACC)
        acc = tl.zeros([BLOCK_DV], ACC)
        for first in range(0, used, BLOCK_O):
            splits = first + tl.arange(0, BLOCK_O)
            index = row * num_splits + splits  # [BO]
            lse = tl.load(partials_ptr + index, mask=splits < used, other=-float("inf"))
            mask = (splits < used)[:, None] & (columns < HEAD_DIM_V)[None, :]
            partial = tl.load(partial_out_ptr + index[:, None] * HEAD_DIM_V + columns[None, :], mask=mask, other=0.0)
            weights, rescale, top, total = _softmax_step(lse, top, total, 0)
            acc = acc * rescale + tl.sum(weights[:, None] * partial, 0)
        unseen = total == 0.0
        total = tl.where(unseen, 1.0, total)
        out = acc / total * scale
        out_row = (batch64 * seqlen_q + query) * num_heads + head
        ptrs = out_ptr + out_row * HEAD_DIM_V + columns
        tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=columns < HEAD_DIM_V)
        tl.store(lse_ptr + row, tl.where(unseen, -float("inf"), (top + tl.log2(total)) * LN_2))
