"""The process in which slices run. Started by `gpu_suite.run`, which reads what it prints and ends it if it hangs.

It exits with ``LOST`` when an error has left the GPU unusable to it: what was tried is on record, and another worker
goes on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from pathlib import Path

LOST = 75
LEAST_SECONDS = 5.0  # a slice with less left to it is not begun


class Compilations:
    """Counts what Triton compiles while a slice runs: kernels that the cache did not serve cost its time."""

    def __init__(self) -> None:
        self.hits, self.misses = 0, []
        import triton

        triton.knobs.compilation.listener = self

    def __call__(self, *, src, cache_hit: bool, **_: object) -> None:
        if cache_hit:
            self.hits += 1
        else:
            self.misses.append(getattr(src, "name", None) or src.fn.__name__)

    def take(self) -> dict[str, object]:
        """What was counted since the last time."""
        found = {"cached": self.hits, "compiled": len(self.misses), "misses": sorted(set(self.misses))}
        self.hits, self.misses = 0, []
        return found


def wait_for(marker: Path | None, until: float) -> float:
    """Seconds waited for a file that says that compiling is done; not beyond ``until``."""
    began = time.time()
    while marker is not None and not marker.exists() and time.time() < until:
        time.sleep(0.1)
    return time.time() - began


def run_slice(piece: dict, bench, compilations: Compilations) -> str:
    """One slice to its end, its deadline or its error; returns how it ended."""
    from gpu_suite.bench import DeviceLost, OutOfTime

    module, name = piece["where"].split(":")
    try:
        getattr(importlib.import_module(module), name)(bench)
        return "done"
    except OutOfTime:
        return "out of time"
    except DeviceLost as error:
        print(f"the GPU is lost to this process after {error}", flush=True)
        return "lost"
    except Exception as error:  # a fault of the slice itself: it must not end the others
        traceback.print_exc()
        return f"error: {type(error).__name__}: {error}"[:500]
    finally:
        found = compilations.take()
        if found["cached"] or found["compiled"]:
            print(
                f"kernels: {found['cached']} from the cache, {found['compiled']} compiled {found['misses']}", flush=True
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=json.loads, required=True, help="JSON: name, where, seconds, kernels, gated")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--known", type=Path, nargs="*", default=[])
    parser.add_argument("--until", type=float, default=float("inf"), help="time at which the last slice ends")
    parser.add_argument("--compiled", type=Path, help="file that appears when the kernels are compiled")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--retry-before", default="", help="try errors on record again that are older, ISO 8601")
    arguments = parser.parse_args(argv)

    from gpu_suite.bench import Bench, tell
    from gpu_suite.device import Cuda, Rehearsal
    from gpu_suite.machine import about
    from gpu_suite.records import NAME, Records

    records = Records(arguments.out / NAME, about(arguments.rehearse), arguments.known)
    bench = Bench(
        Rehearsal() if arguments.rehearse else Cuda(), records, arguments.out, retry_before=arguments.retry_before
    )
    compilations = Compilations()
    for piece in arguments.slices:
        if piece["kernels"]:
            waited = wait_for(arguments.compiled, arguments.until - LEAST_SECONDS)
            if waited > 1:
                print(f"waited {waited:.0f} s for kernels to be compiled", flush=True)
        if arguments.until - time.time() < LEAST_SECONDS:
            tell("end", {"slice": piece["name"], "status": "not begun", "seconds": 0})
            continue
        began = time.time()
        bench.until, bench.gated = min(began + piece["seconds"], arguments.until), piece["gated"]
        tell("begin", {"slice": piece["name"]})
        status = run_slice(piece, bench, compilations)
        seconds = round(time.time() - began, 1)
        records.note("slice", piece["name"], "run", {}, status=status, seconds=seconds)
        tell("end", {"slice": piece["name"], "status": status, "seconds": seconds})
        if status == "lost":
            return LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
