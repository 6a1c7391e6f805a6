"""What beside a window says which keys a query sees: runs of keys, one per query, and masks of bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from sar_kernels.configs import SMALL
from sar_kernels.launch import Launch, run_all
from sar_kernels.primitives import edge_offset, row_edges, sequence_bounds, shifted
from sar_kernels.structs import Edges

TILE = 64  # rows and keys of the tiles of which a packed mask knows whether anything in them is seen


@dataclass(frozen=True)
class PackedMask:
    """A boolean mask in an eighth of its memory, shared by all heads; made by `pack_mask`.

    bits: (B or 1, Sq, words) int32, bit j of word w is key 32 w + j. tiles: (B or 1, cdiv(Sq, 64), cdiv(Sk, 64)) int8,
    1 where any query of a tile sees any key of it. num_keys: Sk.
    """

    bits: torch.Tensor
    tiles: torch.Tensor
    num_keys: int


@dataclass(frozen=True)
class Masks:
    """Which keys the queries of a call see, beyond what the options' window says; every part may be None.

    padding: (B, Sk) or packed (Tk,) bool, True = real token. first, end: (B or 1, Sq) or packed (T,) int32, the run
    [first, end) of keys that each query sees, counted from its sample's first key; the window must be open on that
    side. packed: a mask of bits, not with packed sequences.
    """

    padding: torch.Tensor | None = None
    first: torch.Tensor | None = None
    end: torch.Tensor | None = None
    packed: PackedMask | None = None

    def checked(
        self, queries: tuple[int, ...], keys: tuple[int, ...], device: torch.device, window: tuple[int, int]
    ) -> Masks:
        """The same, contiguous.

        queries, keys: the shapes of one flag per query and per key; window: the options', which `causal` bounds too.

        Raises:
            ValueError: naming the part, what came and what is needed.
        """
        parts = {"padding": (torch.bool, [keys])}
        runs = [queries, (1, queries[1])] if len(queries) == 2 else [queries]
        parts |= {"first": (torch.int32, runs), "end": (torch.int32, runs)}
        for name, (dtype, shapes) in parts.items():
            tensor = getattr(self, name)
            if tensor is not None and (
                tensor.dtype != dtype or tuple(tensor.shape) not in shapes or tensor.device != device
            ):
                raise ValueError(
                    f"masks.{name}: got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, need {dtype} "
                    f"{' or '.join(map(str, shapes))} on {device}"
                )
        for name, limit in zip(("first", "end"), window):
            if getattr(self, name) is not None and limit >= 0:
                raise ValueError(f"masks.{name}: got one beside a window of {window}, need that side of it open")
        if self.packed is not None:
            self._check_packed(queries, keys, device)
        dense = {name: None if (x := getattr(self, name)) is None else x.contiguous() for name in parts}
        return replace(self, **dense)

    def _check_packed(self, queries: tuple[int, ...], keys: tuple[int, ...], device: torch.device) -> None:
        bits, num_keys = self.packed.bits, self.packed.num_keys
        if len(queries) != 2 or bits.shape[0] not in (1, queries[0]):
            raise ValueError(f"masks.packed: got a mask of {bits.shape[0]} samples, need a dense call of 1 or as many")
        if bits.shape[1] != queries[1] or num_keys != keys[1] or bits.device != device:
            raise ValueError(
                f"masks.packed: got {bits.shape[1]} queries and {num_keys} keys on {bits.device}, need {queries[1]} "
                f"and {keys[1]} on {device}"
            )

    def edge_arguments(self, window: tuple[int, int]) -> dict[str, Any]:
        """The runs' edges as the kernels take them."""
        left, right = window
        given = [x for x in (self.first, self.end) if x is not None]
        strides = {0 if x.ndim == 1 or x.shape[0] == 1 else x.shape[1] for x in given} or {0}
        first, end = self.first, self.end
        if len(strides) > 1:  # one of them is the same for all samples
            first, end = (x.expand(max(y.shape[0] for y in given), -1).contiguous() for x in given)
        return {
            "first_ptr": first,
            "end_ptr": end,
            "stride_edges_b": max(strides),
            "window_left": max(left, 0),
            "window_right": max(right, 0),
            "HAS_LEFT": left >= 0 or first is not None,
            "HAS_RIGHT": right >= 0 or end is not None,
        }

    def bit_arguments(self) -> dict[str, Any]:
        """The packed mask as the kernels take it."""
        if self.packed is None:
            return {"bits_ptr": None, "stride_bits_b": 0, "stride_bits_s": 0, "HAS_BITS": False}
        bits = self.packed.bits
        stride_b = 0 if bits.shape[0] == 1 else bits.stride(0)
        return {"bits_ptr": bits, "stride_bits_b": stride_b, "stride_bits_s": bits.stride(1), "HAS_BITS": True}

    def tile_arguments(self) -> dict[str, Any]:
        """Which of its tiles hold anything, as the kernels take it that leave the others out."""
        if self.packed is None:
            return {"tiles_ptr": None, "stride_tiles_b": 0}
        tiles = self.packed.tiles
        return {"tiles_ptr": tiles, "stride_tiles_b": 0 if tiles.shape[0] == 1 else tiles.stride(0)}


NO_MASKS = Masks()


@triton.jit(do_not_specialize=["num_rows", "num_keys", "stride_b", "stride_s", "words"])
def pack_mask_kernel(
    mask_ptr,  # (B, Sq, Sk) bool
    bits_ptr,  # (B, Sq, words) out
    tiles_ptr,  # (B, row tiles, key tiles) out
    num_rows,
    num_keys,
    stride_b,
    stride_s,
    words,
    TILE: tl.constexpr,
):
    """One tile of the mask. Grid (row tiles, key tiles, B)."""
    row_tile, key_tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = row_tile * TILE + tl.arange(0, TILE)
    lanes = tl.arange(0, 32)[None, :]
    row_ptr = mask_ptr + batch * stride_b + rows[:, None].to(tl.int64) * stride_s
    seen = tl.zeros([TILE], tl.int32)
    for piece in tl.static_range(0, TILE // 32):
        keys = key_tile * TILE + 32 * piece + lanes
        mask = (rows < num_rows)[:, None] & (keys < num_keys)
        bits = (tl.load(row_ptr + keys, mask=mask, other=0) != 0).to(tl.int32) << lanes  # [TILE, 32]
        word = tl.sum(bits, 1)  # distinct bits: a sum is their union
        index = (batch * num_rows + rows) * words + (key_tile * (TILE // 32) + piece)
        tl.store(bits_ptr + index, word, mask=rows < num_rows)
        seen = seen | word
    index = (batch * tl.num_programs(0) + row_tile) * tl.num_programs(1) + key_tile
    tl.store(tiles_ptr + index, (tl.max((seen != 0).to(tl.int32), 0)).to(tl.int8))


def plan_pack_mask(mask: torch.Tensor) -> tuple[PackedMask, Launch]:
    """The packed mask of (B or 1, 1, Sq, Sk) bool, and the launch that fills it."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.dtype != torch.bool:
        raise ValueError(f"attn_mask: got {mask.dtype} {tuple(mask.shape)}, need torch.bool (B or 1, 1, Sq, Sk)")
    batch, _, num_rows, num_keys = mask.shape
    if mask.stride(-1) != 1 and num_keys > 1:
        mask = mask.contiguous()
    tiles = triton.cdiv(num_rows, TILE), triton.cdiv(num_keys, TILE)
    empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device=mask.device)
    packed = PackedMask(
        empty(batch, num_rows, tiles[1] * (TILE // 32), dtype=torch.int32),
        empty(batch, *tiles, dtype=torch.int8),
        num_keys,
    )
    arguments = {
        "mask_ptr": mask,
        "bits_ptr": packed.bits,
        "tiles_ptr": packed.tiles,
        "num_rows": num_rows,
        "num_keys": num_keys,
        "stride_b": mask.stride(0),
        "stride_s": mask.stride(2),
        "words": packed.bits.shape[2],
        "TILE": TILE,
    }
    return packed, Launch(pack_mask_kernel, (*tiles, batch), arguments, SMALL)


def pack_mask(mask: torch.Tensor) -> PackedMask:
    """Packs a mask (B or 1, 1, Sq, Sk) bool, True = may be seen; reads it once and does not wait for the GPU."""
    packed, launch = plan_pack_mask(mask)
    run_all([launch])
    return packed


@triton.jit(do_not_specialize=["stride_edges_b", "max_seqlen_q", "max_seqlen_k", "window_left", "window_right"])
def row_ranges_kernel(
    first_ptr,  # (B, Sq) int32 or None, as the attention kernels take them
    end_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    row_ranges_ptr,  # (B, key blocks, 3) int32 out
    stride_edges_b,
    max_seqlen_q,
    max_seqlen_k,
    window_left,
    window_right,
    BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows that see a key block: the first, the one from which on all see all of it, and one past the last.

    Grid (key blocks, B). Rows between that see none of it are only masked: runs that rise with the row leave none.
    """
    block, batch = tl.program_id(0), tl.program_id(1)
    start_q, num_rows = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q, VARLEN)
    _, num_keys = sequence_bounds(cu_seqlens_k_ptr, batch, max_seqlen_k, VARLEN)
    offset = edge_offset(batch, start_q, stride_edges_b, VARLEN)
    edges = Edges(
        num_rows,
        num_keys,
        window_left if HAS_LEFT else None,
        window_right if HAS_RIGHT else None,
        shifted(first_ptr, offset),
        shifted(end_ptr, offset),
    )
    first_key = block * BLOCK_N
    end_key = tl.minimum(first_key + BLOCK_N, num_keys)
    lo, full, hi = num_rows, 0, 0
    for offset in range(0, num_rows, BLOCK):
        rows = offset + tl.arange(0, BLOCK)
        first, last = row_edges(edges, rows)
        exists = rows < num_rows
        sees = exists
        sees_all = exists
        if HAS_LEFT:
            sees = sees & (first < end_key)
            sees_all = sees_all & (first <= first_key)
        if HAS_RIGHT:
            sees = sees & (last >= first_key)
            sees_all = sees_all & (last >= end_key - 1)
        if HAS_LEFT and HAS_RIGHT:
            sees = sees & (first <= last)
        lo = tl.minimum(lo, tl.min(tl.where(sees, rows, num_rows), 0))
        hi = tl.maximum(hi, tl.max(tl.where(sees, rows + 1, 0), 0))
        full = tl.maximum(full, tl.max(tl.where(exists & (sees_all == 0), rows + 1, 0), 0))
    row_ranges_ptr += 3 * (batch * tl.num_programs(0) + block)
    tl.store(row_ranges_ptr, tl.minimum(lo, hi))
    tl.store(row_ranges_ptr + 1, full)
    tl.store(row_ranges_ptr + 2, hi)


@triton.jit(do_not_specialize=["stride_edges_b", "max_seqlen_q", "max_seqlen_k", "window_left", "window_right"])
def text_edges_kernel(
    text_ptr,  # (B, Sq) or (T,) bool
    first_ptr,  # (B, Sq) int32 or None, as the attention kernels take them
    end_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    text_first_ptr,  # (B, Sq) or (T,) int32 out; None without a left edge
    text_end_ptr,  # out
    stride_edges_b,
    max_seqlen_q,
    max_seqlen_k,
    window_left,
    window_right,
    VARLEN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The runs of keys of the text queries; the others see nothing. Grid (row blocks, B)."""
    batch = tl.program_id(1)
    start_q, num_rows = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q, VARLEN)
    _, num_keys = sequence_bounds(cu_seqlens_k_ptr, batch, max_seqlen_k, VARLEN)
    offset = edge_offset(batch, start_q, stride_edges_b, VARLEN)
    edges = Edges(
        num_rows,
        num_keys,
        window_left if HAS_LEFT else None,
        window_right if HAS_RIGHT else None,
        shifted(first_ptr, offset),
        shifted(end_ptr, offset),
    )
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = rows < num_rows
    first, last = row_edges(edges, rows)
    end = tl.minimum(last + 1, num_keys) if HAS_RIGHT else tl.zeros_like(rows) + num_keys
    is_text = tl.load(text_ptr + start_q + rows, mask=in_range, other=0) != 0
    tl.store(text_end_ptr + start_q + rows, tl.where(is_text, tl.maximum(end, 0), 0), mask=in_range)
    if HAS_LEFT:
        tl.store(text_first_ptr + start_q + rows, tl.maximum(first, 0), mask=in_range)
