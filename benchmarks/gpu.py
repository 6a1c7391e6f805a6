"""Every GPU figure of the project by one command, made for machines that are at hand for minutes.

    python benchmarks/gpu.py                            # what is missing, in the order that uses minutes best
    python benchmarks/gpu.py --budget 440 --out FOLDER  # ends by itself; results and log come as they are made
    python benchmarks/gpu.py --slice gate forward       # some slices
    python benchmarks/gpu.py --build-cache FOLDER       # on any CPU: compile everything beforehand, for another machine
    python benchmarks/gpu.py --merge FOLDER             # records of another machine into benchmarks/results/gpu
    python benchmarks/gpu.py --table                    # ratios against the goals, of what is on record
    python benchmarks/gpu.py --rehearse --out FOLDER    # every step on a CPU, tiny; its figures mean nothing

A slice is ended by its own budget and goes on in the next run, on this machine or another: what is on record for the
same GPU and the same code (kernels, backends, the way of measuring) is not measured again. A provider that fails is a
record with its error. Where the gate is red, the speed that rests on it is withheld and the others go on.
benchmarks/README.md has the two calls that fill fifteen minutes.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from gpu_suite import precompile
from gpu_suite.goals import print_table
from gpu_suite.keys import ROOT, code_key
from gpu_suite.records import NAME, Records, merge, read
from gpu_suite.run import Runner, gpu_name
from gpu_suite.slices import BY_NAME, SLICES, Slice

RESULTS = Path(__file__).parent / "results" / "gpu"
CARRIED = ROOT / "results" / "gpu-carry"  # ignored by git; a pack made by --build-cache
CACHE = ROOT / "results" / "gpu-cache"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--slice",
        nargs="+",
        default=["next"],
        metavar="NAME",
        help=f"next (what is missing), or of {', '.join(BY_NAME)}",
    )
    add("--budget", type=float, metavar="SECONDS", help="the whole run ends by then; default: no limit")
    add("--out", type=Path, help="folder of records.jsonl, log.txt and the rest; default: benchmarks/results/gpu")
    add("--known", type=Path, nargs="+", default=[], metavar="FOLDER", help="folders whose records count too")
    add("--retry", action="store_true", help="try again what is on record with an error")
    add(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="processes that compile; default: cores - 1"
    )
    add("--cache", type=Path, default=CACHE, help="Triton's cache of this run; default: results/gpu-cache")
    add("--carry", type=Path, default=CARRIED, help="folder of a packed cache; default: results/gpu-carry")
    add("--arch", default="sm_90", help="architecture to compile for beforehand; default: sm_90")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--rehearse", action="store_true", help="every step on a CPU with tiny sizes; needs --out")
    what.add_argument("--build-cache", type=Path, metavar="FOLDER", help="compile and pack a cache; needs no GPU")
    what.add_argument("--merge", type=Path, nargs="+", metavar="FOLDER", help="append these records to --out's")
    what.add_argument("--table", action="store_true", help="measure nothing; print what is on record")
    arguments = parser.parse_args(argv)
    unknown = [n for n in arguments.slice if n not in BY_NAME and n != "next"]
    if unknown:
        parser.error(f"--slice: got {unknown[0]!r}, need next or some of {', '.join(BY_NAME)}")
    if "next" in arguments.slice and len(arguments.slice) > 1:
        parser.error(f"--slice: got {' '.join(arguments.slice)}, need next alone or names")
    if arguments.budget is not None and not arguments.budget > 0:
        parser.error(f"--budget: got {arguments.budget}, need a number of seconds > 0")
    if arguments.jobs < 1:
        parser.error(f"--jobs: got {arguments.jobs}, need 1 or more")
    if arguments.rehearse and arguments.out is None:
        parser.error("--rehearse needs --out FOLDER: its figures mean nothing and do not belong among the others")
    for folder in (*arguments.known, *(arguments.merge or ())):
        if not folder.is_dir():
            parser.error(f"no such folder: {folder}")
    arguments.out = arguments.out or RESULTS
    return arguments


def chosen(names: Sequence[str], records: Records) -> list[Slice]:
    """The slices to run, in the suite's order; the gate first where a figure rests on a row of it that is not there."""
    ended = {r["provider"] for r in records.all() if r["kernel"] == "slice" and r.get("status") == "done"}
    wanted = {n for n in BY_NAME if n not in ended} if list(names) == ["next"] else set(names)
    if any(BY_NAME[n].gated for n in wanted) and "gate" not in ended:
        wanted.add("gate")
    return [s for s in SLICES if s.name in wanted]


def begin_compiling(
    arguments: argparse.Namespace, runner: Runner, slices: Sequence[Slice]
) -> tuple[object, Path | None]:
    """The process that compiles what the cache lacks while the first slices run, and the file that tells of its end."""
    names = [s.name for s in slices if s.kernels]
    if not names or arguments.rehearse:
        return None, None
    runner.say(precompile.unpack(arguments.carry, arguments.cache))
    done = Path(tempfile.mkdtemp(prefix="gpu-suite")) / "compiled"
    command = [sys.executable, "-m", "gpu_suite.precompile", *names, "--arch", arguments.arch]
    command += ["--jobs", str(arguments.jobs), "--done", str(done)]
    log = (arguments.out / "compile.txt").open("a")
    return subprocess.Popen(command, cwd=ROOT, env=runner.environment(), stdout=log, stderr=log), done


def measure(arguments: argparse.Namespace) -> int:
    """Run the chosen slices and print the table."""
    began = time.time()
    until = float("inf") if arguments.budget is None else began + arguments.budget
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    known = [] if arguments.rehearse else [RESULTS / NAME]
    known += [folder / NAME for folder in arguments.known]
    runner = Runner(
        arguments.out,
        known,
        until=until,
        rehearse=arguments.rehearse,
        retry_before=now if arguments.retry else "",
        cache=arguments.cache.resolve(),
    )
    gpu = gpu_name(arguments.rehearse)
    if gpu is None:
        print("no GPU here: nvidia-smi does not answer; --rehearse takes every step on a CPU", file=sys.stderr)
        return 2
    about = {"gpu": gpu, "key": code_key()}
    slices = chosen(arguments.slice, Records(arguments.out / NAME, about, known))
    budget = "no limit" if arguments.budget is None else f"{arguments.budget:.0f} s"
    runner.say(f"{gpu}, code {about['key']}, {budget}; slices: {' '.join(s.name for s in slices) or 'none is missing'}")
    compiling, done = begin_compiling(arguments, runner, slices)
    try:
        runner.run(slices, done)
    finally:
        if compiling is not None:
            compiling.terminate()
            compiling.wait()
            runner.say("\n".join((arguments.out / "compile.txt").read_text().splitlines()[-1:]))
    runner.say(f"{time.time() - began:.0f} s in all")
    print_table(Records(arguments.out / NAME, about, known).all())
    if arguments.rehearse:
        print("a rehearsal: these figures mean nothing")
    return 0


def build_cache(arguments: argparse.Namespace) -> int:
    """Compile the kernels of the chosen slices for another machine and pack them."""
    names = [
        s.name for s in SLICES if (s.kernels and arguments.slice in (["next"], [s.name])) or s.name in arguments.slice
    ]
    os.environ["TRITON_CACHE_DIR"] = str(arguments.cache.resolve())
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["PYTHONPATH"] = Runner(Path(tempfile.mkdtemp())).environment()["PYTHONPATH"]
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    failed = precompile.compile_all(names, arguments.arch, arguments.jobs)
    packed = precompile.pack(arguments.cache, arguments.build_cache)
    print(f"{packed}: {packed.stat().st_size / 2**20:.1f} MiB")
    return min(1, failed)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.build_cache is not None:
        return build_cache(arguments)
    if arguments.merge is not None:
        print(
            f"{merge([f / NAME for f in arguments.merge], arguments.out / NAME)} new records in {arguments.out / NAME}"
        )
        return 0
    if arguments.table:
        print_table([r for r in read(arguments.out / NAME) if r["key"] == code_key()])
        return 0
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
