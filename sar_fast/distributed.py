"""Head weights where a layer's heads or queries are split over ranks (docs/method.md, section 6).

Weights are a softmax over all heads of the layer and their statistics are means over all text queries, so ranks first
exchange the per-head sums: B x H floats per layer, in one collective. Every rank then computes the same weights from
the same numbers.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sar_fast.types import AttentionOptions
from sar_fast.weights import head_weights


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
            raise ValueError("heads or queries must be a process group; got None for both")

    def __deepcopy__(self, memo: dict) -> Shards:
        return self  # process groups belong to the process, not to the model

    def check_heads(self, total: int) -> None:
        """``ValueError`` unless a layer's ``total`` heads divide evenly over the ranks that share them."""
        ranks = 1 if self.heads is None else dist.get_world_size(self.heads)
        if total % ranks:
            raise ValueError(f"shards.heads has {ranks} ranks, which do not share {total} heads evenly")

    def weights(
        self, av: Tensor, sa: Tensor, count: Tensor, options: AttentionOptions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From this rank's means to its heads' weights, differentiable in av and sa.

        Args:
            av, sa: (B, H_local) means over this rank's counted queries. count: (B,) how many they are.

        Returns:
            (av, sa, c, count) of this rank's heads, the means over all ranks' queries.
        """
        if self.queries is not None:
            sums = torch.cat([av * count[:, None], sa * count[:, None], count[:, None]], dim=1)  # [B, 2 H_local + 1]
            av, sa, count = _AllReduce.apply(sums, self.queries).split([av.shape[1], sa.shape[1], 1], dim=1)
            count = count[:, 0].detach()
            av, sa = (x / count.clamp_min(1)[:, None] for x in (av, sa))
        all_av, all_sa, own = av, sa, slice(None)
        if self.heads is not None:
            local = av.shape[1]
            own = slice(dist.get_rank(self.heads) * local, (dist.get_rank(self.heads) + 1) * local)
            all_av, all_sa = gather(torch.stack([av, sa]), self.heads)  # [2, B, H]
        weigh = {"beta": options.beta, "protect_first_head": options.protect_first_head, "normalize": options.normalize}
        return av, sa, head_weights(all_av, all_sa, count, **weigh)[:, own], count


def without_weights(options: AttentionOptions) -> AttentionOptions:
    """Options under which every head weighs 1: what ranks compute before they know each other's statistics."""
    return dataclasses.replace(options, beta=float("inf"), protect_first_head=False, normalize="none")


class _AllReduce(torch.autograd.Function):
    """Sum over ranks. Every rank uses the sum for its own outputs, so the gradient is the sum over ranks too."""

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

    Backward as in :class:`_AllReduce`: every rank uses the whole for its own outputs.
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
