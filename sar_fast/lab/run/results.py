"""A folder of results: records appended as they come, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sar_fast.base import json_text
from sar_fast.base.errors import ArgumentError

METADATA = "run_metadata.json"
SAMPLES = "samples.jsonl"
RESULTS = "all_results.json"
PARTS = "parts"
ANOTHER = "choose another folder"
ADVICE = f"{ANOTHER}, or give {{overwrite}}"


class FolderInUse(ArgumentError):
    """A folder of results that holds something else: "folder out holds ...; choose another folder"."""

    def worded(self, names: Mapping[str, str]) -> str:
        advice = self.needed.replace("{overwrite}", names.get("overwrite", "overwrite=True"))
        return f"{names.get(self.argument, self.argument)} {self.came}; {advice}"


class ResultFolder:
    """The folder of one evaluation.

    While it runs every process appends to a file of its own in ``parts/``; :meth:`merge` makes ``samples.jsonl`` of
    them, in the order of the samples. ``run_metadata.json`` has the settings that the records depend on, and the
    sessions that made them.

    Args:
        path: the folder; made if it is not there.
        settings: plain values that change the records. A folder with records of other settings is an error.
        overwrite: delete what an earlier evaluation left there.
        products: files in it that overwriting deletes too, as glob patterns.
        work: a file in it that counts as records once it has a byte that is not zero.

    Nothing is written before :meth:`prepare`.

    Raises:
        FolderInUse: the folder holds results of other settings, or results without settings.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        overwrite: bool = False,
        products: Sequence[str] = (),
        work: str | None = None,
    ) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        if path.exists() and not path.is_dir():
            raise FolderInUse("folder", f"{path} is a file", ANOTHER)
        self.products, self.work = products, work
        self.sessions: list[dict[str, Any]] = []
        self._refuse_foreign_metadata()
        self._stale = overwrite or not self._continues()

    def _refuse_foreign_metadata(self) -> None:
        """:class:`FolderInUse` if the metadata are not an evaluation's: a training's are not replaced."""
        metadata = self.path / METADATA
        if metadata.is_file() and not {"settings", "sessions"} <= read_json(metadata).keys():
            raise FolderInUse("folder", f"{self.path} holds a {METADATA} that is not that of an evaluation", ANOTHER)

    def _continues(self) -> bool:
        """Whether what lies there is of these settings; False if it counts as nothing, an error if it is of others."""
        metadata = self.path / METADATA
        if not metadata.is_file():
            parts = self.path / PARTS
            left = [name for name in (SAMPLES, RESULTS) if _has_bytes(self.path / name)]
            left += [PARTS] if parts.is_dir() and any(parts.iterdir()) else []
            if left:
                raise FolderInUse("folder", f"{self.path} holds {', '.join(left)} but no {METADATA}", ADVICE)
            return False
        stored = read_json(metadata)
        differing = differences(stored["settings"], self.settings)
        if differing and self._used():
            came = f"{self.path} holds results of other settings: {'; '.join(differing)}"
            raise FolderInUse("folder", came, ADVICE)
        if not differing:
            self.sessions = stored["sessions"]
        return not differing

    def _used(self) -> bool:
        """Whether an earlier run left anything that was computed; one that failed or was killed at once did not."""
        work = self.work is not None and (self.path / self.work).is_file() and (self.path / self.work).read_bytes()
        return bool(self._read()) or _has_bytes(self.path / RESULTS) or bool(work and any(work))

    def prepare(self) -> None:
        """One process makes the folder, and empties it of what is overwritten or of other settings."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self._stale:
            for name in (SAMPLES, RESULTS, METADATA):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / PARTS, ignore_errors=True)
            for pattern in self.products:
                for file in self.path.glob(pattern):
                    file.unlink()
        (self.path / PARTS).mkdir(exist_ok=True)

    def begin(self) -> None:
        """Every process, once the folder is prepared: what lies there is of these settings."""
        self._stale = False

    def records(self) -> dict[str, dict[str, Any]]:
        """Records so far, by key. A line that a killed process left unfinished does not count."""
        return {} if self._stale else self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
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


def _has_bytes(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


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
    write_text(path, json_text.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
