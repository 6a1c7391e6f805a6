"""Runs slices in worker processes: ends one that hangs, goes on after one that dies, and never begins what cannot end.

Imports neither torch nor Triton, so that it starts at once and no error of a GPU reaches it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_suite.keys import ROOT, code_key
from gpu_suite.machine import REHEARSAL, nvidia_smi
from gpu_suite.records import ABOUT, NAME, Record, Records, read
from gpu_suite.slices import Slice

MARK = "@@"
GRACE = 25.0  # seconds beyond a slice's budget after which its worker is taken for hung
START = 60.0  # seconds in which a worker must begin its first slice


@dataclasses.dataclass
class Runner:
    """One call of the suite: where results go, what is known, and until when it may run."""

    out: Path
    known: Sequence[Path] = ()
    until: float = float("inf")
    rehearse: bool = False
    retry_before: str = ""
    cache: Path | None = None
    path: Sequence[Path] = ()  # further folders that workers import from
    grace: float = GRACE

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = (self.out / "log.txt").open("a", encoding="utf-8")

    def environment(self) -> dict[str, str]:
        """Everything runs from the checkout; nothing need be installed."""
        folders = [*map(str, self.path), str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
        folders += filter(None, [os.environ.get("PYTHONPATH")])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1"}
        if self.cache is not None:
            env["TRITON_CACHE_DIR"] = str(self.cache)
        if self.rehearse:
            env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        else:
            env.pop("TRITON_INTERPRET", None)
        return env

    def run(self, slices: Sequence[Slice], compiled: Path | None = None) -> None:
        """All slices, in order, in as few workers as it takes."""
        rest, deaths = list(slices), 0
        while rest:
            ended, lost = self._worker(rest, compiled)
            names = {e["slice"] for e in ended if e["status"] != "lost"}
            rest = [s for s in rest if s.name not in names]
            if not lost:
                return
            deaths = 0 if names else deaths + 1
            if deaths > 20:  # each time something else: what was tried is on record and is not tried again
                self.say(f"giving up on {rest[0].name}: its worker died {deaths} times")
                rest, deaths = rest[1:], 0

    def _worker(self, slices: Sequence[Slice], compiled: Path | None) -> tuple[list[dict], bool]:
        """(how slices ended, whether the worker died before its last one)."""
        argv = [
            sys.executable,
            "-m",
            "gpu_suite.worker",
            "--slices",
            json.dumps([dataclasses.asdict(s) for s in slices]),
        ]
        argv += ["--out", str(self.out.resolve()), "--until", repr(self.until)]
        argv += ["--known", *(str(p.resolve()) for p in self.known)]
        argv += ["--compiled", str(compiled)] if compiled is not None else []
        argv += ["--rehearse"] * self.rehearse
        argv += ["--retry-before", self.retry_before] if self.retry_before else []
        process = subprocess.Popen(
            argv, cwd=ROOT, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        budgets = {s.name: s.seconds for s in slices}
        ended: list[dict] = []
        current, trying = None, None
        limit = time.time() + START + (600 if compiled is not None else 0)
        for line in _lines(process):
            if line is not None and line.startswith(MARK):
                what, _, text = line[len(MARK) :].partition(" ")
                value = json.loads(text)
                if what == "begin":
                    current, trying = value["slice"], None
                    limit = time.time() + budgets[current] + self.grace
                    self.say(f"-- {current}: {budgets[current]} s")
                elif what == "trying":
                    trying = value
                else:
                    ended.append(value)
                    self.say(f"-- {value['slice']}: {value['status']} after {value['seconds']} s")
                    current, trying, limit = None, None, time.time() + START + (600 if compiled is not None else 0)
            elif line is not None:
                self.say(line)
            if time.time() > min(limit, self.until + self.grace):
                _kill(process)
                self._died(current, trying, "did not end by itself and was killed")
                return [*ended, *_as_ended(current, trying)], time.time() < self.until
        status = process.wait()
        if status == 0:
            return ended, False
        if not (ended and ended[-1]["status"] == "lost"):
            self._died(current, trying, f"its process died with exit status {status}")
            ended += _as_ended(current, trying)
        return ended, True

    def _died(self, current: str | None, trying: dict[str, Any] | None, how: str) -> None:
        """What was being tried becomes a record, so that the next worker does not die of it again."""
        self.say(f"-- {current or 'start'}: {how}")
        records = Records(self.out / NAME, self._about(), self.known)
        if trying is not None:
            for provider in trying["providers"]:
                at = (trying["kernel"], provider, trying["mode"], trying["shape"])
                known = records.find(at[0], at[2], at[3], provider)
                if known is None or "error" not in known:
                    records.fail(*at, f"while it was tried the run {how}")
        if current is not None:
            records.note("slice", current, "run", {}, status=how)

    def _about(self) -> Record:
        """As the worker's records; from its own, if it wrote any."""
        kept = [r for r in read(self.out / NAME) if r.get("key") == code_key()]
        if kept:
            return {n: kept[-1].get(n) for n in ABOUT}
        return {**dict.fromkeys(ABOUT), "gpu": gpu_name(self.rehearse), "key": code_key()}

    def say(self, line: str) -> None:
        """Print and keep."""
        print(line, flush=True)
        print(line, file=self.log, flush=True)


def gpu_name(rehearse: bool) -> str | None:
    """The name that this machine's records carry; None where there is no GPU."""
    return REHEARSAL if rehearse else nvidia_smi().get("name")


def _as_ended(current: str | None, trying: dict | None) -> list[dict]:
    """A slice that died without a trace is over; one of which the culprit is known goes on without it."""
    return [] if current is None or trying is not None else [{"slice": current, "status": "died", "seconds": 0}]


def _lines(process: subprocess.Popen) -> Iterator[str | None]:
    """The process's lines as they come, and None at least every second."""
    found: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        for line in process.stdout:
            found.put(line.rstrip("\n"))
        found.put(None)

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    while thread.is_alive() or not found.empty():
        try:
            line = found.get(timeout=1.0)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
