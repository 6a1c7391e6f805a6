"""sar-fast paper: all stages on a fraction of the data, a report with every figure, and nothing done twice."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess

import pytest
import torch
from typer.testing import CliRunner

from sar_fast.cli import app
from sar_fast.cli.evaluate import benchmark, sweep
from sar_fast.cli.paper import commands
from sar_fast.lab import focus, probe
from sar_fast.lab.paper import Paper, run
from sar_fast.lab.paper import run as package_run
from sar_fast.lab.paper.report import findings
from sar_fast.lab.paper.stages import run_stage
from sar_fast.lab.run.threads import VARIABLES, one_thread_for

GROUPS = ("Base", "SFT", "SFT + SAR", "Control")


@pytest.mark.slow
def test_the_whole_paper_on_a_fraction_of_the_data(tmp_path, monkeypatch, capsys):
    paper = Paper(tmp_path, max_samples=8, epochs=0.1, swept_k=(0, 1, 4), swept_beta=(0.5,))
    page = run(paper, commands()).read_text()
    assert all(f"<h2>Figure {n}</h2>" in page for n in (3, 4, 5, 6))
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]+", "", page)  # self-contained
    for group in GROUPS:
        assert f"<th>{group}</th>" in page
    summary = json.loads((tmp_path / "paper.json").read_text())
    assert len(summary["stages"]) == 2 + len(GROUPS) * (6 + 2) + 1
    sar = next(s for s in summary["stages"] if s["title"] == "pope: SFT + SAR")
    assert "--use_sar --sar_activation_layer_k 2 --sar_beta 0.5" in sar["command"]
    assert "POPE&#39;s mean yes_ratio is no score" in page
    assert "Lower FI is better" in page
    capsys.readouterr()

    with monkeypatch.context() as nothing_runs:
        nothing_runs.setattr(subprocess, "run", None)
        for module in (benchmark, focus, probe, sweep):
            nothing_runs.setattr(module, "run", None)
        assert run(paper, commands()).read_text() == page
    assert json.loads((tmp_path / "paper.json").read_text()) == summary
    assert all(line.endswith(": kept") for line in capsys.readouterr().err.splitlines())

    run(dataclasses.replace(paper, k=3), commands())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("-- ")]
    again = [line for line in said if "again, other --k or --beta" in line]
    assert len(again) == 8
    assert all("SFT + SAR" in line for line in again)
    assert sum(line.endswith(": kept") for line in said) == len(said) - 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "0"], "--k must be 1 to 4, as many layers as the miniature has; got 0"),
        (["--k", "5"], "--k must be 1 to 4"),
        (["--beta", "0"], "--beta must be > 0"),
        (["--beta", "nan"], "--beta must be > 0"),
        (["--max_samples", "3"], "--max_samples must be at least 4: the probe needs two pictures"),
        (["--epochs", "0"], "--epochs must be more than 0; got 0.0"),
        (["--epochs", "-1"], "--epochs must be more than 0; got -1.0"),
        (["--epochs", "inf"], "--epochs must be more than 0; got inf"),
    ],
)
def test_options_are_checked_before_anything_runs(tmp_path, flags, message):
    found = CliRunner().invoke(app, ["paper", "--output_dir", str(tmp_path / "out"), *flags])
    assert found.exit_code == 2
    assert f"error: {message}" in found.output
    assert not (tmp_path / "out").exists()


class TestStage:
    """One stage alone: what it did is counted, its folder holds a file a run."""

    @pytest.fixture
    def stage(self, tmp_path):
        def run(depends, fail=False):
            def call():
                (tmp_path / "work").mkdir(exist_ok=True)
                (tmp_path / "work" / f"{len(list((tmp_path / 'work').iterdir()))}.txt").touch()
                if fail:
                    raise KeyboardInterrupt
                return {"value": depends["--k"], "files": len(list((tmp_path / "work").iterdir()))}

            return run_stage(tmp_path, "One: it", "python it", tmp_path / "work", depends, ["0.txt"], call)

        return run

    def test_what_is_finished_is_kept_and_what_changed_is_done_again(self, stage, capsys):
        first = stage({"--k": 2, "weights": "a"})
        assert stage({"--k": 2, "weights": "a"}) == first
        assert stage({"--k": 3, "weights": "a"}).results == {"value": 3, "files": 1}  # in an emptied folder
        assert capsys.readouterr().err.splitlines() == [
            "-- One: it",
            "-- One: it: kept",
            "-- One: it: again, other --k",
        ]

    def test_what_was_interrupted_goes_on_and_its_time_counts(self, stage, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            stage({"--k": 2}, fail=True)
        spent = json.loads((tmp_path / "stages" / "one_it.json").read_text())["seconds"]
        found = stage({"--k": 2})
        assert found.results["files"] == 2
        assert found.seconds > spent > 0
        with pytest.raises(KeyboardInterrupt):
            stage({"--k": 4}, fail=True)
        assert stage({"--k": 3}).results == {"value": 3, "files": 1}

    def test_a_lost_product_is_made_again(self, stage, tmp_path):
        stage({"--k": 2})
        (tmp_path / "work" / "0.txt").unlink()
        stage({"--k": 2})
        assert (tmp_path / "work" / "0.txt").is_file()

    def test_files_of_someone_else_are_left_alone(self, stage, tmp_path):
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "mine.txt").touch()
        with pytest.raises(
            ValueError,
            match=r"output_dir must be another folder; got .*work, which holds files that this command did not make",
        ):
            stage({"--k": 2})
        assert (tmp_path / "work" / "mine.txt").is_file()


def test_the_miniature_takes_one_thread_unless_the_environment_says_otherwise(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread_for("miniature"):
            assert torch.get_num_threads() == 1
            assert os.environ["OMP_NUM_THREADS"] == "1"  # for the processes that it starts
        assert torch.get_num_threads() == 2
        assert "OMP_NUM_THREADS" not in os.environ
        with one_thread_for("some/model"):
            assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with one_thread_for("miniature"):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def stages(with_sar: float, sfs: float) -> dict:
    """Stages of made-up results: every benchmark scores 50, but with SAR."""
    from sar_fast.lab.paper.settings import TASKS

    made = {}
    for group in GROUPS:
        value = with_sar if group == "SFT + SAR" else 50.0
        made |= {f"{task}: {group}": {"results": {"main": value}} for task in TASKS}
        focus = {
            "semantic_focus_score": sfs if group == "SFT + SAR" else 0.3,
            "semantic_focus_score_ci95": [0.25, 0.35],
        }
        made[f"SFS and FI: {group}"] = {"results": focus}
    return made


@pytest.mark.parametrize(
    ("with_sar", "sfs", "said"),
    [
        (52.0, 0.4, ("raises", "beyond")),
        (48.0, 0.3, ("lowers", "within")),
        (50.01, 0.2, ("does not change", "beyond")),
    ],
)
def test_findings_say_what_came_out_for_and_against(tmp_path, with_sar, sfs, said):
    first, _, last = findings(Paper(tmp_path), stages(with_sar, sfs))
    assert said[0] in first
    assert said[1] in last


def test_outside_a_checkout_it_says_so(tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules[package_run.__module__], "EXPERIMENTS", tmp_path / "experiments")
    with pytest.raises(FileNotFoundError, match="runs from a checkout of the repository"):
        run(Paper(tmp_path), commands())
