"""From the partial sums of the statistics to head weights, and the scaling of the output by them."""

import triton
import triton.language as tl

from sar_kernels.primitives import (
    LEAST_WEIGHT,
    head_matrix,
    load_tile,
    sequence_bounds,
    softmax_over_heads,
    store_tile,
)


@triton.jit
def first_and_end(mask_ptr, and_ptr, length, BLOCK: tl.constexpr):
    """Index of the first True, one past the last, and their number; 0 all if there is none. and_ptr may be None."""
    first = length
    end = 0
    count = 0
    for offset in range(0, length, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        is_set = tl.load(mask_ptr + index, mask=index < length, other=0) != 0
        if and_ptr is not None:
            is_set = is_set & (tl.load(and_ptr + index, mask=index < length, other=0) != 0)
        first = tl.minimum(first, tl.min(tl.where(is_set, index, length), 0))
        end = tl.maximum(end, tl.max(tl.where(is_set, index + 1, 0), 0))
        count += tl.sum(is_set.to(tl.int32), 0)
    return tl.minimum(first, end), end, count


@triton.jit
def store_visual_tiles(tiles_ptr, visual_ptr, num_keys, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Numbers of the key tiles that hold visual keys, after how many of them come before each tile and before the end.

    tiles_ptr: room for 2 (1 + tiles).
    """
    num_tiles = tl.cdiv(num_keys, TILE)
    found = 0
    for offset in range(0, num_keys + 1, BLOCK):  # the end may begin a block
        tiles = offset // TILE + tl.arange(0, BLOCK // TILE)
        keys = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
        visual = tl.load(visual_ptr + keys, mask=keys < num_keys, other=0) != 0  # [tiles, TILE]
        holds = tl.max(visual.to(tl.int32), 1)  # [tiles]
        before = found + tl.cumsum(holds, 0) - holds
        tl.store(tiles_ptr + tiles, before, mask=tiles <= num_tiles)
        tl.store(tiles_ptr + 1 + num_tiles + before, tiles, mask=holds != 0)
        found += tl.sum(holds, 0)


@triton.jit(do_not_specialize=["max_seqlen_q", "max_seqlen_k", "stride_visual_tiles_b"])
def token_ranges_kernel(
    visual_ptr,  # (B, Sk) bool or (Tk,)
    text_ptr,  # (B, Sq) bool or (T,)
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    ranges_ptr,  # (B, 4) int32 out
    visual_tiles_ptr,  # (B, 2, 1 + tiles) int32 out, of `store_visual_tiles`
    stride_visual_tiles_b,
    max_seqlen_q,
    max_seqlen_k,
    VARLEN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Per sample: first and past-last visual key, first and past-last text query; and which key tiles hold visual
    keys. Grid (B,)."""
    batch = tl.program_id(0)
    start_q, num_rows = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q, VARLEN)
    start_k, num_keys = sequence_bounds(cu_seqlens_k_ptr, batch, max_seqlen_k, VARLEN)
    visual_lo, visual_hi, _ = first_and_end(visual_ptr + start_k, None, num_keys, BLOCK)
    text_lo, text_hi, _ = first_and_end(text_ptr + start_q, None, num_rows, BLOCK)
    tl.store(ranges_ptr + 4 * batch, visual_lo)
    tl.store(ranges_ptr + 4 * batch + 1, visual_hi)
    tl.store(ranges_ptr + 4 * batch + 2, text_lo)
    tl.store(ranges_ptr + 4 * batch + 3, text_hi)
    store_visual_tiles(visual_tiles_ptr + batch * stride_visual_tiles_b, visual_ptr + start_k, num_keys, BLOCK, TILE)


@triton.jit(do_not_specialize=["num_blocks", "num_heads"])
def head_weights_kernel(
    partials_ptr,  # (B, H, row blocks, 3)
    ranges_ptr,  # (B, 4)
    closed_ptr,  # (B, H) variances summed in closed form, which the partials lack (negative: they do not); or None
    variance_ptr,  # (B, H) AV
    alignment_ptr,  # (B, H) SA
    c_ptr,  # (B, H)
    count_ptr,  # (B,)
    num_blocks,
    num_heads,
    beta,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PROTECT_FIRST: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    ACC: tl.constexpr,
):
    """AV, SA and c of one sample. Blocks are added in a fixed order, so the result does not vary. Grid (B,)."""
    batch = tl.program_id(0)
    heads = tl.arange(0, BLOCK_H)
    is_head = heads < num_heads
    # Tiles are added and reduced once: Triton fails to compile a reduction of few heads that is accumulated in a loop.
    variances = tl.zeros([BLOCK_H, BLOCK_B], ACC)
    alignments = tl.zeros([BLOCK_H, BLOCK_B], ACC)
    queries = tl.zeros([BLOCK_H, BLOCK_B], ACC)
    base = (tl.cast(batch, tl.int64) * num_heads + heads) * num_blocks  # [BH]
    # Only row blocks that can hold a text query were given sums that matter.
    text_lo = tl.load(ranges_ptr + 4 * batch + 2) // BLOCK_M
    text_hi = tl.cdiv(tl.load(ranges_ptr + 4 * batch + 3), BLOCK_M)
    for first in range(text_lo, text_hi, BLOCK_B):
        blocks = first + tl.arange(0, BLOCK_B)
        mask = is_head[:, None] & (blocks < text_hi)[None, :]
        ptrs = partials_ptr + 3 * (base[:, None] + blocks[None, :])  # [BH, BB]
        variances += tl.load(ptrs, mask=mask, other=0.0)
        alignments += tl.load(ptrs + 1, mask=mask, other=0.0)
        queries += tl.load(ptrs + 2, mask=mask, other=0.0)
    counts = tl.sum(queries, 1)
    count = tl.max(counts, 0)  # the same for every head
    variance = tl.sum(variances, 1)
    if closed_ptr is not None:
        closed = tl.load(closed_ptr + batch * num_heads + heads, mask=is_head, other=0.0)
        variance += tl.where(closed < 0.0, 0.0, closed)
    variance = variance / tl.maximum(counts, 1.0)
    alignment = tl.sum(alignments, 1) / tl.maximum(counts, 1.0)
    c, _, _, _ = softmax_over_heads(
        variance * alignment, heads, num_heads, tl.cast(beta, ACC), PROTECT_FIRST, STANDARDIZE
    )
    c = tl.where(count > 0.0, c, 1.0)
    offsets = tl.cast(batch, tl.int64) * num_heads + heads
    tl.store(variance_ptr + offsets, variance, mask=is_head)
    tl.store(alignment_ptr + offsets, alignment, mask=is_head)
    tl.store(c_ptr + offsets, c, mask=is_head)
    tl.store(count_ptr + batch, count)


@triton.jit(do_not_specialize=["max_seqlen", "num_heads"])
def scale_heads_kernel(
    out_ptr,  # (B, S, H, DV) or (T, H, DV), contiguous; scaled in place
    c_ptr,  # (B, H)
    count_ptr,  # (B,)
    cu_seqlens_ptr,
    max_seqlen,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """out *= c on a tile of one head's rows. Grid (H, row blocks, B): neighbours in memory run side by side.

    A sample without a counting query is left alone.
    """
    head = tl.program_id(0)
    batch = tl.program_id(2)
    start, length = sequence_bounds(cu_seqlens_ptr, batch, max_seqlen, VARLEN)
    first = tl.program_id(1) * BLOCK_M
    if first >= length:
        return
    if tl.load(count_ptr + batch) == 0.0:
        return
    c = tl.load(c_ptr + tl.cast(batch, tl.int64) * num_heads + head)
    out_ptr += ((tl.cast(start, tl.int64) + first) * num_heads + head) * HEAD_DIM
    rows = tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = (rows < length - first) & (columns < HEAD_DIM)
    ptrs = out_ptr + rows * (num_heads * HEAD_DIM) + columns
    tl.store(ptrs, (tl.load(ptrs, mask=mask) * c).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["max_seqlen_q"])
def unscale_heads_kernel(
    dout_ptr,  # (B, Sq, H, DV) or (T, H, DV), strided
    out_ptr,
    c_ptr,  # (B, H)
    dplain_ptr,  # dout * c, contiguous
    plain_ptr,  # out / c, contiguous
    sums_ptr,  # (B, H, row blocks) sums of dout * out, or None
    cu_seqlens_q_ptr,
    stride_dob,
    stride_dos,
    stride_doh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_pb,
    stride_ps,
    stride_ph,
    max_seqlen_q,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    VARLEN: tl.constexpr,
    ACC: tl.constexpr,
):
    """From scaled attention to what a plain attention's backward takes, on rows of one head. Grid (row blocks, H, B).

    A head whose weight underflowed to 0 has out = 0 and gives no gradient, whatever stands for its plain output.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    start, num_rows = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q, VARLEN)
    first_row = block * BLOCK_M
    if first_row >= num_rows:
        return
    dout_matrix = head_matrix(dout_ptr, batch, head, start, stride_dob, stride_dos, stride_doh, VARLEN)
    out_matrix = head_matrix(out_ptr, batch, head, start, stride_ob, stride_os, stride_oh, VARLEN)
    dplain_matrix = head_matrix(dplain_ptr, batch, head, start, stride_pb, stride_ps, stride_ph, VARLEN)
    plain_matrix = head_matrix(plain_ptr, batch, head, start, stride_pb, stride_ps, stride_ph, VARLEN)
    index = tl.cast(batch, tl.int64) * tl.num_programs(1) + head
    c = tl.load(c_ptr + index)
    inverse = 1.0 / tl.maximum(c, LEAST_WEIGHT)
    total = tl.zeros([ROWS], ACC)
    for row in range(first_row, tl.minimum(first_row + BLOCK_M, num_rows), ROWS):  # few at once: registers
        dout = load_tile(dout_matrix, row, num_rows, ROWS, BLOCK_DV, HEAD_DIM_V, True).to(ACC)  # [ROWS, DV]
        out = load_tile(out_matrix, row, num_rows, ROWS, BLOCK_DV, HEAD_DIM_V, True).to(ACC)
        if sums_ptr is not None:
            total += tl.sum(dout * out, 1)
        store_tile(dplain_matrix, dout * c, row, num_rows, ROWS, BLOCK_DV, HEAD_DIM_V)
        store_tile(plain_matrix, out * inverse, row, num_rows, ROWS, BLOCK_DV, HEAD_DIM_V)
    if sums_ptr is not None:
        tl.store(sums_ptr + index * tl.num_programs(0) + block, tl.sum(total, 0))


@triton.jit(do_not_specialize=["max_seqlen_q", "num_blocks", "num_heads"])
def head_weights_backward_kernel(
    sums_ptr,  # (B, H, row blocks) sums of delta
    variance_ptr,  # (B, H) AV
    alignment_ptr,  # (B, H) SA
    count_ptr,  # (B,)
    dvariance_ptr,  # (B, H) incoming gradients of AV, SA and c, or None
    dalignment_ptr,
    dc_ptr,
    variance_gain_ptr,  # (B, H) out: gradient of each counting query's variance
    alignment_gain_ptr,  # (B, H) out: gradient of each counting query's semantic alignment, over c
    cu_seqlens_q_ptr,
    max_seqlen_q,
    num_blocks,
    num_heads,
    beta,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    VARLEN: tl.constexpr,
    PROTECT_FIRST: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradient of c, carried back through the softmax over heads to the per-query statistics. Grid (B,).

    sum(delta) is c * dL/dc, and the softmax's gradient needs dL/dc only times the weight: c = 0 is no special case.
    """
    batch = tl.program_id(0)
    _, num_rows = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q, VARLEN)
    heads = tl.arange(0, BLOCK_H)
    is_head = heads < num_heads
    offsets = tl.cast(batch, tl.int64) * num_heads + heads
    sums = tl.zeros([BLOCK_H, BLOCK_B], ACC)
    for first in range(0, tl.cdiv(num_rows, BLOCK_M), BLOCK_B):
        blocks = first + tl.arange(0, BLOCK_B)
        mask = is_head[:, None] & (blocks * BLOCK_M < num_rows)[None, :]
        sums += tl.load(sums_ptr + offsets[:, None] * num_blocks + blocks[None, :], mask=mask, other=0.0)
    grad = tl.sum(sums, 1)  # c * dL/dc
    variance = tl.load(variance_ptr + offsets, mask=is_head, other=0.0)
    alignment = tl.load(alignment_ptr + offsets, mask=is_head, other=0.0)
    count = tl.load(count_ptr + batch)
    beta = tl.cast(beta, ACC)
    c, w, z, std = softmax_over_heads(variance * alignment, heads, num_heads, beta, PROTECT_FIRST, STANDARDIZE)
    if dc_ptr is not None:
        grad += c * tl.load(dc_ptr + offsets, mask=is_head, other=0.0)
    largest = tl.min(tl.where(w == tl.max(w, 0), heads, BLOCK_H), 0)
    if PROTECT_FIRST:  # the first head's weight was the largest head's
        first_grad = tl.sum(tl.where(heads == 0, grad, 0.0), 0)
        grad = tl.where(heads == 0, 0.0, grad) + tl.where(heads == largest, first_grad, 0.0)
    dz = (grad - w / num_heads * tl.sum(grad, 0)) / tl.maximum(beta, LEAST_WEIGHT)
    # They add up to 0. The largest weight may be all of it but for rounding, and its own difference nothing but that.
    dz = tl.where(heads == largest, 0.0, dz)
    dz = tl.where(heads == largest, -tl.sum(dz, 0), dz)
    if STANDARDIZE:
        dz = tl.where(is_head, dz - tl.sum(dz, 0) / num_heads - z * (tl.sum(dz * z, 0) / num_heads), 0.0) / std
    dvariance = dz * alignment
    dalignment = dz * variance
    if dvariance_ptr is not None:
        dvariance += tl.load(dvariance_ptr + offsets, mask=is_head, other=0.0)
    if dalignment_ptr is not None:
        dalignment += tl.load(dalignment_ptr + offsets, mask=is_head, other=0.0)
    share = tl.where(count > 0.0, 1.0 / tl.maximum(count, 1.0), 0.0)
    tl.store(variance_gain_ptr + offsets, dvariance * share, mask=is_head)
    tl.store(alignment_gain_ptr + offsets, dalignment * share / tl.maximum(c, LEAST_WEIGHT), mask=is_head)
