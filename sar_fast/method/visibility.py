"""Which keys each query may see, as a value: what ``causal`` and ``window_size`` cannot say, without a matrix.

Every pattern here lets a query see one run of keys. It is lowered to at most two int32 numbers a query, the first key
of the run and one past the last, which all backends understand; the idea is FlashMask's (Wang et al., 2024), by rows.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.base.scalars import is_integer, plain
from sar_fast.method.values import Bounds

BROKEN_BLOCK = "visibility: the positions of a block must follow one another, but for padding; got a number twice"


@dataclasses.dataclass(frozen=True, eq=False)
class Visibility:
    """A pattern beside a call's ``causal`` and ``window_size``.

    A query sees a key where the call's causal mask and window allow it and both lie in one chunk; or where both lie in
    one block; padding hides a key in any case. Positions count keys, the queries being the last of them.

    Attributes:
        chunk: length of chunks of positions, beyond which nothing is seen (Llama 4); 0 = off.
        chunk_start: (B,) integers, where each sample's first chunk begins: left padding. None: at position 0.
        prefix: (B,) integers: the first so many positions see each other in both directions (PaliGemma), a block.
        blocks: (B, Sk) integers, or (Sk,): positions with the same number >= 0 see each other in both directions, as
            pictures do in Gemma. The positions of a block must follow one another, but for padding between them.
    """

    chunk: int = 0
    chunk_start: Tensor | None = None
    prefix: Tensor | None = None
    blocks: Tensor | None = None

    def __post_init__(self) -> None:
        chunk = plain(self.chunk)
        if not is_integer(chunk) or chunk < 0:
            raise ArgumentError("chunk", repr(chunk), "be an int >= 0, 0 = off")
        if self.chunk_start is not None and chunk == 0:
            raise ArgumentError("chunk", 0, "be > 0 with {chunk_start}")
        if self.prefix is not None and self.blocks is not None:
            raise ArgumentError(
                "prefix and blocks", "both", "not be given together: a prefix is a block; give it a number there"
            )
        for name in ("chunk_start", "prefix", "blocks"):
            given = getattr(self, name)
            if given is None:
                continue
            if not isinstance(given, Tensor) or given.is_floating_point() or given.dtype == torch.bool:
                kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
                raise ArgumentTypeError(name, kind, "be a tensor of integers")

    def check(self, batch: int, num_keys: int, device: torch.device, *, packed: bool = False) -> None:
        """Raise unless its tensors fit a call of ``batch`` samples and ``num_keys`` keys on ``device``."""
        blocks = [(num_keys,)] if packed else [(batch, num_keys), (num_keys,)]
        shapes = {"chunk_start": [(batch,)], "prefix": [(batch,)], "blocks": blocks}
        for name, needed in shapes.items():
            given = getattr(self, name)
            if given is None:
                continue
            if tuple(given.shape) not in needed:
                raise ArgumentError(name, tuple(given.shape), f"have shape {' or '.join(map(str, needed))}")
            if given.device != device:
                raise ArgumentError(name, given.device, f"be on q's device {device}")

    def bounds(
        self,
        position: Tensor,
        num_keys: int,
        *,
        causal: bool,
        window: tuple[int, int] = (-1, -1),
        real: Tensor | None = None,
    ) -> Bounds:
        """The run of keys of every query; traces, and waits for no GPU.

        Args:
            position: (B or 1, Sq) int64, where each query is among the keys.
            causal, window: the call's.
            real: (B, num_keys) bool, False = padding, which no block stops at.

        Returns:
            Bounds of (B or 1, Sq) int32; a side is None where nothing limits it.
        """
        start = None if self.chunk_start is None else self.chunk_start.to(position.device, torch.int64)[:, None]
        around, blocks = None, self._blocks(num_keys, position.device)
        if blocks is not None:
            index = position.clamp(0, max(num_keys - 1, 0))
            around = _runs_at(block_runs(blocks, real), index)
        return self._bounds(position, start, around, causal, window)

    def packed_bounds(
        self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, causal: bool, window: tuple[int, int], total_q: int
    ) -> Bounds:
        """The same for packed sequences, (total_q,) int32: ``chunk_start`` and ``prefix`` (sequences,), ``blocks``
        (total_k,)."""
        sequence, position = packed_positions(cu_seqlens_q, cu_seqlens_k, total_q)
        start = None if self.chunk_start is None else self.chunk_start.long()[sequence]
        around = None
        if self.prefix is not None:
            stop = self.prefix.long()[sequence]
            inside = position < stop
            around = torch.where(inside, 0, position), torch.where(inside, stop, position)
        elif self.blocks is not None:
            first = cu_seqlens_k.long()[sequence]  # the sequence's first key
            index = (first + position).clamp(0, max(self.blocks.shape[0] - 1, 0))
            runs = _runs_at(block_runs(self.packed_blocks(cu_seqlens_k)[None]), index[None])
            around = tuple(x[0] - first for x in runs)
        return self._bounds(position, start, around, causal, window)

    def packed_blocks(self, cu_seqlens_k: Tensor) -> Tensor:
        """(total_k,) int64 block numbers that no two sequences share."""
        key = torch.arange(self.blocks.shape[0], dtype=cu_seqlens_k.dtype, device=cu_seqlens_k.device)
        sequence = torch.searchsorted(cu_seqlens_k[1:].contiguous(), key, right=True)
        return torch.where(self.blocks >= 0, self.blocks.long() * cu_seqlens_k.shape[0] + sequence, -1)

    def _bounds(
        self,
        position: Tensor,
        start: Tensor | None,
        around: tuple[Tensor, Tensor] | None,
        causal: bool,
        window: tuple[int, int],
    ) -> Bounds:
        """Bounds of queries at ``position``, whose chunks begin at ``start`` and whose blocks are ``around`` them."""
        left, right = window
        if causal:
            right = 0 if right < 0 else min(right, 0)
        first = position - left if left >= 0 else None
        end = position + right + 1 if right >= 0 else None
        if self.chunk:
            origin = 0 if start is None else start
            begin = (position - origin).div(self.chunk, rounding_mode="floor") * self.chunk + origin
            first = begin if first is None else torch.maximum(first, begin)
            end = begin + self.chunk if end is None else torch.minimum(end, begin + self.chunk)
        if around is not None:
            begin, stop = around
            first = None if first is None else torch.minimum(first, begin)
            end = None if end is None else torch.maximum(end, stop)
        return Bounds(*(None if x is None else x.to(torch.int32).contiguous() for x in (first, end)))

    def _blocks(self, num_keys: int, device: torch.device) -> Tensor | None:
        """(B or 1, num_keys) int64 block numbers, -1 = in none."""
        if self.prefix is not None:
            position = torch.arange(num_keys, device=device)
            return torch.where(position < self.prefix.to(device)[:, None], 0, -1)
        if self.blocks is None:
            return None
        blocks = self.blocks.to(device, torch.int64)
        return blocks if blocks.dim() == 2 else blocks[None]

    def follows(self, num_keys: int, device: torch.device, real: Tensor | None = None) -> Tensor:
        """() bool: whether each block's positions follow one another, so that :meth:`bounds` says it all."""
        blocks = self._blocks(num_keys, device)
        if blocks is None:
            return torch.ones((), dtype=torch.bool, device=device)
        blocks = _over_padding(blocks, real)
        begins = _begins(blocks) & (blocks >= 0)
        numbers = torch.where(begins, blocks, -1).sort(-1).values
        return ~((numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] >= 0)).any()


def _over_padding(blocks: Tensor, real: Tensor | None) -> Tensor:
    """Numbers in which a position of padding has that of the last real one before it, -1 if there is none."""
    if real is None:
        return blocks
    blocks, real = torch.broadcast_tensors(blocks, real)
    position = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, position, -1).cummax(-1).values
    return torch.where(last >= 0, blocks.gather(1, last.clamp_min(0)), -1)


def _begins(blocks: Tensor) -> Tensor:
    """Where a run of equal numbers begins."""
    return torch.cat([torch.ones_like(blocks[:, :1], dtype=torch.bool), blocks[:, 1:] != blocks[:, :-1]], dim=1)


def block_runs(blocks: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(begin, stop), (B, Sk) int64 each: the run of its block around every position; an empty one outside blocks.

    An empty run is (position, position), which widens no bounds.
    """
    blocks = _over_padding(blocks, real)
    num_keys = blocks.shape[1]
    position = torch.arange(num_keys, device=blocks.device).expand_as(blocks)
    begins = _begins(blocks)
    begin = torch.where(begins, position, 0).cummax(1).values
    ends = torch.cat([begins[:, 1:], torch.ones_like(begins[:, :1])], dim=1)  # the last position of a run
    stop = torch.where(ends, position + 1, num_keys).flip(1).cummin(1).values.flip(1)
    inside = blocks >= 0
    return torch.where(inside, begin, position), torch.where(inside, stop, position)


def _runs_at(runs: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    """The runs around the positions ``index`` (B or 1, Sq)."""
    begin, stop = runs
    index = index.expand(begin.shape[0], -1)
    return begin.gather(1, index), stop.gather(1, index)


def packed_positions(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int) -> tuple[Tensor, Tensor]:
    """(total_q,) int64 each: every packed query's sequence, and its position among that sequence's keys."""
    query = torch.arange(total_q, dtype=cu_seqlens_q.dtype, device=cu_seqlens_q.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), query, right=True)
    offset = cu_seqlens_k.diff() - cu_seqlens_q.diff() - cu_seqlens_q[:-1]
    return sequence, query.long() + offset.long()[sequence]


def query_positions(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(1, Sq) int64: the queries of a dense call are the last positions."""
    return torch.arange(num_keys - num_queries, num_keys, device=device)[None]


def as_mask(bounds: Bounds, num_keys: int, shape: tuple[int, int]) -> Tensor:
    """(B, 1, Sq, Sk) bool of bounds, for tests and for what reads matrices; ``shape`` is (B, Sq)."""
    given = next(x for x in bounds if x is not None)
    key = torch.arange(num_keys, device=given.device)
    seen = torch.ones(*shape, num_keys, dtype=torch.bool, device=given.device)
    if bounds.first is not None:
        seen = seen & (key >= bounds.first[..., None])
    if bounds.end is not None:
        seen = seen & (key < bounds.end[..., None])
    return seen[:, None]
