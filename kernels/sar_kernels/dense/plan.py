"""Which kernels a call launches, in order, with every argument. Planning allocates but runs nothing.

The same plans, made on tensors without memory, are what `sar_kernels.tools.aot` compiles for a GPU that is not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from sar_kernels.call import Call, WeightOptions
from sar_kernels.configs import SMALL, closed_variance_config, padded_head_dim
from sar_kernels.dense.dkdv import dkdv_kernel
from sar_kernels.dense.dq import delta_kernel, dq_kernel
from sar_kernels.dense.forward import forward_kernel
from sar_kernels.dense.moments import closed_variance_kernel, second_moments_kernel
from sar_kernels.dense.prepare import prepare_kernel
from sar_kernels.dense.statistics import statistics_kernel
from sar_kernels.dense.weights import (
    head_weights_backward_kernel,
    head_weights_kernel,
    scale_heads_kernel,
    token_ranges_kernel,
)
from sar_kernels.launch import Launch
from sar_kernels.masks import row_ranges_kernel


@dataclass
class Sav:
    """The arguments that SAR adds to a call, and the ranges that tell kernels which tiles concern it."""

    visual: torch.Tensor
    text: torch.Tensor
    prior: torch.Tensor
    ranges: torch.Tensor  # (B, 4) int32
    visual_tiles: torch.Tensor | None = None  # (B, 2, 1 + key tiles) int32 of `store_visual_tiles`

    def arguments(self) -> dict[str, Any]:
        return {
            "visual_ptr": self.visual,
            "text_ptr": self.text,
            "prior_ptr": self.prior,
            "ranges_ptr": self.ranges,
        }

    def visual_tile_arguments(self) -> dict[str, Any]:
        """As the kernels take it that make or read them."""
        stride = 0 if self.visual_tiles is None else self.visual_tiles.stride(0)
        return {"visual_tiles_ptr": self.visual_tiles, "stride_visual_tiles_b": stride}


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
    sums: torch.Tensor | None = None  # of dout * out per DELTA_ROWS rows, where another kernel than delta's has them


NO_SAV = {"visual_ptr": None, "text_ptr": None, "prior_ptr": None, "ranges_ptr": None}
NO_COLUMNS = {
    "columns_ptr": None,
    "num_visual_ptr": None,
    "sums_ptr": None,
    "stride_sums_h": 0,
    "CHUNK": 0,
}
CANCELLATION = 2048  # bound over sum up to which the closed form stays within 1e-3 (tests/kernels/test_moments.py)
MOMENT_ROWS = 2048  # tokens per second moment: few enough to fill the device, many enough to be small beside q
DELTA_ROWS = 64  # rows per program of delta's kernel, and of what stands for it
CHUNK = 256  # keys that are summed in one program before the forward; never chosen by length, which would change bits


def _sav(call: Call, visual_mask, text_mask, prior, *, with_visual_tiles: bool) -> Sav:
    empty = lambda *shape: torch.empty(shape, dtype=torch.int32, device=call.q.device)
    tiles = triton.cdiv(call.max_k, call.config("statistics", sav=True).block_n)
    return Sav(
        visual=call.token_mask("visual_mask", visual_mask, keys=True),
        text=call.token_mask("text_mask", text_mask, keys=False),
        prior=call.token_prior(prior),
        ranges=empty(call.batch, 4),
        visual_tiles=empty(call.batch, 2, 1 + tiles) if with_visual_tiles else None,
    )


def _plan_prepare(call: Call, sav: Sav) -> tuple[dict[str, Any], Launch]:
    """What the forward with statistics is told beyond `Sav`, and the launch that fills it and sav.ranges."""
    empty = lambda *shape, dtype=call.acc: torch.empty(shape, dtype=dtype, device=call.q.device)
    tokens = call.k.shape[0] if call.varlen else call.batch * call.max_k
    num_chunks = max(triton.cdiv(call.max_k, CHUNK), 1)  # a sample without keys has ranges too
    sums = empty(call.batch, call.kv_heads, num_chunks, padded_head_dim(call.head_dim))
    prepared = {
        "columns_ptr": empty(tokens // 128 + call.batch, 2, 128),
        "num_visual_ptr": empty(call.batch, dtype=torch.int32),
        "sums_ptr": sums,
        "stride_sums_h": num_chunks * sums.shape[3],
        "CHUNK": CHUNK,
    }
    arguments = {
        **{name: value for name, value in prepared.items() if name != "stride_sums_h"},
        **sav.arguments(),
        **sav.visual_tile_arguments(),
        **call.strides("k", call.k),
        "k_ptr": call.k,
        "padding_ptr": call.padding,
        "cu_seqlens_q_ptr": call.cu_q,
        "cu_seqlens_k_ptr": call.cu_k,
        "num_chunks": num_chunks,
        "max_seqlen_q": call.max_q,
        "max_seqlen_k": call.max_k,
        "HEAD_DIM": call.head_dim,
        "BLOCK_D": sums.shape[3],
        "VARLEN": call.varlen,
        "BLOCK": 4096,
        "TILE": call.config("statistics", sav=True).block_n,
        "ACC": call.triton_acc,
    }
    return prepared, Launch(prepare_kernel, (num_chunks, call.kv_heads + 1, call.batch), arguments, SMALL)


def _plan_ranges(call: Call, visual_mask, text_mask, prior) -> tuple[Sav, Launch]:
    sav = _sav(call, visual_mask, text_mask, prior, with_visual_tiles=True)
    arguments = {
        "visual_ptr": sav.visual,
        "text_ptr": sav.text,
        "cu_seqlens_q_ptr": call.cu_q,
        "cu_seqlens_k_ptr": call.cu_k,
        "ranges_ptr": sav.ranges,
        **sav.visual_tile_arguments(),
        "max_seqlen_q": call.max_q,
        "max_seqlen_k": call.max_k,
        "VARLEN": call.varlen,
        "BLOCK": 4096,
        "TILE": call.config("statistics", sav=True).block_n,
    }
    return sav, Launch(token_ranges_kernel, (call.batch,), arguments, SMALL)


def _plan_forward(
    call: Call, sav: Sav | None, prepared: dict[str, Any], closed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Launch]:
    config = call.config("forward", sav=sav is not None)
    grid = call.grid(config.block_m)
    out = torch.empty((*call.q.shape[:-1], call.head_dim_v), dtype=call.q.dtype, device=call.q.device)
    lse = call.per_row()
    partials = None if sav is None else _partials(call, grid[0])
    arguments = {
        **call.common(),
        **call.values(),
        **call.masks.tile_arguments(),
        **prepared,
        "text_ptr": None if sav is None else sav.text,
        "ranges_ptr": None if sav is None else sav.ranges,
        "out_ptr": out,
        "lse_ptr": lse,
        "partials_ptr": partials,
        "closed_ptr": closed,
        "num_blocks": grid[0],
        **call.strides("o", out),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STATISTICS": sav is not None,
        "CLOSED_FORM": closed is not None,
        # A loop more for the stretch with visual keys, where registers are not limited for the sake of residency.
        "SPLIT_COLLECT": sav is not None and config.max_registers is None,
    }
    return out, lse, partials, Launch(forward_kernel, grid, arguments, config)


def _plan_moments(call: Call, sav: Sav, prepared: dict[str, Any], block_m: int) -> tuple[torch.Tensor, list[Launch]]:
    """(B, H) variances summed in closed form over the row blocks of block_m that see all of V, and the launches."""
    block_d, chunks = padded_head_dim(call.head_dim), triton.cdiv(max(call.max_q, call.max_k), MOMENT_ROWS)
    config = call.config("second_moments", sav=True)
    panel = min(block_d, config.block_m)
    shape = (call.batch, call.kv_heads + call.heads, chunks, block_d, block_d)
    moments = torch.empty(shape, dtype=call.acc, device=call.q.device)
    closed = call.per_head()
    sizes = {
        "moments_ptr": moments,
        "ranges_ptr": sav.ranges,
        "num_visual_ptr": prepared["num_visual_ptr"],
        "num_chunks": chunks,
        "num_kv_heads": call.kv_heads,
        "BLOCK_D": block_d,
        "ROWS": MOMENT_ROWS,
        "ACC": call.triton_acc,
    }
    not_read = ("padding_ptr", "stride_lse_b", "stride_lse_h", "group", "softmax_scale", "softcap")
    not_read += ("bits_ptr", "stride_bits_b", "stride_bits_s")  # where bits hide keys, no row block is taken
    not_read += ("HAS_PADDING", "HAS_SOFTCAP")  # padding is in the columns
    arguments = {
        **{name: value for name, value in call.common().items() if name not in not_read},
        **{name: prepared[name] for name in ("columns_ptr", "sums_ptr", "stride_sums_h", "CHUNK")},
        **sizes,
        "text_ptr": sav.text,
        "PANEL": panel,
        "BLOCK_M": block_m,
        "BLOCK_N": config.block_n,
        # the interpreter has no bfloat16
        "SPLIT": call.arch != "cpu" and call.q.dtype in (torch.float16, torch.bfloat16),
    }
    grid = chunks * (block_d // panel), shape[1], call.batch
    second_moments = Launch(second_moments_kernel, grid, arguments, config)
    arguments = {
        **sizes,
        "closed_ptr": closed,
        "group": call.heads // call.kv_heads,
        "softmax_scale": call.options.softmax_scale,
        "LIMIT": CANCELLATION,
        "PANEL": 16,
    }
    config = closed_variance_config(call.arch)
    return closed, [second_moments, Launch(closed_variance_kernel, (call.heads, call.batch), arguments, config)]


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
        "ACC": call.triton_acc,
    }


def _plan_weights(
    call: Call,
    sav: Sav,
    weights: WeightOptions,
    partials: torch.Tensor,
    block_m: int,
    closed: torch.Tensor | None = None,
) -> tuple[tuple[torch.Tensor, ...], Launch]:
    """(av, sa, c, count) from partial sums, and from what the closed form has of the variances."""
    av, sa, c = call.per_head(), call.per_head(), call.per_head()
    count = torch.empty((call.batch,), dtype=call.acc, device=call.q.device)
    arguments = {
        "partials_ptr": partials,
        "ranges_ptr": sav.ranges,
        "closed_ptr": closed,
        "variance_ptr": av,
        "alignment_ptr": sa,
        "c_ptr": c,
        "count_ptr": count,
        **_weight_constants(call, weights, partials.shape[2], block_m),
    }
    return (av, sa, c, count), Launch(head_weights_kernel, (call.batch,), arguments, SMALL)


def plan_scale(call: Call, out: torch.Tensor, c: torch.Tensor, count: torch.Tensor) -> Launch:
    """out, contiguous, times the head weights in place, but for samples that count no query."""
    block_d = padded_head_dim(call.head_dim_v)
    block_m = max(1, 4096 // block_d)
    arguments = {
        "out_ptr": out,
        "c_ptr": c,
        "count_ptr": count,
        "cu_seqlens_ptr": call.cu_q,
        "max_seqlen": call.max_q,
        "num_heads": call.heads,
        "HEAD_DIM": call.head_dim_v,
        "BLOCK_D": block_d,
        "BLOCK_M": block_m,
        "VARLEN": call.varlen,
    }
    grid = (call.heads, triton.cdiv(call.max_q, block_m), call.batch)
    return Launch(scale_heads_kernel, grid, arguments, SMALL)


def plan_attention_forward(call: Call) -> tuple[tuple[torch.Tensor, ...], list[Launch]]:
    """(out, lse) and the one launch that fills them."""
    out, lse, _, launch = _plan_forward(call, None, NO_COLUMNS)
    return (out, lse), [launch]


def plan_sar_forward(call: Call, visual_mask, text_mask, prior, weights: WeightOptions):
    """(out_scaled, lse, av, sa, c, count) and the launches that fill them: four, with the closed form six."""
    sav = _sav(call, visual_mask, text_mask, prior, with_visual_tiles=False)
    prepared, prepare = _plan_prepare(call, sav)
    block_m = call.config("forward", sav=True).block_m
    closed, moments = _plan_moments(call, sav, prepared, block_m) if call.closed_form else (None, [])
    out, lse, partials, forward = _plan_forward(call, sav, prepared, closed)
    (av, sa, c, count), head_weights = _plan_weights(call, sav, weights, partials, block_m, closed)
    launches = [prepare, *moments, forward, head_weights, plan_scale(call, out, c, count)]
    return (out, lse, av, sa, c, count), launches


def _plan_delta(
    call: Call, dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, c: torch.Tensor | None, *, with_sums: bool
):
    """(delta, lse in base 2), both with c, delta's sums per row block (B, H, row blocks) or None, and the launch."""
    grid = call.grid(DELTA_ROWS)
    delta = call.per_row()
    lse2 = call.per_row()
    sums = torch.empty((call.batch, call.heads, grid[0]), dtype=call.acc, device=dout.device) if with_sums else None
    arguments = {
        "dout_ptr": dout,
        "out_ptr": out,
        "delta_ptr": delta,
        "sums_ptr": sums,
        "c_ptr": c,
        "lse_ptr": lse,
        "lse2_ptr": lse2,
        "cu_seqlens_q_ptr": call.cu_q,
        **call.strides("do", dout),
        **call.strides("o", out),
        **call.row_strides(),
        "max_seqlen_q": call.max_q,
        "HEAD_DIM_V": call.head_dim_v,
        "BLOCK_DV": padded_head_dim(call.head_dim_v),
        "BLOCK_M": DELTA_ROWS,
        "VARLEN": call.varlen,
        "WITH_SUMS": with_sums,
        "ACC": call.triton_acc,
    }
    return delta, lse2, sums, Launch(delta_kernel, grid, arguments, SMALL)


def _plan_weights_backward(call: Call, through: Through, sums: torch.Tensor, block_m: int):
    """Gradients of each counting query's variance and semantic alignment, (B, H) both, and the launch."""
    gains = call.per_head(), call.per_head()
    incoming = {"dav": through.dav, "dsa": through.dsa, "dc": through.dc}
    incoming = [None if g is None else call.head_array(name, g.to(call.acc)) for name, g in incoming.items()]
    arguments = {
        "sums_ptr": sums,
        "variance_ptr": call.head_array("av", through.av),
        "alignment_ptr": call.head_array("sa", through.sa),
        "count_ptr": call.sample_array("count", through.count),
        **dict(zip(("dvariance_ptr", "dalignment_ptr", "dc_ptr"), incoming)),
        "variance_gain_ptr": gains[0],
        "alignment_gain_ptr": gains[1],
        "cu_seqlens_q_ptr": call.cu_q,
        "max_seqlen_q": call.max_q,
        "VARLEN": call.varlen,
        **_weight_constants(call, through.weights, sums.shape[2], block_m),
    }
    return gains, Launch(head_weights_backward_kernel, (call.batch,), arguments, SMALL)


def _plan_statistics(call: Call, sav: Sav, lse: torch.Tensor, **outputs: torch.Tensor) -> Launch:
    """The text-by-visual block: partial sums if `outputs` has partials_ptr, else what the backward kernels need."""
    config = call.config("statistics", sav=True)
    names = ("columns_ptr", "num_visual_ptr", "closed_ptr")
    names += ("partials_ptr", "variance_gain_ptr", "alignment_gain_ptr", "delta_ptr")
    names += ("row_mean_ptr", "row_slope_ptr", "row_gain_ptr")
    arguments = {
        **call.common(),
        **sav.arguments(),
        **sav.visual_tile_arguments(),
        "lse_ptr": lse,
        **{name: outputs.get(name) for name in names},
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GRADIENT": "partials_ptr" not in outputs,
        "CLOSED_FORM": "closed_ptr" in outputs,
    }
    return Launch(statistics_kernel, call.grid(config.block_m), arguments, config)


def plan_attention_statistics(call: Call, lse, visual_mask, text_mask, prior, weights: WeightOptions):
    """(av, sa, c, count) from an lse that is already there, and the launches that fill them: three, with the closed
    form five."""
    lse = call.row_array("lse", lse)
    block_m = call.config("statistics", sav=True).block_m
    partials = _partials(call, call.grid(block_m)[0])
    closed, given, moments = None, {}, []
    if call.closed_form:
        sav = _sav(call, visual_mask, text_mask, prior, with_visual_tiles=True)
        prepared, ranges = _plan_prepare(call, sav)
        closed, moments = _plan_moments(call, sav, prepared, block_m)
        given = {"closed_ptr": closed, **{name: prepared[name] for name in ("columns_ptr", "num_visual_ptr")}}
    else:
        sav, ranges = _plan_ranges(call, visual_mask, text_mask, prior)
    statistics = _plan_statistics(call, sav, lse, partials_ptr=partials, **given)
    outputs, head_weights = _plan_weights(call, sav, weights, partials, block_m, closed)
    return outputs, [ranges, *moments, statistics, head_weights]


def _plan_row_ranges(call: Call, block_n: int) -> tuple[torch.Tensor | None, list[Launch]]:
    """Which rows see each key block, where it is tensors that say so, and the launch that finds out."""
    if call.masks.first is None and call.masks.end is None:
        return None, []
    blocks = triton.cdiv(call.max_k, block_n)
    row_ranges = torch.empty((call.batch, blocks, 3), dtype=torch.int32, device=call.q.device)
    arguments = {
        **call.masks.edge_arguments(call.options.window),
        "cu_seqlens_q_ptr": call.cu_q,
        "cu_seqlens_k_ptr": call.cu_k,
        "row_ranges_ptr": row_ranges,
        "max_seqlen_q": call.max_q,
        "max_seqlen_k": call.max_k,
        "BLOCK_N": block_n,
        "VARLEN": call.varlen,
        "BLOCK": 1024,
    }
    return row_ranges, [Launch(row_ranges_kernel, (blocks, call.batch), arguments, SMALL)]


def plan_backward(
    call: Call,
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    c: torch.Tensor | None = None,
    through: Through | None = None,
    *,
    with_dv: bool = True,
):
    """(dq, dk, dv, dprior or None) and their launches; `through` carries the gradient through the statistics.

    Without dv, which is None then, its product is not computed either.
    """
    dout, lse = call.output_array("dout", dout), call.row_array("lse", lse)
    out = call.output_array("out" if c is None else "out_scaled", out)
    c = None if c is None else call.head_array("c", c)
    with_sums = through is not None and through.sums is None
    delta, lse2, sums, launch = _plan_delta(call, dout, out, lse, c, with_sums=with_sums)
    launches = [launch]
    rows = dict.fromkeys(("row_mean_ptr", "row_slope_ptr", "row_gain_ptr"))
    dprior = None
    if through is not None:
        sav, ranges = _plan_ranges(call, through.visual_mask, through.text_mask, through.prior)
        gains, weights_backward = _plan_weights_backward(call, through, sums if with_sums else through.sums, DELTA_ROWS)
        rows = {name: call.per_row() for name in rows}
        statistics = _plan_statistics(
            call, sav, lse, variance_gain_ptr=gains[0], alignment_gain_ptr=gains[1], delta_ptr=delta, **rows
        )
        launches += [ranges, weights_backward, statistics]
        dprior = torch.empty((call.kv_heads, *sav.prior.shape), dtype=call.acc, device=dout.device)
    like = lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device)
    dq, dk, dv = like(call.q), like(call.k), like(call.v) if with_dv else None
    shared = {
        **call.common(),
        **call.values(),
        **call.masks.tile_arguments(),
        **(NO_SAV if through is None else sav.arguments()),
        **rows,
        **call.strides("do", dout),
        "dout_ptr": dout,
        "lse_ptr": lse2,
        "delta_ptr": delta,
        "STATISTICS": through is not None,
    }
    config = call.config("dkdv", sav=through is not None)
    row_ranges, ranges_launches = _plan_row_ranges(call, config.block_n)
    launches += ranges_launches
    dkdv = {
        **shared,
        "row_ranges_ptr": row_ranges,
        "dk_ptr": dk,
        "dv_ptr": dv,
        "dprior_ptr": dprior,
        **call.strides("dk", dk),
        **(call.strides("dv", dv) if with_dv else dict.fromkeys(("stride_dvb", "stride_dvs", "stride_dvh"), 0)),
        "stride_dprior_h": 0 if dprior is None else dprior[0].numel(),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    del dkdv["text_ptr"]
    grid = triton.cdiv(call.max_k, config.block_n), call.kv_heads, call.batch
    launches.append(Launch(dkdv_kernel, grid, dkdv, config))
    config = call.config("dq", sav=through is not None)
    arguments = {
        **shared,
        "dq_ptr": dq,
        **call.strides("dq", dq),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    launches.append(Launch(dq_kernel, call.grid(config.block_m), arguments, config))
    return (dq, dk, dv, dprior), launches
