"""Blocks of query rows against the keys they may see: the unit of work that keeps memory at O(block x Sk)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from sar_fast.backends.sequence import Sequence
from sar_fast.method.values import Scores

_BLOCK_BYTES = 32 << 20


def within(scores: Scores, position: Tensor, key: Tensor) -> list[Tensor]:
    """What causal mask and window say of keys and of queries at ``position``, both int64: bool of their broadcast."""
    left, right = scores.window
    parts = []
    if scores.causal:
        parts.append(key <= position)
    if left >= 0:
        parts.append(key >= position - left)
    if right >= 0:
        parts.append(key <= position + right)
    return parts


def sees(seq: Sequence, rows: Tensor, keys: Tensor) -> Tensor | None:
    """Which of ``keys`` (n,) each query of ``rows`` (r,) may see: bool (r, n), or None if all see all.

    Indices are int64 positions within the sequence; only the block is built. Where ``key_valid`` is of each kv head,
    (Hkv, 1, r, n).
    """
    parts = within(seq.scores, rows[:, None] + seq.offset, keys[None, :])
    if seq.first is not None:
        parts.append(keys >= seq.first[rows][:, None])
    if seq.end is not None:
        parts.append(keys < seq.end[rows][:, None])
    if seq.key_valid is not None:
        valid = seq.key_valid[keys]
        parts.append(valid if valid.dim() == 1 else valid.T[:, None, None])
    if seq.mask is not None:
        parts.append(seq.mask[rows][:, keys])
    if not parts:
        return None
    block = functools.reduce(torch.logical_and, parts)
    return block.expand(*block.shape[:-2], rows.numel(), keys.numel())


def row_blocks(
    seq: Sequence, rows: Tensor | None = None, copies: int = 1, largest: int | None = None
) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Blocks of query rows, each with the run of keys [k0, k1) that it can see at all.

    Args:
        rows: (r,) int64 ascending query indices; default all.
        copies: how many (H, block, Sk) tensors the caller holds at once, so that a block stays within the budget.
        largest: rows of a block in place of that.
    """
    Sk, H, device = seq.k.shape[0], seq.q.shape[1], seq.q.device
    if rows is None:
        rows = torch.arange(seq.q.shape[0], device=device)
    size = max(16, _BLOCK_BYTES // (4 * H * copies * max(1, Sk))) if largest is None else largest
    left, right = seq.scores.window
    for block in rows.split(size):
        if block.numel() == 0:
            continue
        first, last = int(block[0]) + seq.offset, int(block[-1]) + seq.offset
        end = last + 1 if seq.scores.causal else Sk
        if right >= 0:
            end = min(end, last + right + 1)
        start = first - left if left >= 0 else 0
        if seq.first is not None:
            start = int(seq.first[block].min())
        if seq.end is not None:
            end = int(seq.end[block].max())
        yield block, (min(max(start, 0), Sk), min(max(end, 0), Sk))


def scores(seq: Sequence, rows: Tensor, key_range: tuple[int, int]) -> Tensor:
    """Scores of a block in the accumulate dtype, (Hkv, G, r, n); -inf where the key is not visible."""
    k0, k1 = key_range
    Hkv, acc = seq.k.shape[1], seq.accumulate_dtype
    i0, i1 = int(rows[0]), int(rows[-1]) + 1
    q = seq.q[i0:i1] if i1 - i0 == rows.numel() else seq.q[rows]
    q = q.to(acc).view(q.shape[0], Hkv, -1, q.shape[-1])
    s = torch.einsum("rkgd,nkd->kgrn", q * seq.scores.scale, seq.k[k0:k1].to(acc))
    if seq.scores.softcap > 0:
        s = s.div_(seq.scores.softcap).tanh_().mul_(seq.scores.softcap)
    if seq.marks is not None:
        seq.marks.spoil_(s, rows, slice(k0, k1))
    visible = sees(seq, rows, torch.arange(k0, k1, device=rows.device))
    return s if visible is None else s.masked_fill_(~visible, -torch.inf)


def scale_heads_(out: Tensor, c: Tensor) -> Tensor:
    """out (S, H, D) *= c (H,) in place. On CPU by head: a mixed-dtype broadcast there is 15 times slower."""
    if out.device.type != "cpu" or out.dtype == c.dtype:
        return out.mul_(c[:, None].to(out.dtype) if out.dtype == c.dtype else c[:, None])
    for h, weight in enumerate(c.tolist()):
        out[:, h].mul_(weight)
    return out
