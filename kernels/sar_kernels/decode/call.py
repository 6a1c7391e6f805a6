"""Decode: attention of a few new queries over a KV cache, with the heads re-weighted or not.

q is (B, Sq, H, D), Sq small. The caches are (B, Smax, Hkv, D) and (B, Smax, Hkv, DV), or paged: (blocks, page, Hkv, D)
with block_table (B, pages) int32, and then Smax = pages * page. cache_seqlens (B,) int32 lives on the device and is
never read on the host: it is each sample's length with the new keys in it (`append_kv` writes them). A length beyond
Smax is taken for Smax, and None says that every sample has Smax keys. Everything may be strided if its last dimension
is dense.

Nothing here waits for the GPU, and with a workspace nothing allocates, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from sar_kernels.call import AttentionOptions, WeightOptions
from sar_kernels.decode.cache import append_kv
from sar_kernels.decode.plan import DecodeCall, DecodeWorkspace, decode_workspace
from sar_kernels.launch import run_all
from sar_kernels.masks import NO_MASKS, Masks

__all__ = ["DecodeWorkspace", "append_kv", "decode_forward", "decode_workspace", "sar_decode_forward"]

MODES = ("running", "step", "prompt")


def decode_forward(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor | None,
    *,
    options: AttentionOptions,
    masks: Masks = NO_MASKS,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
    workspace: DecodeWorkspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention of new queries over a KV cache.

    Args:
        q, k_cache, v_cache, cache_seqlens, block_table: the module's layouts, one dtype (fp16, bf16 or fp32).
        options: the causal mask and the window are aligned bottom-right to each sample's own length.
        masks: what else the queries do not see, over cache positions.
        num_splits: pieces to cut the keys into; default from the number of multiprocessors and the sizes.
        workspace: from `decode_workspace`, for these sizes; by default a new one.

    Returns:
        out (B, Sq, H, DV) in q's dtype and lse (B, H, Sq) fp32, natural logarithm; both lie in the workspace. A query
        that sees no key gets out = 0 and lse = -inf.

    Raises:
        ValueError: naming the argument, what came and what is needed.
    """
    call = DecodeCall(q, k_cache, v_cache, cache_seqlens, options, block_table, num_splits, workspace, masks)
    run_all(call.plan("plain"))
    return call.workspace.out, call.workspace.lse


def sar_decode_forward(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor | None,
    visual_mask: torch.Tensor | None,
    text_mask: torch.Tensor | None,
    prior: torch.Tensor | None,
    av_sum: torch.Tensor | None,
    sa_sum: torch.Tensor | None,
    count: torch.Tensor | None,
    head_weights: torch.Tensor | None,
    *,
    options: AttentionOptions,
    weights: WeightOptions,
    mode: str,
    sums_out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    masks: Masks = NO_MASKS,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
    workspace: DecodeWorkspace | None = None,
) -> tuple[torch.Tensor, ...]:
    """Attention of new queries over a KV cache, its heads re-weighted.

    Args:
        visual_mask: (B, Smax) bool, and prior: (B, Smax) floating point, over cache positions. text_mask: (B, Sq) bool,
            the new queries that count. All three unused, and may be None, if mode is "prompt".
        av_sum, sa_sum (B, H), count (B,): fp32 contiguous, the layer's sums so far. "running" adds this step's queries
            to them, in place or in `sums_out`; "prompt" makes av, sa and count of them, 0 if they are None; "step"
            reads none.
        head_weights: (B, H) fp32 contiguous, the prompt's weights; read if mode is "prompt", never written. Else
            it may be None.
        weights: temperature, protected head and normalisation.
        sums_out: as the sums, where "running" puts the new ones.
        mode: "running" (means over all queries so far, these included), "step" (these alone), "prompt" (as they were).
        The others as in `decode_forward`.

    Returns:
        (out, lse, av, sa, c, count): out and lse as in `decode_forward`, out scaled by c; av, sa and c (B, H), the
        means and the weights that were used; count (B,), how many queries the means run over, 0 for c = 1. All lie in
        the workspace.

    Raises:
        ValueError: naming the argument, what came and what is needed.
    """
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, need one of {MODES}")
    needed = {"running": {"av_sum": av_sum, "sa_sum": sa_sum, "count": count}, "prompt": {"head_weights": head_weights}}
    for name, tensor in needed.get(mode, {}).items():
        if tensor is None:
            raise ValueError(f'{name}: got None, need a tensor if mode is "{mode}"')
    call = DecodeCall(q, k_cache, v_cache, cache_seqlens, options, block_table, num_splits, workspace, masks)
    call.set_state(av_sum, sa_sum, count, head_weights)
    if sums_out is not None:
        call.set_sums_out(*sums_out)
    if mode != "prompt":
        call.set_roles(visual_mask, text_mask, prior)
    run_all(call.plan(mode, weights))
    w = call.workspace
    return w.out, w.lse, w.av, w.sa, w.c, w.count
