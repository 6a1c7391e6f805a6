"""Looks at a prior's values: at once on a CPU, and on a GPU without waiting for it.

A GPU's answer travels to the host behind the work that is already queued. A bad prior is then a ``ValueError`` of the
next call whose turn comes after it has arrived; until then the kernels make the output of a negative prior NaN, so that
no result of it passes for a good one.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Protocol

import torch
from torch import Tensor


class Range(Protocol):
    """Least and largest value of a prior, perhaps still on their way."""

    def arrived(self) -> bool: ...

    def values(self) -> tuple[float, float]: ...


class DeviceRange:
    """The range of a prior on a GPU, copied to pinned memory on the current stream."""

    def __init__(self, prior: Tensor) -> None:
        found = torch.stack(prior.detach().aminmax())  # NaN among the values makes both NaN
        self._host = torch.empty(2, dtype=found.dtype, pin_memory=True)
        self._host.copy_(found, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def arrived(self) -> bool:
        return self._event.query()

    def values(self) -> tuple[float, float]:
        low, high = self._host.tolist()
        return low, high


def check_range(low: float, high: float, when: str = "") -> None:
    """Raise unless 0 <= low and high is finite; NaN fails both."""
    if not (low >= 0 and high < float("inf")):
        raise ValueError(f"prior must be finite and non-negative; got values from {low} to {high}{when}")


class LaterChecks:
    """Ranges that have not been looked at, in the order of their calls."""

    def __init__(self) -> None:
        self._pending: deque[Range] = deque()
        self._lock = threading.Lock()

    def add(self, found: Range) -> None:
        """Keep a range for later."""
        with self._lock:
            self._pending.append(found)

    def raise_arrived(self) -> None:
        """Raise for the first bad range that has arrived; never waits."""
        with self._lock:
            while self._pending and self._pending[0].arrived():
                check_range(*self._pending.popleft().values(), " in an earlier call")


_later = LaterChecks()


def check_prior_values(prior: Tensor, *, wait: bool = True) -> None:
    """Raise unless ``prior`` is finite and non-negative.

    Args:
        wait: on a GPU, whether to wait for it; if not, a bad prior raises in a later call (:func:`raise_arrived`).

    Not while a CUDA graph is captured, nor where there are no values to read (``torch.compile``): the operator sees
    them later.
    """
    if _cannot_look() or prior.numel() == 0:
        return
    raise_arrived()
    if prior.device.type == "cuda" and not wait:
        _later.add(DeviceRange(prior))
    else:
        low, high = prior.detach().aminmax()
        check_range(low.item(), high.item())


def raise_arrived() -> None:
    """Raise for a bad prior of an earlier call whose values have arrived by now; never waits."""
    if not _cannot_look():
        _later.raise_arrived()


def _cannot_look() -> bool:
    """While a graph is traced or captured; even to ask whether something has arrived would spoil a capture."""
    return torch.compiler.is_compiling() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
