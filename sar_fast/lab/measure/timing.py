"""Timing side by side: the same inputs, interleaved rounds. Compare within one call only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError

SYSTEM_TOKENS = 32  # text before the image in the made-up prompts


def seconds_now(device: torch.device) -> float:
    """The host's clock, once everything that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved_times(
    calls: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call in each round. Every round visits all of them, so that a slow spell of the machine hits all
    alike; one round more than ``repeats`` runs first and is not counted. ``clock=time.process_time`` counts the work of
    this process alone, where a CPU has other things to do."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            wait()
            start = clock()
            call()
            wait()
            if turn:
                times[name].append(clock() - start)
    return times


def attention_inputs(
    length: int,
    visual: int,
    dtype: torch.dtype,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random (q, k, v, visual_mask, text_mask, prior) of prompts: system text, ``visual`` image tokens, a question.

    q is (batch, length, heads, head_dim), k and v (batch, length, kv_heads, head_dim), the others (batch, length). They
    are drawn on ``device``: a GPU's numbers are not a CPU's.
    """
    if not 0 < visual <= length - SYSTEM_TOKENS:
        raise ArgumentError("visual", visual, f"be 1 to length - {SYSTEM_TOKENS} = {length - SYSTEM_TOKENS}")
    generator = torch.Generator(device).manual_seed(seed)
    drawn = {"generator": generator, "device": device}
    rand = lambda n: torch.randn(batch, length, n, head_dim, **drawn).to(dtype)
    q, k, v = rand(heads), rand(kv_heads), rand(kv_heads)
    token = torch.arange(length, device=device).expand(batch, length)
    visual_mask = (token >= SYSTEM_TOKENS) & (token < SYSTEM_TOKENS + visual)
    text_mask = token >= SYSTEM_TOKENS + visual
    prior = torch.rand(batch, length, **drawn) * visual_mask
    return q, k, v, visual_mask, text_mask, prior / prior.sum(-1, keepdim=True)
