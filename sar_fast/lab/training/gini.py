"""The Gini coefficient of |g|, exact, in bounded memory.

For n numbers x_(1) <= ... <= x_(n), not all zero,

    G = sum_i (2 i - n - 1) x_(i) / (n sum_i x_i)

0 when all are equal, (n - 1) / n when one holds everything. All zeros are equal: G = 0, as for a single number.

The definition needs ranks, a sort of n numbers, and PyTorch's sort takes 12 more bytes for each 4-byte entry. But the
bit pattern of a float that is not negative, read as an integer, has the order of the floats. Its high half puts every
entry into one of 32,768 buckets whose counts give the rank of each bucket's first entry. Then consecutive buckets are
gathered, at most ``limit`` entries at a time, and only those are sorted; a bucket that alone exceeds the limit has at
most 65,536 distinct values, the low halves, and counting these sorts it. Entries are read in pieces, in as many passes
as there are groups, n / limit; sums are in fp64. Memory beyond the gradient: about 40 bytes times ``limit``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError, ArgumentTypeError

LIMIT = 1 << 22  # entries that are sorted at a time
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def gini(values: Tensor | Sequence[Tensor], limit: int = LIMIT) -> float:
    """Gini coefficient of the absolute values of all entries of one or several tensors.

    Args:
        values: fp32, bf16 or fp16, of any shapes, on one device; not changed.
        limit: most entries that are sorted at a time, at least 1.

    Raises:
        TypeError: another dtype. ValueError: no entry, or one that is not finite.
    """
    tensors = [values] if isinstance(values, Tensor) else list(values)
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            raise ArgumentTypeError("values", tensor.dtype, "be float32, bfloat16 or float16")
    if limit < 1:
        raise ArgumentError("limit", limit, "be at least 1")
    n = sum(tensor.numel() for tensor in tensors)
    if n == 0:
        raise ArgumentError("values", "none", "have entries")
    device = tensors[0].device
    counts = torch.zeros(1 << 15, dtype=torch.int64, device=device)
    for bits in _pieces(tensors, limit):
        counts += torch.bincount(bits >> 16, minlength=1 << 15)
    if counts[0x7F80:].any():
        raise ArgumentError("values", "an entry that is not", "be finite")
    total = weighted = 0.0  # sum x and sum rank * x, ranks from 1
    rank = 0
    for first, last, size in _groups(counts.tolist(), limit):
        if size > limit:
            inside, within = _sum_by_value(_members(tensors, first, last, limit), first, device)
        else:
            ordered = torch.cat(list(_members(tensors, first, last, limit))).sort().values
            x = ordered.view(torch.float32).double()
            inside = x.sum().item()
            within = x.mul_(torch.arange(1, size + 1, dtype=torch.int32, device=device)).sum().item()
        total += inside
        weighted += within + rank * inside
        rank += size
    return (2 * weighted / total - n - 1) / n if total else 0.0


def _pieces(tensors: Sequence[Tensor], limit: int) -> Iterator[Tensor]:
    """Bit patterns of |x| as int32, so few at a time that what they need is little beside a group; x may be strided."""
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        for piece in flat.split(max(1, limit // 4)):
            yield piece.float().abs().view(torch.int32)


def _groups(counts: list[int], limit: int) -> Iterator[tuple[int, int, int]]:
    """(first bucket, last bucket, entries) of consecutive buckets with at most ``limit`` entries, or one alone."""
    first = size = 0
    for bucket, count in enumerate(counts):
        if size and size + count > limit:
            yield first, bucket - 1, size
            size = 0
        if count and not size:
            first = bucket
        size += count
    if size:
        yield first, len(counts) - 1, size


def _members(tensors: Sequence[Tensor], first: int, last: int, limit: int) -> Iterator[Tensor]:
    for bits in _pieces(tensors, limit):
        bucket = bits >> 16
        yield bits[(bucket >= first) & (bucket <= last)]


def _sum_by_value(members: Iterator[Tensor], bucket: int, device: torch.device) -> tuple[float, float]:
    """sum x and sum rank * x of one bucket's entries, by counting each of its 65,536 values."""
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=device)
    for bits in members:
        counts += torch.bincount(bits & 0xFFFF, minlength=1 << 16)
    low = torch.arange(1 << 16, dtype=torch.int32, device=device)
    x = (low + (bucket << 16)).view(torch.float32).double()
    c = counts.double()
    before = torch.cumsum(c, 0) - c  # ranks of a value's c copies: before + 1 ... before + c
    return (c * x).sum().item(), (x * (c * before + c * (c + 1) / 2)).sum().item()
