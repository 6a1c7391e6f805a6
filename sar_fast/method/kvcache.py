"""A KV cache and a step over it as values: what a call writes, and each sample's keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.base.scalars import is_integer, kind, plain
from sar_fast.method import validation
from sar_fast.method.values import UNBOUNDED, Bounds, Roles, Scores, Sums
from sar_fast.method.weighting.softmax import Lowered


@dataclasses.dataclass(frozen=True)
class Cache:
    """A cache and what a call appends to it; made by :func:`check_cache`.

    Attributes:
        k, v: (B, Smax, Hkv, D) and (B, Smax, Hkv, Dv), or (blocks, page, Hkv, ...) with ``block_table`` (B, pages).
        new_k, new_v: (B, Snew, Hkv, ...) to be written after each sample's keys, or None.
        seqlens: keys of each sample before the call, an int or (B,); None = the cache is full.
        batch: B.
    """

    k: Tensor
    v: Tensor
    new_k: Tensor | None
    new_v: Tensor | None
    seqlens: int | Tensor | None
    block_table: Tensor | None
    batch: int

    @property
    def capacity(self) -> int:
        """Keys that a sample may have."""
        page = self.k.shape[1]
        return page if self.block_table is None else page * self.block_table.shape[1]

    @property
    def new(self) -> int:
        """How many keys the call brings."""
        return 0 if self.new_k is None else self.new_k.shape[1]

    def host_lengths(self) -> list[int]:
        """Every sample's length before the call, read on the host, with room for the new keys."""
        if self.seqlens is None:
            lengths = [self.capacity] * self.batch
        elif isinstance(self.seqlens, int):
            lengths = [self.seqlens] * self.batch
        else:
            lengths = self.seqlens.tolist()
        for b, length in enumerate(lengths):
            if not 0 <= length <= self.capacity - self.new:
                raise ArgumentError(
                    f"cache_seqlens[{b}]", length, f"leave room for {self.new} new key(s) in a cache of {self.capacity}"
                )
        return lengths

    def device_lengths(self, q: Tensor) -> Tensor:
        """(B,) int32 lengths after the call, without waiting for a GPU: the kernels stop at the capacity."""
        on_cpu = q.device.type == "cpu"
        if isinstance(self.seqlens, Tensor) and not on_cpu:
            return (self.seqlens + self.new).to(torch.int32)
        lengths = self.host_lengths()
        if on_cpu:
            self.check_pages(lengths)
            return torch.tensor(lengths, dtype=torch.int32) + self.new
        length = lengths[0] + self.new if lengths else 0  # one number for all; a list would be copied, and that waits
        return torch.full((len(lengths),), length, dtype=torch.int32, device=q.device)

    def every_key(self) -> Tensor:
        """(B, Smax, Hkv, D) keys, also of positions that are not filled: the cache itself, or its pages gathered."""
        if self.block_table is None:
            return self.k
        pages = self.block_table.long().clamp(0, self.k.shape[0] - 1)  # entries beyond a sample's length are free
        return self.k[pages].flatten(1, 2)

    def positions(self, num_queries: int, device: torch.device) -> Tensor:
        """(B or 1, Sq) int64: where the newest queries are, without waiting for a GPU."""
        length = self.capacity if self.seqlens is None else self.seqlens
        last = torch.arange(num_queries, device=device) - num_queries + self.new
        return (length.to(device, torch.int64)[:, None] if isinstance(length, Tensor) else length) + last.expand(1, -1)

    def check_pages(self, lengths: list[int]) -> None:
        """Raise if a page that the call reads or writes is not in the cache; entries beyond are free."""
        if self.block_table is None:
            return
        blocks, page = self.k.shape[:2]
        for b, (row, length) in enumerate(zip(self.block_table.tolist(), lengths)):
            used = row[: -(-(length + self.new) // page)]
            if any(not 0 <= block < blocks for block in used):
                raise ArgumentError(f"block_table[{b}]", used, f"hold pages between 0 and {blocks - 1}")

    def write(self) -> list[int]:
        """Write the new keys and values after each sample's, in place; returns the lengths after that."""
        lengths = self.host_lengths()
        self.check_pages(lengths)
        if self.new_k is None:
            return lengths
        page = self.k.shape[1]
        for x, cache in ((self.new_k, self.k), (self.new_v, self.v)):
            for b, length in enumerate(lengths):
                if self.block_table is None:
                    cache[b, length : length + self.new] = x[b]
                else:
                    at = torch.arange(length, length + self.new, device=cache.device)
                    cache[self.block_table[b].long()[at // page], at % page] = x[b]
        return [length + self.new for length in lengths]

    def sequences(self, lengths: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """(k, v) of every sample, each (length, Hkv, ...): views, or gathered pages where a sample has several."""
        for b, length in enumerate(lengths):
            used = 1 if self.block_table is None else -(-length // self.k.shape[1])
            if used == 1:
                row = b if self.block_table is None else int(self.block_table[b, 0])
                yield self.k[row, :length], self.v[row, :length]
            else:
                pages = self.block_table[b, :used].long()
                yield self.k[pages].flatten(0, 1)[:length], self.v[pages].flatten(0, 1)[:length]


@dataclasses.dataclass(frozen=True)
class Step:
    """Attention of new queries over a cache.

    Attributes:
        q: (B, Sq, H, D), the newest positions.
        roles: of the cache's positions and of the new queries: heads are weighed by ``rule``. None: plain, or by ``c``.
        sums: fp32 that the means go on from; updated in place. None: of these queries alone.
        c: (B, H) fp32, weights that are known; without roles.
        bounds: (B or 1, Sq) int32, cache positions that each query sees.
        key_padding_mask: (B, Smax) bool over cache positions, True = real token.
    """

    q: Tensor
    cache: Cache
    scores: Scores
    roles: Roles | None = None
    sums: Sums | None = None
    rule: Lowered | None = None
    c: Tensor | None = None
    bounds: Bounds = UNBOUNDED
    key_padding_mask: Tensor | None = None


def check_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: int | Tensor | None,
    block_table: Tensor | None,
) -> Cache:
    """The cache of a call whose shapes and dtypes are right.

    Nothing is written, and no value on a GPU is read.
    """
    paged = block_table is not None
    validation.check_qkv(q, k_cache, v_cache, cache=True, paged=paged)
    batch = q.shape[0]
    if paged:
        check_block_table(block_table, batch, q.device)
    cache_seqlens = _check_lengths(cache_seqlens, batch)
    if (k is None) != (v is None):
        raise ArgumentError("k and v", f"only {'v' if k is None else 'k'}", "be given together")
    for name, x in (("k", k), ("v", v)):
        if x is not None:
            validation.check_tensor(name, x)
    new = 0 if k is None else k.shape[1]
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        expected = (batch, new, *cache.shape[2:])
        if x is not None and tuple(x.shape) != expected:
            raise ArgumentError(name, tuple(x.shape), f"have shape {expected}")
        if x is not None and x.dtype != cache.dtype:
            raise ArgumentTypeError(name, x.dtype, f"have {name}_cache's dtype {cache.dtype}")
    for name, x in (("k", k), ("v", v), ("cache_seqlens", cache_seqlens)):
        if isinstance(x, Tensor) and x.device != q.device:
            raise ArgumentError(name, x.device, f"be on q's device {q.device}")
    return Cache(k_cache, v_cache, k, v, cache_seqlens, block_table, batch)


def check_block_table(block_table: object, batch: int, device: torch.device) -> None:
    """Raise unless ``block_table`` is (batch, pages) int32 on ``device``."""
    validation.check_tensor("block_table", block_table)
    if block_table.dtype != torch.int32:
        raise ArgumentTypeError("block_table", block_table.dtype, "be int32")
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise ArgumentError("block_table", tuple(block_table.shape), f"have shape ({batch}, pages)")
    if block_table.device != device:
        raise ArgumentError("block_table", block_table.device, f"be on q's device {device}")


def _check_lengths(cache_seqlens: object, batch: int) -> int | Tensor | None:
    """``cache_seqlens`` as None, an int or a (batch,) tensor."""
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = plain(cache_seqlens)
        if cache_seqlens is None or is_integer(cache_seqlens):
            return cache_seqlens
        raise ArgumentTypeError("cache_seqlens", kind(cache_seqlens), "be an int or int32")
    validation.check_tensor("cache_seqlens", cache_seqlens)
    if cache_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentTypeError("cache_seqlens", cache_seqlens.dtype, "be an int or int32")
    if cache_seqlens.dim() == 0:  # one number for all
        return cache_seqlens.expand(batch)
    if tuple(cache_seqlens.shape) != (batch,):
        raise ArgumentError("cache_seqlens", tuple(cache_seqlens.shape), f"be an int or ({batch},) int32")
    return cache_seqlens
