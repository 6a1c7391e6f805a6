"""How calls are timed: on a GPU, and in a rehearsal on a CPU, where figures mean nothing but every step is taken."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
FLUSH_BYTES = 256 << 20  # beyond any GPU's L2, so that no call finds its inputs there
LONGEST_SLEEP = 5e-3  # seconds for which the GPU is held while launches are queued
CYCLES = 2e9  # per second, about: a sleep that is a little off hides a little more or less of the host


class Cuda:
    """The GPU at hand. Launches are queued while it is held asleep, so that its time is measured, not the host's."""

    name, tiny, dtype = "cuda", False, torch.bfloat16

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def times(self, call: Call, seconds: float) -> list[float]:
        """Milliseconds of single calls, L2 flushed before each; at least 5 and at most 100 of them."""
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        host = time.perf_counter() - began
        torch.cuda.synchronize()
        count = min(100, max(5, int(seconds / (time.perf_counter() - began + 3e-4))))
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, stop in pairs:
            self._hold(host)
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in pairs]

    def launch_times(self, work: Sequence[Call], seconds: float) -> list[list[float]]:
        """Milliseconds of every launch of a sequence, by events between them; one list a launch."""
        for launch in (*work, *work):
            launch()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for launch in work:
            launch()
        host = time.perf_counter() - began
        torch.cuda.synchronize()
        count = min(50, max(5, int(seconds / (time.perf_counter() - began + 3e-4))))
        rounds = [[torch.cuda.Event(enable_timing=True) for _ in range(len(work) + 1)] for _ in range(count)]
        for events in rounds:
            self._hold(host + 1e-5 * len(work))
            events[0].record()
            for launch, event in zip(work, events[1:]):
                launch()
                event.record()
        torch.cuda.synchronize()
        return [[events[i].elapsed_time(events[i + 1]) for events in rounds] for i in range(len(work))]

    def _hold(self, host: float) -> None:
        self._flush.zero_()
        torch.cuda._sleep(int(min(1.3 * host + 2e-5, LONGEST_SLEEP) * CYCLES))

    def graph(self, call: Call) -> Call:
        """The call as a CUDA graph's replay."""
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

    def peak_extra_bytes(self, call: Call) -> int | None:
        """Most memory that the call holds beyond what was there before."""
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def lost(self) -> bool:
        """Whether an error has left the GPU unusable to this process, as an illegal access does."""
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").item()
        except RuntimeError:
            return True
        return False

    def release(self) -> None:
        """Give back what finished calls held."""
        gc.collect()
        torch.cuda.empty_cache()

    def command(self, program: Sequence[str], arguments: Sequence[str]) -> list[str]:
        """A tool in front of a Python program: ``ncu ... python ...``."""
        return [*program, sys.executable, *arguments]


class Rehearsal:
    """A CPU in the GPU's place. Every call runs once, in Triton's interpreter where it is ours; tools are left away."""

    name, tiny, dtype = "cpu", True, torch.float32

    def times(self, call: Call, seconds: float) -> list[float]:
        began = time.perf_counter()
        call()
        return [1e3 * (time.perf_counter() - began)]

    def launch_times(self, work: Sequence[Call], seconds: float) -> list[list[float]]:
        return [self.times(launch, seconds) for launch in work]

    def graph(self, call: Call) -> Call:
        return call

    def peak_extra_bytes(self, call: Call) -> int | None:
        return None

    def lost(self) -> bool:
        return os.environ.get("GPU_SUITE_LOST") == "1"

    def release(self) -> None:
        gc.collect()

    def command(self, program: Sequence[str], arguments: Sequence[str]) -> list[str]:
        return [sys.executable, *arguments]
