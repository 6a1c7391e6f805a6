"""Small device functions shared by every kernel: addressing, masks, online softmax, streaming moments.

Addresses: whatever is the same for a whole program (batch, head, first row of a tile) is a 64-bit scalar, and only the
offsets inside one tile are 32-bit. No tensor is therefore too large, and no 64-bit variant of a kernel is needed.
"""

import triton
import triton.language as tl

from sar_kernels.structs import Matrix

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LEAST_WEIGHT = tl.constexpr(2.0**-100)  # the backward divides by a head's weight, and takes a smaller one for this


@triton.jit
def sequence_bounds(cu_seqlens_ptr, batch, max_seqlen, VARLEN: tl.constexpr):
    """First token of a sample in the flattened (batch * seqlen or total) token dimension, and its length."""
    if VARLEN:
        start = tl.load(cu_seqlens_ptr + batch).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + batch + 1).to(tl.int64) - start).to(tl.int32)
    else:
        length = max_seqlen
        start = tl.cast(batch, tl.int64) * length
    return start, length


@triton.jit
def head_matrix(ptr, batch, head, start, stride_b, stride_s, stride_h, VARLEN: tl.constexpr):
    """One head of one sample as a Matrix; packed sequences start at token `start` of the only batch entry."""
    ptr += tl.cast(head, tl.int64) * stride_h
    if VARLEN:
        ptr += start * stride_s
    else:
        ptr += tl.cast(batch, tl.int64) * stride_b
    return Matrix(ptr, stride_s)


@triton.jit
def row_pointer(ptr, batch, head, start, stride_b, stride_h, VARLEN: tl.constexpr):
    """Where one head of one sample begins in a per-row array: (B, H, S) dense, (H, T) packed."""
    ptr += tl.cast(head, tl.int64) * stride_h
    if VARLEN:
        ptr += start
    else:
        ptr += tl.cast(batch, tl.int64) * stride_b
    return ptr


@triton.jit
def edge_offset(batch, start, stride_b, VARLEN: tl.constexpr):
    """Where a sample's edges begin in (B, S), with stride 0 (1, S), or packed (T,)."""
    return start if VARLEN else tl.cast(batch, tl.int64) * stride_b


@triton.jit
def shifted(ptr, offset):
    """ptr + offset, or None of none."""
    if ptr is None:
        return
    else:
        return ptr + offset


@triton.jit
def load_tile(
    matrix,
    first_row,
    num_rows,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    NUM_COLS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Rows first_row .. first_row + ROWS of a Matrix, zeros beyond num_rows and NUM_COLS.  # [ROWS, COLS]"""
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    tile_ptr = matrix.ptr + first_row * tl.cast(matrix.stride, tl.int64)
    ptrs = tile_ptr + rows * matrix.stride + cols
    if CHECK_ROWS and COLS != NUM_COLS:
        return tl.load(ptrs, mask=(first_row + rows < num_rows) & (cols < NUM_COLS), other=0.0)
    elif CHECK_ROWS:
        return tl.load(ptrs, mask=first_row + rows < num_rows, other=0.0)
    elif COLS != NUM_COLS:
        return tl.load(ptrs, mask=cols < NUM_COLS, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(matrix, tile, first_row, num_rows, ROWS: tl.constexpr, COLS: tl.constexpr, NUM_COLS: tl.constexpr):
    """Writes a tile to rows first_row .. of a Matrix, nothing beyond num_rows and NUM_COLS."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    ptrs = matrix.ptr + first_row * tl.cast(matrix.stride, tl.int64) + rows * matrix.stride + cols
    mask = first_row + rows < num_rows
    if COLS != NUM_COLS:
        mask = mask & (cols < NUM_COLS)
    tl.store(ptrs, tile.to(matrix.ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_keys_mask(ptr, first_key, num_keys, BLOCK_N: tl.constexpr):
    """A boolean per-key mask, False beyond the last key.  # [BN]"""
    keys = first_key + tl.arange(0, BLOCK_N)
    return tl.load(ptr + keys, mask=keys < num_keys, other=0) != 0


@triton.jit
def load_real_tile(
    matrix,
    first_row,
    num_rows,
    real,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    NUM_COLS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """As `load_tile`, with zeros for what padding hides too: it need not be finite, and 0 * NaN is NaN.  # [ROWS, COLS]

    real: [ROWS], False beyond the last row; or None: no padding.
    """
    if real is None:
        return load_tile(matrix, first_row, num_rows, ROWS, COLS, NUM_COLS, CHECK_ROWS)
    else:
        rows = tl.arange(0, ROWS)[:, None]
        cols = tl.arange(0, COLS)[None, :]
        ptrs = matrix.ptr + first_row * tl.cast(matrix.stride, tl.int64) + rows * matrix.stride + cols
        mask = real[:, None]
        if COLS != NUM_COLS:
            mask = mask & (cols < NUM_COLS)
        return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def load_bits(mask, rows, first_key, num_rows, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which keys of a tile the bits of a Mask let each row see; rows: [BM].  # [BM, BN], or [BN, BM] if TRANSPOSED"""
    axis: tl.constexpr = 1 if TRANSPOSED else 0  # of the tile, along which the rows do not lie
    keys = tl.expand_dims(tl.arange(0, BLOCK_N), axis)
    tile = tl.expand_dims(rows * 0, 1 - axis) + keys * 0
    for piece in tl.static_range(0, (BLOCK_N + 31) // 32):  # one word a row and 32 keys, not one a pair
        ptrs = mask.bits_ptr + rows.to(tl.int64) * mask.stride_bits + (first_key // 32 + piece)
        words = tl.expand_dims(tl.load(ptrs, mask=rows < num_rows, other=0), 1 - axis)
        tile = tl.where(keys // 32 == piece, words, tile)
    return ((tile >> ((first_key + keys) % 32)) & 1) != 0


@triton.jit
def is_tile_seen(mask, edges, first_row, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a Mask's bits, if it has some, let any row of a tile see any key of it."""
    if mask.tiles_ptr is None:
        return True
    else:
        TILE: tl.constexpr = 64
        columns = tl.cdiv(edges.num_keys, TILE)
        row_tiles = first_row // TILE + tl.arange(0, (BLOCK_M + TILE - 1) // TILE)[:, None]
        key_tiles = first_key // TILE + tl.arange(0, (BLOCK_N + TILE - 1) // TILE)[None, :]
        inside = (row_tiles * TILE < edges.num_rows) & (key_tiles < columns)
        seen = tl.load(mask.tiles_ptr + row_tiles * columns + key_tiles, mask=inside, other=0).to(tl.int32)
        return tl.max(tl.max(seen, 1), 0) != 0


@triton.jit
def load_lse(lse_ptr, rows, num_rows):
    """lse in base-2 units; +inf for rows that saw nothing or do not exist, so that their weights are 0."""
    lse = tl.load(lse_ptr + rows, mask=rows < num_rows, other=float("inf")) * LOG2_E
    return tl.where(lse == -float("inf"), float("inf"), lse)


@triton.jit
def load_lse2(lse2_ptr, rows, num_rows):
    """lse as delta's launch wrote it for the backward, in base-2 units; +inf for rows that do not exist."""
    return tl.load(lse2_ptr + rows, mask=rows < num_rows, other=float("inf"))


@triton.jit
def row_edges(edges, rows):
    """First and last key that each row may see; an edge that is not there is not to be read.  # rows' shape each

    Rows that do not exist see nothing where pointers say. The last key, not one past it: of
    `keys < rows + diagonal + right + 1` the compiler makes a decode kernel that spills.
    """
    diagonal = edges.num_keys - edges.num_rows
    first = rows
    last = rows
    if edges.left is not None:
        if edges.first_ptr is not None:
            first = tl.load(edges.first_ptr + rows, mask=rows < edges.num_rows, other=0)
        else:
            first = rows + diagonal - edges.left
    if edges.right is not None:
        if edges.end_ptr is not None:
            last = tl.load(edges.end_ptr + rows, mask=rows < edges.num_rows, other=0) - 1
        else:
            last = rows + diagonal + edges.right
    return first, last


@triton.jit
def is_in_run(edges, first, last, keys):
    """Which keys lie in each row's run; operands broadcast against each other: [BM, 1] with [1, BN], or transposed."""
    visible = keys < edges.num_keys
    if edges.right is not None:
        visible = visible & (keys <= last)
    if edges.left is not None:
        visible = visible & (keys >= first)
    return visible


@triton.jit
def visible_mask(
    edges, mask, rows, first, last, keys, real, first_key, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Which keys of a tile each row sees.  # [BM, BN], or [BN, BM] if TRANSPOSED

    rows: [BM]. first, last: their edges, [BM, 1], or [1, BM] if TRANSPOSED. keys: [BN], from first_key on. real: [BN],
    or None: no padding.
    """
    axis: tl.constexpr = 1 if TRANSPOSED else 0  # of the tile, along which the rows do not lie
    visible = is_in_run(edges, first, last, tl.expand_dims(keys, axis))
    if real is not None:
        visible = visible & tl.expand_dims(real, axis)
    if mask.bits_ptr is not None:
        visible = visible & load_bits(mask, rows, first_key, edges.num_rows, BLOCK_N, TRANSPOSED)
    return visible


@triton.jit
def key_block_range(edges, first_row, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys that a row block sees: [lo, hi), of which every row sees all of [lo, full) if there is no left edge.

    lo and full are multiples of BLOCK_N.
    """
    num_rows = edges.num_rows
    num_keys = edges.num_keys
    diagonal = num_keys - num_rows
    lo = 0
    hi = num_keys
    full = num_keys // BLOCK_N * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)
    first, last = row_edges(edges, rows)
    if edges.right is not None:
        if edges.end_ptr is not None:
            last_end = tl.max(last, 0) + 1
            first_end = tl.min(tl.where(rows < num_rows, last, num_keys), 0) + 1
        else:
            last_end = tl.minimum(first_row + BLOCK_M, num_rows) + diagonal + edges.right
            first_end = first_row + diagonal + edges.right + 1
        hi = tl.maximum(tl.minimum(hi, last_end), 0)
        full = tl.minimum(full, tl.maximum(first_end, 0) // BLOCK_N * BLOCK_N)
    if edges.left is not None:
        if edges.first_ptr is not None:
            sees = rows < num_rows
            if edges.right is not None:  # a row without keys asks for none
                sees = sees & (first <= last)
            least = tl.min(tl.where(sees, first, num_keys), 0)
        else:
            least = first_row + diagonal - edges.left
        lo = tl.maximum(least, 0) // BLOCK_N * BLOCK_N
    return lo, full, hi


@triton.jit
def visual_key_range(
    ranges_ptr,
    batch,
    has_text,
    lo,
    full,
    hi,
    BLOCK_N: tl.constexpr,
    ANYWHERE: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """The stretch [collect_lo, collect_hi) of [lo, hi) with visual keys; empty at lo if the rows have no text query.

    It starts at a multiple of BLOCK_N and ends at one or at hi. Its loop masks, so unless masking is needed ANYWHERE it
    is made to begin no later than `full`, before which nothing need be masked.
    """
    collect_lo = lo
    collect_hi = lo
    if STATISTICS:
        visual_lo = tl.load(ranges_ptr + 4 * batch) // BLOCK_N * BLOCK_N
        visual_hi = tl.cdiv(tl.load(ranges_ptr + 4 * batch + 1), BLOCK_N) * BLOCK_N
        begin = tl.maximum(visual_lo, lo)
        if not ANYWHERE:
            begin = tl.minimum(begin, full)
        end = tl.minimum(visual_hi, hi)
        is_empty = (begin >= end) | (has_text == 0)
        collect_lo = tl.where(is_empty, lo, begin)
        collect_hi = tl.where(is_empty, lo, end)
    return collect_lo, collect_hi


@triton.jit
def column_offset(start_k, batch):
    """Where a sample's columns begin in an array (L, 2, 128) with room for every length rounded up to 128 keys."""
    return (start_k // 128 + batch) * 256


@triton.jit
def load_columns(ptr, first_key, BLOCK_N: tl.constexpr):
    """Per key whether it is visual, 1 or 0, and its prior, 0 where it is not.  # [BN] each

    BLOCK_N divides 128 and first_key.
    """
    offset = tl.multiple_of(first_key // 128 * 256 + first_key % 128, BLOCK_N)
    ptrs = ptr + offset + tl.arange(0, BLOCK_N)
    return tl.load(ptrs), tl.load(ptrs + 128)


@triton.jit
def mean_visual_key(
    sums_ptr,
    first_key,
    end_key,
    num_visual,
    first_dim,
    DIMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Dims [first_dim, first_dim + DIMS) of the mean of the visual keys, which lie in [first_key, end_key).  # [DIMS]

    sums_ptr: (chunks, BLOCK_D) sums of the visual keys in CHUNK keys.
    """
    BLOCK_C: tl.constexpr = 8
    end_chunk = tl.cdiv(end_key, CHUNK)
    total = tl.zeros([BLOCK_C, DIMS], ACC)
    for first in range(first_key // CHUNK, end_chunk, BLOCK_C):
        chunks = first + tl.arange(0, BLOCK_C)[:, None]
        ptrs = sums_ptr + chunks * BLOCK_D + first_dim + tl.arange(0, DIMS)[None, :]
        total += tl.load(ptrs, mask=chunks < end_chunk, other=0.0)
    return tl.sum(total, 0) / num_visual


@triton.jit
def text_meets_visual(text, rows, edges, ranges_ptr, num_visual, batch, HAS_BITS: tl.constexpr):
    """Whether rows hold text queries that all see all visual keys, and whether some that do not.  text, rows: [BM]

    Neither where there are less than two visual keys, of which no variance is.
    """
    diagonal = edges.num_keys - edges.num_rows
    last_text = tl.max(tl.where(text, rows, -1), 0)
    meets = (num_visual >= 2) & (last_text >= 0)
    sees_all = not HAS_BITS  # a mask of bits hides what it likes
    first, last = row_edges(edges, rows)
    if edges.right is not None:
        visual_hi = tl.load(ranges_ptr + 4 * batch + 1)
        if edges.end_ptr is not None:
            least_last = tl.min(tl.where(text, last, visual_hi), 0)
        else:
            least_last = tl.min(tl.where(text, rows, last_text), 0) + diagonal + edges.right
        sees_all = sees_all & (least_last >= visual_hi - 1)
    if edges.left is not None:
        visual_lo = tl.load(ranges_ptr + 4 * batch)
        if edges.first_ptr is not None:
            most_first = tl.max(tl.where(text, first, visual_lo), 0)
        else:
            most_first = last_text + diagonal - edges.left
        sees_all = sees_all & (most_first <= visual_lo)
    return meets & sees_all, meets & (sees_all == 0)


@triton.jit
def soft_cap(scores, cap):
    """cap * tanh(scores / cap)."""
    x = scores / cap
    tanh = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    if scores.dtype != tl.float64:
        # a difference of numbers near 1 says little of a small one; there the series in Cephes' tanhf, to 2^-24
        z = x * x
        series = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
        tanh = tl.where(z < 0.390625, x + x * z * (series - 3.33332819422e-1), tanh)
    return cap * tanh


@triton.jit
def soft_cap_slope(capped, cap):
    """The derivative of soft_cap, 1 - tanh^2, from its value; 0 where that is masked (-inf).

    The capped scores are alive anyway: a tile of tanh kept beside them would cost a register per entry.
    """
    tanh = tl.maximum(capped, -cap) / cap
    return 1.0 - tanh * tanh


@triton.jit
def base2_scale(scale, HAS_SOFTCAP: tl.constexpr):
    """The factor of a Softmax to base-2 units."""
    if HAS_SOFTCAP:
        return tl.cast(LOG2_E, scale.dtype)
    else:
        return scale * LOG2_E


@triton.jit
def product_scores(a, b, softmax, PRECISION: tl.constexpr):
    """a b^T, capped if there is a soft cap, else still to be scaled.  a: [A, D], b: [B, D]  # [A, B]"""
    scores = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if softmax.cap is not None:
        scores = soft_cap(scores * softmax.scale, softmax.cap)
    return scores


@triton.jit
def online_softmax(scores, row_max, row_sum, scale_log2, MASKED: tl.constexpr):
    """One step of the running softmax in base 2: weights [BM, BN], the factor for older sums, the new max and sum."""
    weights, rescale, row_max = softmax_weights(scores, row_max, scale_log2, MASKED)
    return weights, rescale, row_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def softmax_weights(scores, row_max, scale_log2, MASKED: tl.constexpr):
    """A running softmax's weights [BM, BN] in base 2, the factor for older sums, and the new max.

    A row that has seen nothing keeps max = -inf; subtracting 0 in its place keeps NaN out.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)  # [BM]
    if MASKED:
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    else:
        shift = new_max
    weights = tl.exp2(scores * scale_log2 - shift[:, None])  # [BM, BN]
    rescale = tl.exp2(row_max - shift)  # [BM]
    return weights, rescale, new_max


@triton.jit
def update_moments(scores, selected, count, mean, m2):
    """Merges a tile's selected entries, a mask [BM, BN], into running (count, mean, M2) per row.

    Both the tile's deviations and the merge are taken about means, so that an offset common to all scores cancels
    before anything is squared.
    """
    tile_count = tl.sum(selected.to(mean.dtype), 1)  # [BM]
    tile_mean = tl.sum(tl.where(selected, scores, 0.0), 1) / tl.maximum(tile_count, 1.0)
    deviation = tl.where(selected, scores - tile_mean[:, None], 0.0)  # [BM, BN]
    total = count + tile_count
    share = tile_count / tl.maximum(total, 1.0)
    step = tile_mean - mean
    mean += step * share
    m2 += tl.sum(deviation * deviation, 1) + step * step * count * share
    return total, mean, m2


@triton.jit
def store_partials(partials_ptr, batch, head, block, num_blocks, variance, alignment, counts):
    """Sums over the rows of one block into partials (B, H, row blocks, 3); grid axes are (row blocks, H, B)."""
    index = (tl.cast(batch, tl.int64) * tl.num_programs(1) + head) * num_blocks + block
    tl.store(partials_ptr + 3 * index, tl.sum(variance, 0))
    tl.store(partials_ptr + 3 * index + 1, tl.sum(alignment, 0))
    tl.store(partials_ptr + 3 * index + 2, tl.sum(counts, 0))


@triton.jit
def softmax_over_heads(sav, heads, num_heads, beta, PROTECT_FIRST: tl.constexpr, STANDARDIZE: tl.constexpr):
    """H * softmax(SAV / beta) over the heads of one sample, before (w) and after (c) the first head's protection.

    sav: [BH] with anything in lanes >= num_heads. Returns (c, w, z, std): z is the standardised SAV and std its
    divisor; SAV and 1 without standardisation.
    """
    is_head = heads < num_heads
    z = tl.where(is_head, sav, 0.0)
    std = tl.sum(z, 0) * 0.0 + 1.0
    if STANDARDIZE:
        mean = tl.sum(z, 0) / num_heads
        z = tl.where(is_head, z - mean, 0.0)
        # once more: the mean's own rounding is large beside heads that nearly agree, and the gradient divides by std
        z = tl.where(is_head, z - tl.sum(z, 0) / num_heads, 0.0)
        std = tl.sqrt(tl.sum(z * z, 0) / num_heads)
        std = tl.where(std > 0.0, std, 1.0)  # equal heads: z is 0 whatever the divisor
        z = z / std
    # the largest first: z / beta itself may overflow
    largest = tl.max(tl.where(is_head, z, -float("inf")), 0)
    weights = tl.where(is_head, tl.exp((z - largest) / tl.maximum(beta, LEAST_WEIGHT)), 0.0)
    w = num_heads * weights / tl.sum(weights, 0)
    c = w
    if PROTECT_FIRST:
        c = tl.where(heads == 0, tl.max(w, 0), w)
    return c, w, z, std
