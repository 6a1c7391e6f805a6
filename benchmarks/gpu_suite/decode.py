"""Decode steps over a KV cache, as CUDA graphs, beside the bandwidth that a copy reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from providers import make_inputs

from gpu_suite.attention import Bench
from gpu_suite.measure import as_graph, samples
from sar_fast import SARState, flash_attn_with_kvcache, sar_attn_with_kvcache


def decode(bench: Bench) -> None:
    """One new token per sequence; keys and values read once are the bytes that bandwidth is counted in."""
    for shape in _shapes(bench):
        names = ["sar running", "sar step", "sar prompt", "plain", "sdpa"]
        if not bench.records.missing("decode", "graph", shape, names):
            continue
        calls = _calls(bench, shape)
        moved = 2 * shape["B"] * shape["KV"] * shape["Hkv"] * shape["D"] * bench.dtype.itemsize
        graphs = {name: as_graph(call, bench.device) for name, call in calls.items()}
        for name, times in samples(graphs, bench.device).items():
            rate = moved / sorted(times)[len(times) // 2] * 1e-9
            bench.records.add("decode", name, "graph", "ms", shape, times, terabytes_per_second=rate)


def _shapes(bench: Bench) -> list[dict[str, Any]]:
    if bench.tiny:
        return [{"B": 2, "KV": 96, "H": 4, "Hkv": 2, "D": 32}]
    return [
        {"B": batch, "KV": length, "H": 32, "Hkv": 32 // group, "D": 128}
        for group in (4, 8)
        for length in (1024, 8192, 32768)
        for batch in (1, 8, 64)
    ]


def _calls(bench: Bench, shape: dict[str, Any]) -> dict[str, Callable[[], object]]:
    sizes = [shape[n] for n in ("B", "KV", "H", "Hkv", "D")]
    q, k, v, visual, _, prior = make_inputs(*sizes, dtype=bench.dtype, device=bench.device)
    backend = "triton" if bench.device == "cuda" else "torch"
    step = q[:, -1:].contiguous()
    lengths = torch.full((shape["B"],), shape["KV"], dtype=torch.int32, device=bench.device)
    roles = {"visual_mask": visual, "prior": prior}

    def sar(mode: str) -> Callable[[], object]:
        state = SARState.empty(shape["B"], shape["H"], bench.device)
        common = {**roles, "state": state, "decode": mode, "backend": backend}
        return lambda: sar_attn_with_kvcache(step, k, v, cache_seqlens=lengths, **common)

    at = [x.transpose(1, 2) for x in (step, k, v)]
    return {
        **{f"sar {mode}": sar(mode) for mode in ("running", "step", "prompt")},
        "plain": lambda: flash_attn_with_kvcache(step, k, v, cache_seqlens=lengths, causal=True, backend=backend),
        "sdpa": lambda: F.scaled_dot_product_attention(*at, enable_gqa=True),
    }


PARTS = {"decode": decode}
