"""How a layer is split over ranks, and the collectives that they exchange statistics by (docs/method.md, section 6)."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sar_fast.base.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Shards:
    """How one layer's attention is split over ranks; None = not split.

    Attributes:
        heads: ranks that hold different heads of the same tokens, in head order (tensor parallel; DeepSpeed Ulysses
            between its all-to-alls). Rank 0 of the group holds global head 0, the protected one.
        queries: ranks that hold different queries of the same sequences against all keys (context parallel).
    """

    heads: ProcessGroup | None = None
    queries: ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.heads is None and self.queries is None:
            raise ArgumentError("heads or queries", "None for both", "be a process group")

    def __deepcopy__(self, memo: dict) -> Shards:
        return self  # process groups belong to the process, not to the model

    def check_heads(self, total: int) -> None:
        """``ValueError`` unless a layer's ``total`` heads divide evenly over the ranks that share them."""
        ranks = 1 if self.heads is None else dist.get_world_size(self.heads)
        if total % ranks:
            raise ArgumentError("shards.heads", ranks, f"have ranks that share {total} heads evenly")


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over ranks; differentiable. Every rank uses the sum for its own outputs, so its gradient is their sum too."""
    return _AllReduce.apply(x, group)


class _AllReduce(torch.autograd.Function):
    """See :func:`all_reduce`."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def gather(x: Tensor, group: ProcessGroup, dim: int = -1) -> Tensor:
    """The tensors of all ranks, of one shape, side by side along ``dim`` in rank order; differentiable.

    Backward as in :func:`all_reduce`: every rank uses the whole for its own outputs.
    """
    return _AllGather.apply(x, group, dim)


class _AllGather(torch.autograd.Function):
    """See :func:`gather`."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.local, ctx.dim = group, x.shape[dim], dim
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        grad, first = grad.contiguous().clone(), dist.get_rank(ctx.group) * ctx.local
        dist.all_reduce(grad, group=ctx.group)
        return grad.narrow(ctx.dim, first, ctx.local), None, None
