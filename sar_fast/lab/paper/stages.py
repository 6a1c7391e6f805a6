"""What a stage of the paper left behind, and whether it is still what is asked for."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.run.results import read_json, write_json
from sar_fast.lab.run.run_metadata import commit

STAGES = "stages"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command, and what it gave; ``seconds`` are those of all its sessions."""

    title: str
    command: str
    seconds: float
    results: dict[str, Any]
    commit: str | None


def run_stage(
    out: Path,
    title: str,
    command: str,
    folder: Path,
    depends: Mapping[str, Any],
    products: Sequence[str],
    call: Callable[[], Mapping[str, Any]],
) -> Stage:
    """The results of a stage: those it left in ``out/stages``, or those of running it.

    Args:
        folder: where the stage works. It is emptied if what it depends on has changed, and else continued.
        depends: plain values that the results depend on, by names that a reader knows.
        products: files in ``folder`` without which the stage is not finished.
        call: runs it.

    ``ValueError`` if ``folder`` holds files that no such stage made.
    """
    path = out / STAGES / f"{re.sub('[^a-z0-9]+', '_', title.lower())}.json"
    depends = json.loads(json.dumps(depends))
    known = read_json(path) if path.is_file() else {}
    changed = [name for name, value in depends.items() if known and known["depends"].get(name) != value]
    if not changed and "results" in known and all((folder / name).is_file() for name in products):
        say(f"{title}: kept")
        return Stage(title, command, known["seconds"], known["results"], known["commit"])
    if not known and folder.is_dir() and any(folder.iterdir()):
        raise ArgumentError(
            "output_dir",
            f"{folder}, which holds files that this command did not make",
            "be another folder",
        )
    if changed:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"{title}: again, other {', '.join(changed)}" if changed else title)
    record = {"depends": depends, "seconds": 0.0 if changed else known.get("seconds", 0.0)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)  # from here on the folder is known to be this stage's
    began = time.time()
    try:
        results = json.loads(json.dumps(call()))
    finally:
        record["seconds"] += time.time() - began
        write_json(path, record)
    write_json(path, {**record, "commit": commit(), "results": results})
    return Stage(title, command, record["seconds"], results, commit())


def say(words: str) -> None:
    """One line of progress."""
    sys.stderr.write(f"-- {words}\n")
    sys.stderr.flush()
