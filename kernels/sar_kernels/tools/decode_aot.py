"""The decode steps that the ahead-of-time check compiles (see `sar_kernels.tools.aot`)."""

from __future__ import annotations

import torch

from sar_kernels.call import AttentionOptions, WeightOptions
from sar_kernels.decode.cache import plan_append
from sar_kernels.decode.plan import DecodeCall
from sar_kernels.launch import Launch
from sar_kernels.masks import Masks, plan_pack_mask

MODES = ("plain", "running", "step", "prompt")
CASES = (1, 8), (0, 16, 256)  # queries (few and many rows), and page sizes: contiguous, less than a tile, more
CAPACITY = 4096  # keys
HEADS = (32, 8)  # query heads and kv heads


def masks_of(options: tuple[str, ...], queries: tuple[int, ...], keys: tuple[int, ...]) -> Masks:
    """The memory-less masks that options ask for, of calls with flags of these shapes."""
    empty = lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta")
    padding = empty(keys, torch.bool) if "padding" in options else None
    first = empty(queries, torch.int32) if "runs" in options else None
    end = empty(queries, torch.int32) if {"runs", "ends"} & set(options) else None
    packed = None
    if "bits" in options:
        packed, _ = plan_pack_mask(empty((queries[0], 1, queries[1], keys[1]), torch.bool))
    return Masks(padding, first, end, packed)


def plan(
    arch: str,
    mode: str,
    head_dim: int,
    dtype: torch.dtype,
    seqlen_q: int,
    page: int,
    options: tuple[str, ...] = (),
    capacity: int = CAPACITY,
    num_heads: tuple[int, int] = HEADS,
) -> list[Launch]:
    """All launches of a decode step, with the cache write, on memory-less tensors."""
    batch, (heads, kv_heads) = 2, num_heads
    empty = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")
    floats = lambda *shape: empty(*shape, dtype=torch.float32)
    q, new = empty(batch, seqlen_q, heads, head_dim), empty(batch, seqlen_q, kv_heads, head_dim)
    rows = (batch * capacity // page, page) if page else (batch, capacity)
    k, v = empty(*rows, kv_heads, head_dim), empty(*rows, kv_heads, head_dim)
    lengths = empty(batch, dtype=torch.int32)
    block_table = empty(batch, capacity // page, dtype=torch.int32) if page else None
    window = (1024, -1) if "window" in options else (-1, -1)
    attention = AttentionOptions(
        not {"runs", "ends"} & set(options), head_dim**-0.5, window, 30.0 if "softcap" in options else 0.0
    )
    masks = masks_of(options, (batch, seqlen_q), (batch, capacity))
    call = DecodeCall(q, k, v, lengths, attention, block_table, masks=masks, arch=arch, sm_count=132)
    if mode != "plain":
        call.set_state(floats(batch, heads), floats(batch, heads), floats(batch), floats(batch, heads))
    if mode in ("running", "step"):
        visual, text = empty(batch, capacity, dtype=torch.bool), empty(batch, seqlen_q, dtype=torch.bool)
        call.set_roles(visual, text, floats(batch, capacity))
    write = plan_append(k, v, new, new, lengths, block_table)[:1] if mode == "plain" else []
    return write + call.plan(mode, WeightOptions(0.5))
