"""SAR attention as functions, in FlashAttention's layout and with FlashAttention-2's conventions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sar_fast.attention import decode_op, ops
from sar_fast.attention.head_scaling import scale_heads
from sar_fast.attention.row_statistics import join_rows, row_sums
from sar_fast.attention.row_statistics import row_statistics as row_statistics_of
from sar_fast.backends.protocol import Backend, Request
from sar_fast.backends.select import choose_backend
from sar_fast.base.errors import ArgumentError, ArgumentTypeError, check_choice
from sar_fast.method import validation, value_checks
from sar_fast.method.distributed import Shards
from sar_fast.method.kvcache import Step, check_cache
from sar_fast.method.state import SARState, SARStats
from sar_fast.method.values import UNBOUNDED, Bounds, Call, Result, Roles, Scores
from sar_fast.method.visibility import BROKEN_BLOCK, Visibility, query_positions
from sar_fast.method.weighting.constant import Equal
from sar_fast.method.weighting.protocol import Weighting, head_weights, needs_statistics, no_statistics, value_source
from sar_fast.method.weighting.rows import RowStatistic, all_row_statistics, recorded_rows
from sar_fast.method.weighting.softmax import choose_weighting, is_lowered
from sar_fast.method.weighting.split import refuse_split_queries, split_over


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, cast as scaled_dot_product_attention does: everything but fp64 to the autocast dtype."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def sar_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visual_mask: Tensor,
    text_mask: Tensor,
    prior: Tensor,
    *,
    beta: float | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    protect_first_head: bool | None = None,
    normalize: str | None = None,
    weighting: Weighting | None = None,
    sav_grad: bool = False,
    backend: str = "auto",
    return_stats: bool = False,
    row_statistics: Sequence[RowStatistic] = (),
    attn_mask: Tensor | None = None,
    visibility: Visibility | None = None,
    shards: Shards | None = None,
) -> Tensor | tuple[Tensor, SARStats]:
    """Attention whose heads are re-weighted by Semantic Alignment Variance (docs/method.md).

    Args:
        q: (B, Sq, H, D) fp16, bf16, fp32 or fp64; D <= 256. Only the last dimension need be dense.
        k, v: (B, Sk, Hkv, D) and (B, Sk, Hkv, Dv), same dtype; H a multiple of Hkv, head h reads h // (H // Hkv).
        visual_mask: (B, Sk) bool, the visual keys V.
        text_mask: (B, Sq) bool, the text queries T.
        prior: (B, Sk) floating point, non-negative and finite; sums to 1 over V, ignored elsewhere.
        beta: temperature of the softmax over heads, > 0; default 0.5.
        causal: mask aligned bottom-right when Sq != Sk, as in FlashAttention.
        softmax_scale: default 1 / sqrt(D).
        key_padding_mask: (B, Sk) bool, True = real token.
        window_size: (left, right) keys that a query sees around its position; -1 = unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0 = off.
        protect_first_head: head 0 gets the largest weight; default True.
        normalize: ``"none"`` (default) or ``"standardize"`` (SAV standardised over heads before the softmax).
        weighting: another rule for the heads' weights (docs/weighting.md), in place of the three options of the
            paper's: beta, protect_first_head and normalize.
        sav_grad: gradients also flow through the statistics, exactly; otherwise they are constants in backward. A
            weighting's own parameters get their gradients either way.
        backend: ``"auto"``, ``"triton"``, ``"composed"`` or ``"torch"``; ``SAR_BACKEND`` replaces ``"auto"``.
        return_stats: also return the statistics.
        row_statistics: with ``return_stats``, others beside AV and SA to be returned (docs/row_statistics.md).
        visibility: chunks, a prefix or blocks that see each other in both directions (docs/masks.md).
        attn_mask: (B or 1, 1, Sq, Sk) bool, True = may be seen, for patterns that nothing above can say.
        shards: q, k and v hold this rank's heads or queries only (:class:`~sar_fast.method.distributed.Shards`).

    Returns:
        out (B, Sq, H, Dv), or (out, :class:`SARStats`). A sample without counted text queries is plain attention,
        bit for bit. Queries that see no key give 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is needed. The Triton backend does not wait for a
            GPU to look at a prior's values: a bad one raises in a later call, and a negative one makes its sample's
            output NaN.
    """
    validation.check_qkv(q, k, v)
    validation.check_roles(visual_mask, text_mask, prior, q, k, key_padding_mask=key_padding_mask, attn_mask=attn_mask)
    sav_grad = validation.check_flag("sav_grad", sav_grad)
    return_stats = validation.check_flag("return_stats", return_stats)
    recorded = recorded_rows(row_statistics, return_stats)
    rule = split_over(choose_weighting(weighting, beta, protect_first_head, normalize), shards)
    scores = validation.make_scores(
        q, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap
    )
    roles = Roles(visual_mask, text_mask, prior)
    scores, bounds = _lowered(
        visibility, scores, query_positions(q.shape[1], k.shape[1], q.device), k.shape[:2], key_padding_mask
    )
    call = Call(*autocast_inputs(q, k, v), scores, roles, key_padding_mask, attn_mask, bounds=bounds)
    chosen = choose_backend(backend, Request.of(call))
    result = ops.attention(
        call, rule, chosen, sav_grad=sav_grad, need_lse=return_stats, need_stats=return_stats, recorded=recorded
    )
    return (result.out, SARStats.of(result, chosen.name)) if return_stats else result.out


def sar_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    visual_mask: Tensor,
    text_mask: Tensor,
    prior: Tensor,
    *,
    beta: float | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    protect_first_head: bool | None = None,
    normalize: str | None = None,
    weighting: Weighting | None = None,
    sav_grad: bool = False,
    backend: str = "auto",
    return_stats: bool = False,
    row_statistics: Sequence[RowStatistic] = (),
    visibility: Visibility | None = None,
    shards: Shards | None = None,
) -> Tensor | tuple[Tensor, SARStats]:
    """:func:`sar_attn_func` on sequences packed without padding; statistics are per sequence.

    Args:
        q: (total_q, H, D). k, v: (total_k, Hkv, D) and (total_k, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (num_sequences + 1,) int32, where each sequence starts; the last is the total.
        max_seqlen_q, max_seqlen_k: longest sequence. A tensor on a GPU is waited for, as FlashAttention does.
        visual_mask, prior: (total_k,). text_mask: (total_q,).
        visibility: of each sequence by itself: ``chunk_start`` and ``prefix`` (num_sequences,), ``blocks`` (total_k,).

    Returns:
        out (total_q, H, Dv), or (out, stats) with ``stats.lse`` (H, total_q) and the others (num_sequences, H).
    """
    validation.check_qkv(q, k, v, packed=True)
    total_q, total_k, device = q.shape[0], k.shape[0], q.device
    validation.check_mask("visual_mask", visual_mask, (total_k,), device)
    validation.check_mask("text_mask", text_mask, (total_q,), device)
    validation.check_prior(prior, (total_k,), device)
    sav_grad = validation.check_flag("sav_grad", sav_grad)
    return_stats = validation.check_flag("return_stats", return_stats)
    recorded = recorded_rows(row_statistics, return_stats)
    rule = split_over(choose_weighting(weighting, beta, protect_first_head, normalize), shards)
    scores = validation.make_scores(
        q, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap
    )
    max_seqlens = check_packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, total_q, total_k, device)
    roles = Roles(visual_mask, text_mask, prior)
    scores, bounds = _lowered_packed(visibility, scores, q, k, cu_seqlens_q, cu_seqlens_k)
    call = Call(
        *autocast_inputs(q, k, v),
        scores,
        roles,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlens=max_seqlens,
        bounds=bounds,
    )
    chosen = choose_backend(backend, Request.of(call))
    result = ops.attention(
        call, rule, chosen, sav_grad=sav_grad, need_lse=return_stats, need_stats=return_stats, recorded=recorded
    )
    return (result.out, SARStats.of(result, chosen.name)) if return_stats else result.out


def check_packing(
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, total_q: int, total_k: int, device: torch.device
) -> tuple[int, int]:
    """Check a packed call's sequences; returns the two longest lengths as ints."""
    validation.check_cu_seqlens("cu_seqlens_q", cu_q, total_q, device)
    validation.check_cu_seqlens("cu_seqlens_k", cu_k, total_k, device)
    if cu_q.shape != cu_k.shape:
        raise ArgumentError(
            "cu_seqlens_k", f"{cu_k.shape[0] - 1} and {cu_q.shape[0] - 1}", "describe as many sequences as cu_seqlens_q"
        )
    return validation.check_longest("max_seqlen_q", max_q), validation.check_longest("max_seqlen_k", max_k)


def _lowered(
    visibility: Visibility | None,
    scores: Scores,
    position: Tensor,
    keys: tuple[int, int],
    real: Tensor | None = None,
) -> tuple[Scores, Bounds]:
    """What is left of the scores' own limits, and the bounds that say all of them."""
    if visibility is None:
        return scores, UNBOUNDED
    _check_visibility(visibility).check(*keys, position.device)
    if visibility.blocks is not None:  # else there is nothing to look at
        value_checks.check_holds(visibility.follows(keys[1], position.device, real), BROKEN_BLOCK)
    bounds = visibility.bounds(position, keys[1], causal=scores.causal, window=scores.window, real=real)
    return dataclasses.replace(scores, causal=False, window=(-1, -1)), bounds


def _lowered_packed(
    visibility: Visibility | None, scores: Scores, q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[Scores, Bounds]:
    """The same for packed sequences."""
    if visibility is None:
        return scores, UNBOUNDED
    _check_visibility(visibility).check(cu_q.shape[0] - 1, k.shape[0], q.device, packed=True)
    if visibility.blocks is not None:
        numbers = Visibility(blocks=visibility.packed_blocks(cu_k))
        value_checks.check_holds(numbers.follows(k.shape[0], q.device), BROKEN_BLOCK)
    how = {"causal": scores.causal, "window": scores.window, "total_q": q.shape[0]}
    bounds = visibility.packed_bounds(cu_q, cu_k, **how)
    return dataclasses.replace(scores, causal=False, window=(-1, -1)), bounds


def _check_visibility(visibility: object) -> Visibility:
    if not isinstance(visibility, Visibility):
        raise ArgumentTypeError("visibility", type(visibility).__name__, "be a sar_fast.Visibility or None")
    return visibility


def plain_attention(
    call: Call, *, backend: str = "auto", need_lse: bool = False, deterministic: bool = False
) -> tuple[Tensor, Tensor]:
    """A validated call with SAR off: (out, lse)."""
    q, k, v = autocast_inputs(call.q, call.k, call.v)
    call = dataclasses.replace(call, q=q, k=k, v=v)
    chosen = choose_backend(backend, Request.of(call, deterministic=deterministic))
    result = ops.attention(call, None, chosen, need_lse=need_lse)
    return result.out, result.lse


def sar_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    visual_mask: Tensor,
    prior: Tensor,
    state: SARState | None,
    text_mask: Tensor | None = None,
    decode: str = "running",
    block_table: Tensor | None = None,
    beta: float | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    visibility: Visibility | None = None,
    protect_first_head: bool | None = None,
    normalize: str | None = None,
    weighting: Weighting | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SARStats]:
    """SAR attention of new queries over a KV cache, which k and v, if given, extend in place.

    Args:
        q: (B, Sq, H, D), the newest Sq positions. k, v: (B, Snew, Hkv, D) or None.
        k_cache, v_cache: (B, Smax, Hkv, D), or (blocks, page, Hkv, D) with ``block_table`` (B, pages) int32.
        cache_seqlens: int or (B,) int32, keys in the cache before this call. It is not changed.
        visual_mask, prior: (B, Smax) bool and floating point, over cache positions; Smax = pages * page when paged.
        state: sums and weights of this layer so far; updated in place. ``SARState.empty`` before the first tokens,
            ``SARState.from_stats`` after a prompt; None starts afresh and keeps nothing.
        text_mask: (B, Sq) bool, which new queries count as text; default all.
        decode: ``"running"`` (means over all text queries so far, these included), ``"step"`` (these alone),
            ``"prompt"`` (``state.head_weights``, unchanged). A weighting that needs no statistics is the same in all
            three; it neither reads nor writes the state.
        Others: as :func:`sar_fast.sar_attn_func`. On a GPU the kernels read no value on the host: there a negative
            prior, lengths beyond the cache and pages that it has not are the caller's to avoid.

    Returns:
        out (B, Sq, H, Dv), or (out, stats of the weights that were used). Inference only: nothing is differentiable,
        and nothing that is written keeps a graph.
    """
    if cache_seqlens is None:
        raise ArgumentTypeError("cache_seqlens", "None", "be an int or (batch,) int32")
    return_stats = validation.check_flag("return_stats", return_stats)
    check_choice("decode", decode, ("running", "step", "prompt"))
    cache = check_cache(q, k_cache, v_cache, k, v, cache_seqlens, block_table)
    rule = choose_weighting(weighting, beta, protect_first_head, normalize)
    if state is None:
        if decode == "prompt" and needs_statistics(rule):
            raise ArgumentError("state", "None", 'hold the prompt\'s weights for decode="prompt"')
        state = SARState.empty(q.shape[0], q.shape[2], q.device, rule)
    if not isinstance(state, SARState):
        raise ArgumentTypeError("state", type(state).__name__, "be a SARState or None")
    B, Sq, H, _ = q.shape
    validation.check_mask("visual_mask", visual_mask, (B, cache.capacity), q.device)
    validation.check_prior(prior, (B, cache.capacity), q.device)
    if text_mask is None:
        text_mask = torch.ones(B, Sq, dtype=torch.bool, device=q.device)
    validation.check_mask("text_mask", text_mask, (B, Sq), q.device)
    check_state(state, B, H, q.device, written=decode == "running")
    rows, held = len(all_row_statistics(rule)), 0 if state.row_sums is None else state.row_sums.shape[1]
    if decode == "running" and held != rows:
        raise ArgumentError(
            "state",
            held,
            (
                f"hold the sums of {rows} row statistics, for which weighting asks, as "
                "SARState.empty(..., weighting=rule) and SARState.from_stats(stats, rule) do"
            ),
        )
    scores = validation.make_scores(
        q, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap
    )
    scores, bounds = _lowered(visibility, scores, cache.positions(Sq, q.device), (B, cache.capacity))
    chosen = choose_backend(backend, Request(q.device, q.dtype, scores, bounded=bounds.given, decode=True))
    value_checks.raise_arrived()
    if chosen.waits or q.device.type == "cpu":
        value_checks.check_prior_values(prior)  # before the cache is written
    with torch.no_grad():
        roles = Roles(visual_mask, text_mask, prior)
        result = _decode(Step(q, cache, scores, bounds=bounds), roles, state, decode, rule, chosen, return_stats)
    return (result.out, SARStats.of(result, chosen.name)) if return_stats else result.out


def _decode(
    plain: Step,
    roles: Roles,
    state: SARState,
    mode: str,
    rule: Weighting,
    backend: Backend,
    need_stats: bool,
) -> Result:
    """A decode step under any rule; the state's sums go on in ``"running"``."""
    q, step = plain.q, functools.partial(dataclasses.replace, plain)
    decode = functools.partial(decode_op.decode, backend, need_lse=need_stats)
    refuse_split_queries(rule)
    if not needs_statistics(rule):
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        c = head_weights(rule, no_statistics(q.shape[0], q.shape[2], q, acc), None)
        source = value_source(rule, None)
        if source:
            value_checks.check_weight_values(c, source)  # before the cache is written
        if not need_stats:
            return decode(step(c=c))
        result = decode(step(roles=roles, rule=Equal()))
        return result._replace(out=scale_heads(result.out, c, None, source), c=c)
    if mode == "prompt":
        result = decode(step(c=state.head_weights))
        return result._replace(statistics=state.sums.means(), c=state.head_weights)
    sums = state.sums if mode == "running" else None
    if is_lowered(rule):
        return decode(step(roles=roles, sums=sums, rule=rule))
    asked = all_row_statistics(rule)
    before = None if sums is None else sums._replace(count=sums.count.clone())
    result = decode(step(roles=roles, sums=sums, rule=Equal()), need_lse=need_stats or bool(asked))
    if asked:
        rows = _row_sums_over_cache(plain, roles, result.lse, asked, backend)
        result = result._replace(statistics=join_rows(result.statistics, rows, asked, before))
        if sums is not None:
            state.row_sums = row_sums(result.statistics, asked).to(torch.float32)
    c = head_weights(rule, result.statistics, None)
    return result._replace(out=scale_heads(result.out, c, None, value_source(rule, None)), c=c)


def _row_sums_over_cache(
    step: Step, roles: Roles, lse: Tensor, asked: tuple[RowStatistic, ...], backend: Backend
) -> Tensor:
    """(B, R, H) of a cache that holds the new keys by now. Traces: lengths are bounds, of which none is read here."""
    scores, capacity, Sq = step.scores, step.cache.capacity, step.q.shape[1]
    position = step.cache.positions(Sq, step.q.device)  # [B or 1, Sq]
    first, end = step.bounds
    if not step.bounds.given:
        first, end = Visibility().bounds(position, capacity, causal=scores.causal, window=scores.window)
    filled = (position[:, -1:] + 1).to(torch.int32).expand(-1, Sq)
    bounds = Bounds(first, filled.contiguous() if end is None else torch.minimum(end, filled))
    k, scores = step.cache.every_key(), dataclasses.replace(scores, causal=False, window=(-1, -1))
    call = Call(step.q, k, k, scores, roles, bounds=bounds)  # statistics read no values
    return row_statistics_of(call, lse, asked, backend.name, differentiable=False)


def check_state(state: SARState, batch: int, heads: int, device: torch.device, *, written: bool) -> None:
    """Raise unless all of ``state`` is fp32, of that many rows and heads, and can be written if it will be."""
    shapes = {"av_sum": (batch, heads), "sa_sum": (batch, heads), "count": (batch,), "head_weights": (batch, heads)}
    for name, shape in shapes.items():
        tensor = getattr(state, name)
        validation.check_tensor(f"state.{name}", tensor)
        if tuple(tensor.shape) != shape:
            raise ArgumentError("state", f"{tuple(tensor.shape)} in {name}", f"be for batch {batch} and {heads} heads")
        if tensor.dtype != torch.float32:
            raise ArgumentTypeError(f"state.{name}", tensor.dtype, "be float32")
        if tensor.device != device:
            raise ArgumentError("state", tensor.device, f"be on q's device {device}")
        shared = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))
        if written and shared and name != "head_weights":
            raise ArgumentError(
                f"state.{name}", f"strides {tensor.stride()}", "have entries that do not share memory, as it is written"
            )
