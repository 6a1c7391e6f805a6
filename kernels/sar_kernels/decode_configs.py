"""Tiles of the decode kernels and the number of splits: pure functions of sizes that are known without the GPU."""

from __future__ import annotations

import functools

import torch

from sar_kernels.configs import KernelConfig

MAX_SPLITS = 128
BLOCKS_PER_SM = 2  # thread blocks of the split kernel that one multiprocessor holds
MIN_KEYS_PER_SPLIT = 128  # less, and merging costs more than the idle multiprocessors


def num_splits_for(sm_count: int, batch: int, kv_heads: int, max_length: int, row_tiles: int = 1) -> int:
    """How many pieces to cut the keys into: as many as fill the GPU once, while a piece is worth a program.

    A pure function of its arguments. max_length is the capacity of the cache: the samples' lengths are on the GPU, and
    each is shared out there.
    """
    programs = max(1, batch * kv_heads * row_tiles)
    fill = BLOCKS_PER_SM * sm_count // programs
    worth = -(-max_length // MIN_KEYS_PER_SPLIT)
    return max(1, min(fill, worth, MAX_SPLITS))


@functools.cache
def choose_decode(arch: str, head_dim: int, dtype: torch.dtype, rows: int) -> KernelConfig:
    """The split kernel's tile for `rows` = queries * heads per kv head; head_dim is the padded one.

    block_m holds the rows if it can (16 is the tensor cores' least); more rows take more tiles.
    """
    block_m = min(max(16, 1 << (rows - 1).bit_length()), 32 if head_dim > 128 else 64)
    if arch == "cpu":  # the interpreter: small tiles, so that short caches cross their edges
        return KernelConfig(16, 32, 4, 1)
    if dtype in (torch.float32, torch.float64):
        return KernelConfig(min(block_m, 32), 16 if head_dim > 128 else 32, 4, 1)
    keys = {16: 128, 32: 128, 64: 128, 128: 64}.get(head_dim, 32)
    if arch.startswith("gfx"):
        return KernelConfig(block_m, min(keys, 64), 4, 1)
    # Two blocks of three stages fit into Hopper's shared memory, two of two stages into that of the others.
    return KernelConfig(block_m, keys, 4, 3 if arch in ("sm_90", "sm_100", "sm_103") else 2)
