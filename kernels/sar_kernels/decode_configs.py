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
def choose_decode(arch: str, head_dim: int, dtype: torch.dtype, rows: int, paged: bool) -> KernelConfig:
    """The split kernel's tile for `rows` = queries * heads per kv head; head_dim is the padded one.

    16 rows are the tensor cores' least; more than 32 take more tiles, whose second reading of the keys comes from L2.
    """
    if arch == "cpu":  # the interpreter: small tiles, so that short caches cross their edges
        return KernelConfig(16, 32, 4, 1)
    block_m, num_warps = (16, 4) if rows <= 16 else (32, 8)
    if dtype in (torch.float32, torch.float64):
        return KernelConfig(block_m, 32 if head_dim <= 128 else 16, num_warps, 1)
    block_n = 64 if head_dim <= 128 else 32
    if arch.startswith("gfx"):
        return KernelConfig(block_m, block_n, num_warps, 2)
    num_stages = 4 if head_dim <= 64 else 3
    if not paged:
        return KernelConfig(block_m, block_n, num_warps, num_stages)
    # The page's look-up stands before the key's in the pipeline: the same loads in flight take more stages. Two blocks
    # fit with all registers; left alone, the compiler would spill a few bytes to make room for a third.
    return KernelConfig(block_m, block_n, num_warps, 2 * num_stages - 1, max_registers=255)


def combine_config(arch: str) -> KernelConfig:
    """The combine kernel's: left alone, NVIDIA's compiler may spill a few bytes to make room for more blocks."""
    return KernelConfig(0, 0, 4, 1, max_registers=128 if arch.startswith("sm_") else None)
