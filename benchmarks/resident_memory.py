"""How much memory a call adds on a CPU: a process of its own runs it, whose peak the kernel counts (Linux)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[], Sequence[Tensor]]


def extra_resident_bytes(calls: Callable[..., tuple[Call, Call]], *args: object) -> int:
    """Peak resident memory that a call adds, beyond its inputs and what it returns.

    Args:
        calls: a function of a module, called with ``args`` in a new process; gives a small call, which allocates the
            libraries' own buffers, and the call that is measured.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(send, torch.get_num_threads(), calls, args))
    child.start()
    send.close()
    extra = receive.recv()
    child.join()
    return max(extra, 0)


def _measure(pipe: Connection, threads: int, calls: Callable[..., tuple[Call, Call]], args: tuple) -> None:
    torch.set_num_threads(threads)
    small, call = calls(*args)
    small()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status_kb("VmRSS")
    results = call()
    returned = sum(x.numel() * x.element_size() for x in results)
    pipe.send((_status_kb("VmHWM") - before) * 1024 - returned)


def _status_kb(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1])
