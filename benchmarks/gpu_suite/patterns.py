"""The slice of what queries see: every kind of visibility against the fp64 reference, then timed beside plain causal.

A pattern's time counts only if its row of the gate is green. ``seen`` is the share of the causal pairs that it leaves:
what its time should come to, beside plain attention's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from providers import make_inputs

from gpu_suite.bench import Bench
from gpu_suite.device import Call
from gpu_suite.gate import check_prefill
from gpu_suite.inputs import Shape, part_of, pattern_shapes, sizes
from sar_fast import Visibility, flash_attn_func, sar_attn_func
from sar_fast.method.visibility import as_mask, query_positions

PATTERNS = ("window", "chunks", "pictures in a window", "prefix", "mask")


def options_of(pattern: str, length: int, device: str) -> dict[str, Any]:
    """A pattern's options of ``sar_attn_func`` for one length: windows and chunks of a sixteenth, pictures of a
    thirty-second."""
    part = part_of(length)
    position = torch.arange(length, device=device)
    inside = position % part < part // 2
    if pattern == "window":
        return {"window_size": (part - 1, -1)}
    if pattern == "chunks":
        return {"visibility": Visibility(chunk=part)}
    if pattern == "pictures in a window":
        numbers = torch.where(inside, position // part, -1)
        return {"visibility": Visibility(blocks=numbers), "window_size": (part - 1, -1)}
    if pattern == "prefix":
        return {"visibility": Visibility(blocks=torch.where(position < length // 2, 0, -1))}
    return {"attn_mask": matrix_of("pictures in a window", length, device), "causal": False}


def matrix_of(pattern: str, length: int, device: str) -> torch.Tensor:
    """(1, 1, N, N) bool of a pattern, with the causal mask in it."""
    options = options_of(pattern, length, device)
    visibility, window = options.get("visibility", Visibility()), options.get("window_size", (-1, -1))
    position = query_positions(length, length, torch.device(device))
    return as_mask(visibility.bounds(position, length, causal=True, window=window), length, (1, length))


def visibility(bench: Bench) -> None:
    """The gate's rows of all patterns at a small length, then their times at a long one."""
    checked, timed = pattern_shapes(bench.tiny)
    green = [pattern for pattern in PATTERNS if _check(bench, pattern, checked)]
    seen = {pattern: _share(pattern, timed["N"], bench.device.name) for pattern in green}
    for pattern in green:
        bench.check_time()
        shape = {**timed, "pattern": pattern, "seen": seen[pattern]}
        makers = {"sar-triton": partial(_graph, bench, pattern, timed), "plain-triton": partial(_plain, bench, timed)}
        bench.measure("attention", "visibility", shape, makers, timed="graph")


def _check(bench: Bench, pattern: str, shape: Shape) -> bool:
    """The gate's row of a pattern, forward and gradients through the weights; whether it is green."""
    shape = {**shape, "pattern": pattern}
    if not bench.missing("gate", "visibility", shape, ["sar-triton"]):
        return bool(bench.records.find("gate", "visibility", shape, "sar-triton").get("green"))
    bench.check_time()
    bench.trying("gate", "visibility", shape, ["sar-triton"])
    inputs = make_inputs(*sizes(shape), dtype=bench.dtype, device=bench.device.name)
    options = options_of(pattern, shape["N"], bench.device.name)
    mask = {"causal": False, "attn_mask": matrix_of(_origin(pattern), shape["N"], bench.device.name)}
    check = lambda: check_prefill(partial(sar_attn_func, **options), inputs, True, reference=mask)
    rows = bench.attempt("gate", "sar-triton", "visibility", shape, check)
    if rows is None:
        return False
    failures = [failure for row_failures, _ in rows.values() for failure in row_failures]
    worst = round(max(error for _, error in rows.values()), 3)
    bench.records.note(
        "gate", "sar-triton", "visibility", shape, green=not failures, failures=failures, error_of_allowed=worst
    )
    for failure in failures:
        print(f"  RED sar-triton visibility {shape}: {failure}", flush=True)
    return not failures


def _origin(pattern: str) -> str:
    """The pattern that a mask of bits is a copy of."""
    return "pictures in a window" if pattern == "mask" else pattern


def _share(pattern: str, length: int, device: str) -> float:
    """Pairs that a pattern leaves, over the causal mask's; of its runs, without a matrix."""
    options = options_of(_origin(pattern), length, device)
    pattern_value, window = options.get("visibility", Visibility()), options.get("window_size", (-1, -1))
    position = query_positions(length, length, torch.device(device))
    first, end = pattern_value.bounds(position, length, causal=True, window=window)
    pairs = end - (0 if first is None else first.clamp_min(0))
    return round(2 * int(pairs.sum()) / (length * (length + 1)), 4)


def _inputs(bench: Bench, shape: Shape) -> tuple:
    return make_inputs(*sizes(shape), text=shape["T"], dtype=bench.dtype, device=bench.device.name)


def _graph(bench: Bench, pattern: str, shape: Shape) -> Call:
    inputs, options = _inputs(bench, shape), options_of(pattern, shape["N"], bench.device.name)
    return bench.device.graph(lambda: sar_attn_func(*inputs, backend="triton", **options))


def _plain(bench: Bench, shape: Shape) -> Call:
    q, k, v, *_ = _inputs(bench, shape)
    return bench.device.graph(lambda: flash_attn_func(q, k, v, causal=True, backend="triton"))
