"""Workers that hang, die, lose their GPU or run out of time: what was tried is on record and the others go on."""

from __future__ import annotations

import json
import time

import pytest
from gpu_suite.records import NAME
from gpu_suite.run import Runner
from gpu_suite.slices import Slice

PIECES = """
import os, signal, time
from gpu_suite.bench import tell

def fine(bench):
    bench.measure("attention", "forward", {"D": 8}, {"theirs": lambda: (lambda: time.sleep(0.001))})

def endless(bench):
    for n in range(10_000):
        bench.measure("attention", "forward", {"N": n}, {"theirs": lambda: (lambda: time.sleep(0.05))})

def hangs(bench):
    bench.measure("attention", "forward", {"D": 9}, {"theirs": lambda: (lambda: time.sleep(600))})

def dies(bench):
    def make():
        os.kill(os.getpid(), signal.SIGSEGV)
    bench.measure("attention", "forward", {"D": 10}, {"theirs": make})
    bench.measure("attention", "forward", {"D": 11}, {"theirs": lambda: (lambda: None)})

def loses(bench):
    def lost():
        os.environ["GPU_SUITE_LOST"] = "1"
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    bench.measure("attention", "forward", {"D": 12}, {"a": lambda: (lambda: None), "b": lambda: lost})
    bench.measure("attention", "forward", {"D": 13}, {"a": lambda: (lambda: None)})

def faulty(bench):
    raise KeyError("a slice's own fault")

def at_start(bench):
    os._exit(3)
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "pieces.py").write_text(PIECES)

    def run(*pieces: tuple[str, int], seconds: float = 300, grace: float = 2.0) -> tuple[list[dict], dict[str, str]]:
        runner = Runner(tmp_path / "out", rehearse=True, path=[tmp_path], grace=grace, until=time.time() + seconds)
        runner.run([Slice(n, s, f"pieces:{n}", n, kernels=False, gated=False) for n, s in pieces])
        path = tmp_path / "out" / NAME
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return records, {r["provider"]: r["status"] for r in records if r["kernel"] == "slice"}

    return run


def errors(records: list[dict]) -> list[tuple[int, str]]:
    return [(r["shape"]["D"], r["error"]) for r in records if "error" in r]


def test_a_slice_that_hangs_is_killed_and_the_next_runs(run):
    records, ended = run(("hangs", 1), ("fine", 10))
    assert ended == {"hangs": "done", "fine": "done"}  # the second time without what hung
    assert next(r["status"] for r in records if r["kernel"] == "slice") == "did not end by itself and was killed"
    assert errors(records) == [(9, "while it was tried the run did not end by itself and was killed")]


@pytest.mark.slow
def test_a_slice_whose_process_dies_goes_on_behind_what_killed_it(run):
    records, ended = run(("dies", 20), ("fine", 10))
    assert ended == {"dies": "done", "fine": "done"}
    assert errors(records) == [(10, "while it was tried the run its process died with exit status -11")]
    assert [r["shape"]["D"] for r in records if "p50" in r] == [11, 8]


@pytest.mark.slow
def test_a_lost_gpu_takes_a_new_process(run):
    records, ended = run(("loses", 20))
    assert ended == {"loses": "done"}
    assert errors(records) == [(12, "RuntimeError: CUDA error: an illegal memory access was encountered")]
    measured = {(r["provider"], r["shape"]["D"]) for r in records if "p50" in r}
    assert ("a", 13) in measured


@pytest.mark.slow
def test_a_slice_ends_with_its_budget_and_goes_on_in_the_next_run(run):
    records, ended = run(("endless", 2), ("fine", 10))
    assert ended == {"endless": "out of time", "fine": "done"}
    before = {r["shape"]["N"] for r in records if "N" in r["shape"]}
    assert before
    records, _ = run(("endless", 2))
    after = [r["shape"]["N"] for r in records if "N" in r["shape"]]
    assert len(after) == len(set(after)) > len(before)  # nothing twice, and more than before


@pytest.mark.slow
def test_the_whole_runs_budget_holds(run):
    began = time.time()
    _, ended = run(("endless", 60), ("fine", 10), seconds=12)
    assert time.time() - began < 30
    assert ended.get("endless") == "out of time"
    assert "fine" not in ended


@pytest.mark.slow
def test_a_slices_own_fault_is_its_status(run):
    _, ended = run(("faulty", 5), ("at_start", 5), ("fine", 10))
    assert ended["faulty"] == 'error: KeyError: "a slice\'s own fault"'
    assert "exit status 3" in ended["at_start"]
    assert ended["fine"] == "done"
