"""A folder of results: records appended as they come, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

METADATA = "run_metadata.json"
SAMPLES = "samples.jsonl"
RESULTS = "all_results.json"
PARTS = "parts"
ADVICE = "choose another folder, or give --overwrite_output_dir"


class ResultFolder:
    """``output_dir`` of one evaluation.

    While it runs every process appends to a file of its own in ``parts/``; :meth:`merge` makes ``samples.jsonl`` of
    them, in the order of the samples. ``run_metadata.json`` has the settings that the records depend on, and the
    sessions that made them.

    Args:
        path: the folder; made if it is not there.
        settings: plain values that change the records. A folder with other settings is an error.
        overwrite: delete what an earlier evaluation left there.

    Raises:
        ValueError: the folder holds results of other settings, or results without settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        if path.exists() and not path.is_dir():
            raise ValueError(f"output_dir {path} is a file, needed a folder")
        self.overwrite = overwrite
        self.sessions: list[dict[str, Any]] = []
        if not overwrite:
            self._check()

    def _check(self) -> None:
        metadata = self.path / METADATA
        if not metadata.is_file():
            left = [name for name in (SAMPLES, RESULTS, PARTS) if (self.path / name).exists()]
            if left:
                raise ValueError(f"output_dir {self.path} holds {', '.join(left)} but no {METADATA}: {ADVICE}")
            return
        stored = read_json(metadata)
        differing = differences(stored.get("settings", {}), self.settings)
        if differing:
            raise ValueError(
                f"output_dir {self.path} holds results of other settings: {'; '.join(differing)}; {ADVICE}"
            )
        self.sessions = stored["sessions"]

    def prepare(self) -> None:
        """One process makes the folder, and empties it of results if they are to be overwritten."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.overwrite:
            for name in (SAMPLES, RESULTS, METADATA):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / PARTS, ignore_errors=True)
        (self.path / PARTS).mkdir(exist_ok=True)

    def records(self) -> dict[str, dict[str, Any]]:
        """Records so far, by key. A line that a killed process left unfinished does not count."""
        files = [self.path / SAMPLES, *sorted((self.path / PARTS).glob("*.jsonl"))]
        found: dict[str, dict[str, Any]] = {}
        for file in files:
            for record in read_lines(file) if file.is_file() else ():
                found[record["key"]] = record
        return found

    def open_part(self, process: int) -> Part:
        """Where this process appends."""
        return Part(self.path / PARTS / f"{process:05d}.jsonl")

    def write_session(self, session: Mapping[str, Any]) -> None:
        """Metadata with this session as the last one."""
        write_json(self.path / METADATA, {"settings": self.settings, "sessions": [*self.sessions, dict(session)]})

    def merge(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Final records, in their order, in place of the parts."""
        write_text(self.path / SAMPLES, "".join(to_line(record) for record in records))
        shutil.rmtree(self.path / PARTS)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """``all_results.json``."""
        write_json(self.path / RESULTS, results)


class Part:
    """Appends records to a file; what a killed process left unfinished at its end is cut off first."""

    def __init__(self, path: Path) -> None:
        if path.is_file():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                path.write_bytes(whole)
        self._file = path.open("a", encoding="utf-8")

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Records of one batch, in one write."""
        self._file.write("".join(to_line(record) for record in records))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``name was X, now Y`` for every value that differs, names of inner values dotted."""
    found = []
    for name in sorted({*stored, *asked}):
        old, new = stored.get(name), asked.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {json.dumps(old)}, now {json.dumps(new)}")
    return found


def to_line(record: Mapping[str, Any]) -> str:
    """One line of JSON; NaN and infinity are errors, since readers differ on them."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file, less an unfinished last line; ``ValueError`` names a broken one."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}; delete it to answer it again") from error
    return records


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ``ValueError`` names the file if it is not one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
