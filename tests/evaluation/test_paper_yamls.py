"""The paper's YAMLs of sections 6.2 and 6.3: those at full scale parse, those in miniature run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sar_fast.cli.evaluate import benchmark
from sar_fast.cli.evaluate.arguments import parse
from sar_fast.lab.benchmark.tasks import find_task

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "experiments" / "sar_paper").glob("eval_*.yaml"))
SAR = ["--use_sar", "--sar_activation_layer_k", "2", "--sar_beta", "0.5"]


def test_there_are_three_and_their_miniatures():
    names = {f.stem for f in YAMLS}
    full = {"eval_sec6.2_main_llava", "eval_sec6.2_main_qwen", "eval_sec6.3_ablation_k"}
    assert names == full | {f"{name}_mini" for name in full}


@pytest.mark.parametrize("path", YAMLS, ids=lambda f: f.stem)
def test_flags_after_a_file_make_it_a_run_with_sar(path):
    plain, sar = parse([str(path)]), parse([str(path), *SAR, "--output_dir", "elsewhere"])
    assert find_task(plain.task)
    assert not plain.use_sar
    assert (sar.use_sar, sar.sar_activation_layer_k, sar.output_dir) == (True, 2, "elsewhere")


@pytest.mark.parametrize("path", [f for f in YAMLS if f.stem.endswith("_mini")], ids=lambda f: f.stem)
def test_miniatures_run_from_the_repository_root(path, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(ROOT)
    benchmark.run(parse([str(path), *SAR, "--output_dir", str(tmp_path), "--max_samples", "16"]))
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["num_samples_evaluated"] == 16
    assert results["overall"]["accuracy"] > 50
