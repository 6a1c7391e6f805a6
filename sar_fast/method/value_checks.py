"""Looks at values that callers bring, priors and head weights: at once on a CPU, on a GPU without waiting for it.

A GPU's answer travels to the host behind the work that is already queued. A bad value is then a ``ValueError`` of the
next call whose turn comes after it has arrived; until then NaN stays NaN, and the kernels make the output of a negative
prior NaN, so that no result of it passes for a good one.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError
from sar_fast.method.tracing import capturing


class Range(Protocol):
    """Least and largest value of a tensor, perhaps still on their way."""

    def arrived(self) -> bool: ...

    def values(self) -> tuple[float, float]: ...


class DeviceRange:
    """The range of a tensor on a GPU, copied to pinned memory on the current stream."""

    def __init__(self, x: Tensor) -> None:
        found = torch.stack(x.detach().aminmax())  # NaN among the values makes both NaN
        self._host = torch.empty(2, dtype=found.dtype, pin_memory=True)
        self._host.copy_(found, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def arrived(self) -> bool:
        return self._event.query()

    def values(self) -> tuple[float, float]:
        low, high = self._host.tolist()
        return low, high


Check = Callable[[float, float, str], None]  # (least, largest, when): raises


def check_prior_range(low: float, high: float, when: str = "") -> None:
    """Raise unless 0 <= low and high is finite; NaN fails both."""
    if not (low >= 0 and high < float("inf")):
        raise ArgumentError("prior", f"values from {low} to {high}{when}", "be finite and non-negative")


def check_weights_range(low: float, high: float, when: str = "", *, rule: str) -> None:
    """Raise unless both are finite."""
    if not (low > -float("inf") and high < float("inf")):
        raise ArgumentError("weighting", f"values from {low} to {high}{when} of {rule}", "return finite weights")


def _check_all(low: float, high: float, when: str = "", *, error: str) -> None:
    """Raise unless all flags are 1."""
    if low < 1:
        raise ValueError(f"{error}{when}")


class LaterChecks:
    """Ranges that have not been looked at, in the order of their calls."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Range, Check]] = deque()
        self._lock = threading.Lock()

    def add(self, found: Range, check: Check = check_prior_range) -> None:
        """Keep a range for later."""
        with self._lock:
            self._pending.append((found, check))

    def raise_arrived(self) -> None:
        """Raise for the first bad range that has arrived; never waits."""
        with self._lock:
            while self._pending and self._pending[0][0].arrived():
                found, check = self._pending.popleft()
                check(*found.values(), " in an earlier call")


_later = LaterChecks()


def check_prior_values(prior: Tensor, *, wait: bool = True) -> None:
    """Raise unless ``prior`` is finite and non-negative.

    Args:
        wait: on a GPU, whether to wait for it; if not, a bad prior raises in a later call (:func:`raise_arrived`).

    Not while a CUDA graph is captured, nor where there are no values to read (``torch.compile``): the operator sees
    them later.
    """
    _check(prior, check_prior_range, wait=wait)


def check_weight_values(c: Tensor, rule: str) -> None:
    """Raise unless a rule's weights are finite; of a GPU in a later call. ``rule``: its name, and the layer's."""
    _check(c, functools.partial(check_weights_range, rule=rule), wait=False)


def check_holds(flag: Tensor, error: str) -> None:
    """Raise ``error`` unless a bool tensor is True; of a GPU in a later call."""
    _check(flag.float(), functools.partial(_check_all, error=error), wait=False)


def _check(x: Tensor, check: Check, *, wait: bool) -> None:
    if _cannot_look() or x.numel() == 0:
        return
    raise_arrived()
    if x.device.type == "cuda" and not wait:
        _later.add(DeviceRange(x), check)
    else:
        low, high = x.detach().aminmax()
        check(low.item(), high.item(), "")


def raise_arrived() -> None:
    """Raise for a bad value of an earlier call that has arrived by now; never waits."""
    if not _cannot_look():
        _later.raise_arrived()


def _cannot_look() -> bool:
    """While a graph is traced or captured; even to ask whether something has arrived would spoil a capture."""
    return torch.compiler.is_compiling() or capturing()
