"""benchmarks/gpu.py runs, continues where it stopped, refuses wrong results, and its goals read its own records."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import plot
from gpu_suite import attention
from gpu_suite.goals import goals

pytestmark = pytest.mark.usefixtures("one_thread")


def run(path, *parts):
    gpu.main([*parts, "--device", "cpu", "--tiny", "--results", str(path)])
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "records.jsonl"
    torch.set_num_threads(1)
    return path, run(path)


def test_every_part_leaves_complete_records(measured):
    _, records = measured
    kernels = {(r["kernel"], r["mode"]) for r in records}
    assert {k for k, _ in kernels} == {"copy", "matmul", "attention", "decode", "model"}
    assert {m for k, m in kernels if k == "model"} == {"prefill", "decode", "training step"}
    for record in records:
        assert 0 < record["p20"] <= record["p50"] <= record["p80"]
        assert {"provider", "metric", "shape", "gpu", "driver", "clocks_mhz", "versions", "commit", "time"} <= set(
            record
        )


def test_a_second_run_measures_nothing_again(measured, capsys):
    path, records = measured
    assert run(path) == records
    assert "attention" not in capsys.readouterr().out.replace("--", "").split("gate:")[0]


def test_goals_and_figures_come_from_the_records(measured, tmp_path):
    path, _ = measured
    shape = {"B": 8, "N": 2048, "H": 32, "Hkv": 8, "D": 128, "T": 0.05}
    times = {"sar-triton": 1.02, "plain-triton": 1.0, "sdpa-flash": 1.1, "sdpa-cudnn": 0.8, "sar-auto": 0.9}
    made = [
        {"kernel": "attention", "mode": "forward", "provider": p, "shape": shape, "p50": t} for p, t in times.items()
    ]
    found = {work: (round(ratio, 3), met) for work, _, ratio, _, met in goals(made)}
    assert found == {
        "forward, SAR on / off": (1.02, True),
        "forward, SAR on / FlashAttention-2": (0.927, True),
        "forward, auto / cuDNN": (1.125, False),
    }
    plot.main(["--results", str(path), "--out", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {"gpu_speed.png", "gpu_memory.png"}


def test_wrong_results_are_not_timed(tmp_path, monkeypatch):
    right = attention.sar_attn_func

    def slightly_wrong(*args, **kwargs):
        out, stats = right(*args, **kwargs)
        return out * 1.001, stats

    monkeypatch.setattr(attention, "sar_attn_func", slightly_wrong)
    with pytest.raises(SystemExit, match=r"wrong results, nothing is timed:\s+sar-composed D=64 N=97"):
        run(tmp_path / "r.jsonl", "ceilings")
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense", "--device", "cpu", "--tiny"], "unknown part 'nonsense'"),
        (["--device", "cpu"], "--device cpu needs --tiny"),
        (["--device", "cpu", "--tiny"], "--tiny needs --results FILE"),
    ],
)
def test_bad_input(words, message, capsys):
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert message in capsys.readouterr().err
