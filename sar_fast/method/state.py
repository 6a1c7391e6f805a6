"""What users keep of an attention call: its statistics, and its decode state."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.method.values import Result, Sums

if TYPE_CHECKING:
    from sar_fast.method.weighting import Weighting


@dataclasses.dataclass
class SARStats:
    """Statistics of one SAR attention call (docs/method.md, section 2).

    Attributes:
        lse: (B, H, Sq) fp32, natural log-sum-exp of the scores of every query; (H, total_q) for packed input.
        alignment_variance: (B, H) fp32, AV.
        semantic_alignment: (B, H) fp32, SA.
        sav: (B, H) fp32, AV * SA.
        head_weights: (B, H) fp32, c, the factor on each head's output.
        query_count: (B,) fp32, number of text queries that the means run over; 0 means ``head_weights`` is 1.
        backend: name of the backend that ran.
        rows: name of each row statistic that was asked for -> (B, H) fp32 (docs/row_statistics.md).
    """

    lse: Tensor
    alignment_variance: Tensor
    semantic_alignment: Tensor
    sav: Tensor
    head_weights: Tensor
    query_count: Tensor
    backend: str
    rows: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, result: Result, backend: str) -> SARStats:
        """As users read what ``result`` holds: fp32."""
        narrow = lambda t: t.to(torch.float32)
        found = result.statistics
        av, sa, sav = (narrow(t) for t in (found.av, found.sa, found.sav))
        rows = {name: narrow(x) for name, x in getattr(found, "rows", {}).items()}
        c = narrow(result.c).clone()  # not the rule's own table, which may change
        return cls(narrow(result.lse), av, sa, sav, c, narrow(found.count), backend, rows)

    def detach(self) -> SARStats:
        """The same without a graph."""
        tensors = {name: x.detach() for name, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **tensors, rows={name: x.detach() for name, x in self.rows.items()})


@dataclasses.dataclass
class SARState:
    """Decode state of one layer: sums over the counted text queries so far. Updated in place.

    Attributes:
        av_sum, sa_sum: (B, H) fp32, sums of each query's variance and semantic alignment.
        count: (B,) fp32, number of queries in the sums.
        head_weights: (B, H) fp32, the prompt's weights (used by ``decode="prompt"``).
        row_sums: (B, R, H) fp32, the same of a rule's row statistics, of the last query their values; None without any.
    """

    av_sum: Tensor
    sa_sum: Tensor
    count: Tensor
    head_weights: Tensor
    row_sums: Tensor | None = None

    @classmethod
    def empty(
        cls,
        batch_size: int,
        num_heads: int,
        device: torch.device | str = "cpu",
        weighting: Weighting | None = None,
    ) -> SARState:
        """State before any query was counted: zero sums, weights 1. ``weighting``: a rule with row statistics."""
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float32, device=device)
        asked = getattr(weighting, "row_statistics", ())
        return cls(
            zeros(batch_size, num_heads),
            zeros(batch_size, num_heads),
            zeros(batch_size),
            torch.ones(batch_size, num_heads, dtype=torch.float32, device=device),
            zeros(batch_size, len(asked), num_heads) if asked else None,
        )

    @classmethod
    def from_means(cls, av: Tensor, sa: Tensor, head_weights: Tensor, count: Tensor) -> SARState:
        """State of ``count`` (B,) queries whose mean statistics are ``av``, ``sa`` (B, H)."""
        for name, tensor, shape in (
            ("sa", sa, av.shape),
            ("head_weights", head_weights, av.shape),
            ("count", count, av.shape[:1]),
        ):
            if tensor.shape != shape:
                raise ArgumentError(name, tuple(tensor.shape), f"have shape {tuple(shape)}")
        av, sa, c, n = (t.detach().to(torch.float32) for t in (av, sa, head_weights, count))
        return cls(av * n[:, None], sa * n[:, None], n.clone(), c.clone())

    @classmethod
    def from_stats(cls, stats: SARStats, weighting: Weighting | None = None) -> SARState:
        """State after a prompt whose statistics are ``stats``. ``weighting``: its rule, if that has row statistics."""
        if not isinstance(stats, SARStats):
            raise ArgumentTypeError("stats", type(stats).__name__, "be the SARStats of a prompt")
        count = stats.query_count
        state = cls.from_means(stats.alignment_variance, stats.semantic_alignment, stats.head_weights, count)
        asked = getattr(weighting, "row_statistics", ())
        if asked:
            times = [stats.rows[s.name] * (count[:, None] if s.queries == "text" else 1) for s in asked]
            state.row_sums = torch.stack(times, dim=1).detach()
        return state

    @property
    def sums(self) -> Sums:
        """The sums, as a call carries them."""
        return Sums(self.av_sum, self.sa_sum, self.count, self.row_sums)

    def tensors(self) -> tuple[Tensor, ...]:
        """(av_sum, sa_sum, count, head_weights), and row_sums where there are any."""
        rows = () if self.row_sums is None else (self.row_sums,)
        return self.av_sum, self.sa_sum, self.count, self.head_weights, *rows

    def index_select(self, rows: Tensor) -> SARState:
        """State of the batch rows ``rows`` (int64), as beam search reorders them."""
        if not isinstance(rows, Tensor):
            raise ArgumentTypeError("rows", type(rows).__name__, "be an int64 tensor")
        return SARState(*(t.index_select(0, rows.to(t.device)) for t in self.tensors()))
