"""Decode steps over a KV cache as CUDA graphs, beside the bandwidth that a copy reaches."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from gpu_suite.bench import Bench
from gpu_suite.device import Call
from gpu_suite.inputs import Shape, decode_inputs, decode_shapes
from sar_fast import SARState, flash_attn_with_kvcache, sar_attn_with_kvcache

PROVIDERS = ("sar running", "sar step", "sar prompt", "plain", "sdpa")


def decode(bench: Bench) -> None:
    """One new token per sequence; keys and values read once are the bytes that bandwidth is counted in."""
    for shape in decode_shapes(bench.tiny):
        if not bench.missing("decode", "decode", shape, PROVIDERS):
            continue
        bench.check_time()
        inputs = decode_inputs(shape, bench.dtype, bench.device.name)
        moved = 2 * shape["B"] * shape["KV"] * shape["Hkv"] * shape["D"] * bench.dtype.itemsize
        bench.measure(
            "decode",
            "decode",
            shape,
            {name: partial(_graph, bench, name, inputs) for name in PROVIDERS},
            seconds=0.03,
            rates=lambda t, moved=moved: {"terabytes_per_second": moved / t * 1e-9},
            timed="graph",
        )


def _graph(bench: Bench, name: str, inputs: tuple) -> Call:
    return bench.device.graph(decode_call(name, inputs))


def decode_call(name: str, inputs: tuple) -> Call:
    """One provider's step."""
    q, k, v, visual, prior = inputs
    shape: Shape = {"B": q.shape[0], "H": q.shape[2], "KV": k.shape[1]}
    lengths = torch.full((shape["B"],), shape["KV"], dtype=torch.int32, device=q.device)
    if name == "sdpa":
        at = [x.transpose(1, 2) for x in (q, k, v)]
        return lambda: F.scaled_dot_product_attention(*at, enable_gqa=True)
    if name == "plain":
        return lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True, backend="triton")
    state = SARState.empty(shape["B"], shape["H"], q.device)
    call = {"visual_mask": visual, "prior": prior, "state": state, "decode": name.removeprefix("sar ")}
    return lambda: sar_attn_with_kvcache(q, k, v, cache_seqlens=lengths, backend="triton", **call)
