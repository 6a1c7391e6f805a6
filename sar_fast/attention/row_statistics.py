"""The operator of row statistics (docs/row_statistics.md): sums over text queries, and their gradients.

It reads q, k and the log-sum-exp that any backend gives, one block of counted text queries against the visual keys at a
time. A statistic is a Python object, which reaches the operator by its id; what it computes with besides are tensors
among the operator's arguments, so a compiled graph is told of new ones, and a backward has those of its forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sar_fast.backends.blocks import row_blocks, scores, sees
from sar_fast.backends.select import BY_NAME
from sar_fast.backends.sequence import Sequence, sequences_of
from sar_fast.backends.statistics import rows_per_block, text_visual_block
from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.method.tracing import distinct, longest, no_autocast, recording
from sar_fast.method.values import Bounds, Call, Roles, Scores, Statistics, StatisticsWithRows, Sums
from sar_fast.method.weighting.rows import Mass, Rows, RowStatistic, check_row_statistics, find_row_statistic

_COPIES = 8  # (heads, rows, keys) tensors that a statistic and its gradient may hold at once

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor lse, Tensor visual_mask, Tensor text_mask, Tensor? key_padding_mask, "
    "Tensor? attn_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_first, Tensor? key_end, "
    "Tensor[] tensors, int[] num_tensors, str[] ids, float softmax_scale, bool causal, SymInt window_left, "
    "SymInt window_right, float softcap, SymInt max_seqlen_q, SymInt max_seqlen_k"
)
_library = torch.library.Library("sar_fast", "FRAGMENT")
_library.define(f"row_statistics({_ARGUMENTS}, str backend, bool grad_enabled) -> Tensor sums")
_library.define(f"row_statistics_backward(Tensor grad_sums, {_ARGUMENTS}) -> (Tensor dq, Tensor dk)")


class _Asked(NamedTuple):
    """A statistic and the tensors that it was called with."""

    statistic: RowStatistic
    tensors: list[Tensor]

    def __call__(self, rows: Rows) -> Tensor:
        """(h, r) in the accumulate dtype."""
        value = self.statistic(rows, *self.tensors)
        shape, rule = (len(rows.heads), rows.queries.numel()), f"row statistic {self.statistic.name!r}"
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentTypeError(rule, got, "return a floating point tensor")
        if value.shape != shape:
            raise ArgumentError(rule, tuple(value.shape), f"return shape {shape}, (heads, queries)")
        return value.to(rows.q.dtype)


class _Sample(NamedTuple):
    """One sequence of a call, and where it lies in tensors like q, k and lse."""

    number: int
    seq: Sequence
    lse: Tensor  # [H, Sq]
    at_q: int | slice
    at_k: int | slice

    @property
    def first_key(self) -> int:
        return self.at_k.start if isinstance(self.at_k, slice) else 0


def _samples(call: Call, lse: Tensor) -> Iterator[_Sample]:
    ends = [cu.tolist() for cu in (call.cu_seqlens_q, call.cu_seqlens_k)] if call.packed else None
    for b, seq in enumerate(sequences_of(call)):
        if ends is None:
            yield _Sample(b, seq, lse[b], b, b)
        else:
            at_q, at_k = (slice(*e[b : b + 2]) for e in ends)
            yield _Sample(b, seq, lse[:, at_q], at_q, at_k)


def _handed(sample: _Sample, asked: list[_Asked]) -> Iterator[tuple[list[int], Rows]]:
    """Blocks of a sample's counted text queries, and which statistics they are for."""
    seq, block = sample.seq, text_visual_block(sample.seq)
    counted, keys, acc = block.rows[block.counted], block.keys, seq.accumulate_dtype
    if counted.numel() == 0:
        return
    Hkv = seq.k.shape[1]
    G, k = seq.q.shape[1] // Hkv, seq.k[keys].to(acc)  # [n, Hkv, D]
    for queries, rows in (("text", counted), ("last", counted[-1:])):
        wanted = [i for i, (statistic, _) in enumerate(asked) if statistic.queries == queries]
        if not wanted:
            continue
        for part in rows.split(rows_per_block(_COPIES * G, keys.numel(), rows.device)):
            visible = None if block.all_visible else sees(seq, part, keys)
            if visible is not None and bool(visible.all()):  # later queries see more than the first
                visible = None
            q = seq.q[part].to(acc).transpose(0, 1)  # [H, r, D]
            for kv in range(Hkv):
                heads = range(kv * G, (kv + 1) * G)
                own = slice(heads.start, heads.stop)
                given = (q[own], k[:, kv], sample.lse[own, part], visible, keys, part)
                static = (sample.number, heads, sample.first_key, seq.scores.scale, seq.scores.softcap)
                yield wanted, Rows(*given, *static, bad=_bad(seq, part, keys, kv))


def _bad(seq: Sequence, rows: Tensor, keys: Tensor, kv: int) -> Tensor | None:
    """(G, r, n) bool, pairs of one kv head with a query or a key that was not finite, or None."""
    if seq.marks is None:
        return None
    none = torch.zeros(1, seq.q.shape[1] // seq.k.shape[1], rows.numel(), keys.numel(), device=rows.device)
    return seq.marks.spoil_(none, rows, keys, slice(kv, kv + 1))[0].isnan()


def _looked_at(sample: _Sample, results: list[Tensor]) -> _Sample | None:
    """The sample to compute anew, pair by pair, where what a mask hides has shown in results; None: they are right.

    On a GPU they are not looked at, which would wait for it.
    """
    if sample.seq.q.device.type != "cpu" or all(bool(x.sum().isfinite()) for x in results):
        return None
    marked = sample.seq.marked()
    return None if marked is None else sample._replace(seq=marked)


def _forward(call: Call, lse: Tensor, asked: list[_Asked], backend: str) -> Tensor:
    """(B, R, H) sums, with a graph only where a statistic has parameters of its own."""
    sums = lse.new_zeros(call.batch_size, len(asked), call.num_heads)
    others = []
    for i, one in enumerate(asked):
        chosen = one.statistic.chosen(call, *one.tensors) if _is_mass(one.statistic) else None
        mass = None if chosen is None else BY_NAME[backend].mass(call, lse, chosen)
        if mass is None:
            others.append(i)
        else:
            sums[:, i] = mass
    if not others:
        return sums
    rest = [asked[i] for i in others]
    for sample in _samples(call, lse):
        found = _sample_sums(sample, rest)
        again = _looked_at(sample, [found])
        sums[sample.number, others] = found if again is None else _sample_sums(again, rest)
    return sums


def _sample_sums(sample: _Sample, asked: list[_Asked]) -> Tensor:
    """(R, H) of one sample."""
    sums = sample.lse.new_zeros(len(asked), sample.lse.shape[0])
    for wanted, rows in _handed(sample, asked):
        for i in wanted:
            value = asked[i](rows)
            if value.requires_grad:
                raise ArgumentTypeError(
                    f"row statistic {asked[i].statistic.name!r}",
                    "a result that requires grad",
                    "have no parameters of its own: gradients flow to q and k alone",
                )
            sums[i, rows.heads.start : rows.heads.stop] += value.sum(-1)
    return sums


def _is_mass(statistic: RowStatistic) -> bool:
    """Whether a backend may have it for itself: linear in attention, over all counted queries."""
    return type(statistic).__call__ is Mass.__call__ and statistic.queries == "text"


def _backward(call: Call, lse: Tensor, asked: list[_Asked], grad_sums: Tensor) -> tuple[Tensor, Tensor]:
    """(dq, dk) in the inputs' dtypes."""
    dq, dk = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (call.q, call.k))
    for sample in _samples(call, lse):
        grads = [dq[sample.at_q], dk[sample.at_k]]
        if sample.seq.q.device.type != "cpu" and sample.seq.key_valid is not None:
            sample = sample._replace(seq=sample.seq.without_padding(sample.lse))
        _sample_backward(sample, asked, grad_sums[sample.number], *grads)
        again = _looked_at(sample, grads)
        if again is not None:
            for x in grads:
                x.zero_()
            _sample_backward(again, asked, grad_sums[sample.number], *grads)
    return dq.to(call.q.dtype), dk.to(call.k.dtype)


def _sample_backward(sample: _Sample, asked: list[_Asked], grad_sums: Tensor, dq: Tensor, dk: Tensor) -> None:
    """Add the gradients of one sample, given those of its sums (R, H), to dq (Sq, H, D) and dk (Sk, Hkv, D)."""
    dlse = torch.zeros_like(sample.lse)
    for wanted, rows in _handed(sample, asked):
        heads = slice(rows.heads.start, rows.heads.stop)
        with recording():
            leaves = [x.detach().requires_grad_() for x in (rows.q, rows.k, rows.lse)]
            rows.q, rows.k, rows.lse = leaves
            loss = sum((asked[i](rows).sum(-1) * grad_sums[i, heads]).sum() for i in wanted)
            if not loss.requires_grad:  # the statistic is a constant
                continue
            for_q, for_k, for_lse = torch.autograd.grad(loss, leaves, allow_unused=True)
        if for_q is not None:
            dq[rows.queries, heads] += for_q.transpose(0, 1)
        if for_k is not None:
            dk[rows.keys, rows.heads.start // len(rows.heads)] += for_k
        if for_lse is not None:
            dlse[heads, rows.queries] += for_lse
    _log_sum_exp_backward(sample, dlse, dq, dk)


def _log_sum_exp_backward(sample: _Sample, dlse: Tensor, dq: Tensor, dk: Tensor) -> None:
    """``dS_ij += dlse_i p_ij`` where dlse (H, Sq) is not 0: those queries, against all keys that they see."""
    seq, softcap = sample.seq, sample.seq.scores.softcap
    H, Hkv, acc = seq.q.shape[1], seq.k.shape[1], seq.accumulate_dtype
    rows = (dlse != 0).any(0).nonzero()[:, 0]
    for block, (k0, k1) in row_blocks(seq, rows, copies=3):
        s = scores(seq, block, (k0, k1))  # [Hkv, G, r, n]
        gain, row_lse = (x[:, block].view(Hkv, H // Hkv, -1, 1) for x in (dlse, sample.lse))
        ds = seq.scores.scale * gain * torch.exp(s - row_lse)
        if softcap > 0:
            ds = ds * (1 - (s / softcap).square())
        if softcap > 0 or seq.marks is not None:  # hidden: -inf would make NaN of it, a row that is NaN too
            ds.masked_fill_(s.isneginf(), 0)
        q = seq.q[block].to(acc).view(block.numel(), Hkv, H // Hkv, -1)
        dq[block] += torch.einsum("kgrn,nkd->rkgd", ds, seq.k[k0:k1].to(acc)).reshape(block.numel(), H, -1)
        dk[k0:k1] += torch.einsum("kgrn,rkgd->nkd", ds, q)


def _asked(call: Call, tensors: list[Tensor], num_tensors: list[int], ids: list[str]) -> list[_Asked]:
    """The statistics of an operator's call, checked against it."""
    left, asked = list(tensors), []
    for key, n in zip(ids, num_tensors):
        one = _Asked(find_row_statistic(key), left[:n])
        one.statistic.check(call, *one.tensors)
        asked.append(one)
        left = left[n:]
    return asked


def _call(
    q, k, lse, visual_mask, text_mask, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, key_first, key_end,
    softmax_scale, causal, window_left, window_right, softcap, max_seqlen_q, max_seqlen_k,
) -> Call:  # fmt: skip
    """The call on real tensors; neither values nor a prior are read, so keys and V stand for them."""
    lengths = (longest(max_seqlen_q, cu_seqlens_q, q.shape[0]), longest(max_seqlen_k, cu_seqlens_k, k.shape[0]))
    masks = (key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k)
    q, k, roles = q.detach(), k.detach(), Roles(visual_mask, text_mask, visual_mask)
    scores = Scores(softmax_scale, causal, (window_left, window_right), softcap)
    call = Call(q, k, k, scores, roles, *masks, lengths, Bounds(key_first, key_end))
    if tuple(lse.shape) != call.lse_shape or lse.dtype != call.accumulate_dtype:
        needed = f"{call.accumulate_dtype} of shape {call.lse_shape}"
        raise ArgumentError("lse", f"{lse.dtype} of shape {tuple(lse.shape)}", f"be {needed}")
    return call


@torch.library.impl(_library, "row_statistics", "CompositeExplicitAutograd")
def _forward_impl(
    q, k, lse, visual_mask, text_mask, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, key_first, key_end,
    tensors, num_tensors, ids, softmax_scale, causal, window_left, window_right, softcap, max_seqlen_q, max_seqlen_k,
    backend, grad_enabled,
):  # fmt: skip
    masks = (key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, key_first, key_end)
    scalars = (softmax_scale, causal, window_left, window_right, softcap, max_seqlen_q, max_seqlen_k)
    call = _call(q, k, lse, visual_mask, text_mask, *masks, *scalars)
    asked = _asked(call, tensors, num_tensors, ids)
    with no_autocast(q), recording() if grad_enabled else torch.no_grad():  # to see parameters of a statistic
        return _forward(call, lse.detach(), asked, backend)


@torch.library.register_fake("sar_fast::row_statistics", lib=_library)
def _forward_fake(
    q, k, lse, visual_mask, text_mask, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, key_first, key_end,
    tensors, num_tensors, ids, softmax_scale, causal, window_left, window_right, softcap, max_seqlen_q, max_seqlen_k,
    backend, grad_enabled,
):  # fmt: skip
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    return lse.new_empty((batch, len(ids), q.shape[-2]))


@torch.library.impl(_library, "row_statistics_backward", "CompositeExplicitAutograd")
def _backward_impl(
    grad_sums, q, k, lse, visual_mask, text_mask, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, key_first,
    key_end, tensors, num_tensors, ids, softmax_scale, causal, window_left, window_right, softcap, max_seqlen_q,
    max_seqlen_k,
):  # fmt: skip
    masks = (key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, key_first, key_end)
    scalars = (softmax_scale, causal, window_left, window_right, softcap, max_seqlen_q, max_seqlen_k)
    call = _call(q, k, lse, visual_mask, text_mask, *masks, *scalars)
    asked = _asked(call, tensors, num_tensors, ids)
    with no_autocast(q), torch.no_grad():
        return _backward(call, lse.detach(), asked, grad_sums)


@torch.library.register_fake("sar_fast::row_statistics_backward", lib=_library)
def _backward_fake(
    grad_sums, q, k, lse, visual_mask, text_mask, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, key_first,
    key_end, tensors, num_tensors, ids, softmax_scale, causal, window_left, window_right, softcap, max_seqlen_q,
    max_seqlen_k,
):  # fmt: skip
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))


class _RowStatistics(torch.autograd.Function):
    """Differentiable in q and k; lse is theirs, so its gradient goes on to them."""

    @staticmethod
    def forward(
        ctx, q, k, lse, visual_mask, text_mask, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k,
        key_first, key_end, static, backend, held, *tensors,
    ):  # fmt: skip
        masks = (key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, key_first, key_end)
        ctx.save_for_backward(q, k, lse, visual_mask, text_mask, *masks, *tensors)
        ctx.static, ctx.held = static, held
        return torch.ops.sar_fast.row_statistics(
            q, k, lse, visual_mask, text_mask, *masks, list(tensors), *static, backend, True
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sums):
        saved = ctx.saved_tensors
        dq, dk = torch.ops.sar_fast.row_statistics_backward(grad_sums, *saved[:11], list(saved[11:]), *ctx.static)
        return (dq, dk) + (None,) * (len(saved) + 1)


def row_statistics(
    call: Call, lse: Tensor, statistics: tuple[RowStatistic, ...], backend: str, *, differentiable: bool
) -> Tensor:
    """Sums of row statistics over a call's counted text queries, or their values at the last of them.

    Args:
        call: with roles.
        lse: ``call.lse_shape`` in the accumulate dtype, of the same call. What a statistic's gradient asks of it goes
            on to q and k, not to a graph behind it.
        statistics: R of them; names must differ.
        backend: name of the call's; it may have :class:`Mass` for itself, as the kernels do.
        differentiable: whether gradients flow to q and k.

    Returns:
        (B, R, H) in the accumulate dtype; 0 where no query counts.

    Raises:
        ValueError, TypeError: naming the statistic or the argument.
    """
    statistics = check_row_statistics(statistics)
    if call.roles is None:
        raise ArgumentError("row_statistics", "plain attention", "be asked of a call with roles")
    scores = call.scores
    num_tensors = [len(statistic.tensors) for statistic in statistics]
    scalars = (float(scores.scale), scores.causal, *scores.window, float(scores.softcap), *call.max_seqlens)
    static = (num_tensors, [statistic._id for statistic in statistics], *scalars)
    masks = (call.key_padding_mask, call.attn_mask, call.cu_seqlens_q, call.cu_seqlens_k, *call.bounds)
    rest = (lse.detach(), call.roles.visual, call.roles.text, *masks)
    tensors = [x for statistic in statistics for x in statistic.tensors]
    if differentiable and torch.is_grad_enabled() and (call.q.requires_grad or call.k.requires_grad):
        held = None if torch.compiler.is_compiling() else statistics  # until the backward
        q, k, *rest = distinct(call.q, call.k, *rest, *tensors)
        return _RowStatistics.apply(q, k, *rest[:9], static, backend, held, *rest[9:])
    q, k = call.q.detach(), call.k.detach()
    return torch.ops.sar_fast.row_statistics(q, k, *rest, tensors, *static, backend, torch.is_grad_enabled())


def join_rows(
    statistics: Statistics, sums: Tensor, asked: tuple[RowStatistic, ...], carried: Sums | None
) -> StatisticsWithRows:
    """Statistics and sums (B, R, H) of one call, with those of the queries before it, as a rule is given them."""
    count = statistics.count
    if carried is not None and carried.rows is not None:
        counted = (count > carried.count)[:, None]
        last = lambda i: torch.where(counted, sums[:, i], carried.rows[:, i].to(sums.dtype))
        total = lambda i: sums[:, i] + carried.rows[:, i].to(sums.dtype)
        sums = torch.stack([(total if s.queries == "text" else last)(i) for i, s in enumerate(asked)], dim=1)
    total = count.clamp_min(1)[:, None].to(sums.dtype)
    rows = {s.name: sums[:, i] / total if s.queries == "text" else sums[:, i] for i, s in enumerate(asked)}
    return StatisticsWithRows(*statistics, rows)


def row_sums(statistics: StatisticsWithRows, asked: tuple[RowStatistic, ...]) -> Tensor:
    """(B, R, H): what :func:`join_rows` made means of."""
    count = statistics.count[:, None]
    rows = [statistics.rows[s.name] * (count if s.queries == "text" else 1) for s in asked]
    return torch.stack(rows, dim=1)
