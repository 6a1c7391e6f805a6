"""Tiles of the decode kernels and the number of splits: pure functions of sizes that are known without the GPU."""

from __future__ import annotations

import functools

import torch

from sar_kernels.configs import KernelConfig, tuned

MAX_SPLITS = 128
BLOCKS_PER_SM = 2  # thread blocks of the split kernel that one multiprocessor holds
MIN_KEYS_PER_SPLIT = 128  # less, and merging costs more than the idle multiprocessors
FEW_ROWS = 16  # rows that one tensor-core tile holds
WIDEST_TILE = 64  # keys; pages that are multiples of it hold whole tiles
LAYOUTS = ("dense", "paged", "small-pages")


def num_splits_for(sm_count: int, batch: int, kv_heads: int, max_length: int, row_tiles: int = 1) -> int:
    """How many pieces to cut the keys into: as many as fill the GPU once, while a piece is worth a program.

    A pure function of its arguments. max_length is the capacity of the cache: the samples' lengths are on the GPU, and
    each is shared out there.
    """
    programs = max(1, batch * kv_heads * row_tiles)
    fill = BLOCKS_PER_SM * sm_count // programs
    worth = -(-max_length // MIN_KEYS_PER_SPLIT)
    return max(1, min(fill, worth, MAX_SPLITS))


def cache_layout(page_size: int) -> str:
    """ "dense" (0: contiguous), "paged" (a tile of keys lies in one page, whatever its size) or "small-pages"."""
    if page_size == 0:
        return "dense"
    return "small-pages" if page_size % WIDEST_TILE else "paged"


def decode_config_key(arch: str, head_dim: int, dtype: torch.dtype, rows: int, layout: str) -> str:
    """The name of one choice in `tuned.json`."""
    name = str(dtype).removeprefix("torch.")
    return f"decode/{arch}/{head_dim}/{name}/{'few' if rows <= FEW_ROWS else 'many'}/{layout}"


@functools.cache
def choose_decode(arch: str, head_dim: int, dtype: torch.dtype, rows: int, layout: str) -> KernelConfig:
    """The split kernel's tile for `rows` = queries * heads per kv head and a `cache_layout`; head_dim the padded one.

    16 rows are the tensor cores' least; more than 32 take more tiles, whose second reading of the keys comes from L2.
    """
    measured = tuned().get(decode_config_key(arch, head_dim, dtype, rows, layout))
    if measured is not None:
        return measured
    few = rows <= FEW_ROWS
    if arch == "cpu":  # the interpreter: few keys per tile, so that short caches cross their edges
        return KernelConfig(16 if few else 32, 32, 4, 1)
    if dtype in (torch.float32, torch.float64):
        return KernelConfig(16 if few else 32, 32 if head_dim <= 128 else 16, 4 if few else 8, 1)
    if arch.startswith("gfx"):
        return KernelConfig(16 if few else 32, 64 if head_dim <= 128 else 32, 4 if few else 8, 2)
    return _NVIDIA[few, layout][max(head_dim, 64)]


# 16-bit inputs, by (few rows, layout) and padded head dim. Registers are limited to what lets as many blocks be
# resident with the statistics as without (4 of D 64, 3 of D 128 on an H100); left alone, the compiler would take more,
# or spill to make room for one block more. A page's look-up stands before its keys in the pipeline: the same loads in
# flight take twice the stages.
_NVIDIA = {
    (True, "dense"): {
        64: KernelConfig(16, 32, 4, 7, max_registers=128),
        128: KernelConfig(16, 32, 4, 5, max_registers=168),
        256: KernelConfig(16, 32, 4, 3, max_registers=255),
    },
    (True, "paged"): {
        64: KernelConfig(16, 32, 4, 15, max_registers=168),
        128: KernelConfig(16, 64, 4, 5, max_registers=255),
        256: KernelConfig(16, 32, 4, 5, max_registers=255),
    },
    (False, "dense"): {
        64: KernelConfig(32, 64, 8, 4, max_registers=128),
        128: KernelConfig(32, 64, 8, 3, max_registers=255),
        256: KernelConfig(32, 32, 8, 3, max_registers=255),
    },
    (False, "paged"): {
        64: KernelConfig(32, 64, 8, 7, max_registers=128),
        128: KernelConfig(32, 64, 8, 5, max_registers=255),
        256: KernelConfig(32, 32, 8, 5, max_registers=255),
    },
}
_NVIDIA[True, "small-pages"] = _NVIDIA[True, "paged"]
# One stage of look-ups more, and Triton 3.6 spills 16 to 48 bytes.
_NVIDIA[False, "small-pages"] = {**_NVIDIA[False, "paged"], 64: KernelConfig(32, 64, 8, 5, max_registers=128)}


def combine_config(arch: str) -> KernelConfig:
    """The combine kernel's: left alone, NVIDIA's compiler may spill a few bytes to make room for more blocks."""
    return KernelConfig(0, 0, 4, 1, max_registers=128 if arch.startswith("sm_") else None)
