"""A decode step as an operator, for graphs: it writes the cache and the running sums, which a trace must be told."""

from __future__ import annotations

import torch

from sar_fast.backends.protocol import Backend
from sar_fast.backends.select import BY_NAME
from sar_fast.method import value_checks
from sar_fast.method.kvcache import Cache, Step
from sar_fast.method.values import Bounds, Call, Result, Roles, Scores, Statistics, Sums
from sar_fast.method.weighting.constant import Equal
from sar_fast.method.weighting.softmax import flatten, unflatten

_FULL = -1  # for ``length``: the cache is full, or ``seqlens`` says
_library = torch.library.Library("sar_fast", "FRAGMENT")
_library.define(
    "decode(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor? seqlens, SymInt length, "
    "Tensor? block_table, Tensor? visual_mask, Tensor? text_mask, Tensor? prior, Tensor(c!)? av_sum, "
    "Tensor(d!)? sa_sum, Tensor(e!)? count, Tensor? head_weights, Tensor? key_first, Tensor? key_end, "
    "Tensor? key_padding_mask, float softmax_scale, bool causal, SymInt window_left, SymInt window_right, "
    "float softcap, float beta, bool protect, str normalize, str backend, bool need_lse)"
    " -> (Tensor out, Tensor lse, Tensor av, Tensor sa, Tensor c, Tensor count_out)"
)


@torch.library.impl(_library, "decode", "CompositeExplicitAutograd")
def _impl(
    q, k_cache, v_cache, k, v, seqlens, length, block_table, visual_mask, text_mask, prior, av_sum, sa_sum, count,
    head_weights, key_first, key_end, key_padding_mask, softmax_scale, causal, window_left, window_right, softcap,
    beta, protect, normalize, backend, need_lse,
):  # fmt: skip
    chosen = BY_NAME[backend]
    if prior is not None:
        value_checks.check_prior_values(prior, wait=chosen.waits)  # before the cache is written
    cache = Cache(k_cache, v_cache, k, v, seqlens if length == _FULL else length, block_table, q.shape[0])
    roles = None if visual_mask is None else Roles(visual_mask, text_mask, prior)
    sums = None if av_sum is None else Sums(av_sum, sa_sum, count)
    scores = Scores(softmax_scale, causal, (window_left, window_right), softcap)
    rule, bounds = unflatten(beta, protect, normalize), Bounds(key_first, key_end)
    step = Step(q, cache, scores, roles, sums, rule, head_weights, bounds, key_padding_mask)
    out, lse, statistics, c, _ = chosen.decode(step, need_lse=need_lse)
    return out, lse if need_lse else lse.new_empty(0), statistics.av, statistics.sa, c, statistics.count


@torch.library.register_fake("sar_fast::decode", lib=_library)
def _fake(
    q, k_cache, v_cache, k, v, seqlens, length, block_table, visual_mask, text_mask, prior, av_sum, sa_sum, count,
    head_weights, key_first, key_end, key_padding_mask, softmax_scale, causal, window_left, window_right, softcap,
    beta, protect, normalize, backend, need_lse,
):  # fmt: skip
    call = Call(q, k_cache, v_cache, Scores(softmax_scale))
    acc, batch, sar = call.accumulate_dtype, q.shape[0], visual_mask is not None
    stats = lambda: q.new_empty((batch, call.num_heads) if sar else (0, 0), dtype=acc)
    out = q.new_empty((*q.shape[:-1], v_cache.shape[-1]))
    lse = q.new_empty(call.lse_shape if need_lse else (0,), dtype=acc)
    return out, lse, stats(), stats(), stats(), q.new_empty((batch if sar else 0,), dtype=acc)


def decode(backend: Backend, step: Step, *, need_lse: bool) -> Result:
    """``backend.decode``, as an operator where a graph is traced."""
    if not torch.compiler.is_compiling():
        return backend.decode(step, need_lse=need_lse)
    cache, scores = step.cache, step.scores
    seqlens, length = (None, cache.seqlens) if isinstance(cache.seqlens, int) else (cache.seqlens, _FULL)
    out, lse, av, sa, used, count = torch.ops.sar_fast.decode(
        *(step.q, cache.k, cache.v, cache.new_k, cache.new_v, seqlens, length, cache.block_table),
        *(step.roles or (None, None, None)),
        *(step.sums or (None, None, None))[:3],
        *(step.c, *step.bounds, step.key_padding_mask),
        *(scores.scale, scores.causal, *scores.window, scores.softcap),
        *(*flatten(step.rule or Equal()), backend.name, need_lse),
    )
    return Result(out, lse, Statistics(av, sa, count), used)
