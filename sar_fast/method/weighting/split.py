"""A rule where a layer's heads or queries are split over ranks (docs/method.md, section 6)."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sar_fast.base.errors import ArgumentError
from sar_fast.method.distributed import Shards, all_reduce, gather
from sar_fast.method.values import Statistics, StatisticsWithRows
from sar_fast.method.weighting.protocol import Weighting, head_weights, needs_statistics
from sar_fast.method.weighting.rows import RowStatistic


class Split:
    """``inner``, asked with the statistics of all heads over all queries; every rank takes the weights of its own.

    Ranks exchange B x H floats per statistic and layer, then compute the same weights from the same numbers.

    Args:
        inner: the rule.
        heads: ranks that hold different heads of the same tokens, in head order. None = each has all.
        queries: ranks that hold different queries of the same sequences. None = each has all.
    """

    def __init__(
        self, inner: Weighting, heads: ProcessGroup | None = None, queries: ProcessGroup | None = None
    ) -> None:
        if heads is None and queries is None:
            raise ArgumentError("heads or queries", "None for both", "be a process group")
        self.inner, self.heads, self.queries = inner, heads, queries

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        return Split(copy.deepcopy(self.inner, memo), self.heads, self.queries)  # groups belong to the process

    @property
    def needs_statistics(self) -> bool:
        return needs_statistics(self.inner)

    @property
    def row_statistics(self) -> tuple[RowStatistic, ...]:
        return getattr(self.inner, "row_statistics", ())

    def over_all_queries(self, statistics: Statistics | StatisticsWithRows) -> Statistics | StatisticsWithRows:
        """This rank's heads, their means over the queries of all ranks; differentiable."""
        if self.queries is None:
            return statistics
        if any(s.queries == "last" for s in self.row_statistics):
            raise ArgumentError(
                "weighting",
                "some",
                "have no row statistics of the last query where queries are split: they are not known there",
            )
        count = statistics.count[:, None]
        heads = _stacked(statistics)  # [S, B, H_local]
        sums = [*(heads * count).unbind(), count]
        *heads, count = all_reduce(torch.cat(sums, dim=1), self.queries).split([x.shape[1] for x in sums], dim=1)
        count = count.detach()
        return _like(statistics, torch.stack(heads) / count.clamp_min(1), count[:, 0])

    def __call__(self, statistics: Statistics | StatisticsWithRows, layer: int | None) -> Tensor:
        """c (B, H_local) of this rank's heads, from their means over all queries; differentiable."""
        if self.heads is None:
            return head_weights(self.inner, statistics, layer)
        batch, local = statistics.av.shape
        ranks, first = dist.get_world_size(self.heads), dist.get_rank(self.heads) * local
        if self.needs_statistics:
            everything = gather(_stacked(statistics), self.heads)  # [S, B, H]
        else:  # NaN: nothing to exchange
            everything = statistics.av[:, :1].expand(2, batch, local * ranks)
            statistics = Statistics(*statistics[:3])
        given = _like(statistics, everything, statistics.count)
        return head_weights(self.inner, given, layer)[:, first : first + local]


def _stacked(statistics: Statistics | StatisticsWithRows) -> Tensor:
    """(S, B, H): AV, SA and the row statistics."""
    return torch.stack([statistics.av, statistics.sa, *getattr(statistics, "rows", {}).values()])


def _like(statistics: Statistics | StatisticsWithRows, heads: Tensor, count: Tensor) -> Statistics | StatisticsWithRows:
    """What :func:`_stacked` made one tensor of."""
    if isinstance(statistics, Statistics):
        return Statistics(heads[0], heads[1], count)
    return StatisticsWithRows(heads[0], heads[1], count, dict(zip(statistics.rows, heads[2:])))


def module_of(weighting: Weighting | None) -> nn.Module | None:
    """The rule, or the one inside a :class:`Split`, if it is a module; else None."""
    inner = weighting.inner if isinstance(weighting, Split) else weighting
    return inner if isinstance(inner, nn.Module) else None


def split_over(weighting: Weighting, shards: Shards | None) -> Weighting:
    """The rule of one rank's share of a layer."""
    return weighting if shards is None else Split(weighting, shards.heads, shards.queries)


def refuse_split_queries(weighting: Weighting) -> None:
    """``ValueError`` for a rule over split queries, where sums are carried from call to call."""
    if isinstance(weighting, Split) and weighting.queries is not None:
        raise ArgumentError(
            "shards.queries", "a process group", "be None with a state: running sums are not split over ranks"
        )
