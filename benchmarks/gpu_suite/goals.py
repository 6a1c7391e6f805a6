"""The ratios that the project aims for, from records; each is of two medians of one run. And the table at the end."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

Record = dict[str, Any]


class Ratio(NamedTuple):
    work: str
    shape: dict[str, Any]
    value: float
    goal: float
    at_least: bool = False  # a share that should be reached, not a cost that should be kept below

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def goals(records: Iterable[Record]) -> Iterator[Ratio]:
    """Every ratio that the records allow."""
    measured = [r for r in records if "p50" in r]
    by: dict[tuple[str, str, str], dict[str, Record]] = defaultdict(dict)
    for r in measured:
        by[r["kernel"], r["mode"], json.dumps(r["shape"], sort_keys=True)][r["provider"]] = r
    copy = next((r["terabytes_per_second"] for r in measured if r["kernel"] == "copy"), None)
    for (kernel, mode, shape), found in by.items():
        about, times = json.loads(shape), {p: r["p50"] for p, r in found.items()}
        ratio = lambda work, over, under, goal: (
            [Ratio(work, about, times[over] / times[under], goal)] if {over, under} <= times.keys() else []  # noqa: B023
        )
        if kernel == "attention":
            yield from _attention(mode, about, ratio)
        elif kernel == "decode":
            yield from ratio("decode, SAR running / plain", "sar running", "plain", 1.03)
            if copy is not None and about["KV"] >= 8192 and about["B"] >= 8 and "sar running" in found:
                share = found["sar running"]["terabytes_per_second"] / copy
                yield Ratio("decode, share of copy bandwidth", about, share, 0.8, at_least=True)
        elif kernel == "model":
            yield from ratio(f"model, {mode}, SAR on / off", "sar", "sdpa", 1.02 if mode == "training step" else 1.01)


def _attention(mode: str, about: dict[str, Any], ratio: Any) -> Iterator[Ratio]:
    if mode == "forward":
        work, goal = ("forward, SAR on / off", 1.03) if about["T"] < 0.2 else ("forward, half text, SAR on / off", 1.08)
        yield from ratio(work, "sar-triton", "plain-triton", goal)
        yield from ratio("forward, SAR / FlashAttention-2", "sar-triton", "sdpa-flash", 1.0)
        yield from ratio("forward, SAR / cuDNN", "sar-triton", "sdpa-cudnn", 1.1)
    elif mode == "forward+backward":
        yield from ratio("training, SAR / FlashAttention-2", "sar-triton", "sdpa-flash", 1.05)
        yield from ratio("training, sav_grad / FlashAttention-2", "sar-triton through", "sdpa-flash", 1.15)
    elif mode == "forward, graph":
        yield from ratio("short prefill, SAR / FlashAttention-2", "sar-triton", "sdpa-flash", 1.15)


def print_table(records: Iterable[Record]) -> None:
    """How slices ended, what is red or failed, and a line per goal: a screen of text."""
    records = list(records)
    for r in records:
        if r["kernel"] == "slice":
            print(f"{r['provider']:>10}  {r.get('status')}  {r.get('seconds', '')} s")
    print("\n".join(_troubles(records)))
    found: dict[tuple[str, float, bool], list[Ratio]] = defaultdict(list)
    for row in goals(records):
        found[row.work, row.goal, row.at_least].append(row)
    if not found:
        print("no ratio yet: the goals compare SAR on a GPU with what runs beside it")
    for (work, goal, at_least), rows in found.items():
        values = sorted(r.value for r in rows)
        sign, met = ">=" if at_least else "<=", sum(r.met for r in rows)
        mark = "ok  " if met == len(rows) else "MISS"
        spread = f"{values[0]:6.3f} .. {values[-1]:6.3f}"
        print(f"{mark} {work:<40} {spread}  goal {sign} {goal:g}: {met} of {len(rows)} shapes")


def _troubles(records: list[Record]) -> Iterator[str]:
    """Red gate rows, failed tests, errors; withheld figures as a number."""
    for r in records:
        for failure in (r.get("failures") or ())[:5]:
            yield f"RED  {r['kernel']} {r['provider']} {r['mode']} {_short(r['shape'])}: {failure[:140]}"
    errors = [r for r in records if "error" in r and not r.get("withheld")]
    for r in errors[:12]:
        text = r["error"].splitlines()[0][:110]
        yield f"ERR  {r['kernel']} {r['provider']} {r['mode']} {_short(r['shape'])}: {text}"
    if len(errors) > 12:
        yield f"ERR  and {len(errors) - 12} more"
    withheld = sum(bool(r.get("withheld")) for r in records)
    if withheld:
        yield f"     {withheld} figures withheld where the gate is red"


def _short(shape: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in shape.items())
