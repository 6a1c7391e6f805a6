"""Slices that are other programs: the tests, the tuner's shortlist, ncu and compute-sanitizer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from gpu_suite.bench import Bench, OutOfTime
from gpu_suite.keys import ROOT
from gpu_suite.slices import SHORTLIST

PROFILED = {"forward": "forward_kernel", "dkdv": "dkdv_kernel", "decode": "decode_split_kernel"}
SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "ComputeWorkloadAnalysis")


def _run(bench: Bench, command: Sequence[str], log: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """(exit status, output) of a command, which is appended to a log in the results; it ends with the slice.

    It runs in a process group of its own, all of which is ended at the deadline: `OutOfTime`.
    """
    print("$", " ".join(command), flush=True)
    path, timed_out = bench.out / log, False
    with path.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        began = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=file, stderr=file, start_new_session=True
        )
        try:
            process.wait(max(1.0, bench.left()))
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output = path.read_bytes()[began:].decode(errors="replace")
    if timed_out:
        print("\n".join(output.splitlines()[-5:]), flush=True)
        raise OutOfTime
    return process.returncode, output


def _tests(bench: Bench, name: str, processes: int, arguments: list[str]) -> None:
    """pytest, in parallel; the record names what failed."""
    report = Path(tempfile.mkdtemp(prefix="gpu-suite")) / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(processes), *arguments]
    known = bench.records.find("tests", "pytest", {}, name)
    if known is not None and known.get("failed") == 0:  # what failed is run again: a test may have been mended
        return
    bench.trying("tests", "pytest", {}, [name])
    status, output = _run(bench, [*command, f"--junitxml={report}"], "commands.log")
    if not report.is_file():
        bench.records.fail("tests", name, "pytest", {}, f"exit status {status}: {output[-1500:]}")
        return
    cases = ElementTree.parse(report).getroot().iter("testcase")
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in cases:
        bad = [c for c in case if c.tag in ("failure", "error")]
        kind = "failed" if bad else "skipped" if any(c.tag == "skipped" for c in case) else "passed"
        counts[kind] += 1
        if bad:
            failures.append(f"{case.get('classname')}::{case.get('name')}: {(bad[0].get('message') or '')[:300]}")
    bench.records.note("tests", name, "pytest", {}, status=status, **counts, failures=failures)


def tests_gpu(bench: Bench) -> None:
    """What only a GPU can show."""
    tiny = ["tests/kernels/test_gpu.py", "--collect-only"] if bench.tiny else ["tests/kernels"]
    _tests(bench, "gpu", 1 if bench.tiny else 6, [*tiny, "-m", "gpu"])


def tests(bench: Bench) -> None:
    """The interpreter's cases, compiled; without the ahead-of-time budgets, which need no GPU."""
    if bench.tiny:
        return _tests(bench, "everyday", 1, ["tests/kernels/test_configs.py", "-k", "small_pages"])
    left_out = [f"--ignore=tests/kernels/{name}.py" for name in ("test_aot", "test_offsets", "test_tune")]
    return _tests(bench, "everyday", 10, ["tests/kernels", "-m", "not slow and not gpu", *left_out])


def tiles(bench: Bench) -> None:
    """The tuner over the shortlist; what it found is ``tuned.json`` among the results, for a person to take over."""
    found = bench.out / "tuned.json"
    command = ["-m", "sar_kernels.tools.tune", "--shortlist", str(SHORTLIST), "--out", str(found)]
    if bench.tiny:
        status, output = _run(
            bench, bench.device.command([], ["-m", "sar_kernels.tools.tune", "--help"]), "commands.log"
        )
    else:
        seconds = ["--seconds", str(int(bench.left() - 3)), "--milliseconds", "20"]
        status, output = _run(bench, bench.device.command([], [*command, *seconds]), "commands.log")
    lines = [line for line in output.splitlines() if line.strip()]
    print("\n".join(lines[-3:]), flush=True)
    if status != 0:
        bench.records.fail("tiles", "tuner", "shortlist", {}, f"exit status {status}: {output[-1500:]}")
    else:
        bench.records.note("tiles", "tuner", "shortlist", {}, summary=lines[-1] if lines else "")


def profile(bench: Bench) -> None:
    """ncu on one launch of each of the kernels that matter most; its pages are ``profile.txt`` among the results."""
    for case, kernel in PROFILED.items():
        if not bench.missing("profile", "ncu", {}, [case]):
            continue
        bench.check_time()
        bench.trying("profile", "ncu", {}, [case])
        sections = [word for section in SECTIONS for word in ("--section", section)]
        tool = ["ncu", "--clock-control", "none", "-c", "1", "-k", kernel, *sections]
        status, output = _case(bench, tool, case, "profile.txt")
        if status != 0:
            bench.records.fail("profile", case, "ncu", {}, f"exit status {status}: {output[-800:]}")
            continue
        bench.records.note("profile", case, "ncu", {}, measured=ncu_rows(output))


def ncu_rows(page: str) -> dict[str, str]:
    """{"Duration [us]": "123.4", ...} of ncu's details page: a name, perhaps a unit, and a number a line."""
    rows = re.findall(r"^ {2,}([A-Z][^\n]*?) {2,}(?:(\S+) +)?([\d.,]+)\s*$", page, flags=re.M)
    return {f"{name} [{unit}]" if unit else name: value for name, unit, value in rows}


def sanitize(bench: Bench) -> None:
    """memcheck on small calls of every kernel, racecheck after it; each tensor its own allocation, so overruns show."""
    for tool in ("memcheck", "racecheck"):
        if not bench.missing("sanitize", tool, {}, ["small"]):
            continue
        bench.check_time()
        bench.trying("sanitize", tool, {}, ["small"])
        program = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        status, output = _case(bench, program, "small", "sanitize.txt", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        if status != 0:
            bench.records.fail("sanitize", "small", tool, {}, f"exit status {status}: {output[-1500:]}")
        else:
            bench.records.note("sanitize", "small", tool, {}, clean=True)


def _case(bench: Bench, tool: list[str], case: str, log: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """A program of `gpu_suite.cases` under a tool; a tool that is not there is its exit status, 127."""
    arguments = ["-m", "gpu_suite.cases", case, *(["--tiny"] if bench.tiny else [])]
    try:
        return _run(bench, bench.device.command(tool, arguments), log, env)
    except FileNotFoundError as error:
        return 127, str(error)
