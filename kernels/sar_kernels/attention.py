"""Host side: checks, allocates, and launches the kernels.

Tensors are in FlashAttention's layout. Dense: q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, DV), masks (B, S).
Packed: q (T, H, D), k (Tk, Hkv, D), v (Tk, Hkv, DV), masks (T,) or (Tk,), with cu_seqlens int32 (num_seqs + 1,) and the
longest sequence's length. q, k, v and dout may be strided in any way if the last dimension is dense.

Nothing here waits for the GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sar_kernels.backward import delta_kernel, dkdv_kernel, dq_kernel
from sar_kernels.configs import KernelConfig, choose, device_arch, length_class, padded_head_dim
from sar_kernels.forward import forward_kernel
from sar_kernels.launch import Launch, run_all
from sar_kernels.statistics import statistics_kernel
from sar_kernels.weights import (
    head_weights_backward_kernel,
    head_weights_kernel,
    scale_heads_kernel,
    token_ranges_kernel,
)

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # float64 only in the interpreter
NORMALIZE = ("none", "standardize")


@dataclass(frozen=True)
class AttentionOptions:
    """What plain attention needs to know.

    window_size (left, right) counts keys beside the diagonal, -1 = no limit; causal sets right to 0. softcap 0 = off.
    """

    causal: bool
    softmax_scale: float
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.softmax_scale) and self.softmax_scale > 0):
            raise ValueError(f"softmax_scale: got {self.softmax_scale}, need a positive number")
        if not (math.isfinite(self.softcap) and self.softcap >= 0):
            raise ValueError(f"softcap: got {self.softcap}, need 0 (off) or a positive number")

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) with negative = no limit, and the causal mask as right = 0."""
        left, right = self.window_size
        return left, 0 if self.causal else right


@dataclass(frozen=True)
class WeightOptions:
    """How the statistics of the heads become their weights: c = H * softmax(SAV / beta), SAV perhaps standardised."""

    beta: float
    protect_first_head: bool = True
    normalize: str = "none"

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta: got {self.beta}, need a positive number")
        if self.normalize not in NORMALIZE:
            raise ValueError(f"normalize: got {self.normalize!r}, need one of {NORMALIZE}")


class Call:
    """One call's tensors seen as 4-dimensional, its sizes, and the arguments that all its kernels share."""

    def __init__(
        self, q, k, v, options, key_padding_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, arch
    ):
        self.varlen = cu_seqlens_q is not None
        self._check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        self.q, self.k, self.v = (dense_last(t) for t in (q, k, v))
        self.options = options
        self.heads, self.head_dim = q.shape[-2:]
        self.kv_heads, self.head_dim_v = v.shape[-2:]
        if self.varlen:
            self.batch = cu_seqlens_q.shape[0] - 1
            self.max_q, self.max_k = int(max_seqlen_q), int(max_seqlen_k)
        else:
            self.batch, self.max_q, self.max_k = q.shape[0], q.shape[1], k.shape[1]
        self.cu_q, self.cu_k = cu_seqlens_q, cu_seqlens_k
        self.padding = None
        if key_padding_mask is not None:
            self.padding = self.token_mask("key_padding_mask", key_padding_mask, keys=True)
        self.arch = arch or device_arch(q.device)
        self.acc = torch.float64 if q.dtype == torch.float64 else torch.float32

    def _check(self, q, k, v, cu_q, cu_k, max_q, max_k) -> None:
        rank = 3 if self.varlen else 4
        layout = "(tokens, heads, head_dim)" if self.varlen else "(batch, seqlen, heads, head_dim)"
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.ndim != rank:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, need {layout}")
            if tensor.dtype != q.dtype or tensor.device != q.device:
                raise ValueError(f"{name}: got {tensor.dtype} on {tensor.device}, need q's {q.dtype} on {q.device}")
        if q.dtype not in DTYPES:
            raise ValueError(f"q: got dtype {q.dtype}, need one of {DTYPES}")
        if k.shape[:-1] != v.shape[:-1] or (not self.varlen and k.shape[0] != q.shape[0]):
            raise ValueError(f"k, v: got shapes {tuple(k.shape)} and {tuple(v.shape)} for q {tuple(q.shape)}")
        if k.shape[-1] != q.shape[-1] or not 1 <= q.shape[-1] <= MAX_HEAD_DIM or not 1 <= v.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"head dim: got {q.shape[-1]} (q), {k.shape[-1]} (k), {v.shape[-1]} (v), need q's and k's equal "
                f"and all at most {MAX_HEAD_DIM}"
            )
        if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
            raise ValueError(f"heads: got {q.shape[-2]} query heads, need a multiple of the {k.shape[-2]} kv heads")
        if not self.varlen:
            return
        if cu_k is None or max_q is None or max_k is None:
            raise ValueError("packed input needs all of cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k")
        for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
            if cu.dtype != torch.int32 or cu.shape != cu_q.shape or not cu.is_contiguous():
                raise ValueError(f"{name}: got {cu.dtype} {tuple(cu.shape)}, need contiguous int32 (num_seqs + 1,)")

    def token_mask(self, name: str, mask: torch.Tensor, *, keys: bool) -> torch.Tensor:
        """A boolean per-token mask, checked and contiguous."""
        expected = (self.k if keys else self.q).shape[: 1 if self.varlen else 2]
        if mask.dtype != torch.bool or mask.shape != expected or mask.device != self.q.device:
            raise ValueError(
                f"{name}: got {mask.dtype} {tuple(mask.shape)} on {mask.device}, "
                f"need torch.bool {tuple(expected)} on {self.q.device}"
            )
        return mask.contiguous()

    def token_prior(self, prior: torch.Tensor) -> torch.Tensor:
        """The prior over keys in the statistics' dtype, checked and contiguous."""
        expected = self.k.shape[: 1 if self.varlen else 2]
        if not prior.is_floating_point() or prior.shape != expected or prior.device != self.q.device:
            raise ValueError(
                f"prior: got {prior.dtype} {tuple(prior.shape)} on {prior.device}, "
                f"need floating point {tuple(expected)} on {self.q.device}"
            )
        return prior.to(self.acc).contiguous()

    def per_row(self) -> torch.Tensor:
        """A new fp32 array with one entry per head and query: (B, H, Sq) or (H, T)."""
        shape = (self.heads, self.q.shape[0]) if self.varlen else (self.batch, self.heads, self.max_q)
        return torch.empty(shape, dtype=self.acc, device=self.q.device)

    def per_head(self) -> torch.Tensor:
        """A new fp32 array (B, H)."""
        return torch.empty((self.batch, self.heads), dtype=self.acc, device=self.q.device)

    def strides(self, name: str, tensor: torch.Tensor) -> dict[str, int]:
        """Strides over batch, token and head as the kernels name them."""
        b, s, h = (0, *tensor.stride()[:2]) if self.varlen else tensor.stride()[:3]
        return {f"stride_{name}b": b, f"stride_{name}s": s, f"stride_{name}h": h}

    def row_strides(self) -> dict[str, int]:
        """Strides of `per_row` arrays over batch and head."""
        if self.varlen:
            return {"stride_lse_b": 0, "stride_lse_h": self.q.shape[0]}
        return {"stride_lse_b": self.heads * self.max_q, "stride_lse_h": self.max_q}

    def config(self, kernel: str, *, sav: bool) -> KernelConfig:
        head_dim = padded_head_dim(max(self.head_dim, self.head_dim_v))
        causal = self.options.window[1] >= 0
        return choose(
            kernel, self.arch, head_dim, self.q.dtype, causal=causal, sav=sav, length=length_class(self.max_q)
        )

    def grid(self, block_m: int) -> tuple[int, int, int]:
        return triton.cdiv(self.max_q, block_m), self.heads, self.batch

    def common(self) -> dict[str, Any]:
        """Arguments of every kernel that computes scores, but for its tile sizes."""
        left, right = self.options.window
        return {
            "q_ptr": self.q,
            "k_ptr": self.k,
            "cu_seqlens_q_ptr": self.cu_q,
            "cu_seqlens_k_ptr": self.cu_k,
            "padding_ptr": self.padding,
            **self.strides("q", self.q),
            **self.strides("k", self.k),
            **self.row_strides(),
            "max_seqlen_q": self.max_q,
            "max_seqlen_k": self.max_k,
            "group": self.heads // self.kv_heads,
            "window_left": max(left, 0),
            "window_right": max(right, 0),
            "softmax_scale": self.options.softmax_scale,
            "softcap": self.options.softcap,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": padded_head_dim(self.head_dim),
            "VARLEN": self.varlen,
            "HAS_PADDING": self.padding is not None,
            "HAS_LEFT": left >= 0,
            "HAS_RIGHT": right >= 0,
            "HAS_SOFTCAP": self.options.softcap > 0,
            # TF32 keeps 10 bits of mantissa, which the tolerances for fp32 inputs do not allow.
            "PRECISION": "ieee",
            "ACC": tl.float64 if self.acc == torch.float64 else tl.float32,
        }

    def values(self) -> dict[str, Any]:
        """Arguments of every kernel that reads v."""
        return {
            "v_ptr": self.v,
            **self.strides("v", self.v),
            "HEAD_DIM_V": self.head_dim_v,
            "BLOCK_DV": padded_head_dim(self.head_dim_v),
        }


def dense_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last dimension is dense, else a copy (an expanded gradient has stride 0)."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@dataclass
class Sav:
    """The arguments that SAR adds to a call, and the ranges that tell kernels which tiles concern it."""

    visual: torch.Tensor
    text: torch.Tensor
    prior: torch.Tensor
    ranges: torch.Tensor  # (B, 4) int32

    def arguments(self) -> dict[str, Any]:
        return {
            "visual_ptr": self.visual,
            "text_ptr": self.text,
            "prior_ptr": self.prior,
            "ranges_ptr": self.ranges,
        }


@dataclass
class Through:
    """What the gradient through the statistics needs beyond plain attention's backward."""

    visual_mask: torch.Tensor
    text_mask: torch.Tensor
    prior: torch.Tensor
    weights: WeightOptions
    av: torch.Tensor
    sa: torch.Tensor
    count: torch.Tensor
    dav: torch.Tensor | None = None
    dsa: torch.Tensor | None = None
    dc: torch.Tensor | None = None


NO_SAV = {"visual_ptr": None, "text_ptr": None, "prior_ptr": None, "ranges_ptr": None}


def _plan_ranges(call: Call, visual_mask, text_mask, prior) -> tuple[Sav, Launch]:
    sav = Sav(
        visual=call.token_mask("visual_mask", visual_mask, keys=True),
        text=call.token_mask("text_mask", text_mask, keys=False),
        prior=call.token_prior(prior),
        ranges=torch.empty((call.batch, 4), dtype=torch.int32, device=call.q.device),
    )
    arguments = {
        "visual_ptr": sav.visual,
        "text_ptr": sav.text,
        "cu_seqlens_q_ptr": call.cu_q,
        "cu_seqlens_k_ptr": call.cu_k,
        "ranges_ptr": sav.ranges,
        "max_seqlen_q": call.max_q,
        "max_seqlen_k": call.max_k,
        "VARLEN": call.varlen,
        "BLOCK": 4096,
    }
    return sav, Launch(token_ranges_kernel, (call.batch,), arguments, num_warps=4)


def _plan_forward(call: Call, sav: Sav | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Launch]:
    config = call.config("forward", sav=sav is not None)
    grid = call.grid(config.block_m)
    out = torch.empty((*call.q.shape[:-1], call.head_dim_v), dtype=call.q.dtype, device=call.q.device)
    lse = call.per_row()
    partials = None if sav is None else _partials(call, grid[0])
    arguments = {
        **call.common(),
        **call.values(),
        **(NO_SAV if sav is None else sav.arguments()),
        "out_ptr": out,
        "lse_ptr": lse,
        "partials_ptr": partials,
        **call.strides("o", out),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STATISTICS": sav is not None,
    }
    return out, lse, partials, Launch(forward_kernel, grid, arguments, config.num_warps, config.num_stages)


def _partials(call: Call, num_blocks: int) -> torch.Tensor:
    return torch.empty((call.batch, call.heads, num_blocks, 3), dtype=call.acc, device=call.q.device)


def _weight_constants(call: Call, weights: WeightOptions, num_blocks: int, block_m: int) -> dict[str, Any]:
    block_h = triton.next_power_of_2(call.heads)
    return {
        "num_blocks": num_blocks,
        "num_heads": call.heads,
        "beta": weights.beta,
        "BLOCK_M": block_m,
        "BLOCK_H": block_h,
        "BLOCK_B": max(1, 1024 // block_h),
        "PROTECT_FIRST": weights.protect_first_head,
        "STANDARDIZE": weights.normalize == "standardize",
        "ACC": tl.float64 if call.acc == torch.float64 else tl.float32,
    }


def _plan_weights(
    call: Call, sav: Sav, weights: WeightOptions, partials: torch.Tensor, block_m: int
) -> tuple[tuple[torch.Tensor, ...], Launch]:
    """(av, sa, c, count) from partial sums."""
    av, sa, c = call.per_head(), call.per_head(), call.per_head()
    count = torch.empty((call.batch,), dtype=call.acc, device=call.q.device)
    arguments = {
        "partials_ptr": partials,
        "ranges_ptr": sav.ranges,
        "variance_ptr": av,
        "alignment_ptr": sa,
        "c_ptr": c,
        "count_ptr": count,
        **_weight_constants(call, weights, partials.shape[2], block_m),
    }
    return (av, sa, c, count), Launch(head_weights_kernel, (call.batch,), arguments, num_warps=4)


def _plan_scale(call: Call, out: torch.Tensor, c: torch.Tensor, count: torch.Tensor) -> Launch:
    block = 4096
    arguments = {
        "out_ptr": out,
        "c_ptr": c,
        "count_ptr": count,
        "cu_seqlens_ptr": call.cu_q,
        "max_seqlen": call.max_q,
        "num_heads": call.heads,
        "HEAD_DIM": call.head_dim_v,
        "VARLEN": call.varlen,
        "BLOCK": block,
    }
    pieces = triton.cdiv(call.max_q * call.heads * call.head_dim_v, block)
    return Launch(scale_heads_kernel, (pieces, call.batch), arguments, num_warps=8)


def plan_attention_forward(call: Call) -> tuple[tuple[torch.Tensor, ...], list[Launch]]:
    """(out, lse) and the one launch that fills them."""
    out, lse, _, launch = _plan_forward(call, None)
    return (out, lse), [launch]


def plan_sar_forward(call: Call, visual_mask, text_mask, prior, weights: WeightOptions):
    """(out_scaled, lse, av, sa, c, count) and the four launches that fill them."""
    sav, ranges = _plan_ranges(call, visual_mask, text_mask, prior)
    out, lse, partials, forward = _plan_forward(call, sav)
    block_m = forward.arguments["BLOCK_M"]
    (av, sa, c, count), head_weights = _plan_weights(call, sav, weights, partials, block_m)
    return (out, lse, av, sa, c, count), [ranges, forward, head_weights, _plan_scale(call, out, c, count)]


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    options: AttentionOptions,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flash attention.

    Args:
        q, k, v: the module's layouts; H must be a multiple of Hkv (grouped queries), DV may differ from D.
        options: mask, scale and soft cap. Causal masks and windows are aligned bottom-right when Sq != Sk.
        key_padding_mask: bool, per key, True = real token.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: packed sequences; all or none.

    Returns:
        out with q's layout and v's head dim, in q's dtype, and lse, fp32 (B, H, Sq) or (H, T), natural logarithm.
        A query that sees no key gets out = 0 and lse = -inf.

    Raises:
        ValueError: naming the argument, what came and what is needed.
    """
    call = Call(q, k, v, options, key_padding_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None)
    outputs, launches = plan_attention_forward(call)
    run_all(launches)
    return outputs


def sar_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visual_mask: torch.Tensor,
    text_mask: torch.Tensor,
    prior: torch.Tensor,
    *,
    options: AttentionOptions,
    weights: WeightOptions,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Attention whose heads are re-weighted by how sharply and how meaningfully they look at the visual keys.

    Args:
        visual_mask: bool, per key. text_mask: bool, per query. prior: floating point, per key; read at visual keys only.
        weights: temperature, protected head and normalisation.
        The others as in `attention_forward`.

    Returns:
        (out_scaled, lse, av, sa, c, count): as in `attention_forward`, then fp32 (B, H) alignment variance, semantic
        alignment and head weights, and fp32 (B,) number of text queries that counted. A sample with count 0 has c = 1
        and plain attention's output, bit for bit.

    Raises:
        ValueError: naming the argument, what came and what is needed.
    """
    call = Call(q, k, v, options, key_padding_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None)
    outputs, launches = plan_sar_forward(call, visual_mask, text_mask, prior, weights)
    run_all(launches)
    return outputs


def _plan_delta(call: Call, dout: torch.Tensor, out: torch.Tensor, *, with_sums: bool):
    """delta (as per_row), its sums per row block (B, H, row blocks) or None, and the launch."""
    block_m = 64
    grid = call.grid(block_m)
    delta = call.per_row()
    sums = torch.empty((call.batch, call.heads, grid[0]), dtype=call.acc, device=dout.device) if with_sums else None
    arguments = {
        "dout_ptr": dout,
        "out_ptr": out,
        "delta_ptr": delta,
        "sums_ptr": sums,
        "cu_seqlens_q_ptr": call.cu_q,
        **call.strides("do", dout),
        **call.strides("o", out),
        **call.row_strides(),
        "max_seqlen_q": call.max_q,
        "HEAD_DIM_V": call.head_dim_v,
        "BLOCK_DV": padded_head_dim(call.head_dim_v),
        "BLOCK_M": block_m,
        "VARLEN": call.varlen,
        "WITH_SUMS": with_sums,
        "ACC": tl.float64 if call.acc == torch.float64 else tl.float32,
    }
    return delta, sums, Launch(delta_kernel, grid, arguments, num_warps=4)


def _plan_weights_backward(call: Call, weights: WeightOptions, sums, av, sa, count, dav, dsa, dc, block_m):
    """Gradients of each counting query's variance and semantic alignment, (B, H) both, and the launch."""
    gains = call.per_head(), call.per_head()
    incoming = (None if g is None else g.to(call.acc).contiguous() for g in (dav, dsa, dc))
    arguments = {
        "sums_ptr": sums,
        "variance_ptr": av,
        "alignment_ptr": sa,
        "count_ptr": count,
        **dict(zip(("dvariance_ptr", "dalignment_ptr", "dc_ptr"), incoming)),
        "variance_gain_ptr": gains[0],
        "alignment_gain_ptr": gains[1],
        "cu_seqlens_q_ptr": call.cu_q,
        "max_seqlen_q": call.max_q,
        "VARLEN": call.varlen,
        **_weight_constants(call, weights, sums.shape[2], block_m),
    }
    return gains, Launch(head_weights_backward_kernel, (call.batch,), arguments, num_warps=4)


def _plan_statistics(call: Call, sav: Sav, lse: torch.Tensor, **outputs: torch.Tensor) -> Launch:
    """The text-by-visual block: partial sums if `outputs` is partials_ptr, else what the backward kernels need."""
    config = call.config("statistics", sav=True)
    names = ("partials_ptr", "variance_gain_ptr", "alignment_gain_ptr", "delta_ptr")
    names += ("row_mean_ptr", "row_slope_ptr", "row_gain_ptr")
    arguments = {
        **call.common(),
        **sav.arguments(),
        "lse_ptr": lse,
        **{name: outputs.get(name) for name in names},
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GRADIENT": "partials_ptr" not in outputs,
    }
    return Launch(statistics_kernel, call.grid(config.block_m), arguments, config.num_warps, config.num_stages)


def plan_attention_statistics(call: Call, lse, visual_mask, text_mask, prior, weights: WeightOptions):
    """(av, sa, c, count) from an lse that is already there, and the three launches that fill them."""
    sav, ranges = _plan_ranges(call, visual_mask, text_mask, prior)
    block_m = call.config("statistics", sav=True).block_m
    partials = _partials(call, call.grid(block_m)[0])
    statistics = _plan_statistics(call, sav, lse, partials_ptr=partials)
    outputs, head_weights = _plan_weights(call, sav, weights, partials, block_m)
    return outputs, [ranges, statistics, head_weights]


def plan_backward(
    call: Call,
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    c: torch.Tensor | None = None,
    through: Through | None = None,
):
    """(dq, dk, dv, dprior or None) and their launches; `through` carries the gradient through the statistics."""
    if dout.shape != out.shape or dout.dtype != call.q.dtype:
        raise ValueError(f"dout: got {dout.dtype} {tuple(dout.shape)}, need {call.q.dtype} {tuple(out.shape)}")
    dout = dense_last(dout)
    delta, sums, launch = _plan_delta(call, dout, out, with_sums=through is not None)
    launches = [launch]
    rows = dict.fromkeys(("row_mean_ptr", "row_slope_ptr", "row_gain_ptr"))
    dprior = None
    if through is not None:
        sav, ranges = _plan_ranges(call, through.visual_mask, through.text_mask, through.prior)
        gains, weights_backward = _plan_weights_backward(
            call,
            through.weights,
            sums,
            through.av,
            through.sa,
            through.count,
            through.dav,
            through.dsa,
            through.dc,
            launch.arguments["BLOCK_M"],
        )
        rows = {name: call.per_row() for name in rows}
        statistics = _plan_statistics(
            call, sav, lse, variance_gain_ptr=gains[0], alignment_gain_ptr=gains[1], delta_ptr=delta, **rows
        )
        launches += [ranges, weights_backward, statistics]
        dprior = torch.empty((call.kv_heads, *sav.prior.shape), dtype=call.acc, device=dout.device)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (call.q, call.k, call.v))
    shared = {
        **call.common(),
        **call.values(),
        **(NO_SAV if through is None else sav.arguments()),
        **rows,
        **call.strides("do", dout),
        "dout_ptr": dout,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "c_ptr": c,
        "SCALED": c is not None,
        "STATISTICS": through is not None,
    }
    config = call.config("dkdv", sav=through is not None)
    dkdv = {
        **shared,
        "dk_ptr": dk,
        "dv_ptr": dv,
        "dprior_ptr": dprior,
        **call.strides("dk", dk),
        **call.strides("dv", dv),
        "stride_dprior_h": 0 if dprior is None else dprior[0].numel(),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    del dkdv["text_ptr"]
    grid = triton.cdiv(call.max_k, config.block_n), call.kv_heads, call.batch
    launches.append(Launch(dkdv_kernel, grid, dkdv, config.num_warps, config.num_stages))
    config = call.config("dq", sav=through is not None)
    arguments = {
        **shared,
        "dq_ptr": dq,
        **call.strides("dq", dq),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    launches.append(Launch(dq_kernel, call.grid(config.block_m), arguments, config.num_warps, config.num_stages))
    return (dq, dk, dv, dprior), launches


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
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Statistics and head weights after any attention forward that returned lse; reads the text-by-visual block only.

    Returns:
        (av, sa, c, count) as in `sar_forward`.
    """
    call = Call(q, k, k, options, key_padding_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None)
    outputs, launches = plan_attention_statistics(call, lse, visual_mask, text_mask, prior, weights)
    run_all(launches)
    return outputs


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    options: AttentionOptions,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attention_forward`; deterministic.

    Args:
        dout: the gradient of out, with its shape and dtype, any strides.
        out, lse: what the forward returned.
        The others as given to the forward.

    Returns:
        (dq, dk, dv), contiguous, in the inputs' shapes and dtype.
    """
    call = Call(q, k, v, options, key_padding_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None)
    (dq, dk, dv, _), launches = plan_backward(call, dout, out, lse)
    run_all(launches)
    return dq, dk, dv


def sar_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out_scaled: torch.Tensor,
    lse: torch.Tensor,
    visual_mask: torch.Tensor,
    text_mask: torch.Tensor,
    prior: torch.Tensor,
    av: torch.Tensor,
    sa: torch.Tensor,
    c: torch.Tensor,
    count: torch.Tensor,
    *,
    options: AttentionOptions,
    weights: WeightOptions,
    sav_grad: bool,
    dav: torch.Tensor | None = None,
    dsa: torch.Tensor | None = None,
    dc: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `sar_forward`; deterministic.

    Args:
        dout: the gradient of out_scaled, with its shape and dtype, any strides.
        out_scaled, lse, av, sa, c, count: what the forward returned.
        sav_grad: False takes c for a constant and costs what plain attention's backward costs. True is exact.
        dav, dsa, dc: gradients of av, sa and c themselves, (B, H) each; need sav_grad.
        The others as given to the forward.

    Returns:
        (dq, dk, dv, dprior), contiguous; dprior has prior's shape in fp32, None without sav_grad.
    """
    if not sav_grad and any(g is not None for g in (dav, dsa, dc)):
        raise ValueError("dav, dsa, dc: got a gradient, need sav_grad=True for it to be used")
    call = Call(q, k, v, options, key_padding_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None)
    through = None
    if sav_grad:
        through = Through(visual_mask, text_mask, prior, weights, av, sa, count, dav, dsa, dc)
    (dq, dk, dv, dprior), launches = plan_backward(call, dout, out_scaled, lse, c, through)
    run_all(launches)
    return dq, dk, dv, None if dprior is None else dprior.sum(0)
