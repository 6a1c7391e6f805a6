"""The values that an attention call is made of, and what comes back from it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError


class Roles(NamedTuple):
    """What the tokens of a call are. Packed calls have no batch dimension."""

    visual: Tensor  # [B, Sk] bool, the visual keys V
    text: Tensor  # [B, Sq] bool, the text queries T
    prior: Tensor  # [B, Sk] floating point, over V


class Statistics(NamedTuple):
    """One layer's statistics, of all its heads, also where heads are split over ranks (docs/method.md, section 2).

    Attributes:
        av, sa: (B, H) fp32, fp64 for fp64 input: means over the counted text queries.
        count: (B,) in the same dtype, how many queries counted; where 0, ``av`` and ``sa`` are 0.
    """

    av: Tensor
    sa: Tensor
    count: Tensor

    @property
    def sav(self) -> Tensor:
        """(B, H): AV * SA."""
        return self.av * self.sa

    def sums(self) -> Sums:
        """The same over the queries, not their mean."""
        return Sums(self.av * self.count[:, None], self.sa * self.count[:, None], self.count)


class StatisticsWithRows(NamedTuple):
    """:class:`Statistics` for a rule that asks for row statistics beside them (``row_statistics`` of the rule).

    Attributes:
        av, sa, count: as in :class:`Statistics`.
        rows: name of the row statistic -> (B, H), where nothing counted 0.
    """

    av: Tensor
    sa: Tensor
    count: Tensor
    rows: dict[str, Tensor]

    @property
    def sav(self) -> Tensor:
        """(B, H): AV * SA."""
        return self.av * self.sa


class Sums(NamedTuple):
    """Sums over counted text queries: (B, H), (B, H) and (B,), and (B, R, H) of row statistics where there are any.

    Of those of the last query ``rows`` holds the value.
    """

    av: Tensor
    sa: Tensor
    count: Tensor
    rows: Tensor | None = None

    def means(self) -> Statistics:
        """Their means; 0 where nothing counted."""
        total = self.count.clamp_min(1)[:, None]
        return Statistics(self.av / total, self.sa / total, self.count)


class Bounds(NamedTuple):
    """The run of keys that each query may see, [first, end); a side is None where the call's scores say it all.

    Shapes: (B or 1, Sq) int32; of a packed call (total_q,), counted from the first key of the query's own sequence.
    """

    first: Tensor | None = None
    end: Tensor | None = None

    @property
    def given(self) -> bool:
        return self.first is not None or self.end is not None


UNBOUNDED = Bounds()


@dataclasses.dataclass(frozen=True)
class Scores:
    """How a call's scores are made and which of them are seen; what a compiled graph specialises on.

    ``window`` is (left, right) in keys, -1 for unbounded; ``softcap`` 0.0 is off.
    """

    scale: float
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0

    @property
    def windowed(self) -> bool:
        return self.window != (-1, -1)


@dataclasses.dataclass
class Call:
    """One attention call; without ``roles`` it is plain attention.

    Dense: q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), key_padding_mask (B, Sk) bool, attn_mask
    (B or 1, 1, Sq, Sk) bool. Packed: q, k, v and roles without B, and ``cu_seqlens_*`` (B + 1,) int32, with the longest
    lengths in ``max_seqlens``. A side that ``bounds`` gives is unbounded in ``scores``, where the causal mask is the
    right side; masks hide keys on top of either.

    ``carried`` holds the sums of queries that counted before this call (decode; inference only), or is None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Scores
    roles: Roles | None = None
    key_padding_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlens: tuple[int, int] = (0, 0)
    bounds: Bounds = UNBOUNDED
    carried: Sums | None = None

    def __post_init__(self) -> None:
        left, right = self.scores.window
        for name, given, limited in zip(Bounds._fields, self.bounds, (left >= 0, right >= 0 or self.scores.causal)):
            if given is not None and limited:
                raise ArgumentError(f"bounds.{name}", "both", "be open where scores limit that side")

    def plain(self) -> Call:
        """The same without roles."""
        return dataclasses.replace(self, roles=None, carried=None)

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch_size(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1 if self.packed else self.q.shape[0]

    @property
    def num_heads(self) -> int:
        return self.q.shape[-2]

    @property
    def head_dim(self) -> int:
        """The larger of the keys' and the values'."""
        return max(self.q.shape[-1], self.v.shape[-1])

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """fp64 for fp64 input, fp32 for everything else: of statistics, weights and log-sum-exps."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """(B, H, Sq), or (H, total_q) of a packed call."""
        if self.packed:
            return self.num_heads, self.q.shape[0]
        return self.batch_size, self.num_heads, self.q.shape[1]


class Result(NamedTuple):
    """What a call gives. Statistics and weights are empty where none were computed, ``lse`` where none was wanted."""

    out: Tensor  # as q, with v's head dim
    lse: Tensor  # Call.lse_shape
    statistics: Statistics
    c: Tensor  # [B, H], the factor on each head's output
    sums: Sums | None = None  # the call's carried sums with its own queries in them; None where it carried none
