"""torch.library operators of SAR attention and the autograd function around them.

The operators are opaque to ``torch.compile`` (schema, fake, one implementation per call), so a compiled graph holds one
node per attention call. Everything above them is traced, everything below them runs on real tensors.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sar_fast import prior_check
from sar_fast.backends import run
from sar_fast.distributed import Shards, without_weights
from sar_fast.types import AttentionOptions
from sar_fast.validation import UNKNOWN_LENGTH

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? visual_mask, Tensor? text_mask, Tensor? prior, "
    "Tensor? key_padding_mask, Tensor? attn_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
_OPTIONS = (
    "float softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, float beta, "
    "bool protect_first_head, str normalize, str backend"
)
_PACKED = "SymInt max_seqlen_q=0, SymInt max_seqlen_k=0"
_library = torch.library.Library("sar_fast", "DEF")
_library.define(
    f"attention_forward({_TENSORS}, Tensor? av_sum, Tensor? sa_sum, Tensor? count, {_OPTIONS}, bool need_lse, "
    f"{_PACKED}, bool check_prior=True)"
    " -> (Tensor out, Tensor lse, Tensor av, Tensor sa, Tensor c, Tensor count_out)"
)
_library.define(
    f"attention_backward(Tensor grad_out, {_TENSORS}, Tensor out, Tensor lse, Tensor av, Tensor sa, Tensor c, "
    f"Tensor count, Tensor? grad_av, Tensor? grad_sa, Tensor? grad_c, {_OPTIONS}, {_PACKED})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dprior)"
)


def _options(scale, causal, left, right, softcap, beta, protect_first_head, normalize) -> AttentionOptions:
    return AttentionOptions(scale, causal, (left, right), softcap, beta, protect_first_head, normalize)


def _accumulate_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _no_autocast(q: Tensor) -> contextlib.AbstractContextManager:
    """Inputs are cast before the operator; inside, autocast would round the fp32 statistics to its dtype."""
    device = q.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _longest(known: int, cu_seqlens: Tensor | None, tokens: int) -> int:
    """The longest sequence, where a traced graph could not read what the caller gave for it.

    Not simply the packed length, which is an upper bound too: what kernels allocate per sequence grows with it (second
    moments by 64 KiB per head and 2,048 tokens). Only a captured graph, which cannot look, takes it.
    """
    if known != UNKNOWN_LENGTH:
        return known
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return tokens
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


@torch.library.impl(_library, "attention_forward", "CompositeExplicitAutograd")
def _forward_impl(
    q, k, v, visual_mask, text_mask, prior, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k,
    av_sum, sa_sum, count, softmax_scale, causal, window_left, window_right, softcap, beta, protect_first_head,
    normalize, backend, need_lse, max_seqlen_q=0, max_seqlen_k=0, check_prior=True,
):  # fmt: skip
    if prior is not None and check_prior:
        prior_check.check_prior_values(prior, wait=backend != "triton")  # the others wait in any case
    carried = None if av_sum is None else (av_sum, sa_sum, count)
    call = run.Call(
        q,
        k,
        v,
        visual_mask,
        text_mask,
        prior,
        key_padding_mask,
        attn_mask,
        cu_seqlens_q,
        cu_seqlens_k,
        carried,
        (_longest(max_seqlen_q, cu_seqlens_q, q.shape[0]), _longest(max_seqlen_k, cu_seqlens_k, k.shape[0])),
    )
    options = _options(softmax_scale, causal, window_left, window_right, softcap, beta, protect_first_head, normalize)
    with _no_autocast(q):
        return run.forward(call, options, backend, need_lse=need_lse)


@torch.library.register_fake("sar_fast::attention_forward", lib=_library)
def _forward_fake(
    q, k, v, visual_mask, text_mask, prior, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k,
    av_sum, sa_sum, count, softmax_scale, causal, window_left, window_right, softcap, beta, protect_first_head,
    normalize, backend, need_lse, max_seqlen_q=0, max_seqlen_k=0, check_prior=True,
):  # fmt: skip
    acc, packed, sar = _accumulate_dtype(q), cu_seqlens_q is not None, visual_mask is not None
    batch = cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
    heads = q.shape[-2]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse_shape = (heads, q.shape[0]) if packed else (batch, heads, q.shape[1])
    lse = q.new_empty(lse_shape if need_lse else (0,), dtype=acc)
    stats = lambda: q.new_empty((batch, heads) if sar else (0, 0), dtype=acc)
    return out, lse, stats(), stats(), stats(), q.new_empty((batch if sar else 0,), dtype=acc)


def _check_results(call: run.Call, grad_out: Tensor, out: Tensor, **statistics: Tensor) -> None:
    """Raise unless a backward is given what the forward of the same call returned."""
    q, batch, acc = call.q, call.batch_size, _accumulate_dtype(call.q)
    heads, sar = q.shape[-2], call.visual is not None
    rows, per_head = (*q.shape[:-1], call.v.shape[-1]), (batch, heads) if sar else (0, 0)
    shapes = {"lse": (heads, q.shape[0]) if call.packed else (batch, heads, q.shape[1])}
    shapes |= {"av": per_head, "sa": per_head, "c": per_head, "count": per_head[:1]}
    expected = {"grad_out": (grad_out, rows, q.dtype), "out": (out, rows, q.dtype)}
    expected |= {name: (statistics[name], shape, acc) for name, shape in shapes.items()}
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}; got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}; got {tensor.device}")


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _backward_impl(
    grad_out, q, k, v, visual_mask, text_mask, prior, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k,
    out, lse, av, sa, c, count, grad_av, grad_sa, grad_c, softmax_scale, causal, window_left, window_right, softcap,
    beta, protect_first_head, normalize, backend, max_seqlen_q=0, max_seqlen_k=0,
):  # fmt: skip
    call = run.Call(
        q,
        k,
        v,
        visual_mask,
        text_mask,
        prior,
        key_padding_mask,
        attn_mask,
        cu_seqlens_q,
        cu_seqlens_k,
        None,
        (_longest(max_seqlen_q, cu_seqlens_q, q.shape[0]), _longest(max_seqlen_k, cu_seqlens_k, k.shape[0])),
    )
    prior_check.raise_arrived()
    _check_results(call, grad_out, out, lse=lse, av=av, sa=sa, c=c, count=count)
    options = _options(softmax_scale, causal, window_left, window_right, softcap, beta, protect_first_head, normalize)
    grad_stats = None if grad_av is None else (grad_av, grad_sa, grad_c)
    with _no_autocast(q):
        return run.backward(call, options, backend, grad_out, out, lse, av, sa, c, count, grad_stats)


@torch.library.register_fake("sar_fast::attention_backward", lib=_library)
def _backward_fake(
    grad_out, q, k, v, visual_mask, text_mask, prior, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k,
    out, lse, av, sa, c, count, grad_av, grad_sa, grad_c, softmax_scale, causal, window_left, window_right, softcap,
    beta, protect_first_head, normalize, backend, max_seqlen_q=0, max_seqlen_k=0,
):  # fmt: skip
    through = visual_mask is not None and grad_av is not None
    dense = lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dprior = q.new_empty(prior.shape if through else (0,), dtype=_accumulate_dtype(q))
    return dense(q), dense(k), dense(v), dprior


class SARAttentionFunction(torch.autograd.Function):
    """Differentiable attention: (q, k, v, prior, static arguments) -> (out, lse, av, sa, c, count).

    ``out`` is always differentiable; av, sa and c are when ``sav_grad``; lse and count never are.
    """

    @staticmethod
    def forward(
        ctx, q, k, v, prior, visual_mask, text_mask, key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k,
        sav_grad, flat_options, max_seqlens, check_prior,
    ):  # fmt: skip
        masks = (key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k)
        out, lse, av, sa, c, count = torch.ops.sar_fast.attention_forward(
            q,
            k,
            v,
            visual_mask,
            text_mask,
            prior,
            *masks,
            None,
            None,
            None,
            *flat_options,
            True,
            *max_seqlens,
            check_prior,
        )
        ctx.save_for_backward(q, k, v, visual_mask, text_mask, prior, *masks, out, lse, av, sa, c, count)
        ctx.flat_options, ctx.max_seqlens = flat_options, max_seqlens
        ctx.sav_grad = sav_grad and prior is not None
        if ctx.sav_grad:
            ctx.mark_non_differentiable(lse, count)
        else:
            ctx.mark_non_differentiable(lse, av, sa, c, count)
        return out, lse, av, sa, c, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _grad_lse, grad_av, grad_sa, grad_c, _grad_count):
        saved = ctx.saved_tensors
        grads = (grad_av, grad_sa, grad_c) if ctx.sav_grad else (None, None, None)
        dq, dk, dv, dprior = torch.ops.sar_fast.attention_backward(
            grad_out.contiguous(), *saved, *grads, *ctx.flat_options, *ctx.max_seqlens
        )
        prior = saved[5]
        dprior = dprior.to(prior.dtype) if ctx.sav_grad and ctx.needs_input_grad[3] else None
        return (dq, dk, dv, dprior) + (None,) * 10


def _flatten(options: AttentionOptions, backend: str) -> tuple:
    """Options in the order of the schemas."""
    return (
        float(options.softmax_scale),
        options.causal,
        *options.window_size,
        float(options.softcap),
        float(options.beta),
        options.protect_first_head,
        options.normalize,
        backend,
    )


def _distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, each once: ``torch.compile`` refuses an autograd function that is given one twice."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    seen: list[Tensor | None] = []
    for t in tensors:
        seen.append(t.view_as(t) if t is not None and any(t is s for s in seen) else t)
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visual: Tensor | None,
    text: Tensor | None,
    prior: Tensor | None,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlens: tuple[int, int] = (0, 0),
    carried: tuple[Tensor, Tensor, Tensor] | None = None,
    options: AttentionOptions,
    backend: str,
    sav_grad: bool = False,
    need_lse: bool = False,
    shards: Shards | None = None,
    check_prior: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention on validated arguments with a chosen backend: (out, lse, av, sa, c, count).

    ``visual`` None means plain attention (statistics come back empty). ``carried`` (decode) is for inference only.
    ``shards``: this rank holds some of the heads or queries; statistics come back for its heads, over all queries.
    ``check_prior`` False: the caller knows its values to be finite and non-negative, so that no GPU is waited for.
    """
    if shards is not None and visual is not None:
        if carried is not None and shards.queries is not None:
            raise ValueError("shards.queries must be None with a state: running sums are not split over ranks")
        split = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "max_seqlens": max_seqlens}
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "carried": carried, "need_lse": need_lse}
        masks["check_prior"] = check_prior
        neutral = {"options": without_weights(options), "backend": backend, "sav_grad": sav_grad}
        out, lse, av, sa, _, count = attention(q, k, v, visual, text, prior, **split, **masks, **neutral)
        av, sa, c, count = shards.weights(av, sa, count, options)
        if cu_seqlens_q is None:
            factors = c[:, None, :, None]
        else:
            lengths = cu_seqlens_q.diff().long()
            factors = c.repeat_interleave(lengths, dim=0, output_size=q.shape[0])[..., None]
        return (out * factors).to(out.dtype), lse, av, sa, c, count
    differentiates = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, prior if sav_grad else None)
    )
    masks, flat = (key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k), _flatten(options, backend)
    if differentiates:
        if carried is not None:
            raise ValueError("state: decoding with running statistics has no backward; call it under torch.no_grad()")
        tensors = _distinct(q, k, v, prior, visual, text, *masks)
        return SARAttentionFunction.apply(*tensors, sav_grad, flat, max_seqlens, check_prior)
    carried = carried or (None, None, None)
    return torch.ops.sar_fast.attention_forward(
        q, k, v, visual, text, prior, *masks, *carried, *flat, need_lse, *max_seqlens, check_prior
    )
