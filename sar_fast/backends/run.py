"""Run a chosen backend on real tensors: whole batches in, outputs, statistics and gradients out."""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import Tensor

from sar_fast.backends import torch_backend, triton_backend
from sar_fast.backends.select import PYTORCH_BACKENDS
from sar_fast.backends.sequence import Sequence, dense_last, dense_sequences, packed_sequences
from sar_fast.backends.statistics import statistics_backward, statistics_forward, text_visual_block
from sar_fast.backends.torch_backend import log_sum_exp
from sar_fast.types import AttentionOptions
from sar_fast.weights import head_weights, head_weights_vjp

logger = logging.getLogger("sar_fast")


@dataclasses.dataclass
class Call:
    """Tensors of one attention call. With ``visual`` None it is plain attention.

    Dense: q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv). Packed: without B, and ``cu_seqlens_*`` (B + 1,)
    int32, with the longest lengths in ``max_seqlens``. ``carried`` holds (av_sum, sa_sum, count) of queries counted
    before this call, or is None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    visual: Tensor | None
    text: Tensor | None
    prior: Tensor | None
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    carried: tuple[Tensor, Tensor, Tensor] | None
    max_seqlens: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.q, self.k, self.v = (dense_last(x) for x in (self.q, self.k, self.v))

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch_size(self) -> int:
        return self.cu_seqlens_q.numel() - 1 if self.packed else self.q.shape[0]

    def sequences(self) -> list[Sequence]:
        roles = (self.visual, self.text, self.prior)
        if self.packed:
            ends = (self.cu_seqlens_q, self.cu_seqlens_k)
            return list(packed_sequences(self.q, self.k, self.v, *roles, *ends, self.max_seqlens))
        return list(dense_sequences(self.q, self.k, self.v, *roles, self.key_padding_mask, self.attn_mask))

    def part(self, x: Tensor, b: int, *, keys: bool = False) -> Tensor:
        """Sequence ``b`` of a tensor laid out as q (or as k), (S, ...)."""
        if not self.packed:
            return x[b]
        ends = self.cu_seqlens_k if keys else self.cu_seqlens_q
        return x[int(ends[b]) : int(ends[b + 1])]

    def lse_part(self, lse: Tensor, b: int) -> Tensor:
        """(H, Sq) of sequence ``b`` from (B, H, Sq) or (H, total_q)."""
        if not self.packed:
            return lse[b]
        return lse[:, int(self.cu_seqlens_q[b]) : int(self.cu_seqlens_q[b + 1])]


def scale_heads_(out: Tensor, c: Tensor) -> Tensor:
    """out (S, H, D) *= c (H,) in place. On CPU by head: a mixed-dtype broadcast there is 15 times slower."""
    if out.device.type != "cpu" or out.dtype == c.dtype:
        return out.mul_(c[:, None].to(out.dtype) if out.dtype == c.dtype else c[:, None])
    for h, weight in enumerate(c.tolist()):
        out[:, h].mul_(weight)
    return out


def forward(
    call: Call, options: AttentionOptions, backend: str, *, need_lse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, av, sa, c, count); lse is empty unless needed, the last four are empty for plain attention."""
    logger.debug("attention: backend=%s q=%s k=%s", backend, tuple(call.q.shape), tuple(call.k.shape))
    if backend == triton_backend.name:
        out, lse, *stats = triton_backend.forward(call, options)
        return out, lse if need_lse else lse.new_empty(0), *stats
    q, kernel = call.q, PYTORCH_BACKENDS[backend]
    B, H, Dv = call.batch_size, q.shape[-2], call.v.shape[-1]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    sar = call.visual is not None
    sequences = call.sequences()

    lse_shape = (H, q.shape[0]) if call.packed else (B, H, q.shape[1])
    lse = q.new_empty(lse_shape if need_lse else (0,), dtype=acc)
    stats_shape = (B, H) if sar else (0, 0)
    av, sa = q.new_zeros(stats_shape, dtype=acc), q.new_zeros(stats_shape, dtype=acc)
    c = q.new_ones(stats_shape, dtype=acc)
    count = q.new_zeros(stats_shape[0], dtype=acc)
    if sar and call.carried is not None:
        av += call.carried[0]
        sa += call.carried[1]
        count += call.carried[2]

    out = None if len(sequences) == 1 else q.new_empty(*q.shape[:-1], Dv)
    for b, seq in enumerate(sequences):
        if not _is_looked_at(seq) and seq.key_valid is not None:
            seq = seq.without_padding()
        o, row_lse, *sums = _attend(kernel, seq, options, need_lse)
        if _is_looked_at(seq) and not _finite(o, *sums):
            marked = seq.marked()
            if marked is not None:
                o, row_lse, *sums = _attend(torch_backend, marked, options, need_lse)
        if sar:
            for total, part in zip((av, sa, count), sums):
                total[b] += part
            total = count[b : b + 1].clamp_min(1)
            av[b] /= total
            sa[b] /= total
            c[b] = weights_of(av[b : b + 1], sa[b : b + 1], count[b : b + 1], options)[0]
        if need_lse:
            call.lse_part(lse, b).copy_(row_lse)
        if out is None:
            out = o.contiguous() if call.packed else o.contiguous()[None]
        else:
            call.part(out, b).copy_(o)
        if sar:
            scale_heads_(call.part(out, b), c[b])
    return (out if sequences else q.new_empty(*q.shape[:-1], Dv)), lse, av, sa, c, count


def _is_looked_at(seq: Sequence) -> bool:
    """Whether results are looked at, and computed again pair by pair where what a mask hides has shown in them.

    On a GPU that would wait for it; there zeros stand for what padding hides.
    """
    return seq.q.device.type == "cpu"


def _finite(*results: Tensor) -> bool:
    """Whether all entries are, at the price of a sum; huge ones may look infinite."""
    return all(bool(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()) for x in results)


def _attend(kernel, seq: Sequence, options: AttentionOptions, need_lse: bool) -> tuple[Tensor, ...]:
    """(out, lse) of one sequence and, with roles, (av_sum, sa_sum, count) over its text queries."""
    out, lse = kernel.attention(seq, options, need_lse=need_lse)
    if seq.visual is None:
        return out, lse
    block = text_visual_block(seq, options)
    text_lse = log_sum_exp(seq, options, block.rows) if lse is None else lse[:, block.rows]
    return out, lse, *statistics_forward(seq, options, block, text_lse), block.counted.sum()


def weights_of(av: Tensor, sa: Tensor, count: Tensor, options: AttentionOptions) -> Tensor:
    """Head weights (B, H) under a call's options."""
    return head_weights(
        av,
        sa,
        count,
        beta=options.beta,
        protect_first_head=options.protect_first_head,
        normalize=options.normalize,
    )


def backward(
    call: Call,
    options: AttentionOptions,
    backend: str,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    av: Tensor,
    sa: Tensor,
    c: Tensor,
    count: Tensor,
    grad_stats: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dprior). ``out`` is the scaled output; dprior is empty unless gradients flow through the weights.

    Args:
        grad_stats: (grad_av, grad_sa, grad_c), each (B, H): gradients flow through the weights. None: c is constant.
    """
    if backend == triton_backend.name:
        return triton_backend.backward(call, options, grad_out, out, lse, av, sa, c, count, grad_stats)
    q, k, v, kernel = call.q, call.k, call.v, PYTORCH_BACKENDS[backend]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    sar = call.visual is not None
    dq, dk, dv = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (q, k, v))
    through = sar and grad_stats is not None
    dprior = torch.zeros(call.prior.shape, dtype=acc, device=q.device) if through else q.new_empty(0, dtype=acc)
    if through:
        grad_av, grad_sa = _statistics_gradients(call, options, grad_out, out, av, sa, c, count, grad_stats)

    for b, seq in enumerate(call.sequences()):
        row_lse, weight = call.lse_part(lse, b), c[b] if sar else q.new_ones(q.shape[-2], dtype=acc)
        given = (call.part(grad_out, b), call.part(out, b), weight, row_lse)
        grads = [call.part(dq, b), *(call.part(x, b, keys=True) for x in (dk, dv))]
        statistics = (grad_av[b], grad_sa[b], call.part(dprior, b, keys=True)) if through else None
        if not _is_looked_at(seq) and seq.key_valid is not None:
            seq = seq.without_padding(row_lse)
        _attend_backward(kernel, seq, options, given, grads, statistics)
        if _is_looked_at(seq) and not _finite(*grads, *(statistics or ())[2:]):
            marked = seq.marked()
            if marked is not None:
                for x in (*grads, *(statistics or ())[2:]):
                    x.zero_()
                _attend_backward(torch_backend, marked, options, given, grads, statistics)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dprior


def _attend_backward(
    kernel,
    seq: Sequence,
    options: AttentionOptions,
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: list[Tensor],
    statistics: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Add one sequence's gradients to (dq, dk, dv) and, with ``statistics`` (grad_av, grad_sa, dprior), to dprior.

    given: (grad_out, out, c, lse) of the sequence.
    """
    extra_delta = None
    if statistics is not None:
        block = text_visual_block(seq, options)
        grad_av, grad_sa, dprior = statistics
        extra_delta = statistics_backward(
            seq, options, block, given[3][:, block.rows], grad_av, grad_sa, *grads[:2], dprior
        )
    kernel.attention_backward(seq, options, *given, extra_delta, *grads)


def _statistics_gradients(
    call: Call,
    options: AttentionOptions,
    grad_out: Tensor,
    out: Tensor,
    av: Tensor,
    sa: Tensor,
    c: Tensor,
    count: Tensor,
    grad_stats: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients (B, H) of each counted query's variance and alignment.

    ``dL/dc_h = sum_i delta_i / c_h``; where c_h underflowed to 0 it only ever meets a factor c_h, so 0 is exact.
    """
    grad_av, grad_sa, grad_c = grad_stats
    acc = av.dtype
    # reduced by sum, not by a product: the softmax over heads then cancels most of it, so its rounding counts
    from_out = torch.zeros_like(grad_c)
    for b in range(call.batch_size):
        from_out[b] = (call.part(grad_out, b).to(acc) * call.part(out, b).to(acc)).sum(-1).sum(0)
    grad_c = grad_c + torch.where(c == 0, 0, from_out / torch.where(c == 0, 1, c))
    through_av, through_sa = head_weights_vjp(
        grad_c,
        av,
        sa,
        count,
        beta=options.beta,
        protect_first_head=options.protect_first_head,
        normalize=options.normalize,
    )
    per_query = 1 / count.clamp_min(1)[:, None]
    return (grad_av + through_av) * per_query, (grad_sa + through_sa) * per_query
