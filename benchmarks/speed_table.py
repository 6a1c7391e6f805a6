"""The table by which "auto" and "composed" choose on a GPU, from the records of `gpu.py --slice machine libraries`.

    python benchmarks/speed_table.py                         # benchmarks/results/gpu into the library's own table
    python benchmarks/speed_table.py --records FOLDER --dry-run

Rows of the GPUs on record replace those of the same architecture and the others stay. A library counts where the gate's
rows on it are green, and comes before the fused kernels where its median is at least 2 % less, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_suite.records import NAME, identity, read

RESULTS = Path(__file__).parent / "results" / "gpu"
TABLE = Path(__file__).parents[1] / "sar_fast" / "backends" / "providers" / "speed.json"
DIRECTIONS = {"libraries": "forward", "libraries, forward+backward": "training"}
LEAST_GAIN = 0.02  # of a library over the fused kernels, which are this project's to tune

Record = dict[str, Any]


def rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Rows of the table, of the newest code on record for each GPU.

    Raises:
        ValueError: figures of a GPU whose architecture no record tells.
    """
    latest = {(r["gpu"], r["key"], *identity(r)): r for r in records}
    newest = {r["gpu"]: r["key"] for r in latest.values()}
    kept = [r for r in latest.values() if r["key"] == newest[r["gpu"]]]
    archs = {r["gpu"]: r["arch"] for r in kept if r["kernel"] == "machine" and "arch" in r}
    red = {(r["gpu"], r["provider"]) for r in kept if r["kernel"] == "gate" and ("error" in r or r.get("failures"))}
    found: dict[tuple, list[tuple[float, str]]] = defaultdict(list)
    for r in kept:
        if (
            r["kernel"] == "attention"
            and r["mode"] in DIRECTIONS
            and "p50" in r
            and (r["gpu"], r["provider"]) not in red
        ):
            if r["gpu"] not in archs:
                raise ValueError(f'{r["gpu"]}: no record of the slice "machine" tells its architecture; run that too')
            name = r["provider"].removeprefix("sar-")
            time = r["p50"] * (1 - LEAST_GAIN if name == "triton" else 1)
            found[archs[r["gpu"]], DIRECTIONS[r["mode"]], r["shape"]["D"], r["shape"]["N"]].append((time, name))
    keys = ("arch", "direction", "head_dim", "length")
    return [
        {**dict(zip(keys, at)), "order": [name for _, name in sorted(times)]} for at, times in sorted(found.items())
    ]


def merged(table: dict[str, Any], new: list[dict[str, Any]], source: str) -> dict[str, Any]:
    """The table with rows of the architectures that ``new`` speaks of replaced."""
    archs = {row["arch"] for row in new}
    return {"source": source, "rows": [*(r for r in table["rows"] if r["arch"] not in archs), *new]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--records", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results/gpu")
    add("--out", type=Path, default=TABLE, metavar="FILE", help="default: the library's own table")
    add("--dry-run", action="store_true", help="print the table, write nothing")
    arguments = parser.parse_args(argv)
    path = arguments.records / NAME
    if not path.is_file():
        parser.error(f"--records: {path} is not there; `python benchmarks/gpu.py --slice machine libraries` makes it")
    try:
        new = rows(read(path))
    except ValueError as error:
        parser.error(f"--records: {error}")
    if not new:
        parser.error(f'--records: {path} has no figure of the slice "libraries" whose gate is green')
    gpus = ", ".join(sorted({r["gpu"] for r in read(path)}))
    table = merged(json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"rows": []}, new, gpus)
    text = json.dumps(table, indent=1) + "\n"
    if arguments.dry_run:
        print(text, end="")
        return 0
    part = arguments.out.with_suffix(".part")
    part.write_text(text)
    os.replace(part, arguments.out)
    print(f"{len(new)} rows into {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
