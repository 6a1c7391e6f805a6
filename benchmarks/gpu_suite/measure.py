"""Timing and records: samples of interleaved calls, their quantiles, the machine, and a file that a run continues."""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sar_fast.run_metadata import commit, versions

Calls = Mapping[str, Callable[[], object]]
FLUSH_BYTES = 256 << 20  # beyond any GPU's L2, so that no call finds its inputs there


def samples(calls: Calls, device: str, *, rounds: int = 3, budget: float = 0.15) -> dict[str, list[float]]:
    """Milliseconds of each call, L2 flushed. Rounds visit all calls in turn, so a slow spell hits all alike.

    Args:
        budget: seconds per call and round; at least 5 samples are taken.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    time_one = _cuda_samples if device == "cuda" else _cpu_samples
    for _ in range(rounds):
        for name, call in calls.items():
            found[name] += time_one(call, budget)
    return found


def _cuda_samples(call: Callable[[], object], budget: float) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = min(100, max(5, int(budget / (time.perf_counter() - began + 1e-4))))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, stop in pairs:
        flush.zero_()
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in pairs]


def _cpu_samples(call: Callable[[], object], budget: float) -> list[float]:
    """One sample, whatever the budget: on a CPU the suite only proves that it runs."""
    began = time.perf_counter()
    call()
    return [1e3 * (time.perf_counter() - began)]


def as_graph(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call as a CUDA graph's replay: launch overhead of Python and driver drops out. On the CPU, the call."""
    if device != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_extra_bytes(call: Callable[[], object], device: str) -> int | None:
    """Most memory that the call holds beyond what was there before; None on the CPU."""
    if device != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    if len(values) < 2:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": statistics.median(values), "p80": cuts[7]}


def machine(device: str) -> dict[str, Any]:
    """GPU, driver, clocks as they are, versions and revision."""
    found: dict[str, Any] = {"gpu": "cpu", "driver": None, "clocks_mhz": None}
    if device == "cuda":
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm"
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-i", str(torch.cuda.current_device())]
        found["gpu"] = torch.cuda.get_device_name()
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
            found["driver"], found["clocks_mhz"] = (
                answer[0],
                dict(zip(("sm", "memory", "sm_max"), map(int, answer[1:]))),
            )
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            found["driver"] = f"unknown: {error}"
    return {**found, "cuda": torch.version.cuda, "versions": versions(), "commit": commit()}


class Records:
    """A JSONL file of measurements. A run with the same GPU and commit skips what is there."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, dict(about)
        lines = path.read_text().splitlines() if path.is_file() else []
        self.all = [r for r in map(json.loads, lines) if (r["gpu"], r["commit"]) == (about["gpu"], about["commit"])]
        self._known = {_key(r) for r in self.all}

    def missing(self, kernel: str, mode: str, shape: Mapping[str, Any], providers: Iterable[str]) -> list[str]:
        """Those of ``providers`` that have no record of this measurement."""
        at = {"kernel": kernel, "mode": mode, "shape": dict(shape)}
        return [p for p in providers if _key({**at, "provider": p}) not in self._known]

    def add(
        self,
        kernel: str,
        provider: str,
        mode: str,
        metric: str,
        shape: Mapping[str, Any],
        values: list[float],
        **more: Any,
    ) -> None:
        """Append one measurement and print it."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        head = {"kernel": kernel, "provider": provider, "mode": mode, "metric": metric, "shape": dict(shape)}
        record = {**head, **quantiles(values), **more, **self.about, "time": now}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.all.append(record)
        self._known.add(_key(record))
        at = " ".join(f"{k}={v}" for k, v in shape.items())
        extra = " ".join(f"{k}={v:.4g}" for k, v in more.items() if isinstance(v, int | float))
        print(f"{kernel:>10} {mode:>18} {provider:>20}  {record['p50']:10.4f} {metric}  {at}  {extra}", flush=True)


def _key(record: Mapping[str, Any]) -> tuple:
    return record["kernel"], record["mode"], record["provider"], json.dumps(record["shape"], sort_keys=True)
