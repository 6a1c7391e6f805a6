"""The command itself, as it would run on a GPU: every slice on a CPU, then again, then what it prints and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import gpu
import plot
import pytest
from gpu_suite.records import NAME
from gpu_suite.slices import SLICES

from .conftest import BENCHMARKS

ROOT = BENCHMARKS.parent


def command(*arguments: str) -> subprocess.CompletedProcess:
    """As a user calls it, with no package on the path but what is installed."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = [sys.executable, "benchmarks/gpu.py", *arguments]
    return subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


@pytest.mark.slow  # every day what slices launch, in test_bench.py, and a worker that hangs, in test_runner.py
def test_every_slice_runs_and_a_second_run_measures_nothing(tmp_path):
    out = tmp_path / "out"
    first = command("--rehearse", "--out", str(out))
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-2000:]
    records = read(out)
    ended = {r["provider"]: r["status"] for r in records if r["kernel"] == "slice"}
    assert ended == {s.name: "done" for s in SLICES}
    assert not [r for r in records if "error" in r]
    assert {r["kernel"] for r in records} == {
        *("machine", "copy", "matmul", "attention", "launches", "gate", "decode", "model"),
        *("tests", "profile", "sanitize", "tiles", "slice"),
    }
    assert all(r["green"] for r in records if r["kernel"] == "gate")
    for r in records:
        assert {"provider", "mode", "shape", "gpu", "key", "driver", "versions", "commit", "time"} <= set(r)
        if "p50" in r:
            assert 0 < r["p20"] <= r["p50"] <= r["p80"]
    assert {m for r in records if r["kernel"] == "model" for m in [r["mode"]]} == {"prefill", "decode", "training step"}
    assert len([p for p in out.iterdir() if p.is_file()]) <= 8  # what a machine at hand for minutes may send back
    assert "forward, SAR on / off" in first.stdout.split("s in all")[1]

    again = command("--rehearse", "--out", str(out), "--slice", "next")
    assert "none is missing" in again.stdout
    named = command("--rehearse", "--out", str(out), "--slice", "short", "decode")
    assert named.returncode == 0
    new = read(out)[len(records) :]
    assert [(r["kernel"], r["provider"]) for r in new] == [("slice", "short"), ("slice", "decode")]
    plot.main(["--results", str(out / NAME), "--out", str(tmp_path)])
    assert {"gpu_speed.png", "gpu_memory.png"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.slow
def test_a_budget_ends_the_run_and_the_next_goes_on(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert command("--rehearse", "--out", str(first), "--slice", "machine", "short", "--budget", "4").returncode == 0
    there = (
        {r["provider"]: r["status"] for r in read(first) if r["kernel"] == "slice"} if (first / NAME).exists() else {}
    )
    assert there.get("short") != "done"
    answer = command("--rehearse", "--out", str(second), "--known", str(first), "--slice", "machine", "gate")
    assert answer.returncode == 0
    ended = {r["provider"]: r["status"] for r in read(second) if r["kernel"] == "slice"}
    assert ended == {"machine": "done", "gate": "done"}
    third = command("--rehearse", "--out", str(first), "--known", str(second), "--slice", "short")
    assert "slices: short" in third.stdout  # the gate that it rests on is known from the other folder
    assert read(first)[-1]["status"] == "done"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slice", "forwrad"], "--slice: got 'forwrad', need next or some of machine, ceilings,"),
        (["--slice", "next", "gate"], "--slice: got next gate, need next alone or names"),
        (["--rehearse"], "--rehearse needs --out FOLDER"),
        (["--budget", "0"], "--budget: got 0.0, need a number of seconds > 0"),
        (["--jobs", "0"], "--jobs: got 0, need 1 or more"),
        (["--known", "/no/such"], "no such folder: /no/such"),
    ],
)
def test_bad_input(words, message, capsys):
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "gpu_name", lambda rehearse: None)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no GPU here" in capsys.readouterr().err
