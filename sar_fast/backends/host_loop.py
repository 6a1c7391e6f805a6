"""A backend out of attention for one sequence: the loop over the sequences of a call, once for all kinds of calls."""

from __future__ import annotations

import logging
from types import ModuleType

import torch
from torch import Tensor

from sar_fast.backends import small, torch_backend
from sar_fast.backends.blocks import scale_heads_
from sar_fast.backends.protocol import Gradients, Request, nothing_computed
from sar_fast.backends.sequence import Sequence, dense_last, part_of, sequences_of
from sar_fast.backends.statistics import gather_rows, statistics_backward, statistics_forward, text_visual_block
from sar_fast.backends.torch_backend import log_sum_exp
from sar_fast.backends.weight_gradients import statistics_gradients
from sar_fast.method.kvcache import Step
from sar_fast.method.values import Call, Result, Statistics, Sums
from sar_fast.method.weighting.constant import Equal
from sar_fast.method.weighting.softmax import Lowered

logger = logging.getLogger("sar_fast")


class HostLoop:
    """The backend of a module with ``unsupported``, ``attention`` and ``attention_backward`` for one sequence.

    Statistics come from the text-by-visual block, whatever attends.
    """

    waits = True
    on_cpu = True

    def __init__(self, name: str, kernel: ModuleType) -> None:
        self.name, self.kernel = name, kernel

    def unsupported(self, request: Request) -> str | None:
        return self.kernel.unsupported(request)

    def forward(self, call: Call, rule: Lowered, *, need_lse: bool) -> Result:
        self._log(call)
        result = self._attend_at_once(call, rule, need_lse=need_lse) if small.runs_at_once(call) else None
        return self._attend(call, sequences_of(call), rule, need_lse=need_lse) if result is None else result

    def _log(self, call: Call) -> None:
        logger.debug("attention: backend=%s q=%s k=%s", self.name, tuple(call.q.shape), tuple(call.k.shape))

    def _attend_at_once(self, call: Call, rule: Lowered, *, need_lse: bool) -> Result | None:
        """Attention of all samples in one call; None where it is not finite, as what a mask hides may have shown."""
        out, lse = self.kernel.attention(small.side_by_side(call), need_lse=need_lse)  # [Sq, B * H, Dv], [B * H, Sq]
        sums = () if call.roles is None else small.statistics_sums(call)
        if not _finite(out, *sums):
            return None
        out = out.unflatten(1, (call.batch_size, -1)).transpose(0, 1).contiguous()
        lse = lse.view(call.lse_shape) if need_lse else out.new_empty(0)
        total, c = _start(call)
        if call.roles is None:
            return Result(out, lse, Statistics(*total[:3]), c)
        for before, own in zip(total[:3], sums):
            before += own
        statistics = total.means()
        if not isinstance(rule, Equal):
            c = rule(statistics, None)
            out *= c[:, None, :, None]
        return Result(out, lse, statistics, c, None if call.carried is None else total)

    def _attend(self, call: Call, sequences: list[Sequence], rule: Lowered, *, need_lse: bool) -> Result:
        """Attention of a call's sequences, one after the other."""
        q, acc, sar = call.q, call.accumulate_dtype, call.roles is not None
        lse = q.new_empty(call.lse_shape if need_lse else (0,), dtype=acc)
        total, c = _start(call)
        weighs = sar and not isinstance(rule, Equal)  # whose weights are 1: no pass over the output
        out_shape = (*q.shape[:-1], call.v.shape[-1])
        out = None if len(sequences) == 1 else q.new_empty(out_shape)
        for b, seq in enumerate(sequences):
            o, row_lse, *sums = _attend_safely(self.kernel, seq, need_lse)
            if sar:
                for before, own_sum in zip(total[:3], sums):
                    before[b] += own_sum
                if weighs:
                    c[b] = rule(Sums(*(x[b : b + 1] for x in total[:3])).means(), None)[0]
            if need_lse:
                _lse_part(call, lse, b).copy_(row_lse)
            if out is None:
                out = o.contiguous().view(out_shape)
            else:
                part_of(call, out, b).copy_(o)
            if weighs:
                scale_heads_(part_of(call, out, b), c[b])
        if not sar:
            return Result(out, lse, Statistics(*total[:3]), c)
        return Result(out, lse, total.means(), c, None if call.carried is None else total)

    def backward(
        self, call: Call, rule: Lowered, grad_out: Tensor, result: Result, through: Gradients | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, acc, sar = call.q, call.accumulate_dtype, call.roles is not None
        dq, dk, dv = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (q, call.k, call.v))
        through = through if sar else None
        dprior = q.new_empty(0, dtype=acc)
        if through is not None:
            dprior = torch.zeros(call.roles.prior.shape, dtype=acc, device=q.device)
            grad_av, grad_sa = statistics_gradients(call, rule, grad_out, result, through)

        for b, seq in enumerate(sequences_of(call)):
            row_lse = _lse_part(call, result.lse, b)
            weight = result.c[b] if sar else q.new_ones(q.shape[-2], dtype=acc)
            given = (part_of(call, grad_out, b), part_of(call, result.out, b), weight, row_lse)
            grads = [part_of(call, dq, b), *(part_of(call, x, b, keys=True) for x in (dk, dv))]
            statistics = None
            if through is not None:
                statistics = (grad_av[b], grad_sa[b], part_of(call, dprior, b, keys=True))
            if not _is_looked_at(seq) and seq.key_valid is not None:
                seq = seq.without_padding(row_lse)
            _attend_backward(self.kernel, seq, given, grads, statistics)
            if _is_looked_at(seq) and not _finite(*grads, *(statistics or ())[2:]):
                marked = seq.marked()
                if marked is not None:
                    for x in (*grads, *(statistics or ())[2:]):
                        x.zero_()
                    _attend_backward(torch_backend, marked, given, grads, statistics)
        return dq.to(q.dtype), dk.to(call.k.dtype), dv.to(call.v.dtype), dprior

    def mass(self, call: Call, lse: Tensor, chosen: Tensor) -> Tensor | None:
        return None

    def decode(self, step: Step, *, need_lse: bool) -> Result:
        lengths, cache, roles = step.cache.write(), step.cache, step.roles
        q, sequences = dense_last(step.q), []
        for b, (k, v) in enumerate(cache.sequences(lengths)):
            own = []
            if roles is not None:
                own = [roles.visual[b, : lengths[b]], roles.text[b], roles.prior[b, : lengths[b]]]
            first, end = (None if x is None else x[b if x.shape[0] > 1 else 0] for x in step.bounds)
            real = None if step.key_padding_mask is None else step.key_padding_mask[b, : lengths[b]]
            sequences.append(Sequence(q[b], k, v, step.scores, *own, key_valid=real, first=first, end=end))
        call = Call(q, cache.k, cache.v, step.scores, roles, carried=step.sums)
        self._log(call)
        result = self._attend(call, sequences, step.rule, need_lse=need_lse)
        if step.c is not None:
            for b in range(q.shape[0]):
                scale_heads_(result.out[b], step.c[b])
        if step.sums is not None:
            for kept, new in zip(step.sums[:3], result.sums):
                kept.copy_(new)
        return result


def _start(call: Call) -> tuple[Sums, Tensor]:
    """What to add a call's sums to, and weights 1; empty for plain attention."""
    q, acc = call.q, call.accumulate_dtype
    if call.roles is None:
        nothing, c = nothing_computed(q, acc)
        return Sums(*nothing), c
    B, H = call.batch_size, call.num_heads
    if call.carried is None:
        total = Sums(*(q.new_zeros(shape, dtype=acc) for shape in ((B, H), (B, H), (B,))))
    else:
        total = Sums(*(x.to(acc, copy=True) for x in call.carried[:3]))
    return total, q.new_ones((B, H), dtype=acc)


def _lse_part(call: Call, lse: Tensor, b: int) -> Tensor:
    """(H, Sq) of sequence ``b`` from (B, H, Sq) or (H, total_q)."""
    if not call.packed:
        return lse[b]
    return lse[:, int(call.cu_seqlens_q[b]) : int(call.cu_seqlens_q[b + 1])]


def _is_looked_at(seq: Sequence) -> bool:
    """Whether results are looked at, and computed again pair by pair where what a mask hides has shown in them.

    On a GPU that would wait for it; there zeros stand for what padding hides.
    """
    return seq.q.device.type == "cpu"


def _finite(*results: Tensor) -> bool:
    """Whether all entries are, at the price of a sum; huge ones may look infinite."""
    return all(bool(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()) for x in results)


def _attend_safely(kernel: ModuleType, seq: Sequence, need_lse: bool) -> tuple[Tensor, ...]:
    """As :func:`_attend_one`; what a mask hides need not be finite."""
    if not _is_looked_at(seq):
        return _attend_one(kernel, seq if seq.key_valid is None else seq.without_padding(), need_lse)
    found = _attend_one(kernel, seq, need_lse)
    out, _, *sums = found
    marked = None if _finite(out, *sums) else seq.marked()
    return found if marked is None else _attend_one(torch_backend, marked, need_lse)


def _attend_one(kernel: ModuleType, seq: Sequence, need_lse: bool) -> tuple[Tensor, ...]:
    """(out, lse) of one sequence and, with roles, (av_sum, sa_sum, count) over its text queries."""
    out, lse = kernel.attention(seq, need_lse=need_lse)
    if seq.visual is None:
        return out, lse
    if seq.marks is None and small.is_small(alone := seq.as_call()):
        return out, lse, *(x[0] for x in small.statistics_sums(alone))
    block = text_visual_block(seq)
    text_lse = log_sum_exp(seq, block.rows) if lse is None else gather_rows(lse.T, block.rows).T
    return out, lse, *statistics_forward(seq, block, text_lse), block.counted.sum()


def _attend_backward(
    kernel: ModuleType,
    seq: Sequence,
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: list[Tensor],
    statistics: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Add one sequence's gradients to (dq, dk, dv) and, with ``statistics`` (grad_av, grad_sa, dprior), to dprior.

    given: (grad_out, out, c, lse) of the sequence.
    """
    extra_delta = None
    if statistics is not None:
        block = text_visual_block(seq)
        grad_av, grad_sa, dprior = statistics
        extra_delta = statistics_backward(seq, block, given[3][:, block.rows], grad_av, grad_sa, *grads[:2], dprior)
    kernel.attention_backward(seq, *given, extra_delta, *grads)
