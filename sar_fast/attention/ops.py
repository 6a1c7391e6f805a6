"""torch.library operators of SAR attention and the autograd function around them.

The operators are opaque to ``torch.compile`` (schema, fake, one implementation per call), so a compiled graph holds one
node per attention call. Everything above them is traced, everything below them runs on real tensors. Calls and rules
are made flat where operators are defined (here, ``decode_op``, ``row_statistics``), and nowhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sar_fast.attention.head_scaling import scale_heads
from sar_fast.attention.row_statistics import join_rows, row_statistics
from sar_fast.backends.protocol import Backend
from sar_fast.backends.select import BY_NAME
from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.method import value_checks
from sar_fast.method.tracing import distinct, longest, no_autocast
from sar_fast.method.values import Bounds, Call, Result, Roles, Scores, Statistics, Sums
from sar_fast.method.weighting.constant import Equal
from sar_fast.method.weighting.protocol import Weighting, head_weights, needs_statistics, no_statistics, value_source
from sar_fast.method.weighting.rows import RowStatistic, all_row_statistics
from sar_fast.method.weighting.softmax import Lowered, flatten, is_lowered, unflatten
from sar_fast.method.weighting.split import Split, refuse_split_queries

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? visual_mask, Tensor? text_mask, Tensor? prior, "
    "Tensor? key_padding_mask, Tensor? attn_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? key_first, Tensor? key_end"
)
_OPTIONS = (
    "float softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, float beta, "
    "bool protect, str normalize, str backend"
)
_PACKED = "SymInt max_seqlen_q=0, SymInt max_seqlen_k=0"
_library = torch.library.Library("sar_fast", "DEF")
_RESULTS = "Tensor out, Tensor lse, Tensor av, Tensor sa, Tensor c, Tensor count"
_library.define(
    f"attention_forward({_TENSORS}, {_OPTIONS}, bool need_lse, {_PACKED}, bool check_prior=True) -> ({_RESULTS})"
)
_library.define(  # from the sums of queries before; count is also the new sums'
    f"attention_continued({_TENSORS}, Tensor av_sum, Tensor sa_sum, Tensor count, {_OPTIONS}, bool need_lse, "
    f"bool check_prior=True) -> ({_RESULTS.replace('count', 'count_out')}, Tensor av_sum_out, Tensor sa_sum_out)"
)
_library.define(
    f"attention_backward(Tensor grad_out, {_TENSORS}, Tensor out, Tensor lse, Tensor av, Tensor sa, Tensor c, "
    f"Tensor count, Tensor? grad_av, Tensor? grad_sa, Tensor? grad_c, {_OPTIONS}, {_PACKED})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dprior)"
)


def _tensors(call: Call) -> tuple[Tensor | None, ...]:
    """A call's tensors in the schemas' order."""
    roles = (None, None, None) if call.roles is None else call.roles
    return (
        *(call.q, call.k, call.v),
        *roles,
        *(call.key_padding_mask, call.attn_mask, call.cu_seqlens_q, call.cu_seqlens_k),
        *call.bounds,
    )


def _options(call: Call, rule: Lowered, backend: Backend) -> tuple[object, ...]:
    """What is static in a call, in the schemas' order."""
    scores = call.scores
    return (scores.scale, scores.causal, *scores.window, scores.softcap, *flatten(rule), backend.name)


def _call_of(
    q, k, v, visual, text, prior, key_padding_mask, attn_mask, cu_q, cu_k, first, end, options: tuple,
    max_seqlens: tuple[int, int],
) -> tuple[Call, Lowered, Backend]:  # fmt: skip
    """What :func:`_tensors` and :func:`_options` made flat."""
    scale, causal, left, right, softcap, beta, protect, normalize, backend = options
    roles = None if visual is None else Roles(visual, text, prior)
    lengths = longest(max_seqlens[0], cu_q, q.shape[0]), longest(max_seqlens[1], cu_k, k.shape[0])
    scores = Scores(scale, causal, (left, right), softcap)
    call = Call(q, k, v, scores, roles, key_padding_mask, attn_mask, cu_q, cu_k, lengths, Bounds(first, end))
    return call, unflatten(beta, protect, normalize), BY_NAME[backend]


@torch.library.impl(_library, "attention_forward", "CompositeExplicitAutograd")
def _forward_impl(
    q, k, v, visual_mask, text_mask, prior, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k,
    key_first, key_end, softmax_scale, causal, window_left, window_right, softcap, beta, protect, normalize, backend,
    need_lse, max_seqlen_q=0, max_seqlen_k=0, check_prior=True,
):  # fmt: skip
    options = (softmax_scale, causal, window_left, window_right, softcap, beta, protect, normalize, backend)
    masks = (key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, key_first, key_end)
    tensors = (q, k, v, visual_mask, text_mask, prior, *masks)
    found = _run_forward(*_call_of(*tensors, options, (max_seqlen_q, max_seqlen_k)), need_lse, check_prior)
    return _flat(found)


@torch.library.impl(_library, "attention_continued", "CompositeExplicitAutograd")
def _continued_impl(
    q, k, v, visual_mask, text_mask, prior, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k,
    key_first, key_end, av_sum, sa_sum, count, softmax_scale, causal, window_left, window_right, softcap, beta,
    protect, normalize, backend, need_lse, check_prior=True,
):  # fmt: skip
    options = (softmax_scale, causal, window_left, window_right, softcap, beta, protect, normalize, backend)
    masks = (key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, key_first, key_end)
    call, rule, chosen = _call_of(q, k, v, visual_mask, text_mask, prior, *masks, options, (0, 0))
    call.carried = Sums(av_sum, sa_sum, count)
    found = _run_forward(call, rule, chosen, need_lse, check_prior)
    return *_flat(found), *(x.to(call.accumulate_dtype) for x in found.sums[:2])


def _run_forward(call: Call, rule: Lowered, backend: Backend, need_lse: bool, check_prior: bool) -> Result:
    if call.roles is not None and check_prior:
        value_checks.check_prior_values(call.roles.prior, wait=backend.waits)
    with no_autocast(call.q):
        return backend.forward(call, rule, need_lse=need_lse)


def _flat(found: Result) -> tuple[Tensor, ...]:
    """A result as the operators return it."""
    return found.out, found.lse, found.statistics.av, found.statistics.sa, found.c, found.statistics.count


@torch.library.register_fake("sar_fast::attention_forward", lib=_library)
def _forward_fake(
    q, k, v, visual_mask, text_mask, prior, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k,
    key_first, key_end, softmax_scale, causal, window_left, window_right, softcap, beta, protect, normalize, backend,
    need_lse, max_seqlen_q=0, max_seqlen_k=0, check_prior=True,
):  # fmt: skip
    return _fake_results(q, v, visual_mask is not None, need_lse, cu_seqlens_q)


@torch.library.register_fake("sar_fast::attention_continued", lib=_library)
def _continued_fake(
    q, k, v, visual_mask, text_mask, prior, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k,
    key_first, key_end, av_sum, sa_sum, count, softmax_scale, causal, window_left, window_right, softcap, beta,
    protect, normalize, backend, need_lse, check_prior=True,
):  # fmt: skip
    results = _fake_results(q, v, True, need_lse)
    return *results, torch.empty_like(results[2]), torch.empty_like(results[2])


def _fake_results(q, v, sar: bool, need_lse: bool, cu_seqlens_q=None) -> tuple[Tensor, ...]:
    call = Call(q, q, v, Scores(1.0), cu_seqlens_q=cu_seqlens_q)
    acc, batch = call.accumulate_dtype, call.batch_size
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(call.lse_shape if need_lse else (0,), dtype=acc)
    stats = lambda: q.new_empty((batch, call.num_heads) if sar else (0, 0), dtype=acc)
    return out, lse, stats(), stats(), stats(), q.new_empty((batch if sar else 0,), dtype=acc)


def _check_results(call: Call, grad_out: Tensor, result: Result) -> None:
    """Raise unless a backward is given what the forward of the same call returned."""
    q, batch, acc = call.q, call.batch_size, call.accumulate_dtype
    rows, per_head = (*q.shape[:-1], call.v.shape[-1]), (0, 0) if call.roles is None else (batch, call.num_heads)
    statistics = result.statistics
    expected = {"grad_out": (grad_out, rows, q.dtype), "out": (result.out, rows, q.dtype)}
    expected["lse"] = (result.lse, call.lse_shape, acc)
    per_head_results = {"av": statistics.av, "sa": statistics.sa, "c": result.c}
    expected |= {name: (tensor, per_head, acc) for name, tensor in per_head_results.items()}
    expected["count"] = (statistics.count, per_head[:1], acc)
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ArgumentError(name, tuple(tensor.shape), f"have shape {shape}")
        if tensor.dtype != dtype:
            raise ArgumentTypeError(name, tensor.dtype, f"be {dtype}")
        if tensor.device != q.device:
            raise ArgumentError(name, tensor.device, f"be on q's device {q.device}")


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _backward_impl(
    grad_out, q, k, v, visual_mask, text_mask, prior, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k,
    key_first, key_end, out, lse, av, sa, c, count, grad_av, grad_sa, grad_c, softmax_scale, causal, window_left,
    window_right, softcap, beta, protect, normalize, backend, max_seqlen_q=0, max_seqlen_k=0,
):  # fmt: skip
    options = (softmax_scale, causal, window_left, window_right, softcap, beta, protect, normalize, backend)
    masks = (key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, key_first, key_end)
    tensors = (q, k, v, visual_mask, text_mask, prior, *masks)
    call, rule, chosen = _call_of(*tensors, options, (max_seqlen_q, max_seqlen_k))
    result = Result(out, lse, Statistics(av, sa, count), c)
    value_checks.raise_arrived()
    _check_results(call, grad_out, result)
    through = None if grad_av is None else (grad_av, grad_sa, grad_c)
    with no_autocast(q):
        return chosen.backward(call, rule, grad_out, result, through)


@torch.library.register_fake("sar_fast::attention_backward", lib=_library)
def _backward_fake(
    grad_out, q, k, v, visual_mask, text_mask, prior, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k,
    key_first, key_end, out, lse, av, sa, c, count, grad_av, grad_sa, grad_c, softmax_scale, causal, window_left,
    window_right, softcap, beta, protect, normalize, backend, max_seqlen_q=0, max_seqlen_k=0,
):  # fmt: skip
    through = visual_mask is not None and grad_av is not None
    dense = lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    return dense(q), dense(k), dense(v), q.new_empty(prior.shape if through else (0,), dtype=acc)


class SARAttentionFunction(torch.autograd.Function):
    """Differentiable attention: (a call's tensors, sav_grad, its options, ...) -> (out, lse, av, sa, c, count).

    ``out`` is always differentiable; av, sa and c are when ``sav_grad``; lse and count never are.
    """

    @staticmethod
    def forward(
        ctx, q, k, v, visual_mask, text_mask, prior, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k,
        key_first, key_end, sav_grad, options, max_seqlens, check_prior,
    ):  # fmt: skip
        masks = (key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k, key_first, key_end)
        tensors = (q, k, v, visual_mask, text_mask, prior, *masks)
        results = torch.ops.sar_fast.attention_forward(*tensors, *options, True, *max_seqlens, check_prior)
        ctx.save_for_backward(*tensors, *results)
        ctx.options, ctx.max_seqlens = options, max_seqlens
        ctx.sav_grad = sav_grad and prior is not None
        _, lse, av, sa, c, count = results
        ctx.mark_non_differentiable(*((lse, count) if ctx.sav_grad else (lse, av, sa, c, count)))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _grad_lse, grad_av, grad_sa, grad_c, _grad_count):
        through = (grad_av, grad_sa, grad_c) if ctx.sav_grad else (None, None, None)
        saved = ctx.saved_tensors  # once: checkpointing recomputes them
        dq, dk, dv, dprior = torch.ops.sar_fast.attention_backward(
            grad_out.contiguous(), *saved, *through, *ctx.options, *ctx.max_seqlens
        )
        prior = saved[5]
        dprior = dprior.to(prior.dtype) if ctx.sav_grad and ctx.needs_input_grad[5] else None
        return (dq, dk, dv, None, None, dprior) + (None,) * 10


def attention(
    call: Call,
    weighting: Weighting | None,
    backend: Backend,
    *,
    layer: int | None = None,
    sav_grad: bool = False,
    need_lse: bool = False,
    need_stats: bool = False,
    recorded: tuple[RowStatistic, ...] = (),
    check_prior: bool = True,
) -> Result:
    """A validated call on a chosen backend.

    The paper's rule and :class:`Equal` run inside the backend. Every other one is asked here, in traced PyTorch, with
    the statistics of plain attention, and its heads are scaled after it.

    Args:
        weighting: None is plain attention, whose statistics come back empty.
        layer: what the rule is told of where it is.
        sav_grad: gradients also flow through the statistics that the rule is given.
        need_stats: statistics are wanted even if the rule needs none.
        recorded: row statistics that are wanted beside those that the rule asks for.
        check_prior: False: the caller knows its values to be finite and non-negative, so that no GPU is waited for.
    """
    if weighting is None:
        return _run(call.plain(), Equal(), backend, need_lse=need_lse)
    if call.carried is not None:
        refuse_split_queries(weighting)
    how = {"sav_grad": sav_grad, "check_prior": check_prior}
    asked = all_row_statistics(weighting, recorded)
    lowered = is_lowered(weighting)
    if lowered and not asked:
        return _run(call, weighting, backend, need_lse=need_lse, **how)
    if call.roles is not None and (need_stats or asked or needs_statistics(weighting)):
        rule = weighting if lowered else Equal()
        result = _run(call, rule, backend, need_lse=need_lse or bool(asked), **how)
        statistics = result.statistics
        if asked:
            sums = row_statistics(call, result.lse, asked, backend.name, differentiable=sav_grad)
            statistics = join_rows(statistics, sums, asked, call.carried)
        if lowered:
            return result._replace(statistics=statistics)
        if isinstance(weighting, Split):
            statistics = weighting.over_all_queries(statistics)
    else:
        result = _run(call.plain(), Equal(), backend, need_lse=need_lse)
        statistics = no_statistics(call.batch_size, call.num_heads, call.q, call.accumulate_dtype)
    c = head_weights(weighting, statistics, layer)
    out = scale_heads(result.out, c, call.cu_seqlens_q, value_source(weighting, layer))
    return Result(out, result.lse, statistics, c, result.sums)


def _run(
    call: Call,
    rule: Lowered,
    backend: Backend,
    *,
    sav_grad: bool = False,
    need_lse: bool = False,
    check_prior: bool = True,
) -> Result:
    """A call under a rule that its backend knows."""
    differentiates = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad
        for t in (call.q, call.k, call.v, call.roles.prior if sav_grad and call.roles else None)
    )
    tensors, options = _tensors(call), _options(call, rule, backend)
    if call.carried is not None:
        if differentiates:
            raise ArgumentError(
                "state",
                "inputs that require gradients",
                "come under torch.no_grad(): decoding with running statistics has no backward",
            )
        out, lse, av, sa, c, count, av_sum, sa_sum = torch.ops.sar_fast.attention_continued(
            *tensors, *call.carried[:3], *options, need_lse, check_prior
        )
        return Result(out, lse, Statistics(av, sa, count), c, Sums(av_sum, sa_sum, count))
    if differentiates:
        out, lse, av, sa, c, count = SARAttentionFunction.apply(
            *distinct(*tensors), sav_grad, options, call.max_seqlens, check_prior
        )
    else:
        out, lse, av, sa, c, count = torch.ops.sar_fast.attention_forward(
            *tensors, *options, need_lse, *call.max_seqlens, check_prior
        )
    return Result(out, lse, Statistics(av, sa, count), c)
