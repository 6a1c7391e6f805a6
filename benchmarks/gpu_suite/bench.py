"""What every slice is given: a device, the records, its deadline, and one way to measure."""

from __future__ import annotations

import functools
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpu_suite.device import Call, Cuda, Rehearsal
from gpu_suite.inputs import Shape
from gpu_suite.records import Records

MARK = "@@"  # lines of a worker that speak to the process that started it


class OutOfTime(Exception):
    """The slice's budget is spent; what is missing stays missing."""


class DeviceLost(Exception):
    """Nothing more can run on the GPU in this process."""


def tell(what: str, value: Any) -> None:
    """Say something to the process that started this one."""
    print(f"{MARK}{what} {json.dumps(value)}", flush=True)


@dataclass
class Bench:
    """One worker's view of a slice. Whatever a provider raises becomes its record, and the others go on."""

    device: Cuda | Rehearsal
    records: Records
    out: Path
    until: float = float("inf")  # time.time() at which the slice ends
    gated: bool = True
    retry_before: str = ""  # errors on record that are older than this are tried again
    failed: list[str] = field(default_factory=list)

    @property
    def tiny(self) -> bool:
        return self.device.tiny

    @property
    def dtype(self) -> torch.dtype:
        return self.device.dtype

    def left(self) -> float:
        """Seconds left to the slice."""
        return self.until - time.time()

    def check_time(self) -> None:
        if self.left() <= 0:
            raise OutOfTime

    def missing(self, kernel: str, mode: str, shape: Shape, providers: Any) -> list[str]:
        """Providers to be measured: all that have not failed before, if one of them has no figure; else none."""
        known = {p: self.records.find(kernel, mode, shape, p) for p in providers}
        again = lambda r: r is None or ("error" in r and r["time"] < self.retry_before)
        wanted = [p for p, r in known.items() if again(r) or "error" not in r]
        return wanted if any(again(known[p]) for p in wanted) else []

    def trying(self, kernel: str, mode: str, shape: Shape, providers: list[str]) -> None:
        """Note what is about to run, so that it is a record even if this process dies of it."""
        tell("trying", {"kernel": kernel, "mode": mode, "shape": shape, "providers": providers})

    def attempt(self, kernel: str, provider: str, mode: str, shape: Shape, call: Callable[[], Any]) -> Any:
        """The call's result, or None with its error on record; a lost device ends the worker."""
        try:
            return call()
        except OutOfTime:
            raise
        except Exception as error:  # a provider may raise anything
            traceback.print_exc()
            self.records.fail(kernel, provider, mode, shape, f"{type(error).__name__}: {error}"[:2000])
            self.failed.append(provider)
            error.__traceback__ = None  # its frames hold tensors
            self.device.release()
            if self.device.lost():
                raise DeviceLost(f"{kernel} {mode} {provider}") from None
            return None

    def measure(
        self,
        kernel: str,
        mode: str,
        shape: Shape,
        makers: Mapping[str, Callable[[], Call]],
        *,
        seconds: float = 0.05,
        rounds: int = 3,
        memory: bool = False,
        rates: Callable[[float], dict[str, float]] = lambda milliseconds: {},
        **more: Any,
    ) -> None:
        """Time providers on one shape in turns, so that a slow spell hits all alike; a shape as a whole or not at all.

        Args:
            makers: per provider a function that makes its call.
            seconds: per provider and round.
            rates: figures that follow from the median milliseconds.
        """
        wanted = self.missing(kernel, mode, shape, makers)
        if not wanted:
            return
        self.check_time()
        self.trying(kernel, mode, shape, wanted)
        at = lambda provider: (kernel, provider, mode, shape)
        calls = {}
        for name in wanted:
            reason = self.withheld(name, mode, shape)
            if reason is not None:
                self.records.fail(*at(name), reason, withheld=True)
            else:
                calls[name] = self.attempt(*at(name), makers[name])
        calls = {name: call for name, call in calls.items() if call is not None}
        for name, times in self._take_turns(calls, at, 1 if self.tiny else rounds, seconds).items():
            facts = rates(sorted(times)[len(times) // 2]) | more
            if memory:
                peak = functools.partial(self.device.peak_extra_bytes, calls[name])
                facts["peak_extra_bytes"] = self.attempt(*at(name), peak)
            if self.gated and ours(name) and not self._gate_rows(name, mode, shape):
                facts["gate"] = "missing"
            self.records.add(kernel, name, mode, "ms", shape, times, **facts)
        calls.clear()
        self.device.release()

    def _take_turns(
        self, calls: Mapping[str, Call], at: Callable[[str], tuple], rounds: int, seconds: float
    ) -> dict[str, list[float]]:
        """Samples of every call that did not fail."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name in list(times):
                timed = functools.partial(self.device.times, calls[name], seconds)
                found = self.attempt(*at(name), timed)
                if found is None:
                    del times[name]
                else:
                    times[name] += found
        return times

    def withheld(self, provider: str, mode: str, shape: Shape) -> str | None:
        """Why a provider's speed is not measured: a red row of the gate at this head dim; None if there is none."""
        if not (self.gated and ours(provider)):
            return None
        red = [r for r in self._gate_rows(provider, mode, shape) if r.get("failures") or "error" in r]
        if not red:
            return None
        row = red[0]
        what = row.get("error") or row["failures"][0]
        return f"withheld: the gate is red ({row['provider']} {row['mode']} {row['shape']}: {what})"

    def _gate_rows(self, provider: str, mode: str, shape: Shape) -> list[dict]:
        """The gate's rows that a figure rests on."""
        if "model" in shape:
            names, modes, head_dim = {"sar-triton"}, {"forward", "constant", "through", "decode"}, 128
        else:
            backend = provider.removesuffix(" through").removesuffix(" launches")
            fused = backend.startswith("sar") and "composed" not in backend
            names = {"sar-triton"} if fused else {backend}
            modes, head_dim = {"forward"}, shape["D"]
            if mode == "decode":
                modes = {"decode"}
            elif "backward" in mode:
                modes |= {"through" if "through" in provider else "constant"}
        rows = (r for r in self.records.all() if r["kernel"] == "gate")
        return [
            r
            for r in rows
            if r["mode"] in modes and r["shape"]["D"] == head_dim and (r["provider"] in names or mode == "decode")
        ]


def ours(provider: str) -> bool:
    """Whether a provider runs our kernels, which the gate speaks of."""
    return provider.startswith(("sar", "plain")) and (":" in provider or "composed" not in provider)
