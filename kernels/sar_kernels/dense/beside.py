"""What SAR needs beside an attention that another library computes: statistics from its log-sum-exp, the scaling of its
output, and the way back.

    out, lse = library(q, k, v)
    av, sa, c, count = attention_statistics(q, k, lse, visual_mask, text_mask, prior, ...)
    scale_heads(out, c, count)                                              # in place
    ...
    dplain, plain, sums = unscale_heads(dout, out, c)
    dq, dk, dv = library.backward(dplain, q, k, v, plain, lse)              # c taken for a constant
    more_dq, more_dk, dprior = statistics_backward(q, k, v, lse, ...)       # to be added, for gradients through c

Tensors are laid out as in `sar_kernels.attention`. Nothing here waits for the GPU.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton

from sar_kernels.call import AttentionOptions, Call, WeightOptions
from sar_kernels.configs import SMALL, padded_head_dim
from sar_kernels.dense.plan import DELTA_ROWS, Through, plan_attention_statistics, plan_backward, plan_scale
from sar_kernels.dense.weights import unscale_heads_kernel
from sar_kernels.launch import Launch, run_all
from sar_kernels.masks import NO_MASKS, Masks, text_edges_kernel


def attention_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    visual_mask: torch.Tensor,
    text_mask: torch.Tensor,
    prior: torch.Tensor,
    *,
    options: AttentionOptions,
    weights: WeightOptions,
    masks: Masks = NO_MASKS,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Statistics and head weights after any attention forward that returned lse; reads the text-by-visual block only.

    Returns:
        (av, sa, c, count) as in `sar_forward`.
    """
    call = Call(q, k, k, options, masks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    outputs, launches = plan_attention_statistics(call, lse, visual_mask, text_mask, prior, weights)
    run_all(launches)
    return outputs


def scale_heads(
    out: torch.Tensor,
    c: torch.Tensor,
    count: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """out (B, S, H, DV) or packed (T, H, DV), contiguous, times c (B, H) in place; samples with count (B,) 0 stay.

    Raises:
        ValueError: naming the argument, what came and what is needed.
    """
    call = _of_output(out, cu_seqlens, max_seqlen)
    if not out.is_contiguous():
        raise ValueError(f"out: got strides {tuple(out.stride())} for shape {tuple(out.shape)}, need it contiguous")
    run_all([plan_scale(call, out, call.head_array("c", c), call.sample_array("count", count))])
    return out


def unscale_heads(
    dout: torch.Tensor,
    out_scaled: torch.Tensor,
    c: torch.Tensor,
    *,
    with_sums: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(c * dout, out_scaled / c), contiguous: what a plain attention's backward takes for re-weighted attention.

    Args:
        dout, out_scaled: (B, S, H, DV) or packed (T, H, DV), any strides. c: (B, H).
        with_sums: also the sums of dout * out_scaled per row block (B, H, blocks) that `statistics_backward` takes.

    Raises:
        ValueError: naming the argument, what came and what is needed.
    """
    outputs, launch = plan_unscale(_of_output(out_scaled, cu_seqlens, max_seqlen), dout, out_scaled, c, with_sums)
    run_all([launch])
    return outputs


def statistics_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    visual_mask: torch.Tensor,
    text_mask: torch.Tensor,
    prior: torch.Tensor,
    av: torch.Tensor,
    sa: torch.Tensor,
    c: torch.Tensor,
    count: torch.Tensor,
    sums: torch.Tensor,
    *,
    options: AttentionOptions,
    weights: WeightOptions,
    dav: torch.Tensor | None = None,
    dsa: torch.Tensor | None = None,
    dc: torch.Tensor | None = None,
    masks: Masks = NO_MASKS,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient that flows through the statistics alone, on the text queries and the keys that they see.

    Args:
        sums: of `unscale_heads`, of which the weights' own gradient is made.
        masks: not a packed mask. dav, dsa, dc: gradients of av, sa and c themselves, (B, H) each.
        The others as given to `attention_statistics`, and what it returned.

    Returns:
        (dq, dk, dprior), contiguous; dprior has prior's shape in fp32.
    """
    call = Call(q, k, v, options, masks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    through = Through(visual_mask, text_mask, prior, weights, av, sa, count, dav, dsa, dc, sums)
    (dq, dk, dprior), launches = plan_statistics_backward(call, lse, c, through)
    run_all(launches)
    return dq, dk, dprior.sum(0)


def _of_output(out: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int | None) -> Call:
    """A call whose queries, keys and values have the shape of an output: what its rows and heads are."""
    plain = AttentionOptions(False, 1.0)
    return Call(out, out, out, plain, NO_MASKS, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


def plan_unscale(call: Call, dout: torch.Tensor, out: torch.Tensor, c: torch.Tensor, with_sums: bool):
    """(dplain, plain, sums or None) and the launch that fills them."""
    dout, out = call.output_array("dout", dout), call.output_array("out_scaled", out)
    dplain, plain = (torch.empty(out.shape, dtype=out.dtype, device=out.device) for _ in range(2))
    grid = call.grid(DELTA_ROWS)
    # blocks beyond a packed sequence's end are read by nobody
    sums = torch.empty((call.batch, call.heads, grid[0]), dtype=call.acc, device=out.device) if with_sums else None
    arguments = {
        "dout_ptr": dout,
        "out_ptr": out,
        "c_ptr": call.head_array("c", c),
        "dplain_ptr": dplain,
        "plain_ptr": plain,
        "sums_ptr": sums,
        "cu_seqlens_q_ptr": call.cu_q,
        **call.strides("do", dout),
        **call.strides("o", out),
        **call.strides("p", plain),
        "max_seqlen_q": call.max_q,
        "HEAD_DIM_V": call.head_dim_v,
        "BLOCK_DV": padded_head_dim(call.head_dim_v),
        "BLOCK_M": DELTA_ROWS,
        "ROWS": min(DELTA_ROWS, 2048 // padded_head_dim(call.head_dim_v)),  # the next block's are not this one's
        "VARLEN": call.varlen,
        "ACC": call.triton_acc,
    }
    return (dplain, plain, sums), Launch(unscale_heads_kernel, grid, arguments, SMALL)


def _plan_text_edges(call: Call, text_mask: torch.Tensor) -> tuple[Call, Launch]:
    """The same call in which only text queries see anything, so that the kernels pass by all other rows."""
    text = call.token_mask("text_mask", text_mask, keys=False)
    edges = call.masks.edge_arguments(call.options.window)
    empty = lambda: torch.empty(text.shape, dtype=torch.int32, device=text.device)
    first, end = empty() if edges["HAS_LEFT"] else None, empty()
    block = 1024
    arguments = {
        **edges,
        "text_ptr": text,
        "cu_seqlens_q_ptr": call.cu_q,
        "cu_seqlens_k_ptr": call.cu_k,
        "text_first_ptr": first,
        "text_end_ptr": end,
        "max_seqlen_q": call.max_q,
        "max_seqlen_k": call.max_k,
        "VARLEN": call.varlen,
        "BLOCK": block,
    }
    open_options = replace(call.options, causal=False, window_size=(-1, -1))
    masks = Masks(call.padding, first, end)
    longest = (call.max_q, call.max_k) if call.varlen else (None, None)
    texts = Call(
        call.q,
        call.k,
        call.v,
        open_options,
        masks,
        call.cu_q,
        call.cu_k,
        *longest,
        arch=call.arch,
        configs=call.configs,
    )
    return texts, Launch(text_edges_kernel, (triton.cdiv(call.max_q, block), call.batch), arguments, SMALL)


def plan_statistics_backward(call: Call, lse: torch.Tensor, c: torch.Tensor, through: Through):
    """(dq, dk, dprior (Hkv, ...)) and their launches: a backward whose output had no gradient of its own."""
    if call.masks.packed is not None:
        raise ValueError("masks.packed: got a mask, need runs of keys: the gradient of bits is `sar_backward`'s")
    texts, edges = _plan_text_edges(call, through.text_mask)
    zeros = torch.zeros(call.head_dim_v, dtype=call.q.dtype, device=call.q.device)
    nothing = zeros.expand(*call.q.shape[:-1], -1)
    (dq, dk, _, dprior), launches = plan_backward(texts, nothing, nothing, lse, c, through, with_dv=False)
    return (dq, dk, dprior), [edges, *launches]


def plan_beside(call: Call, dout: torch.Tensor, visual_mask, text_mask, prior, weights: WeightOptions) -> list[Launch]:
    """Every launch beside a forward and a backward; those through the statistics unless bits mask."""
    lse, out = call.per_row(), torch.empty_like(dout)
    (av, sa, c, count), launches = plan_attention_statistics(call, lse, visual_mask, text_mask, prior, weights)
    (_, _, sums), unscale = plan_unscale(call, dout, out, c, True)
    launches += [plan_scale(call, out, c, count), plan_unscale(call, dout, out, c, False)[1], unscale]
    if call.masks.packed is not None:
        return launches
    incoming = (av, sa, c)  # stand for gradients, which autograd always hands along
    through = Through(visual_mask, text_mask, prior, weights, av, sa, count, *incoming, sums)
    return launches + plan_statistics_backward(call, lse, c, through)[1]
