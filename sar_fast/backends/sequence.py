"""One sequence of an attention call: what the PyTorch backends loop over.

Dense batches, packed (varlen) input and KV caches all become lists of :class:`Sequence`, so the mathematics is written
once, for (Sq, H, D) queries against (Sk, Hkv, D) keys. All members are views.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from sar_fast.method.validation import check_ends
from sar_fast.method.values import Bounds, Call, Roles, Scores


def dense_last(x: Tensor) -> Tensor:
    """The tensor itself if its last dimension is dense, else a copy.

    Kernels take that for granted, PyTorch's flash kernel on a CPU without looking.
    """
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


@dataclasses.dataclass
class Marks:
    """Where a sequence is not finite."""

    q: Tensor  # [Sq, H] bool
    k: Tensor  # [Sk, Hkv] bool
    v: Tensor  # [Sk, Hkv, Dv] bool

    def spoil_(self, s: Tensor, rows: Tensor, keys: Tensor | slice, kv: slice = slice(None)) -> Tensor:
        """NaN in scores (Hkv, G, r, n) of query ``rows`` and ``keys`` whose query or key is not finite, in place."""
        at_q = self.q[rows].T.view(self.k.shape[1], -1, rows.numel())[kv]  # [Hkv, G, r]
        at_k = self.k[keys].T[kv]  # [Hkv, n]
        return s.masked_fill_(at_q[..., None] | at_k[:, None, None, :], torch.nan)


@dataclasses.dataclass
class Sequence:
    """Views of one sample. ``key_valid`` (Sk,) and ``mask`` (Sq, Sk) are bool, True = may be seen.

    Of samples side by side, which have no roles, ``key_valid`` is (Sk, Hkv), each kv head's.
    ``first`` and ``end`` bound the run of keys that each query sees (:class:`~sar_fast.method.values.Bounds`).
    """

    q: Tensor  # [Sq, H, D]
    k: Tensor  # [Sk, Hkv, D]
    v: Tensor  # [Sk, Hkv, Dv]
    scores: Scores
    visual: Tensor | None = None  # [Sk] bool
    text: Tensor | None = None  # [Sq] bool
    prior: Tensor | None = None  # [Sk]
    key_valid: Tensor | None = None
    mask: Tensor | None = None
    first: Tensor | None = None  # [Sq] int32
    end: Tensor | None = None  # [Sq] int32
    marks: Marks | None = None

    def marked(self) -> Sequence | None:
        """The sequence with zeros for what is not finite, and where that was; None if there is no such entry.

        A product then takes nothing from an entry that a mask hides (0 * NaN is NaN), and what a query does see is
        put back into its scores, and into its output.
        """
        finite = [x.isfinite() for x in (self.q, self.k, self.v)]
        if all(bool(x.all()) for x in finite):
            return None
        clean = [torch.where(ok, x, 0) for ok, x in zip(finite, (self.q, self.k, self.v))]
        bad_q, bad_k, bad_v = (~ok for ok in finite)
        marks = Marks(bad_q.any(-1), bad_k.any(-1), bad_v)
        return dataclasses.replace(self, q=clean[0], k=clean[1], v=clean[2], marks=marks)

    def without_padding(self, lse: Tensor | None = None) -> Sequence:
        """The sequence with zeros for keys and values that padding hides, and for queries whose lse (H, Sq) says that
        they see nothing."""
        padding = ~self.key_valid[:, None, None]
        q = self.q if lse is None else self.q.masked_fill(lse.isneginf().all(0)[:, None, None], 0)
        return dataclasses.replace(self, q=q, k=self.k.masked_fill(padding, 0), v=self.v.masked_fill(padding, 0))

    def as_call(self) -> Call:
        """A dense call of this sequence alone, if it has roles."""
        first = lambda x: None if x is None else x[None]
        roles = Roles(*map(first, (self.visual, self.text, self.prior)))
        mask = None if self.mask is None else self.mask[None, None]
        bounds = Bounds(first(self.first), first(self.end))
        return Call(
            *map(first, (self.q, self.k, self.v)), self.scores, roles, first(self.key_valid), mask, bounds=bounds
        )

    @property
    def offset(self) -> int:
        """Position of query 0 among the keys: queries are aligned to the last keys."""
        return self.k.shape[0] - self.q.shape[0]

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """fp64 for fp64 input, fp32 for everything else."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


def sequences_of(call: Call) -> list[Sequence]:
    """The samples of a dense call, or the sequences of a packed one."""
    return list(_packed_sequences(call) if call.packed else _dense_sequences(call))


def _dense_sequences(call: Call) -> Iterator[Sequence]:
    q, k, v = (dense_last(x) for x in (call.q, call.k, call.v))
    at = lambda x, b: None if x is None else x[b]
    for b in range(call.batch_size):
        mask = call.attn_mask
        mask = None if mask is None else mask[b if mask.shape[0] > 1 else 0, 0]
        roles = [None] * 3 if call.roles is None else [x[b] for x in call.roles]
        bounds = [None if x is None else x[b if x.shape[0] > 1 else 0] for x in call.bounds]
        yield Sequence(q[b], k[b], v[b], call.scores, *roles, at(call.key_padding_mask, b), mask, *bounds)


def _packed_sequences(call: Call) -> Iterator[Sequence]:
    q, k, v = (dense_last(x) for x in (call.q, call.k, call.v))
    q_ends, k_ends = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    check_ends("q", q_ends, q.shape[0], call.max_seqlens[0])  # the ends are on the host here anyway
    check_ends("k", k_ends, k.shape[0], call.max_seqlens[1])
    for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:]):
        roles = [None] * 3
        if call.roles is not None:
            roles = call.roles.visual[k0:k1], call.roles.text[q0:q1], call.roles.prior[k0:k1]
        first, end = (None if x is None else x[q0:q1] for x in call.bounds)
        yield Sequence(q[q0:q1], k[k0:k1], v[k0:k1], call.scores, *roles, first=first, end=end)


def part_of(call: Call, x: Tensor, b: int, *, keys: bool = False) -> Tensor:
    """Sequence ``b`` of a tensor laid out as q (or as k), (S, ...)."""
    if not call.packed:
        return x[b]
    ends = call.cu_seqlens_k if keys else call.cu_seqlens_q
    return x[int(ends[b]) : int(ends[b + 1])]
