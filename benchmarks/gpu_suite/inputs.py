"""Shapes of every slice, at real and at tiny sizes, and inputs that are drawn where they are used."""

from __future__ import annotations

from typing import Any

import torch

Shape = dict[str, Any]

# Tiny shapes prove that the suite runs: one small head dim, a few blocks.
_TINY = {"B": 1, "N": 48, "H": 4, "Hkv": 2, "D": 16}


def attention_shapes(tiny: bool) -> list[Shape]:
    """Causal prefill and training: 16,384 tokens; V/N about 0.9 with T/N 0.05, and the training mix T = N/2."""
    if tiny:
        return [{**_TINY, "T": text} for text in (0.05, 0.3)]
    return [
        {"B": 16384 // length, "N": length, "H": 32, "Hkv": 8, "D": head_dim, "T": text}
        for head_dim in (128, 64)
        for length in (2048, 4096, 8192, 16384)
        for text in (0.05, 0.5)
    ]


def short_shapes(tiny: bool) -> list[Shape]:
    """Prompts too short to hide a launch."""
    lengths, batches = ((40,), (1,)) if tiny else ((256, 512, 1024), (1, 16))
    base = {**_TINY, "T": 0.1} if tiny else {"H": 32, "Hkv": 8, "D": 128, "T": 0.1}
    return [{**base, "B": batch, "N": length} for length in lengths for batch in batches]


def scaling_shapes(tiny: bool) -> list[tuple[str, Shape]]:
    """(axis, shape) along each axis; looks for cliffs. ``T tokens`` is what the share T stands for."""
    if tiny:
        return [("N", {**_TINY, "N": n, "T": 0.05}) for n in (48, 49)]
    base = {"B": 1, "N": 4096, "H": 32, "Hkv": 8, "D": 128, "T": 0.05}
    tile = [32 + 64 + v for v in (256, 1000, 1023, 1024, 1025, 10_000, 50_000)]
    axes: list[tuple[str, list[Shape]]] = [
        ("N", [{"N": 2**e} for e in range(10, 17)]),
        ("V", [{"N": n, "T tokens": 64} for n in tile]),
        ("T", [{"T tokens": t} for t in (1, 2, 16, 63, 64, 65, 512, 2048)]),
        ("H", [{"H": h, "Hkv": min(8, h)} for h in (8, 16, 32, 64, 128)]),
        ("B", [{"B": b} for b in (1, 4, 16, 64)]),
    ]
    found = []
    for axis, points in axes:
        for point in points:
            shape = {**base, **point}
            if "T tokens" in point:
                shape["T"] = point["T tokens"] / shape["N"]
            found.append((axis, shape))
    return found


def other_shapes(tiny: bool) -> list[Shape]:
    """For backends that are slow to compile or to run: N 4,096 and 16,384 at D 128 with little text."""
    return attention_shapes(tiny)[:1] if tiny else attention_shapes(tiny)[2:8:4]


def library_shapes(tiny: bool) -> list[Shape]:
    """Where the table of speeds has rows: little text, D 128 at each length, D 64 at one."""
    shapes = attention_shapes(tiny)
    return shapes[:1] if tiny else [*shapes[0:8:2], shapes[12]]


def library_gate_shapes(tiny: bool) -> list[Shape]:
    """One odd length at each head dim of theirs."""
    return gate_shapes(tiny)[2::4] if not tiny else gate_shapes(tiny)


def pattern_shapes(tiny: bool) -> tuple[Shape, Shape]:
    """Where patterns of visible keys are checked, and where they are timed."""
    if tiny:
        return {**_TINY, "N": 45, "H": 2, "Hkv": 1}, {**_TINY, "T": 0.1}
    base = {"B": 1, "H": 32, "Hkv": 8, "D": 128}
    return {**base, "B": 2, "N": 1025, "H": 8, "Hkv": 2}, {**base, "N": 16384, "T": 0.05}


def part_of(length: int) -> int:
    """Keys of a pattern's windows and chunks."""
    return max(8, length // 16)


def decode_shapes(tiny: bool) -> list[Shape]:
    """One new token per sequence over KV keys."""
    if tiny:
        return [{"B": 2, "KV": 48, "H": 4, "Hkv": 2, "D": 16}]
    return [
        {"B": batch, "KV": length, "H": 32, "Hkv": 32 // group, "D": 128}
        for group in (4, 8)
        for length in (1024, 8192, 32768)
        for batch in (1, 8, 64)
    ]


def gate_shapes(tiny: bool) -> list[Shape]:
    """Odd lengths; the last takes the variance's closed form. The reference holds N x N matrices in fp64."""
    if tiny:
        return [{"B": 1, "N": 45, "H": 2, "Hkv": 1, "D": 16}]
    return [
        {"B": 2, "N": n, "H": 8 if n < 8192 else 2, "Hkv": 2 if n < 8192 else 1, "D": head_dim}
        for head_dim in (64, 128)
        for n in (97, 300, 1025, 8200)
    ]


def gate_decode_shapes(tiny: bool) -> list[Shape]:
    """Decode has been timed at D 128 only; more than one split, and a length that ends inside a tile."""
    if tiny:
        return [{"B": 2, "KV": 45, "H": 4, "Hkv": 2, "D": 16}]
    return [{"B": 2, "KV": length, "H": 32, "Hkv": 8, "D": 128} for length in (1003, 8192)]


MODEL_HEADS = {"LLaVA-1.5-7B": (32, 32, 128), "Qwen2.5-VL-7B": (28, 4, 128)}  # H, Hkv, D of its layers
MODEL_TOKENS = {"LLaVA-1.5-7B": 32 + 576 + 48, "Qwen2.5-VL-7B": 32 + 1024 + 48}


def sizes(shape: Shape) -> list[int]:
    """B, N, H, Hkv, D."""
    return [shape[n] for n in ("B", "N", "H", "Hkv", "D")]


def decode_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q (B, 1, H, D), k and v (B, KV, Hkv, D), visual mask and prior (B, KV); nine tenths are a picture."""
    batch, length, heads, kv_heads, head_dim = (shape[n] for n in ("B", "KV", "H", "Hkv", "D"))
    generator = torch.Generator(device).manual_seed(seed)
    normal = lambda *s: torch.randn(s, generator=generator, device=device, dtype=dtype)
    q, k, v = normal(batch, 1, heads, head_dim), *(normal(batch, length, kv_heads, head_dim) for _ in range(2))
    token = torch.arange(length, device=device).expand(batch, -1)
    visual = (token >= length // 20) & (token < length - length // 20)
    prior = torch.rand(batch, length, generator=generator, device=device) * visual
    return q, k, v, visual, prior / prior.sum(-1, keepdim=True)
