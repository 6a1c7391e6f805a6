"""A rule where a layer's heads or queries are split over ranks (docs/method.md, section 6)."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sar_fast.distributed import Shards, all_reduce, gather
from sar_fast.values import Statistics, Sums
from sar_fast.weighting.protocol import Weighting, head_weights, needs_statistics


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
            raise ValueError("heads or queries must be a process group; got None for both")
        self.inner, self.heads, self.queries = inner, heads, queries

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        return Split(copy.deepcopy(self.inner, memo), self.heads, self.queries)  # groups belong to the process

    @property
    def needs_statistics(self) -> bool:
        return needs_statistics(self.inner)

    def over_all_queries(self, statistics: Statistics) -> Statistics:
        """This rank's heads, their means over the queries of all ranks; differentiable."""
        if self.queries is None:
            return statistics
        av, sa, count = statistics.sums()
        sums = all_reduce(torch.cat([av, sa, count[:, None]], dim=1), self.queries)  # [B, 2 H_local + 1]
        av, sa, count = sums.split([av.shape[1], sa.shape[1], 1], dim=1)
        return Sums(av, sa, count[:, 0].detach()).means()

    def __call__(self, statistics: Statistics, layer: int | None) -> Tensor:
        """c (B, H_local) of this rank's heads, from their means over all queries; differentiable."""
        if self.heads is None:
            return head_weights(self.inner, statistics, layer)
        batch, local = statistics.av.shape
        ranks, first = dist.get_world_size(self.heads), dist.get_rank(self.heads) * local
        if self.needs_statistics:
            av, sa = gather(torch.stack([statistics.av, statistics.sa]), self.heads)  # [2, B, H]
        else:  # NaN: nothing to exchange
            av, sa = (x[:, :1].expand(batch, local * ranks) for x in (statistics.av, statistics.sa))
        return head_weights(self.inner, Statistics(av, sa, statistics.count), layer)[:, first : first + local]


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
        raise ValueError("shards.queries must be None with a state: running sums are not split over ranks")
