"""Measurements as lines of JSON, and what a run knows from earlier ones. Imports no torch."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NAME = "records.jsonl"
ABOUT = ("gpu", "key", "driver", "cuda", "commit", "versions")  # what every record of a run carries
Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The records of a file; none if it does not exist. A last line that was cut off is left out."""
    if not path.is_file():
        return []
    found, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number + 1 < len(lines):
                raise ValueError(f"{path}, line {number + 1}: not JSON ({error}); mend or remove the line") from error
    return found


def merge(sources: Iterable[Path], into: Path) -> int:
    """Append the records that ``into`` lacks; returns how many."""
    there = {json.dumps(r, sort_keys=True) for r in read(into)}
    new = [r for source in sources for r in read(source) if json.dumps(r, sort_keys=True) not in there]
    into.parent.mkdir(parents=True, exist_ok=True)
    with into.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in new)
    return len(new)


class Records:
    """One file that is written, and what is known: its records and those of other files, of the same GPU and code."""

    def __init__(self, path: Path, about: Mapping[str, Any], known: Iterable[Path] = ()) -> None:
        """about: what every record carries; its ``gpu`` and ``key`` say which earlier records count."""
        self.path, self.about = path, dict(about)
        same = lambda r: (r.get("gpu"), r.get("key")) == (about["gpu"], about["key"])
        earlier = [r for source in dict.fromkeys([*known, path]) for r in read(source) if same(r)]
        self.latest = {identity(r): r for r in earlier}

    def all(self) -> list[Record]:
        """The last record of everything that was tried."""
        return list(self.latest.values())

    def find(self, kernel: str, mode: str, shape: Mapping[str, Any], provider: str) -> Record | None:
        return self.latest.get((kernel, mode, provider, json.dumps(dict(shape), sort_keys=True)))

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
        """Append one measurement: the quantiles of its samples."""
        self._write(
            kernel, provider, mode, shape, {"metric": metric, **quantiles(values), "samples": len(values), **more}
        )

    def fail(self, kernel: str, provider: str, mode: str, shape: Mapping[str, Any], error: str, **more: Any) -> None:
        """Append that something was tried and gave no figure, and why."""
        self._write(kernel, provider, mode, shape, {"error": error, **more})

    def note(self, kernel: str, provider: str, mode: str, shape: Mapping[str, Any], **facts: Any) -> None:
        """Append facts that are no measurement."""
        self._write(kernel, provider, mode, shape, facts)

    def _write(self, kernel: str, provider: str, mode: str, shape: Mapping[str, Any], facts: Record) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        head = {"kernel": kernel, "provider": provider, "mode": mode, "shape": dict(shape)}
        record = {**head, **facts, **self.about, "time": now}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.latest[identity(record)] = record
        print(line_of(record), flush=True)


def identity(record: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """What was tried: the same again replaces it."""
    return record["kernel"], record["mode"], record["provider"], json.dumps(record["shape"], sort_keys=True)


def line_of(record: Mapping[str, Any]) -> str:
    """A record as one line of the log."""
    at = " ".join(f"{k}={v}" for k, v in record["shape"].items())
    head = f"{record['kernel']:>9} {record['mode']:>16} {record['provider']:>24}"
    if "error" in record:
        return f"{head}  {'-':>10}  {at}  {record['error'].splitlines()[0][:160]}"
    if "p50" in record:
        extra = (k for k in ("tflops", "terabytes_per_second", "peak_extra_bytes") if record.get(k) is not None)
        return (
            f"{head}  {record['p50']:10.4f} {record['metric']}  {at}  {' '.join(f'{k}={record[k]:.4g}' for k in extra)}"
        )
    known = {"kernel", "provider", "mode", "shape", "time", "failures", *ABOUT}
    facts = " ".join(f"{k}={v}" for k, v in record.items() if k not in known and not isinstance(v, dict | list))
    return f"{head}  {at}  {facts[:160]}"


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    if len(values) < 2:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": statistics.median(values), "p80": cuts[7]}
