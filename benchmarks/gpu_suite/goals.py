"""The ratios that the project aims for, from a file of records; each is of two medians of one run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

Row = tuple[str, str, float, float, bool]  # work, shape, ratio, goal, met


def goals(records: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """Every ratio that the records allow."""
    by: dict[tuple[str, str, str], dict[str, float]] = {}
    ceiling = {}
    for r in records:
        by.setdefault((r["kernel"], r["mode"], json.dumps(r["shape"])), {})[r["provider"]] = r["p50"]
        if r["mode"] == "ceiling":
            ceiling[r["kernel"]] = r["p50"]
        if r["kernel"] == "decode":
            by[r["kernel"], "rate", json.dumps(r["shape"])] = {
                **by.get((r["kernel"], "rate", json.dumps(r["shape"])), {}),
                r["provider"]: r["terabytes_per_second"],
            }
    for (kernel, mode, shape), times in by.items():
        about = json.loads(shape)
        yield from _attention(kernel, mode, shape, about, times)
        if kernel == "decode" and mode == "graph" and "sar running" in times:
            yield _row("decode, SAR running / plain", shape, times["sar running"] / times["plain"], 1.03)
        if kernel == "decode" and mode == "rate" and about["KV"] >= 8192 and about["B"] >= 8 and "copy" in ceiling:
            share = times["sar running"] / ceiling["copy"]
            yield "decode, share of copy bandwidth", shape, share, 0.8, share >= 0.8
        if kernel == "model" and "sar" in times and "sdpa" in times:
            goal = 1.02 if mode == "training step" else 1.01
            yield _row(f"model, {mode}, SAR on / off", shape, times["sar"] / times["sdpa"], goal)


def _attention(kernel: str, mode: str, shape: str, about: dict, times: dict[str, float]) -> Iterator[Row]:
    if kernel != "attention" or "sar-triton" not in times:
        return
    ours = times["sar-triton"]
    if mode == "forward":
        yield _row("forward, SAR on / off", shape, ours / times["plain-triton"], 1.03 if about["T"] < 0.2 else 1.08)
        if "sdpa-flash" in times:
            yield _row("forward, SAR on / FlashAttention-2", shape, ours / times["sdpa-flash"], 1.0)
        if "sdpa-cudnn" in times and "sar-auto" in times:
            yield _row("forward, auto / cuDNN", shape, times["sar-auto"] / times["sdpa-cudnn"], 1.1)
    elif mode == "forward+backward" and "sdpa-flash" in times:
        yield _row("training, SAR / FlashAttention-2", shape, ours / times["sdpa-flash"], 1.05)
        through = times.get("sar-triton through")
        if through is not None:
            yield _row("training, sav_grad / FlashAttention-2", shape, through / times["sdpa-flash"], 1.15)
    elif mode == "forward, graph" and "sdpa-flash" in times:
        yield _row("short prefill, SAR / FlashAttention-2", shape, ours / times["sdpa-flash"], 1.15)


def _row(work: str, shape: str, ratio: float, goal: float) -> Row:
    return work, shape, ratio, goal, ratio <= goal


def print_goals(records: Iterable[dict[str, Any]]) -> None:
    """One line per ratio, those that miss their goal marked."""
    rows = list(goals(records))
    if not rows:
        print("no ratio yet: the goals compare SAR on a GPU with what runs beside it")
    for work, shape, ratio, goal, met in rows:
        at = " ".join(f"{k}={v}" for k, v in json.loads(shape).items())
        print(f"{'ok  ' if met else 'MISS'} {work:<40} {ratio:7.3f} (goal {goal:g})  {at}")
