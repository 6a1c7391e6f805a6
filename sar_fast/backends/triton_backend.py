"""Backend ``"triton"``: this project's fused kernels (``sar_kernels``), whole batches in a few launches.

Imported only when it runs or is asked about, so that the package works where Triton is not installed.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from sar_fast.backends.sequence import dense_last
from sar_fast.types import AttentionOptions, SARState
from sar_fast.validation import check_ends
from sar_fast.weights import head_weights

name = "triton"

DECODE_QUERIES = 16  # up to this many queries per sample run through the decode kernels
_GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTERPRETER_DTYPES = (torch.float16, torch.float32, torch.float64)  # its bfloat16 arithmetic is wrong


def interpreting() -> bool:
    """Whether Triton's CPU interpreter is on (``TRITON_INTERPRET=1``): for tests, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """Why the kernels cannot be imported here, or None."""
    try:
        import sar_kernels.attention  # noqa: F401
    except ImportError as error:
        return f"the Triton kernels, which do not import here ({error})"
    return None


def unsupported(
    device: torch.device, dtype: torch.dtype, options: AttentionOptions, *, padded: bool, masked: bool
) -> str | None:
    """Why these options cannot run here, or None."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"{device.type} tensors: the kernels need a CUDA or ROCm device (or TRITON_INTERPRET=1 for tests)"
    reason = missing()
    if reason is not None:
        return reason
    dtypes = _INTERPRETER_DTYPES if interpreting() else _GPU_DTYPES
    if dtype not in dtypes:
        return f"{dtype}: the kernels take {', '.join(map(str, dtypes))} here"
    if masked:
        return "attn_mask: the kernels never read a dense mask"
    return None


def _kernel_options(options: AttentionOptions):
    from sar_kernels.attention import AttentionOptions as KernelOptions
    from sar_kernels.attention import WeightOptions

    attention = KernelOptions(options.causal, options.softmax_scale, options.window_size, options.softcap)
    return attention, WeightOptions(options.beta, options.protect_first_head, options.normalize)


def forward(call, options: AttentionOptions) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, av, sa, c, count) of a :class:`~sar_fast.backends.run.Call`; statistics empty for plain attention."""
    from sar_kernels import attention as kernels

    attention, weights = _kernel_options(options)
    q = call.q
    if call.packed and q.device.type == "cpu":  # a GPU would have to be waited for
        for side, cu, tokens, longest in zip(
            "qk", (call.cu_seqlens_q, call.cu_seqlens_k), (q, call.k), call.max_seqlens
        ):
            check_ends(side, cu.tolist(), tokens.shape[0], longest)
    if _decodes(call):
        return _decode_call(call, options)
    if call.visual is None:
        out, lse = kernels.attention_forward(q, call.k, call.v, options=attention, **_layout(call))
        none = lambda *shape: q.new_zeros(shape, dtype=lse.dtype)
        return out, lse, none(0, 0), none(0, 0), none(0, 0), none(0)
    roles = (call.visual, call.text, call.prior)
    if call.carried is not None:
        return _continue_sums(call, options, attention, weights)
    return kernels.sar_forward(q, call.k, call.v, *roles, options=attention, weights=weights, **_layout(call))


def _decodes(call) -> bool:
    """A few queries against a longer, unpadded past: the split-KV kernels keep all multiprocessors busy."""
    if call.packed or call.key_padding_mask is not None:
        return False
    return 0 < call.q.shape[1] <= DECODE_QUERIES < call.k.shape[1]


def _decode_call(call, options: AttentionOptions) -> tuple[Tensor, ...]:
    q, B, H = call.q, call.batch_size, call.q.shape[-2]
    lengths = torch.full((B,), call.k.shape[1], dtype=torch.int32, device=q.device)
    if call.visual is None:
        out, lse = decode_plain(q, call.k, call.v, lengths, options, None)
        none = lambda *shape: q.new_zeros(shape, dtype=lse.dtype)
        return out, lse, none(0, 0), none(0, 0), none(0, 0), none(0)
    state = SARState.empty(B, H, q.device)
    if call.carried is not None:  # the kernels add to the sums in place: the caller keeps its own
        state.av_sum, state.sa_sum, state.count = (t.to(torch.float32).contiguous().clone() for t in call.carried)
    roles = (call.visual, call.text, call.prior)
    return decode(q, call.k, call.v, lengths, *roles, state, "running", options, None)


def _continue_sums(call, options: AttentionOptions, attention, weights) -> tuple[Tensor, ...]:
    """A call whose means go on from earlier queries: plain attention, its statistics, then the merged weights."""
    from sar_kernels import attention as kernels

    q, layout = call.q, _layout(call)
    out, lse = kernels.attention_forward(q, call.k, call.v, options=attention, **layout)
    av, sa, _, n = kernels.attention_statistics(
        q, call.k, lse, call.visual, call.text, call.prior, options=attention, weights=weights, **layout
    )
    av_sum, sa_sum, before = call.carried
    count = before + n
    total = count.clamp_min(1)[:, None]
    av, sa = (av_sum + av * n[:, None]) / total, (sa_sum + sa * n[:, None]) / total
    c = head_weights(
        av,
        sa,
        count,
        beta=options.beta,
        protect_first_head=options.protect_first_head,
        normalize=options.normalize,
    )
    return out.mul_(c[:, None, :, None]), lse, av, sa, c, count


def backward(
    call,
    options: AttentionOptions,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    av: Tensor,
    sa: Tensor,
    c: Tensor,
    count: Tensor,
    grad_stats: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dprior); dprior is empty unless gradients flow through the weights."""
    from sar_kernels import attention as kernels

    attention, weights = _kernel_options(options)
    q = call.q
    if call.key_padding_mask is not None:  # queries that see nothing need not be finite: dK takes 0 times them
        q = q.masked_fill(lse.isneginf().all(1)[..., None, None], 0)
    qkv = (q, call.k, call.v)
    empty = call.q.new_empty(0, dtype=lse.dtype)
    if call.visual is None:
        return (
            *kernels.attention_backward(grad_out, *qkv, out, lse, options=attention, **_layout(call)),
            empty,
        )
    grad_av, grad_sa, grad_c = grad_stats or (None, None, None)
    dq, dk, dv, dprior = kernels.sar_backward(
        grad_out,
        *qkv,
        out,
        lse,
        call.visual,
        call.text,
        call.prior,
        av,
        sa,
        c,
        count,
        options=attention,
        weights=weights,
        sav_grad=grad_stats is not None,
        dav=grad_av,
        dsa=grad_sa,
        dc=grad_c,
        **_layout(call),
    )
    return dq, dk, dv, empty if dprior is None else dprior


def append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor,
    block_table: Tensor | None,
) -> None:
    """Write new keys and values into the caches; ``lengths`` (B,) int32 are those after the call."""
    from sar_kernels.decode_call import append_kv

    if k is not None:
        append_kv(k_cache, v_cache, dense_last(k), dense_last(v), lengths, _dense(block_table))


def decode_plain(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    options: AttentionOptions,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of new queries over a cache, SAR off."""
    from sar_kernels.decode_call import decode_forward

    attention, _ = _kernel_options(options)
    q, block_table = dense_last(q), _dense(block_table)
    return decode_forward(q, k_cache, v_cache, lengths, options=attention, block_table=block_table)


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    visual_mask: Tensor,
    text_mask: Tensor,
    prior: Tensor,
    state: SARState,
    mode: str,
    options: AttentionOptions,
    block_table: Tensor | None,
) -> tuple[Tensor, ...]:
    """(out, lse, av, sa, c, count) of new queries over a cache; the state's sums go on in place."""
    from sar_kernels.decode_call import sar_decode_forward

    attention, weights = _kernel_options(options)
    roles = (dense_last(visual_mask), dense_last(text_mask), dense_last(prior))
    sums = [t.contiguous() for t in state.tensors()]
    results = sar_decode_forward(
        dense_last(q),
        k_cache,
        v_cache,
        lengths,
        *roles,
        *sums,
        options=attention,
        weights=weights,
        mode=mode,
        block_table=_dense(block_table),
    )
    if mode == "running":
        for kept, new in zip(state.tensors()[:3], sums):
            if new is not kept:
                kept.copy_(new)
    return results


def _dense(block_table: Tensor | None) -> Tensor | None:
    return None if block_table is None else dense_last(block_table)


def _layout(call) -> dict:
    layout = {"key_padding_mask": call.key_padding_mask}
    if call.packed:
        layout |= {
            "cu_seqlens_q": call.cu_seqlens_q.contiguous(),
            "cu_seqlens_k": call.cu_seqlens_k.contiguous(),
            "max_seqlen_q": call.max_seqlens[0],
            "max_seqlen_k": call.max_seqlens[1],
        }
    return layout
